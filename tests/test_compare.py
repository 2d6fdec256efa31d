"""tools/compare.py: the same numbers in every style, and what stands beside them."""
import csv
import json

import numpy as np
import pytest

import evaluate
from conftest import run
from data import checksum
from evaluate import read_qrels, read_run
from test_evaluate import three_runs  # noqa: F401 (a fixture)
from tools.compare import named


def command(folder, *more):
    return run("-m", "tools.compare", "--qrels", folder / "qrels",
               "--run", *(folder / f"{name}.trec" for name in ("base", "better", "same")),
               "--metrics", "mrr@10", "ndcg@10", *more).stdout


def test_json_report(three_runs):
    report = json.loads(command(three_runs, "--json", "--costs"))
    assert report["queries"] == 60 and report["queries_without_relevant"] == 1
    assert report["runs"]["same"]["missing"] == 1 and report["runs"]["same"]["not_in_qrels"] == 1
    assert report["runs"]["base"]["unjudged@10"] == pytest.approx(0.9)
    assert report["runs"]["better"]["costs"]["nnz_docs"] == 123.4
    better, same = (
        next(test for test in report["tests"] if test["run"] == name and test["metric"] == "mrr@10")
        for name in ("better", "same"))
    assert (better["wins"] + better["losses"] + better["equal"] == 60 and better["losses"] == 0
            and better["p_holm"] < 0.001)
    assert (same["wins"], same["losses"], same["equal"]) == (0, 1, 59) and same["p_holm"] == 1
    mrr = {
        name: np.mean(list(evaluate.evaluate(
            read_qrels(three_runs / "qrels"), read_run(three_runs / f"{name}.trec"),
            ["mrr@10"])["mrr@10"].values()))
        for name in ("base", "better", "same")}
    assert all(report["runs"][name]["mrr@10"] == pytest.approx(mrr[name]) for name in mrr)


def test_plain_markdown_and_latex_say_the_same(three_runs, tmp_path):
    report = json.loads(command(three_runs, "--json"))
    best = f"{report['runs']['better']['mrr@10']:.4f}"
    plain = command(three_runs, "--costs", "--queries", three_runs / "queries.tsv",
                    "--groups", three_runs / "groups.json", "--per_query", tmp_path / "q.tsv")
    head, rows = plain.splitlines()[2], plain.splitlines()[3:6]
    assert [row.split()[0] for row in rows] == ["base", "better", "same"] and head.split() == [
        "run", "mrr@10", "ndcg@10", "unjudged@10", "missing", "nnz/doc", "index", "MB", "ms/query"]
    assert (f"{best}*†" in rows[1] and "†" not in rows[0] + rows[2]
            and rows[1].split()[-3:] == ["123", "5.6", "0.79"])
    assert ("60 queries with a relevant document (1 without one left out)" in plain
            and "same: 1 of its queries are not in the qrels" in plain)
    assert "even (30)" in plain and "text of" in plain
    assert f"| better | **{best}**† |" in command(three_runs, "--markdown")
    assert rf"better & \textbf{{{best}}}$^\dagger$ &" in command(three_runs, "--latex")
    table = list(csv.reader(open(tmp_path / "q.tsv"), delimiter="\t"))
    assert (table[0] == ["qid", *(f"{name} {metric}" for name in ("base", "better", "same")
                                  for metric in ("mrr@10", "ndcg@10"))]
            and len(table) == 61)
    # The third figure of a row is the second run's MRR; six decimals were written.
    assert np.mean([float(row[3]) for row in table[1:]]) == pytest.approx(
        report["runs"]["better"]["mrr@10"], abs=1e-6)


def test_costs_of_another_run_are_left_out(three_runs, tmp_path):
    """A kill between a run and its note leaves the note of the run before."""
    for name in ("qrels", "base.trec", "better.trec", "same.trec"):
        (tmp_path / name).write_bytes((three_runs / name).read_bytes())
    note = tmp_path / "better.trec.json"
    note.write_text(json.dumps({"nnz_docs": 123.4, "run": checksum(tmp_path / "better.trec")}))
    assert "nnz/doc" in command(tmp_path, "--costs")
    note.write_text(json.dumps({"nnz_docs": 123.4, "run": checksum(tmp_path / "base.trec")}))
    text = command(tmp_path, "--costs")
    assert ("nnz/doc" not in text
            and "--costs: no run has a RUN.json beside it that was written for it" in text)


def test_damaged_files_are_named(three_runs, tmp_path):
    (tmp_path / "groups.json").write_text('{"q1": ')
    done = run("-m", "tools.compare", "--qrels", three_runs / "qrels", "--run", three_runs / "base.trec",
               "--groups", tmp_path / "groups.json", check=False)
    assert (done.returncode == 1 and "groups.json: is not JSON" in done.stderr
            and "Traceback" not in done.stderr)
    # A text may hold a terminal's commands (here: red letters); they are not passed on.
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\t\x1b[31mred {i}\n" for i in range(60)))
    text = command(three_runs, "--queries", tmp_path / "queries.tsv")
    assert "red" in text and "\x1b" not in text


def test_marks_mean_what_the_style_shows(three_runs, tmp_path):
    assert "*: best" in command(three_runs)
    for style in ("--markdown", "--latex"):
        text = command(three_runs, style)
        assert "bold: best" in text and "*: best" not in text
    # Bars in a query's text: the table keeps its five columns.
    (tmp_path / "queries.tsv").write_text("".join(f"q{i}\ta | b \\| c\n" for i in range(60)))
    text = command(three_runs, "--markdown", "--queries", tmp_path / "queries.tsv")
    rows = [line for line in text.splitlines() if " b " in line]
    assert rows and all(row.endswith(r" a \| b \\\| c |") for row in rows)


def test_names_that_collide_take_their_folders():
    assert list(named(["a/bm25.test.trec", "b/dense.trec.gz"])) == ["bm25.test", "dense"]
    assert list(named(["r/bm25/dev.trec", "r/sp/dev.trec"])) == ["bm25/dev", "sp/dev"]
    assert list(named(["x/s/dev.trec", "y/s/dev.trec"])) == ["x/s/dev", "y/s/dev"]
    # The same file twice, too few names, the same name twice.
    for paths, names in ((["dev.trec", "dev.trec"], None), (["a", "b"], ["one"]),
                         (["a", "b"], ["one", "one"])):
        with pytest.raises(ValueError, match="2 runs need as many different --names"):
            named(paths, names)
