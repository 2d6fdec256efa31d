"""tools/hub.py: what it writes, opened by the libraries that it is for."""
import json
import os
import re

import pytest
import torch
import yaml
from conftest import ROOT, TEXTS, run
from test_model import edit_json, with_lora

import model
from model import Retriever
from tools.hub import main, publish


# Each setting another than the paper's.
POLICY = {"add_bos": False, "add_eos": True, "query_prefix": "query: ", "passage_prefix": "passage: ",
          "query_length": 9, "padding_side": "right"}


@pytest.mark.parametrize("policy", [{}, POLICY])
@pytest.mark.parametrize("head,calibrated", [("sparse", False), ("sparse", True), ("dense", False)])
def test_opens_in_sentence_transformers(tiny_model, tmp_path, head, policy, calibrated):
    from sentence_transformers import SentenceTransformer, SparseEncoder

    r = Retriever.load(tiny_model, head=head)
    r.settings.update(policy)
    if calibrated:
        r.calibrate(TEXTS, 0.4)
    r.save(tmp_path)
    publish(tmp_path)
    theirs = (SparseEncoder if head == "sparse" else SentenceTransformer)(str(tmp_path), device="cpu")
    r = Retriever.load(tmp_path)
    # The last text is longer than any length: both have to cut it in the same place.
    texts = [*TEXTS, "the " * 300]
    for kind, encode in (("query", theirs.encode_query), ("passage", theirs.encode_document)):
        got = encode(texts, convert_to_tensor=True)
        torch.testing.assert_close(got.to_dense() if got.is_sparse else got, r.encode(texts, kind).to_dense(),
                                   rtol=1e-4, atol=1e-5)
    assert theirs.similarity_fn_name == "dot"


def code_of(card, word):
    """The card's Python block that holds `word`."""
    [block] = [b for b in re.findall(r"```python\n(.*?)```", card, re.S) if word in b]
    return block


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


def run_block(block, folder):
    """Run a block of the card in its folder, as its reader would; the names that it leaves."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        exec(block, names := {})
    finally:
        os.chdir(before)
    return names


@pytest.fixture
def finished(tiny_model, tmp_path):
    """A run's folder as train.py leaves it: an adapter, its arguments, its summary."""
    folder = tmp_path / "run"
    with_lora(tiny_model).save(folder)
    arguments = {"model": str(tiny_model), "objective": "cl+kd", "lr": 1e-4, "resume": False, "epochs": None,
                 "lora_rank": 0, "query_prefix": "find: "}
    (folder / "args.json").write_text(json.dumps({"arguments": arguments}))
    (folder / "summary.json").write_text(json.dumps({"steps": 10, "best_mrr@10": 0.51239}))
    return folder


def test_the_card_of_an_adapter(finished, tiny_model):
    publish(finished, datasets=["ms_marco"])
    card = (finished / "README.md").read_text()
    front = front_of(card)
    assert (front["library_name"] == "peft" and front["datasets"] == ["ms_marco"]
            and "sparse-encoder" in front["tags"])
    # The base is a folder of this machine, which is no name on the hub.
    assert "base_model" not in front
    assert "--objective cl+kd --lr 0.0001" in card and "0.5124" in card and "resume" not in card
    assert "--lora_rank 0 --query_prefix 'find: '" in card
    theirs = run_block(code_of(card, "peft"), finished)["model"].eval()
    r = Retriever.load(finished)
    ids, mask = r.pad(r.tokenize(TEXTS, "query"))
    wrapped = Retriever(theirs.base_model.model, r.tokenizer, {"head": "sparse"})
    torch.testing.assert_close(wrapped(ids, mask), r(ids, mask), rtol=1e-5, atol=1e-5)
    assert not (finished / "modules.json").exists()
    run_block(code_of(card, "r.rank"), finished)


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_the_card_of_a_whole_model(tiny_model, tmp_path, head, capsys):
    r = with_lora(tiny_model, head)
    r.save(tmp_path / "run")
    main([str(tmp_path / "run"), "--merge", "--out", str(tmp_path / "hub")])
    assert "sentence-transformers" in capsys.readouterr().out
    card = (tmp_path / "hub/README.md").read_text()
    assert front_of(card)["library_name"] == "sentence-transformers"
    names = run_block(code_of(card, "sentence_transformers"), tmp_path / "hub")
    q = r.encode(["how do tides work"], "query").to_dense()
    torch.testing.assert_close(torch.as_tensor(names["q"]).to_dense(), q, rtol=1e-4, atol=1e-4)
    ranked = run_block(code_of(card, "r.rank"), tmp_path / "hub")["r"].rank("how do tides work", TEXTS)
    assert [place for place, _ in ranked] == [place for place, _ in r.rank("how do tides work", TEXTS)]


def test_a_base_on_the_hub_is_named(tiny_model, tmp_path):
    r = Retriever.load(tiny_model, head="dense")
    r.save(tmp_path)
    arguments = {"arguments": {"model": "meta-llama/Llama-3.2-1B"}}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    (tmp_path / "summary.json").write_text("{}")
    publish(tmp_path)
    assert front_of((tmp_path / "README.md").read_text())["base_model"] == "meta-llama/Llama-3.2-1B"


def test_a_head_of_ones_own_has_a_card_and_no_modules(tiny_model, tmp_path, monkeypatch):
    last = model.HEADS["dense"]._replace(exports_to=None)
    monkeypatch.setitem(model.HEADS, "last", last)
    Retriever.load(tiny_model, head="last").save(tmp_path)
    publish(tmp_path)
    assert not (tmp_path / "modules.json").exists() and "sentence" not in (tmp_path / "README.md").read_text()


def test_the_command_line(finished, tmp_path):
    assert "README.md" in run("-m", "tools.hub", finished).stdout
    done = run("-m", "tools.hub", finished, "--merge", check=False)
    assert done.returncode == 1 and "give --out" in done.stderr and "Traceback" not in done.stderr
    done = run("-m", "tools.hub", finished, "--merge", "--out", finished, check=False)
    assert done.returncode == 1 and "holds an adapter" in done.stderr and "Traceback" not in done.stderr
    (finished / "summary.json").unlink()
    done = run("-m", "tools.hub", finished, check=False)
    assert done.returncode == 1 and "not finished" in done.stderr and "--resume" in done.stderr
