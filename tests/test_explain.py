"""tools/explain.py: what it says adds up to the score that search gives."""
import json

import pytest
import torch

from index import search
from tools.explain import explain, main


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
