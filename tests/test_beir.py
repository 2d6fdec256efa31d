"""tools/beir.py: a folder of sets in, a row of the paper out."""
import json
import os

import numpy as np
import pytest

import evaluate
from conftest import run, torchrun
from data import locked
from evaluate import Pairs, read_qrels, read_run
from tools.beir import without_self


def write_beir(folder, n=12):
    """A BEIR folder in which query i is document i, and also its own best answer were it not removed."""
    (folder / "qrels").mkdir(parents=True)
    with (open(folder / "corpus.jsonl", "w") as corpus, open(folder / "queries.jsonl", "w") as queries,
          open(folder / "qrels" / "test.tsv", "w") as qrels):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for i in range(n):
            words = f"word{i} animal{i % 3} number{i}"
            corpus.write(json.dumps({"_id": f"{i}", "title": "", "text": words}) + "\n"
                         + json.dumps({"_id": f"a{i}", "title": "t", "text": words + " more text"}) + "\n")
            queries.write(json.dumps({"_id": f"{i}", "text": words}) + "\n")
            qrels.write(f"{i}\ta{i}\t1\n")


def test_beir_with_bm25(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    write_beir(tmp_path / "beir" / "mine")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir",
            "--datasets", "mine", "nfcorpus", "scifact", "--out", tmp_path / "out", "--k", 5)
    first = run(*args).stdout
    lines = [line.split() for line in first.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("scifact", "mine", "nfcorpus")}
    # The paper's order, then the others.
    assert list(rows) == ["nfcorpus", "scifact", "mine"]
    assert set(rows["nfcorpus"][1:]) == {"-"} and rows["scifact"][1:3] == ["12", "1.0000"]
    assert "mean of 2 (without nfcorpus)" in first and "BEIR (2 sets) ndcg@10" in first
    ranking = read_run(tmp_path / "out" / "scifact.trec")
    assert all(qid not in docs and 1 <= len(docs) <= 5 for qid, docs in ranking.items())
    assert not list((tmp_path / "out").glob("*.index"))

    # What is finished is not done again.
    (tmp_path / "out" / "mine.json").unlink()
    again = run(*args)
    kept = [[line for line in text.splitlines() if line.startswith(("scifact ", "bm25 "))]
            for text in (first, again.stdout)]
    assert (kept[0] == kept[1] and len(kept[0]) == 2 and "mine." in again.stdout
            and "scifact." not in again.stdout)
    changed = run(*args[:-1], 4, check=False)
    assert changed.returncode == 1 and "was made with another k" in changed.stderr


def test_what_has_changed_is_not_reused(tmp_path):
    """A changed collection, or changed judgements, at the same path: the numbers of before would be wrong."""
    write_beir(tmp_path / "beir" / "scifact")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--datasets", "scifact",
            "--out", tmp_path / "out", "--k", 5, "--keep_indexes")
    run(*args)
    qrels, corpus = (tmp_path / "beir" / "scifact" / name for name in ("qrels/test.tsv", "corpus.jsonl"))
    before = qrels.read_text()
    qrels.write_text(before.replace("\ta3\t1", "\ta4\t1"))
    done = run(*args, check=False)
    assert done.returncode == 1 and "was made with another qrels" in done.stderr
    qrels.write_text(before)
    corpus.write_text(corpus.read_text().replace("word3 ", "word99 "))
    done = run(*args, check=False)
    assert done.returncode == 1 and "was made with another corpus" in done.stderr
    # Nor is the index of the old collection taken for the new one's.
    (tmp_path / "out" / "scifact.json").unlink()
    assert len(list((tmp_path / "out").glob("*.index"))) == 1
    run(*args)
    assert len(list((tmp_path / "out").glob("*.index"))) == 2


def test_dropped_results_are_counted(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--datasets", "scifact",
            "--out", tmp_path / "out", "--k", 5)
    assert "results with the query's own id, left out: scifact 12" in run(*args).stdout
    assert json.loads((tmp_path / "out" / "scifact.json").read_text())["dropped"] == 12
    pairs = Pairs.of({"a": {"a": 3.0, "b": 2.0, "c": 1.0}, "b": {"c": 3.0, "a": 2.0, "d": 1.0}})
    kept, dropped = without_self(pairs, 2)
    assert kept.nested() == {"a": {"b": 2.0, "c": 1.0}, "b": {"c": 3.0, "a": 2.0}} and dropped == 1


def test_all_inputs_are_read_before_anything_is_indexed(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    write_beir(tmp_path / "beir" / "webis-touche2020")
    queries = tmp_path / "beir" / "webis-touche2020" / "queries.jsonl"
    queries.write_text("\n".join(queries.read_text().splitlines()[:-1]) + "\n")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--out", tmp_path / "out")
    done = run(*args, check=False)
    assert done.returncode == 1 and "lacks 1 queries" in done.stderr and "the first is '11'" in done.stderr
    # Nothing of scifact was begun.
    assert not list((tmp_path / "out").glob("*"))


def test_two_at_once_are_refused(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--out", tmp_path / "out")
    with locked(tmp_path / "out"):
        done = run(*args, check=False)
    assert done.returncode == 1 and f"process {os.getpid()} is writing there" in done.stderr
    assert "1.0000" in run(*args).stdout
    for bad in (["--k", 0], ["--beir_length", -1], ["--tokens_per_batch", 0]):
        done = run(*args, *bad, check=False)
        assert done.returncode == 2 and "expected a whole number above 0" in done.stderr


def test_leftovers_of_a_kill_go(tmp_path):
    """Killed between a result and the removal of its index: the next call removes it."""
    write_beir(tmp_path / "beir" / "scifact")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--out", tmp_path / "out")
    run(*args, "--keep_indexes")
    assert len(list((tmp_path / "out").glob("*.index"))) == 1
    # As a call without the flag would have written it.
    result = tmp_path / "out" / "scifact.json"
    result.write_text(result.read_text().replace('"kept": true', '"kept": false'))
    write_beir(tmp_path / "beir" / "nfcorpus")
    run(*args)
    assert sorted(file.name for file in (tmp_path / "out").iterdir() if "nfcorpus" not in file.name) == [
        "scifact.json", "scifact.trec", "scifact.trec.json"]


def test_only_its_own_indexes_go(tmp_path):
    """What else is called *.index in the folder is a user's, and so is what was kept on purpose."""
    write_beir(tmp_path / "beir" / "scifact")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--out", tmp_path / "out")
    (tmp_path / "out" / "other.index").mkdir(parents=True)
    (tmp_path / "out" / "faiss_flat.index").write_text("a week's work")

    def kept():
        return sorted(file.name.split(".")[0] for file in (tmp_path / "out").glob("*.index"))

    run(*args, "--keep_indexes")
    assert kept() == ["faiss_flat", "other", "scifact"]
    # Nothing to do, and then another task.
    run(*args)
    assert kept() == ["faiss_flat", "other", "scifact"]
    write_beir(tmp_path / "beir" / "nfcorpus")
    run(*args)
    assert kept() == ["faiss_flat", "other", "scifact"]


def test_bm25_refuses_what_it_would_ignore(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    done = run("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--out", tmp_path / "out",
               "--dtype", "int8", "--adapter", "nonsense", check=False)
    assert done.returncode == 1 and "--adapter nonsense, --dtype int8: --model bm25 has no use" in done.stderr
    assert not (tmp_path / "out").exists()


def test_beir_and_msmarco_with_a_model(tmp_path, tiny_model):
    write_beir(tmp_path / "beir" / "scifact")
    marco = tmp_path / "marco"
    marco.mkdir()
    (marco / "collection.tsv").write_text("".join(f"{i}\tword{i} animal{i % 3}\n" for i in range(12)))
    (marco / "queries.dev.small.tsv").write_text("".join(f"{i}\tword{i}\n" for i in range(12)))
    # Ids of queries and passages meet by chance: none is removed.
    (marco / "qrels.dev.small.tsv").write_text("".join(f"{i}\t0\t{i}\t1\n" for i in range(12)))
    (marco / "msmarco-test2019-queries.tsv").write_text("".join(f"{i}\tanimal{i}\n" for i in range(3)))
    (marco / "2019qrels-pass.txt").write_text(
        "".join(f"{i} 0 {j} {2 + (j == i)}\n" for i in range(3) for j in range(i, 12, 3)))
    # The report is what begins with a brace; progress stands before it.
    report = json.loads(torchrun(
        2, "-m", "tools.beir", "--model", tiny_model, "--head", "dense", "--data", tmp_path / "beir",
        "--msmarco", marco, "--datasets", "scifact", "--out", tmp_path / "out", "--device", "cpu", "--k", 20,
        "--json").stdout.partition("\n{")[2].join(["{", ""]))
    assert (report["missing"] == ["trec-dl-2020"]
            and set(report["results"]) == {"msmarco-dev", "trec-dl-2019", "scifact"})
    assert report["row"]["trec-dl-2020 ndcg@10"] is None
    for name, metric in (("msmarco-dev", "mrr@10"), ("trec-dl-2019", "ndcg@10"), ("scifact", "ndcg@10")):
        qrels = {"msmarco-dev": marco / "qrels.dev.small.tsv",
                 "trec-dl-2019": marco / "2019qrels-pass.txt"}.get(
                     name, tmp_path / "beir/scifact/qrels/test.tsv")
        values = evaluate.evaluate(read_qrels(qrels), read_run(tmp_path / "out" / f"{name}.trec"),
                                   [metric])[metric].values()
        assert report["results"][name]["scores"][metric] == pytest.approx(np.mean(list(values)))
    # MS MARCO's passage 5 is an answer to its query 5 like any other.
    assert "5" in read_run(tmp_path / "out" / "msmarco-dev.trec")["5"]
