"""tools/export.py, read back by scipy, numpy and protobuf."""
import json

import numpy as np
import pytest

from conftest import read_jsonl
from index import open_index
from tools.export import export, main


def test_exports(tmp_path, built):
    from scipy import sparse
    ix = open_index(built / "sparse")
    names, docs = json.loads((built / "sparse" / "vocab.json").read_text()), {ix.docids[r]: (t, w) for r, t, w in ix.documents(0, 101)}
    for format in ("anserini", "seismic", "ciff", "npz"):
        export(built / "sparse", tmp_path / format, format)
    matrix = sparse.load_npz(tmp_path / "npz" / "vectors.npz")
    assert matrix.shape == (101, len(names)) and matrix.has_sorted_indices
    ids = (tmp_path / "npz" / "docids.txt").read_text().split("\n")[:-1]
    for i, docid in enumerate(ids):
        assert matrix[i].indices.tolist() == docs[docid][0].tolist() and matrix[i].data.tolist() == docs[docid][1].tolist()
    for line in read_jsonl(tmp_path / "seismic" / "vectors.jsonl"):
        t, w = docs[line["id"]]
        assert line["vector"] == {names[a]: b for a, b in zip(t.tolist(), w.tolist())}
    impacts = {}
    for line in read_jsonl(tmp_path / "anserini" / "vectors.jsonl"):
        t, w = docs[line["id"]]
        impacts[line["id"]] = line["vector"]
        assert line["contents"] == "" and set(line["vector"]) == {names[a] for a in t.tolist()}
        for a, b in zip(t.tolist(), w.tolist()):
            assert type(line["vector"][names[a]]) is int and abs(line["vector"][names[a]] - max(1, 100 * b)) < 0.501
    assert read_ciff(tmp_path / "ciff" / "index.ciff") == {d: v for d, v in impacts.items()}
    main(["--index", str(built / "dense"), "--format", "npy", "--out", str(tmp_path / "npy")])  # one through the command line
    assert np.array_equal(np.load(tmp_path / "npy" / "vectors.npy"), open_index(built / "dense").vectors.numpy())
    with pytest.raises(ValueError, match="exports as npy"):
        export(built / "dense", tmp_path / "no", "ciff")


def read_ciff(path):
    """{docid: {term: tf}} through Google's protobuf, from the format's published description."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory
    from google.protobuf.internal.decoder import _DecodeVarint32
    int32, int64, double, string, message = 5, 3, 1, 9, 11
    file = descriptor_pb2.FileDescriptorProto(name="ciff.proto", package="ciff", syntax="proto3")
    for name, kinds in {"Header": [int32, int32, int32, int32, int32, int64, double, string], "Posting": [int32, int32],
                        "PostingsList": [string, int64, int64, message], "DocRecord": [int32, string, int32]}.items():
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
        found = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"ciff.{name}")).FromString(data[at:at + size])
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
    assert [d.f3 for d in docs] == [sum(out[d.f2].values()) for d in docs] and header.f6 == sum(d.f3 for d in docs)
    return out
