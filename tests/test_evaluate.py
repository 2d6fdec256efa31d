"""evaluate.py against trec_eval's own printouts, pytrec_eval, scipy, plain loops and planted differences."""
import csv
import doctest
import gzip
import json
import math

import numpy as np
import pytest

import evaluate
from conftest import run
from data import write_run
from evaluate import (Pairs, find_hits, holm, keys_of, measure, randomization_p, read_pairs, read_qrels,
                      read_run)

# trec_eval

# Its names for what we measure, and ours.
OURS = {"map": "map", "recip_rank": "mrr", "P_10": "p@10", "recall_10": "recall@10",
        "recall_100": "recall@100", "ndcg_cut_5": "ndcg@5", "ndcg_cut_10": "ndcg@10",
        "ndcg_cut_20": "ndcg@20", "num_rel": "num_rel", "num_rel_ret": "num_rel_ret"}


def test_trec_eval_figures(shared):
    folder = shared / "data" / "trec_dl19"
    rows = list(csv.reader(open(folder / "EXPECTED.tsv"), delimiter="\t"))[1:]
    assert len(rows) == 176
    for run_name, qrels_name, flags, name, expected in rows:
        hits = find_hits(read_pairs(folder / qrels_name, "qrels"), read_pairs(folder / run_name, "run"),
                         depth=10 if "-M 10" in flags else None)
        if name == "num_q":
            assert len(hits.qids) == int(expected)
            continue
        values = measure(hits, OURS[name], 2 if "-l 2" in flags else 1)
        got = values.sum() if name.startswith("num_") else values.mean()
        assert f"{got:.4f}" == f"{float(expected):.4f}", (run_name, flags, name)


def random_case(rng):
    """A few queries with graded and negative judgements, rankings with ties (some only after rounding to 32
    bits), some empty, some on one side only."""
    ids = [f"{rng.choice(['d', 'Z', '10', '9', '~', 'é', '日'])}{i}" for i in range(30)]
    queries = int(rng.integers(1, 7))
    qrels = {f"q{i}": {ids[j]: int(rng.integers(-2, 4))
                       for j in rng.choice(30, rng.integers(1, 20), replace=False)} for i in range(queries)}
    for docs in qrels.values():
        # A query whose grades are all negative makes pytrec_eval write outside its memory.
        docs[next(iter(docs))] = 1
    score = lambda: float(rng.choice([rng.normal(), rng.integers(0, 3), 1 + 1e-9 * rng.integers(0, 3)]))
    run = {f"q{i}": {ids[j]: score() for j in rng.choice(30, rng.integers(0, 25), replace=False)}
           for i in rng.permutation(queries + 2)[:queries]}
    return qrels, run


def test_pytrec_eval_on_random_runs():
    pytrec_eval = pytest.importorskip("pytrec_eval")
    names = {"map": "map", "map_cut_5": "map@5", "recip_rank": "mrr", "P_5": "p@5", "recall_5": "recall@5",
             "recall_10": "recall@10", "ndcg": "ndcg", "ndcg_cut_5": "ndcg@5", "ndcg_cut_10": "ndcg@10",
             "success_5": "success@5", "num_rel_ret": "num_rel_ret"}
    families = {"map", "map_cut", "recip_rank", "P", "recall", "ndcg", "ndcg_cut", "success", "num_rel_ret"}
    rng, compared = np.random.default_rng(0), 0
    for _ in range(2000):
        qrels, runs = random_case(rng)
        level = int(rng.integers(1, 3))
        theirs = pytrec_eval.RelevanceEvaluator(qrels, families, relevance_level=level).evaluate(runs)
        ours = evaluate.evaluate(qrels, runs, list(names.values()), min_grade=level)
        for qid in qrels:
            for name, mine in names.items():
                # It says nothing of queries without results, for which we say 0.
                if runs.get(qid):
                    assert abs(ours[mine][qid] - theirs[qid][name]) < 1e-9, (qrels, runs, qid, name)
                    compared += 1
                else:
                    assert ours[mine][qid] == 0
    assert compared > 40_000


def test_scores_are_32_bit_and_ties_fall_by_id():
    qrels, tied = {"q": {"a": 1}}, {"q": {"a": 1.0 + 1e-9, "b": 1.0}}
    # As floats of 32 bits they are equal, and b > a.
    assert evaluate.evaluate(qrels, tied, ["mrr"])["mrr"]["q"] == 0.5
    # MS MARCO's script takes the lines as they stand.
    assert evaluate.evaluate(qrels, tied, ["mrr"], ties="run_order")["mrr"]["q"] == 1.0
    # Ids are strings: "9" > "10".
    assert evaluate.evaluate({"q": {"9": 1}}, {"q": {"9": 1.0, "10": 1.0}}, ["mrr"])["mrr"]["q"] == 1.0


def test_measures_of_our_own_by_hand():
    qrels = {"q": {"a": 1, "b": 1, "c": 1, "d": 0}, "unanswered": {"a": 1}, "hopeless": {"a": 0}}
    ranking = {"q": {"x": 5, "a": 4, "d": 3, "b": 2, "y": 1}, "unknown": {"a": 1}}
    got = evaluate.evaluate(qrels, ranking,
                            ["r_cap@2", "r_cap@10", "success@1", "success@2", "judged@4", "num_ret", "mrr@1"])
    assert {name: values["q"] for name, values in got.items()} == {
        "r_cap@2": 1 / 2, "r_cap@10": 2 / 3, "success@1": 0, "success@2": 1, "judged@4": 3 / 4, "num_ret": 5,
        "mrr@1": 0}
    # A query without a relevant document is out, one without results counts 0.
    assert set(got["mrr@1"]) == {"q", "unanswered"}
    assert got["success@2"]["unanswered"] == 0


@pytest.mark.parametrize("metric", ["ndcgg@10", "ndcg@0", "ndcg@x", "p", "success", "recall@-1"])
def test_unknown_measures_are_refused(metric):
    with pytest.raises(ValueError, match="expected one of"):
        evaluate.evaluate({"q": {"a": 1}}, {"q": {"a": 1.0}}, [metric])


def test_columns_and_dicts_are_the_same(tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(50):
        qrels, ranking = random_case(rng)
        assert Pairs.of(ranking).nested() == ranking
        write_run(tmp_path / "run", ranking)
        back = read_run(tmp_path / "run")
        assert back == {qid: docs for qid, docs in ranking.items() if docs}
        metrics = ["ndcg@10", "map", "mrr@3"]
        assert (evaluate.evaluate(qrels, read_pairs(tmp_path / "run", "run"), metrics)
                == evaluate.evaluate(qrels, ranking, metrics))


def test_docstrings():
    result = doctest.testmod(evaluate)
    assert result.failed == 0 and result.attempted >= 4


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="document 'a' in query 'q'"):
        evaluate.evaluate({"q": {"a": 1}}, {"q": {"b": 1.0, "a": math.nan}}, ["mrr"])


# Readers


def test_every_form_of_a_run(tmp_path):
    expected = {"1": {"a": -1.0, "b": -2.0}, "2": {"é": -1.0}}
    # Blanks, tabs, a carriage return, no newline at the end.
    trec = "1 Q0 a 1 -1 t\n1\tQ0  b\t2 -2e0 t\r\n2 Q0 é 1 -1.0 t"
    forms = {
        "trec": trec.encode(),
        "msmarco": "1\ta\t1\n1\tb\t2\n2\té\t1\n".encode(),
        "packed": gzip.compress(trec.encode()),
        "blank_end": trec.encode() + b"\n\n \n",
        "json": json.dumps(expected).encode(),
        "four": "1 a 1 -1.0\n1 b 2 -2.0\n2 é 1 -1.0\n".encode(),
        "scored": "1 a -1.0\n1 b -2\n2 é -1.0\n".encode(),
        # As trec_eval 10 reads them.
        "longer": "1 Q0 a 1 -1 t\n1 Q0 b 2 -2 my own tag\n2 Q0 é 1 -1 t".encode(),
        "commented": "# a run\n1 Q0 a 1 -1 t\n1 Q0 b 2 -2 t\n# 2 Q0 x 1 1 t\n2 Q0 é 1 -1 t".encode(),
    }
    for name, raw in forms.items():
        (tmp_path / name).write_bytes(raw)
        assert read_run(tmp_path / name) == expected, name
    for name, raw in (("empty", b""), ("blank", b"\n \n"), ("comment", b"# nothing\n"), ("braces", b"{}")):
        (tmp_path / name).write_bytes(raw)
        # A search that failed is no run that found nothing.
        with pytest.raises(ValueError, match="holds no"):
            read_run(tmp_path / name)


def test_every_form_of_qrels(tmp_path):
    expected = {"1": {"a": 1, "b": 0}, "q2": {"c": 2}}
    forms = {"trec": "1 0 a 1\n1 0 b 0\nq2 0 c 2\n",
             "msmarco": "1\t0\ta\t1\n1\t0\tb\t0\nq2\t0\tc\t2\n",
             "bare": "1\ta\t1\n1\tb\t0\nq2\tc\t2",
             "beir": "query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\t0\nq2\tc\t2\n",
             "json": json.dumps(expected),
             "repeated": "1 0 a 1\n1 0 b 0\n1 0 a 1\nq2 0 c 2\n",
             "commented": "# judged\n1 0 a 1\n#1 0 x 1\n1 0 b 0\nq2 0 c 2\n"}
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert read_qrels(tmp_path / name) == expected, name


def test_lines_of_a_query_need_not_stand_together(tmp_path):
    (tmp_path / "run").write_text("".join(f"q{i % 3} Q0 d{i} 0 {i % 7} t\n" for i in range(30)))
    got = read_run(tmp_path / "run")
    assert got == {f"q{q}": {f"d{i}": float(i % 7) for i in range(30) if i % 3 == q} for q in range(3)}
    qrels = {f"q{q}": {f"d{q + 3}": 1, f"d{q + 9}": 2} for q in range(3)}
    assert (evaluate.evaluate(qrels, read_pairs(tmp_path / "run", "run"), ["map"])
            == evaluate.evaluate(qrels, got, ["map"]))


def test_pieces_meet_where_they_should(tmp_path):
    """Files larger than one piece, with ids of every length, against a plain loop."""
    rng = np.random.default_rng(2)
    lines = [f"q{i // 50} Q0 {'d' * int(rng.integers(1, 40))}{i} {i % 50} "
             f"{rng.normal() * 10.0 ** int(rng.integers(-5, 6))!r} t" for i in range(20_000)]
    # numpy 2 writes a number's type into its repr.
    lines = [line.replace("np.float64(", "").replace(")", "") for line in lines]
    (tmp_path / "run").write_text("\n".join(lines) + "\n")
    expected = {}
    for line in lines:
        qid, _, docid, _, score, _ = line.split()
        expected.setdefault(qid, {})[docid] = float(score)
    assert (tmp_path / "run").stat().st_size > 2 ** 20
    # Every score to the last bit.
    assert read_run(tmp_path / "run") == expected


def test_short_decimals_are_read_to_the_last_bit():
    rng = np.random.default_rng(10)
    words = [f"{x:.{d}f}" for x, d in zip(rng.normal(size=20_000) * 10.0 ** rng.integers(-3, 7, 20_000),
                                          rng.integers(0, 9, 20_000))]
    words = [word for word in words if len(word) <= 17] + [
        "-0", "5.", "-.5", ".25", "1e3", "-1E-2", "+3", "000012.5", "1234567890123456",
        "0.1234567890123456"[:17]]
    assert (evaluate.numbers(np.array([word.encode() for word in words])).tolist()
            == [float(word) for word in words])
    for word in (b"-", b".", b"1-2", b"1.2.3", b"", b"a", b"0x1"):
        assert np.isnan(evaluate.numbers(np.array([b"1", word, b"2.5"]))).tolist() == [False, True, False]


# (kind, text) -> what the error must say.
FAULTS = {
    ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0\n"): ":2: expected 6 columns",
    # 7 and 5 columns are 12 as well: the sum over two lines is right, and both lines are wrong.
    ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 1.0 t x\n1 Q0 c 2 1.0\n"): ":3: expected 6 columns",
    ("qrels", "1 0 a 1\n1 0 b 1 x\n1 0 c\n"): ":2: expected 4 columns",
    ("run", "1 Q0 a 1 2.0 t\n\n1 Q0 b 2 1.0 t\n"): ":2: expected 6 columns",
    ("run", "1 Q0 a 1 2.0 t\n1 Q0 b 2 high t\n"): ":2: expected a finite number as score",
    ("run", "1 Q0 a 1 nan t\n"): ":1: expected a finite number as score",
    ("run", "1 a 1\n1 b 0.5\n"): ":2: expected an integer as rank",
    ("run", "1 0 a 1\n"):
        "expected 'qid Q0 docid rank score tag' or 'qid docid rank score' or 'qid docid rank' or "
        "'qid docid score' in run, got 4 columns",
    ("run", "1 a 17\n1 b 9\n"): ":1: three columns without a decimal point",
    ("run", "1 a 1\n2 a 1\n1 b 3\n1 c 2\n"): ":4: three columns without a decimal point",
    ("run", "1 a 1\n1 b 1\n"): ":2: three columns without a decimal point",
    ("run", "# by hand\n1 Q0 a 1 2.0 t\n# twice\n1 Q0 a 1 2.0 t\n"):
        ":4: document 'a' of query '1' stands in line 2 already",
    ("run", "1 Q0 a 1 2.0 t\n2 Q0 a 1 2.0 t\n1 Q0 a 2 1.0 t\n"):
        ":3: document 'a' of query '1' stands in line 1 already",
    ("qrels", "1 Q0 a 1 2.0 t\n"): "in qrels, got 6 columns",
    ("qrels", "query-id\tcorpus-id\tscore\n1\ta\t1\n1\tb\tyes\n"): ":3: expected an integer as grade",
    ("qrels", "query-id\tcorpus-id\tscore\n1\ta\t1\n1\ta\t2\n"):
        ":3: document 'a' of query '1' stands in line 2 already",
    ("qrels", '{"1": {"a": 1, "a": 2}}'): "document 'a' of query '1' stands in line 1 already",
    ("qrels", '{"1": {"a": 0.5}}'): ":1: expected an integer as grade",
    ("run", '{"1": ["a"]}'): "expected one JSON object {qid: {docid: score or grade}}",
    ("run", '{"1": {"a": 1}'): "expected one JSON object",
    # As columns, both would be read as something else without a word.
    ("run", '{"q1": {"New York": 9, "Los Angeles": 8, "Rome": 1}}'): "'New York' cannot be an id",
    ("qrels", '{"the cat": {"a": 1}}'): "'the cat' cannot be an id",
    ("qrels", '{"#1": {"a": 1}, "2": {"a": 1}}'): "'#1' cannot be a query's id",
    ("run", '{"1": {"a": "9 8"}}'): "'9 8'",
    ("qrels", '{"1": {"5": ""}}'): "''",
    ("run", "1 Q0 a\x01b 1 2.0 t\n"): "control characters",
}


@pytest.mark.parametrize("kind, text", FAULTS)
def test_faults_name_their_line(tmp_path, kind, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path / "file", kind)
    assert FAULTS[kind, text] in str(error.value) and str(error.value).startswith(str(tmp_path / "file"))


def test_a_repeat_far_away_is_found(tmp_path):
    lines = [f"q{i // 1000} Q0 {i} 1 {-i} t\n" for i in range(30_000)]
    (tmp_path / "run").write_text("".join(lines) + "q3 Q0 3456 1 0 t\n")
    with pytest.raises(ValueError, match=r":30001: document '3456' of query 'q3' stands in line 3457"):
        read_pairs(tmp_path / "run", "run")


def test_equal_keys_are_rare():
    """Neighbouring queries and ids that differ in one digit are what a weak mix would fold together."""
    pairs = Pairs.of({str(q): {str(d): 0.0 for d in range(1000)} for q in range(300)})
    assert len(np.unique(keys_of(pairs.query, pairs.docid, pairs.docid.itemsize))) == 300_000


# Significance


def test_randomization_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(4)
    # Few enough differences for scipy to go through all sign flips.
    for n, shift in ((8, 0.0), (11, 0.4), (12, 0.8)):
        # Rounded to one decimal many sums are equal on paper, and differ in the last bit.
        d = np.round(rng.normal(shift, 1, n), 1)
        exact = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
        assert abs(randomization_p(d, 40_000) - exact) < 0.015
    assert randomization_p(np.zeros(50)) == 1


def test_planted_difference_is_found_and_planted_null_is_not():
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.2, 400)
    assert randomization_p(0.05 + noise) < 0.001
    null = [randomization_p(d, 1000) for d in rng.normal(0, 0.2, (400, 60))]
    # Of 400 true nulls about 20 fall below 0.05.
    assert 0.02 < np.mean(np.array(null) < 0.05) < 0.085
    assert randomization_p(noise, seed=1) == randomization_p(noise, seed=1) != randomization_p(noise, seed=2)


def test_holm_by_hand():
    assert holm([0.02, 0.01, 0.5, 0.03]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


# Tables


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """60 queries with one relevant document; the second run ranks it higher, the third only swaps what is
    irrelevant and lacks a query."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(6)
    qrels = {f"q{i}": {f"r{i}": 1} for i in range(60)} | {"hopeless": {"x": 0}}
    runs = {name: {} for name in ("base", "better", "same")}
    for i in range(60):
        place = int(rng.integers(2, 9))
        docs = [f"n{j}" for j in range(10)]
        runs["base"][f"q{i}"] = docs[:place] + [f"r{i}"] + docs[place:]
        runs["better"][f"q{i}"] = docs[:place // 2] + [f"r{i}"] + docs[place // 2:]
        runs["same"][f"q{i}"] = docs[:place][::-1] + [f"r{i}"] + docs[place:]
    del runs["same"]["q7"]
    runs["same"]["stranger"] = ["n1"]
    for name, ranking in runs.items():
        write_run(folder / f"{name}.trec",
                  {qid: {docid: 100.0 - i for i, docid in enumerate(docs)} for qid, docs in ranking.items()})
    (folder / "qrels").write_text("".join(
        f"{qid} 0 {docid} {grade}\n" for qid, docs in qrels.items() for docid, grade in docs.items()))
    (folder / "queries.tsv").write_text("".join(f"q{i}\ttext of {i}\n" for i in range(60)))
    (folder / "groups.json").write_text(
        json.dumps({f"q{i}": "even" if i % 2 == 0 else "odd" for i in range(60)}))
    (folder / "better.trec.json").write_text(
        json.dumps({"nnz_docs": 123.4, "index_bytes": 5_600_000, "ms_per_query": 0.789}))
    return folder


def command(folder, *more):
    return run("evaluate.py", "--qrels", folder / "qrels",
               "--run", *(folder / f"{name}.trec" for name in ("base", "better", "same")),
               "--metrics", "mrr@10", "ndcg@10", *more).stdout


def test_table(three_runs):
    text = command(three_runs)
    lines = text.splitlines()
    assert lines[0].split() == ["run", "mrr@10", "p", "ndcg@10", "p", "missing"]
    rows = {line.split()[0].split("/")[-1]: line.split()[1:] for line in lines[1:4]}
    assert list(rows) == ["base.trec", "better.trec", "same.trec"]
    qrels = read_qrels(three_runs / "qrels")
    for name, row in rows.items():
        values = evaluate.evaluate(qrels, read_run(three_runs / name), ["mrr@10"])["mrr@10"].values()
        assert row[0] == f"{np.mean(list(values)):.4f}"
    assert float(rows["better.trec"][1]) < 0.001 and rows["same.trec"][1] == "1.0000"
    assert [row[-1] for row in rows.values()] == ["0", "0", "1"]
    assert "60 queries; 1 without a relevant document are left out" in text
    assert "missing: queries for which a run has no result; they count 0" in text


def test_a_new_measure_is_a_function_and_a_row(monkeypatch):
    """README's fork: the rank of the last relevant document found."""
    def last_rank(top):
        out = np.zeros(len(top.found))
        np.maximum.at(out, top.query, top.rank + 1.0)
        return out

    monkeypatch.setitem(evaluate.METRICS, "last", last_rank)
    qrels, ranking = {"q": {"a": 1, "b": 1}, "p": {"a": 1}}, {"q": {"a": 3.0, "x": 2.0, "b": 1.0}}
    assert (evaluate.evaluate(qrels, ranking, ["last", "last@2"])
            == {"last": {"q": 3, "p": 0}, "last@2": {"q": 1, "p": 0}})


def test_faults_are_one_line(three_runs, tmp_path):
    (tmp_path / "qrels").write_text("1 0 a 0\n")
    for bad, says in (
        (["--metrics", "mrrr"], "metric 'mrrr': expected one of"),
        (["--qrels", tmp_path / "qrels"], "has a relevant document"),
        (["--names", "one"], "as many different --names"),
        (["--qrels", tmp_path / "none"], "no such file"),
        (["--run", three_runs / "base.trec", three_runs / "base.trec"], "as many different --names")):
        done = run("evaluate.py", "--qrels", three_runs / "qrels", "--run", three_runs / "base.trec",
                   three_runs / "same.trec", *bad, check=False)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    for bad in (["--depth", 0], ["--depth", -1], ["--trials", 0], ["--min_grade", "x"], ["--seed", -1]):
        done = run("evaluate.py", "--qrels", "q", "--run", "r", *bad, check=False)
        assert done.returncode == 2 and "expected a whole number" in done.stderr
