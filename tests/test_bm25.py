"""tools/bm25.py against bm25s, Anserini's figure on SciFact, and Porter's own examples."""
import json

import numpy as np
import pytest

from conftest import TEXTS
from tools.bm25 import analyze, build, search, stem
from tools.explain import explain


def test_bm25_is_lucenes(tmp_path, corpus):
    bm25s = pytest.importorskip("bm25s")
    texts = [json.loads(line)["text"] for line in open(corpus / "corpus.jsonl")]
    peer = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    peer.index([analyze(t, False) for t in texts], show_progress=False)
    query = "the dog and the season of 12 dense vectors zebra dog"
    wanted = peer.get_scores([w for w in analyze(query, False) if w in peer.vocab_dict])
    found = search(build(corpus, tmp_path / "ix", k1=1.2, b=0.75), {"q": query}, k=1000)["q"]
    assert len(found) == (wanted > 0).sum()
    assert all(abs(wanted[int(docid[1:]) // 3] - score) < 1e-4 for docid, score in found.items())
    e = explain(tmp_path / "ix", query, "p0")
    assert abs(e["score"] - wanted[0]) < 1e-4 and {s["passage_token"] for s in e["shared"]} <= {"dog", "0"}


def test_bm25_on_scifact_is_anserinis(tmp_path, shared):
    from evaluate import evaluate, read_qrels
    from data import read_queries
    qrels, queries = read_qrels(shared / "data/scifact/qrels/test.tsv"), read_queries(shared / "data/scifact")
    folder = build(shared / "data/scifact", tmp_path / "ix", stemming=True)
    found = search(folder, {qid: queries[qid] for qid in qrels}, k=10)
    assert abs(np.mean(list(evaluate(qrels, found, ["ndcg@10"])["ndcg@10"].values())) - 0.679) < 0.005


def test_marks_belong_to_their_letters(tmp_path):
    """As strings: "हिन्दी" is three letters and three marks; an accent is a mark, or part of its letter."""
    assert analyze("हिन्दी foo_bar", False) == ["हिन्दी", "foo", "bar"]
    assert analyze("ที่นี่ 12", False) == ["ที่นี่", "12"]
    for resume in ("re\u0301sume\u0301", "r\u00e9sum\u00e9"):
        assert analyze(resume, False) == ["r\u00e9sum\u00e9"]
    # A mark alone is no word.
    assert analyze("\u0301 a1 -\u0301-", False) == ["a1"]
    (tmp_path / "c.tsv").write_text("d0\tहद नद हन द\nd1\tहिन्दी भाषा\n")
    folder = build(tmp_path / "c.tsv", tmp_path / "ix")
    assert list(search(folder, {"q": "हिन्दी"})["q"]) == ["d1"]
    shared = explain(folder, "हिन्दी")["shared"]
    assert [(s["term"], s["passage_token"]) for s in shared] == [("हिन्दी", "हिन्दी")]


def test_origins_cut_as_analyze_does(tmp_path):
    """A sigma at a word's end is lower-cased by what stands around it; İ becomes two characters."""
    texts = ["Ο.Σ. τρένα", "İstanbul Treni", "The Re\u0301sume\u0301"]
    (tmp_path / "c.tsv").write_text("".join(f"d{i}\t{text}\n" for i, text in enumerate(texts)))
    folder = build(tmp_path / "c.tsv", tmp_path / "ix")
    for query, docid, token in (("τρένα", "d0", "τρένα"), ("treni", "d1", "treni"),
                                ("r\u00e9sum\u00e9", "d2", "R\u00e9sum\u00e9")):
        e = explain(folder, query)
        assert e["docid"] == docid and [s["passage_token"] for s in e["shared"]] == [token]


def test_stem_is_porters():
    """Porter's own examples, one a rule; on SciFact's 30,000 words it agrees with snowballstemmer's `porter`
    wherever that is installed."""
    wanted = {"caresses": "caress", "ponies": "poni", "caress": "caress", "cats": "cat", "feed": "feed",
              "agreed": "agre", "plastered": "plaster", "bled": "bled", "motoring": "motor", "sing": "sing",
              "conflated": "conflat", "troubled": "troubl", "sized": "size", "hopping": "hop",
              "falling": "fall", "hissing": "hiss", "failing": "fail", "filing": "file", "happy": "happi",
              "sky": "sky", "relational": "relat", "conditional": "condit", "rational": "ration",
              "valenci": "valenc", "digitizer": "digit", "operator": "oper", "triplicate": "triplic",
              "hopefulness": "hope", "revival": "reviv", "adoption": "adopt", "replacement": "replac",
              "probate": "probat", "rate": "rate", "cease": "ceas", "controll": "control", "roll": "roll",
              "generalizations": "gener"}
    assert {w: stem(w) for w in wanted} == wanted
    porter = pytest.importorskip("snowballstemmer").stemmer("porter")
    words = {w for text in TEXTS for w in text.split() if w.isalpha()} | set(wanted)
    assert {w: stem(w) for w in words if len(w) > 2} == {w: porter.stemWord(w) for w in words if len(w) > 2}
