"""tools/convert.py on lines as their publishers write them, read back by TrainingRows."""
import gzip
import itertools
import json
import os
import pickle

import numpy as np
import pytest

from conftest import run
from data import Corpus, TrainingRows
from tools import convert

# The first lines of the authors', Tevatron's, sentence-transformers', MS MARCO's and ColBERT's files, with
# shorter texts.
AUTHORS = {"question": "what is a cat", "pos_pid": "8", "neg_pids": ["3", "4"], "pos_score": 9,
           "neg_scores": [2, -1.5]}
TEVATRON = {
    "query_id": "1185869", "query": ")what was the immediate impact of the success of the manhattan project?",
    "positive_passages": [{"docid": "0", "title": "Introduction", "text": "The presence of communication"}],
    "negative_passages": [{"docid": "2942565", "title": "", "text": "Robert Wilson"},
                          {"docid": "9", "text": "x"}]}
TEVATRON_IDS = {"query_id": "q7", "query_text": "query 7", "query_image": None,
                "positive_document_ids": ["7", "8"], "negative_document_ids": ["3"]}
TEXTS = {"anchor": "what is a cat", "positive": "an animal", "negative": "Paris"}
NUMBERED = {"query": "what is a cat", "positive": "an animal",
            **{f"negative_{i}": f"no {i}" for i in range(1, 12)}}
HARD = {"qid": 7, "pos": [8], "neg": {"bm25": [3, 4], "msmarco-distilbert": [4, 5]}}
CE_SCORES = {
    "qid": 7, "pos": [{"pid": 8, "ce-score": 10.5}],
    "neg": {"bm25": [{"pid": 3, "ce-score": -1.25, "bm25-score": 22.0}, {"pid": 4, "ce-score": 2.0}],
            "msmarco-distilbert": [{"pid": 3, "ce-score": -1.25}]}}

SAMPLES = [  # format, line, (query, positives, negatives, scores)
    ("authors", json.dumps(AUTHORS), ("what is a cat", ["8"], ["3", "4"], [9, 2, -1.5])),
    ("authors", '{"qid": "7", "pos_pid": "8", "neg_pids": ["3"]}', ("seven", ["8"], ["3"], None)),
    ("authors-kd", '{"query": "a cat", "docids": ["8", "3"], "scores": [9, 2.5]}',
     ("a cat", ["8"], ["3"], [9, 2.5])),
    ("margin-mse", "9.5\t-2\t7\t8\t3\r", ("seven", ["8"], ["3"], [9.5, -2])),
    ("tevatron", json.dumps(TEVATRON),
     (TEVATRON["query"], ["Introduction The presence of communication"], ["Robert Wilson", "x"], None)),
    ("tevatron-ids", json.dumps(TEVATRON_IDS), ("query 7", ["7", "8"], ["3"], None)),
    ("triplets", json.dumps(TEXTS), ("what is a cat", ["an animal"], ["Paris"], None)),
    ("triplets", json.dumps(NUMBERED),
     ("what is a cat", ["an animal"], [f"no {i}" for i in range(1, 12)], None)),
    ("triplets", '{"query": 7, "positive": 8, "negative": 3}', ("seven", ["8"], ["3"], None)),
    ("hard-negatives", json.dumps(HARD), ("seven", ["8"], ["3", "4", "5"], None)),
    ("ce-scores", json.dumps(CE_SCORES), ("seven", ["8"], ["3", "4"], [10.5, -1.25, 2.0])),
    ("nway", "[7, [8, 9.5], [3, -1], [4, 0.5]]", ("seven", ["8"], ["3", "4"], [9.5, -1.0, 0.5])),
    ("nway", "[7, 8, 3]", ("seven", ["8"], ["3"], None)),
    ("id-triples", "7\t8\t3", ("seven", ["8"], ["3"], None)),
    ("id-triples", "7 8 3", ("seven", ["8"], ["3"], None)),
    ("text-triples", "is a little caffeine ok\tWe don't know\tIt is generally safe",
     ("is a little caffeine ok", ["We don't know"], ["It is generally safe"], None)),
    ("text-triples", "capital of france\tParis\tLondon", ("capital of france", ["Paris"], ["London"], None)),
]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "collection.tsv").write_text("".join(f"{i}\tpassage {i}\n" for i in range(10)))
    return Corpus(tmp_path / "collection.tsv")


@pytest.mark.parametrize("name, line, want", SAMPLES)
def test_every_format(tmp_path, corpus, name, line, want):
    for file, blob in ("in", f"{line}\n{line}".encode()), ("in.gz", gzip.compress(f"{line}\n".encode())):
        (tmp_path / file).write_bytes(blob)
        convert.main([str(tmp_path / file), "--format", name, "--out", str(tmp_path / "rows.jsonl")])
        rows = TrainingRows(tmp_path / "rows.jsonl", corpus, {"7": "seven"})
        assert len(rows) == 1 + (file == "in") and "left out" not in rows.report
        row = rows[0]
        pos, neg = row.pos, row.neg
        if not row.inline:
            pos, neg = list(map(corpus.docid, pos)), list(map(corpus.docid, neg))
        assert (row.query, pos, neg, row.scores) == want


@pytest.mark.parametrize("name, line, says", [
    ("tevatron", '{"query": "a", "positive_passages": []}',
     "has no 'negative_passages'; expected .*query_id"),
    ("tevatron", '{"query": "a", "positive_passages": [3], "negative_passages": []}',
     "expected .*positive_passages"),
    ("triplets", '{"anchor": "a", "negative": "b"}', "has no 'positive'"),
    ("id-triples", "7\t8", "expected 3 columns between tabs, got 2"),
    ("text-triples", "a\tb\tc\td", "expected 3 columns between tabs, got 4"),
    ("nway", '{"qid": "q1", "pos": ["d1"]}', "is no list; expected .qid, .pid, score"),
    ("nway", '[7, [8, "x"], [3, 1]]', "could not convert string to float: 'x'; expected .qid"),
    ("margin-mse", "1\t2\tq1\tp1", "expected 5 columns between tabs, got 4"),
    ("authors", '{"question": "a", "pos_pid": "8", "neg_pids": ["3"], "pos_score": 1, "neg_scores": []}',
     'under "neg_scores"'),
    ("hard-negatives", '{"qid": 7, "pos": [8], "neg": [3]}', "expected .*bm25"),
])
def test_faults_name_their_line(tmp_path, name, line, says):
    good = next(sample for form, sample, _ in SAMPLES if form == name)
    (tmp_path / "in").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"in:3: .*{says}"):
        convert.convert_rows(tmp_path / "in", tmp_path / "out", convert.FORMATS[name])
    assert not (tmp_path / "out").exists()


def test_what_nobody_judged_is_left_out(tmp_path, capsys):
    """sentence-transformers' file of hard negatives begins with the judged queries, and most are not."""
    bare = {"qid": 5, "pos": [], "neg": {"bm25": [3, 4]}}
    path = tmp_path / "in"
    path.write_text(f"{json.dumps(bare)}\n{json.dumps(HARD)}\n{json.dumps(bare)}\n")
    convert.main([str(path), "--format", "hard-negatives", "--out", str(tmp_path / "out")])
    assert "1 rows; 2 without a positive left out" in capsys.readouterr().out
    path.write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="in: holds no rows with a positive"):
        convert.convert_rows(path, tmp_path / "none", convert.FORMATS["hard-negatives"])


def test_another_format_is_a_function_and_a_row(tmp_path, monkeypatch):
    def read_pair(line):
        query, passage = line.split(" => ")
        return convert.row_of(None, query, [passage], [], inline=True)

    monkeypatch.setitem(convert.FORMATS, "pairs", convert.Format(read_pair, "query => passage"))
    (tmp_path / "in").write_text("what is a cat => an animal\n")
    convert.main([str(tmp_path / "in"), "--format", "pairs", "--out", str(tmp_path / "out")])
    assert TrainingRows(tmp_path / "out").example(0, None).texts == ["an animal"]


def test_scores_of_a_pickle(tmp_path):
    for wrap, protocol in itertools.product((float, np.float32, np.float64), (0, 2, 4)):
        for path, opener in ((tmp_path / "s.pkl", open), (tmp_path / "s.pkl.gz", gzip.open)):
            with opener(path, "wb") as file:
                pickle.dump({7: {8: wrap(1.5), 3: wrap(-2)}, "q": {"a": 1}}, file, protocol)
            convert.main([str(path), "--format", "scores", "--out", str(tmp_path / "s.json")])
            found = json.loads((tmp_path / "s.json").read_text())
            assert found == {"7": {"8": 1.5, "3": -2.0}, "q": {"a": 1.0}}


class Poison:
    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def test_a_poisoned_pickle_runs_nothing(tmp_path):
    poison = Poison()
    poison.place = tmp_path / "ran"
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"7": {"8": poison}}))
    failed = run("-m", "tools.convert", tmp_path / "s.pkl", "--format", "scores",
                 "--out", tmp_path / "s.json", check=False)
    assert failed.returncode == 1 and "asks for posix.system" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert os.listdir(tmp_path) == ["s.pkl"]
    for blob in (b"", b"\x80", b"\x1f\x8b damaged", pickle.dumps([1, 2])):
        (tmp_path / "s.pkl").write_bytes(blob)
        with pytest.raises(ValueError, match="s.pkl"):
            convert.convert_scores(tmp_path / "s.pkl", tmp_path / "s.json")
