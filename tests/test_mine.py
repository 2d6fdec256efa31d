"""tools/mine.py on a run small enough to mine by hand."""
import pytest

from conftest import read_jsonl, run
from data import Corpus, TrainingRows, write_run
from tools import mine

QUERIES = {f"q{i}": f"query {i}" for i in range(5)}


def tsv(path, rows):
    path.write_text("".join(f"{docid}\t{text}\n" for docid, text in rows))
    return path


def ranking(folder):
    """Two queries; p1 is q1's positive at rank 3, q2's positive is missing from the run."""
    tsv(folder / "queries.tsv", QUERIES.items())
    (folder / "qrels").write_text("q1 0 p1 1\nq1 0 p6 0\nq1 0 p8 1\nq2 0 p9 1\nq3 0 p1 1\n")
    write_run(folder / "run.trec",
              {"q1": {f"p{i}": s for i, s in [(5, 10), (6, 9), (1, 8), (2, 7.5), (3, 4), (4, 2)]},
               "q2": {"p3": 2, "p4": 1}})
    return ["-m", "tools.mine", "--run", folder / "run.trec", "--qrels", folder / "qrels",
            "--queries", folder / "queries.tsv", "--out", folder / "t.jsonl"]


def test_mine(tmp_path):
    command = ranking(tmp_path)
    out = run(*command).stdout
    assert "1 queries without a ranking" in out and "3 rows" in out
    rows = read_jsonl(tmp_path / "t.jsonl")
    near = ["p5", "p6", "p2", "p3", "p4"]
    assert [(r["qid"], r["query"], r["pos"], r["neg"]) for r in rows] == [
        ("q1", "query 1", ["p1"], near), ("q1", "query 1", ["p8"], near),
        ("q2", "query 2", ["p9"], ["p3", "p4"])]
    # Without p5 at rank 1 and p4 below rank 5; p6 was judged irrelevant, but 9 is above 0.95 * 8.
    run(*command, "--skip_top", 1, "--depth", 5, "--max_score_ratio", 0.95, "--scores")
    assert read_jsonl(tmp_path / "t.jsonl") == [
        {"qid": "q1", "query": "query 1", "pos": ["p1"], "neg": ["p2", "p3"], "pos_scores": [8],
         "neg_scores": [7.5, 4]}]
    # The draw is the seed's: the same bytes again.
    run(*command, "--negatives", 2, "--seed", 1)
    first = (tmp_path / "t.jsonl").read_bytes()
    assert all(len(r["neg"]) == 2 for r in read_jsonl(tmp_path / "t.jsonl"))
    run(*command, "--negatives", 2, "--seed", 1)
    assert (tmp_path / "t.jsonl").read_bytes() == first
    # It lacks p6, p8 and p9.
    corpus = Corpus(tsv(tmp_path / "collection.tsv", [(f"p{i}", f"passage {i}") for i in range(6)]))
    assert "unknown passages" in run(*command, "--corpus", tmp_path / "collection.tsv").stdout
    assert ([(r["pos"], r["neg"]) for r in read_jsonl(tmp_path / "t.jsonl")]
            == [(["p1"], ["p5", "p2", "p3", "p4"])])
    assert TrainingRows(tmp_path / "t.jsonl", corpus, need_negatives=True).example(0, None).docids[0] == "p1"
    (tmp_path / "qrels").write_text("other 0 p1 1\n")
    failed = run(*command, check=False)
    assert (failed.returncode == 1 and "do both name the same queries" in failed.stderr
            and "Traceback" not in failed.stderr)


@pytest.mark.parametrize("flag", ["--negatives=0", "--negatives=-1", "--skip_top=-3", "--depth=-3",
                                  "--depth=0", "--seed=-1", "--max_score_ratio=nan", "--max_score_ratio=-1",
                                  "--min_grade=0", "--rank=x"])
def test_numbers_out_of_range_are_refused(tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        mine.main([*map(str, ranking(tmp_path)[2:]), flag])
    assert "expected a" in (said := capsys.readouterr().err) or "unrecognized" in said
    assert not (tmp_path / "t.jsonl").exists()


def test_faults_are_one_line():
    failed = run("-m", "tools.mine", "--run", "nowhere", "--qrels", "nowhere", "--out", "x", check=False)
    assert failed.returncode == 1 and failed.stderr == "tools.mine: nowhere: no such file\n"
