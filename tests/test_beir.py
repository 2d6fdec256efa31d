"""tools/beir.py: a folder of sets in, a row of the paper out."""
import json

import numpy as np
import pytest

import evaluate
from conftest import run, torchrun
from evaluate import read_qrels, read_run


def write_beir(folder, n=12):
    """A BEIR folder in which query i is document i, and also its own best answer were it not removed."""
    (folder / "qrels").mkdir(parents=True)
    with open(folder / "corpus.jsonl", "w") as corpus, open(folder / "queries.jsonl", "w") as queries, open(folder / "qrels" / "test.tsv", "w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\n")
        for i in range(n):
            words = f"word{i} animal{i % 3} number{i}"
            corpus.write(json.dumps({"_id": f"{i}", "title": "", "text": words}) + "\n" + json.dumps({"_id": f"a{i}", "title": "t", "text": words + " more text"}) + "\n")
            queries.write(json.dumps({"_id": f"{i}", "text": words}) + "\n")
            qrels.write(f"{i}\ta{i}\t1\n")


def test_beir_with_bm25(tmp_path):
    write_beir(tmp_path / "beir" / "scifact")
    write_beir(tmp_path / "beir" / "mine")
    args = ("-m", "tools.beir", "--model", "bm25", "--data", tmp_path / "beir", "--datasets", "mine", "nfcorpus", "scifact", "--out", tmp_path / "out", "--k", 5)
    first = run(*args).stdout
    lines = [line.split() for line in first.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("scifact", "mine", "nfcorpus")}
    assert list(rows) == ["nfcorpus", "scifact", "mine"]  # the paper's order, then the others
    assert set(rows["nfcorpus"][1:]) == {"-"} and rows["scifact"][1:3] == ["12", "1.0000"]
    assert "mean of 2 (without nfcorpus)" in first and "BEIR (2 sets) ndcg@10" in first
    ranking = read_run(tmp_path / "out" / "scifact.trec")
    assert all(qid not in docs and 1 <= len(docs) <= 5 for qid, docs in ranking.items())
    assert not list((tmp_path / "out").glob("*.index"))

    (tmp_path / "out" / "mine.json").unlink()
    (tmp_path / "beir" / "scifact" / "corpus.jsonl").write_text("not read again")  # what is finished is not done again
    again = run(*args)
    kept = [[line for line in text.splitlines() if line.startswith(("scifact ", "bm25 "))] for text in (first, again.stdout)]
    assert kept[0] == kept[1] and len(kept[0]) == 2 and "mine." in again.stdout and "scifact." not in again.stdout
    changed = run(*args[:-1], 4, check=False)
    assert changed.returncode == 1 and "was made with another k" in changed.stderr


def test_beir_and_msmarco_with_a_model(tmp_path, tiny_model):
    write_beir(tmp_path / "beir" / "scifact")
    marco = tmp_path / "marco"
    marco.mkdir()
    (marco / "collection.tsv").write_text("".join(f"{i}\tword{i} animal{i % 3}\n" for i in range(12)))
    (marco / "queries.dev.small.tsv").write_text("".join(f"{i}\tword{i}\n" for i in range(12)))
    (marco / "qrels.dev.small.tsv").write_text("".join(f"{i}\t0\t{i}\t1\n" for i in range(12)))  # ids of queries and passages meet by chance: none is removed
    (marco / "msmarco-test2019-queries.tsv").write_text("".join(f"{i}\tanimal{i}\n" for i in range(3)))
    (marco / "2019qrels-pass.txt").write_text("".join(f"{i} 0 {j} {2 + (j == i)}\n" for i in range(3) for j in range(i, 12, 3)))
    report = json.loads(torchrun(2, "-m", "tools.beir", "--model", tiny_model, "--head", "dense", "--data", tmp_path / "beir", "--msmarco", marco, "--datasets", "scifact",
                            "--out", tmp_path / "out", "--device", "cpu", "--k", 20, "--json").stdout.partition("\n{")[2].join(["{", ""]))
    assert report["missing"] == ["trec-dl-2020"] and set(report["results"]) == {"msmarco-dev", "trec-dl-2019", "scifact"}
    assert report["row"]["trec-dl-2020 ndcg@10"] is None
    for name, metric in (("msmarco-dev", "mrr@10"), ("trec-dl-2019", "ndcg@10"), ("scifact", "ndcg@10")):
        qrels = {"msmarco-dev": marco / "qrels.dev.small.tsv", "trec-dl-2019": marco / "2019qrels-pass.txt"}.get(name, tmp_path / "beir/scifact/qrels/test.tsv")
        values = evaluate.evaluate(read_qrels(qrels), read_run(tmp_path / "out" / f"{name}.trec"), [metric])[metric].values()
        assert report["results"][name]["scores"][metric] == pytest.approx(np.mean(list(values)))
    assert "5" in read_run(tmp_path / "out" / "msmarco-dev.trec")["5"]
