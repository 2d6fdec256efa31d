"""tools/explain.py: what it says adds up to the score that search gives."""
import json
import shutil

import pytest
import torch

from index import build, search
from tools import bm25
from tools.explain import as_html, explain, main


def test_explain_adds_up(tmp_path, built, capsys):
    found = search(built / "sparse", {"q": "the cat sat"}, k=1000)["q"]
    for docid in (None, list(found)[-1]):
        e = explain(built / "sparse", "the cat sat", docid)
        docid = docid or next(iter(found))
        assert e["docid"] == docid and abs(e["score"] - found[docid]) < 1e-4
        assert abs(sum(s["share"] for s in e["shared"]) - 1) < 1e-6
        assert abs(sum(h for _, h in e["passage_pieces"]) - 1) < 1e-6
        assert [hit["docid"] for hit in e["hits"]] == list(found)[:3]
        # What the short way says of a hit is what the long way says of that passage.
        for hit in e["hits"]:
            long_way = explain(built / "sparse", "the cat sat", hit["docid"])
            alone = {s["term"]: s["share"] for s in long_way["shared"]}
            assert dict(hit["terms"]) == pytest.approx(alone, abs=1e-5)
    main(["--index", str(built / "sparse"), "--query", "the <b>cat</b> sat", "--html",
          str(tmp_path / "e.html")])
    page = (tmp_path / "e.html").read_text()
    assert "&lt;" in page and "<b>cat" not in page and "http" not in page and "<script" not in page
    best = next(iter(search(built / "sparse", {"q": "the <b>cat</b> sat"}, k=1)["q"].items()))
    out = capsys.readouterr().out
    assert f"passage  {best[0]}" in out and f"score    {best[1]:.4f} = the sum" in out
    with pytest.raises(SystemExit, match="is dense"):
        main(["--index", str(built / "dense"), "--query", "x"])


@pytest.mark.parametrize("kind", ["model", "bm25"])
def test_another_text_is_not_explained(tmp_path, tiny_model, kind):
    file = tmp_path / "c" / "collection.tsv"
    file.parent.mkdir()
    file.write_text("d0\tthe cat sat\nd1\ta dog runs\n")
    if kind == "bm25":
        bm25.build(file.parent, tmp_path / "ix")
    else:
        build(str(tiny_model), file.parent, tmp_path / "ix", head="sparse", device="cpu")
    # What else is put into the folder is no passage.
    (file.parent / "train.jsonl").write_text("{}")
    assert explain(tmp_path / "ix", "the cat", "d0")["score"] > 0
    shutil.copytree(file.parent, tmp_path / "copy")
    file.write_text("d0\thurricane season\nd1\ta dog runs\n")
    with pytest.raises(ValueError, match="is not what .* was built from: build the index again"):
        explain(tmp_path / "ix", "the cat", "d0")
    assert explain(tmp_path / "ix", "the cat", "d0", tmp_path / "copy")["score"] > 0
    # An index of before has no fingerprint: what is not in the text has no source, and that is all.
    manifest = json.loads((tmp_path / "ix/manifest.json").read_text())
    del manifest["state of the corpus"]
    (tmp_path / "ix/manifest.json").write_text(json.dumps(manifest))
    e = explain(tmp_path / "ix", "the cat", "d0")
    assert e["text"] == "hurricane season"
    assert kind == "model" or {s["passage_token"] for s in e["shared"]} == {""}


def test_an_index_without_postings(tmp_path):
    (tmp_path / "c.tsv").write_text("d0\t!\nd1\t?\n")
    e = explain(bm25.build(tmp_path / "c.tsv", tmp_path / "ix"), "the cat", "d1")
    assert (e["docid"], e["score"], e["shared"]) == ("d1", 0, []) and as_html(e)


def test_explain_names_the_token_of_the_maximum(built, tiny_model):
    from model import Retriever
    e = explain(built / "sparse", "hurricane season in jamaica", "p12")
    r = Retriever.load(tiny_model, head="sparse")
    ids, mask = r.pad(r.tokenize(["hurricane season in jamaica"], "query"))
    # The whole (L, V), which explain never makes.
    logits = r.llama(input_ids=ids, attention_mask=mask).logits[0].detach()
    names = json.loads((built / "sparse" / "vocab.json").read_text())
    tokens = [r.tokenizer.decode([i]) for i in ids[0].tolist()]
    for s in e["shared"]:
        term = next(t for t, name in enumerate(names) if name.replace("Ġ", "␣") == s["term"])
        assert s["query_token"] == tokens[int(logits[:, term].argmax())]
        assert abs(s["query"] - float(torch.log1p(torch.relu(logits[:, term].max() * 32 ** -0.25)))) < 1e-4
