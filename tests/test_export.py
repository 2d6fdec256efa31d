"""tools/export.py, read back by scipy, numpy and protobuf. (The engines themselves: test_engines.py.)"""
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import documents, read_jsonl
from index import SparseIndex, open_index, search, vocabulary
from tools import bm25
from tools import export as export_module
from tools.export import FORMATS, Documents, Source, check_names, export, loaded_by, main, milvus_lines

TEXTS = {"q1": "the cat on the mat", "q2": "words of the vocabulary"}


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "queries.tsv"
    path.write_text("".join(f"{qid}\t{text}\n" for qid, text in TEXTS.items()))
    return path


@pytest.fixture(scope="module")
def exported(built, queries, tmp_path_factory):
    """The sparse index in every format, with its queries."""
    out = tmp_path_factory.mktemp("exported")
    for format in ("anserini", "seismic", "ciff", "npz"):
        export(built / "sparse", out / format, format, queries=queries)
    return out


@pytest.fixture(scope="module")
def vectors(built):
    """{docid: {term: weight}} of the index, by names."""
    ix, names = open_index(built / "sparse"), json.loads((built / "sparse" / "vocab.json").read_text())
    found = {}
    for row, terms, weights in documents(ix):
        named = {names[term]: weight for term, weight in zip(terms.tolist(), weights.tolist())}
        found[ix.docids[row]] = named
    return found


def test_documents_in_ranges_are_scipys(tmp_path, monkeypatch):
    """An index too large to be turned at once is turned a range of documents after the other."""
    from scipy import sparse
    matrix = sparse.random(300, 200, 0.1, format="csr", dtype=np.float32, random_state=0)
    matrix.sort_indices()
    ix = SparseIndex.from_csr(matrix.indptr, matrix.indices, matrix.data, 200)
    monkeypatch.setattr(export_module, "PIECE", 300)
    for size in (10_000, 500, 1):
        monkeypatch.setattr(export_module, "RANGE", size)
        (tmp_path / str(size)).mkdir()
        found = export_module.Documents(ix, tmp_path / str(size))
        assert np.array_equal(found.ends, matrix.indptr) and np.array_equal(found.terms, matrix.indices)
        assert np.array_equal(found.weights, matrix.data)


def test_npz_is_scipys(exported, vectors, built):
    from scipy import sparse
    matrix = sparse.load_npz(exported / "npz" / "vectors.npz")
    names = json.loads((built / "sparse/vocab.json").read_text())
    assert matrix.shape == (101, len(names)) and matrix.has_sorted_indices
    ids = (exported / "npz" / "docids.txt").read_text().split("\n")[:-1]
    for row, docid in enumerate(ids):
        assert dict(zip([names[t] for t in matrix[row].indices], matrix[row].data.tolist())) == vectors[docid]
    # The product of the two files is what search finds.
    scores = (sparse.load_npz(exported / "npz" / "queries.npz") @ matrix.T).toarray()
    run = search(built / "sparse", TEXTS, k=101)
    assert (exported / "npz" / "qids.txt").read_text().split() == list(TEXTS)
    for q, qid in enumerate(TEXTS):
        assert run[qid]
        for docid, score in run[qid].items():
            assert abs(scores[q, ids.index(docid)] - score) < 1e-4


def test_seismic_holds_the_weights(exported, vectors):
    lines = read_jsonl(exported / "seismic" / "vectors.jsonl")
    assert {line["id"]: line["vector"] for line in lines} == vectors
    assert [line["id"] for line in read_jsonl(exported / "seismic" / "queries.jsonl")] == list(TEXTS)


def test_anserini_and_ciff_hold_whole_numbers(exported, vectors):
    impacts = {}
    for line in read_jsonl(exported / "anserini" / "documents" / "vectors.jsonl"):
        impacts[line["id"]] = line["vector"]
        assert line["contents"] == "" and line["vector"].keys() == vectors[line["id"]].keys()
        for name, impact in line["vector"].items():
            assert type(impact) is int and abs(impact - max(1, 100 * vectors[line["id"]][name])) < 0.501
    assert len(impacts) == 101 and read_ciff(exported / "ciff" / "index.ciff") == impacts


def test_a_topic_repeats_its_words(exported):
    """As often as the weight says, which the other format has as numbers."""
    weights = {line["id"]: line["vector"] for line in read_jsonl(exported / "seismic" / "queries.jsonl")}
    for line in (exported / "anserini" / "topics.tsv").read_text().splitlines():
        qid, words = line.split("\t")
        words = words.split(" ")
        assert {word: words.count(word) for word in words} == \
            {name: max(1, round(100 * weight)) for name, weight in weights[qid].items()}


def test_npy_through_the_command_line(built, queries, tmp_path, capsys):
    flags = f"--index {built}/dense --format npy --out {tmp_path}/npy --queries {queries}"
    main(flags.split())
    written = np.load(tmp_path / "npy" / "vectors.npy")
    assert np.array_equal(written, open_index(built / "dense").vectors.numpy())
    scores = np.load(tmp_path / "npy" / "queries.npy") @ written.astype(np.float32).T
    run = search(built / "dense", TEXTS, k=3)
    for q, qid in enumerate(TEXTS):
        np.testing.assert_allclose(sorted(scores[q])[::-1][:3], list(run[qid].values()), rtol=1e-4)
    # It says what it wrote, and the next command.
    said = capsys.readouterr().out
    assert "npy/vectors.npy" in said and f"{tmp_path}/npy/{{name}}.npy" in said


def test_what_does_not_fit_is_refused(built, tmp_path):
    with pytest.raises(ValueError, match="exports as npy or milvus"):
        export(built / "dense", tmp_path / "no", "ciff")
    with pytest.raises(ValueError, match="term 1 is named 'a b'"):
        check_names(["a", "a b"], [0, 1])
    assert not (tmp_path / "no").exists()
    ignored = f"--index {built}/sparse --format milvus --queries /nonexistent --model /nope --out X"
    with pytest.raises(SystemExit, match="--out X, --queries /nonexistent, --model /nope: --format milvus"):
        main(ignored.split())
    with pytest.raises(SystemExit, match="--model /nope encodes queries"):
        main(f"--index {built}/sparse --format npz --out {tmp_path}/no --model /nope".split())


def test_names_are_checked_where_they_are_parted(tmp_path):
    """A topic is one line of words, Lucene's documents are words; CIFF's names have a length."""
    names = ["cat", "\n\n", "new york"]
    clean, blank = (torch.tensor([[1.0, weight, 0]]).to_sparse_csr() for weight in (0, 1.0))

    def write(format, document, query):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        ix = SparseIndex.of(document, ["d"])
        source = Source(ix, Documents(ix, folder), names, ["q"] if query is not None else [], query, 1.0)
        FORMATS[format].write(source, folder)
        return folder

    for format in ("anserini", "ciff"):
        # Names that nobody uses do no harm.
        assert (write(format, clean, clean) / "topics.tsv").read_text() == "q\tcat\n"
        with pytest.raises(ValueError, match="term 1 is named .* seismic or npz"):
            write(format, clean, blank)
    assert read_ciff(write("ciff", blank, None) / "index.ciff") == {"d": {"cat": 1, "\n\n": 1}}
    with pytest.raises(ValueError, match="term 1 is named .* seismic or npz"):
        write("anserini", blank, None)


@pytest.mark.parametrize("head, format", [("sparse", "npz"), ("dense", "npy")])
def test_the_printed_search_runs(built, queries, tmp_path, capsys, head, format):
    """And is printed only if there are queries to search with."""
    pytest.importorskip({"npz": "scipy", "npy": "faiss"}[format])
    main(f"--index {built}/{head} --format {format} --out {tmp_path}/without".split())
    said = capsys.readouterr().out
    assert "python" not in said and "queries.np" not in said and "--queries FILE" in said
    main(f"--index {built}/{head} --format {format} --out {tmp_path}/with --queries {queries}".split())
    program = re.search(r"^python -c '(.*?)'$", capsys.readouterr().out, re.S | re.M)[1]
    exec(program, {})
    assert capsys.readouterr().out


def test_milvus_lines_load_what_the_index_knows(built, corpus, tmp_path, monkeypatch):
    """BM25's words by tools.bm25; a model with the head that it was told when the index was built."""
    asked = []
    client = SimpleNamespace(search=lambda *args, **options: asked.append(args[1]),
                             hybrid_search=lambda *args, **options: None)
    milvus = {"MilvusClient": lambda uri: client, "AnnSearchRequest": lambda *args: None,
              "RRFRanker": lambda k: None}
    monkeypatch.setitem(sys.modules, "pymilvus", SimpleNamespace(**milvus))
    words = bm25.build(corpus, tmp_path / "bm25")
    for folder in (words, built / "sparse"):
        lines = milvus_lines([folder, built / "dense"], "./milvus.db", "passages")
        exec(lines.replace("how do tides work", "the cat sat"), {})
    terms = [vocabulary(words)[term] for term in asked[0][0]]
    assert sorted(terms) == ["cat", "sat"] and len(asked) == 4
    # Each of what the manifest holds.
    manifest = {"encoder": {"model": "m", "adapter": "it's", "base": "b", "head": "dense"}}
    assert loaded_by("ix", manifest) == """Retriever.load('m', adapter="it's", base='b', head='dense')"""
    assert loaded_by("ix", {"encoder": {"model": "m", "adapter": None}}) == "Retriever.load('m')"


def read_ciff(path):
    """{docid: {term: tf}} through Google's protobuf, from the format's published description."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.internal.decoder import _DecodeVarint32
    int32, int64, double, string, message = 5, 3, 1, 9, 11
    file = descriptor_pb2.FileDescriptorProto(name="ciff.proto", package="ciff", syntax="proto3")
    messages = {"Header": [int32, int32, int32, int32, int32, int64, double, string],
                "Posting": [int32, int32], "PostingsList": [string, int64, int64, message],
                "DocRecord": [int32, string, int32]}
    for name, kinds in messages.items():
        fields = file.message_type.add(name=name).field
        for number, kind in enumerate(kinds, 1):
            field = fields.add(name=f"f{number}", number=number, type=kind, label=3 if kind == message else 1)
            if kind == message:
                field.type_name = ".ciff.Posting"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    data, at = path.read_bytes(), 0

    def read(name):
        nonlocal at
        size, at = _DecodeVarint32(data, at)
        kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ciff.{name}"))
        found = kind.FromString(data[at:at + size])
        at += size
        return found

    header = read("Header")
    postings, out = [], {}
    terms = [read("PostingsList") for _ in range(header.f2)]
    docs = [read("DocRecord") for _ in range(header.f3)]
    assert at == len(data) and header.f1 == 1 and [d.f1 for d in docs] == list(range(len(docs)))
    assert [t.f1.encode() for t in terms] == sorted(t.f1.encode() for t in terms)
    out = {d.f2: {} for d in docs}
    for term in terms:
        row = 0
        assert term.f2 == len(term.f4) and term.f3 == sum(p.f2 for p in term.f4)
        for posting in term.f4:
            row += posting.f1
            out[docs[row].f2][term.f1] = posting.f2
    assert [d.f3 for d in docs] == [sum(out[d.f2].values()) for d in docs]
    assert header.f6 == sum(d.f3 for d in docs)
    return out
