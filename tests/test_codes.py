"""tools/codes.py: 8-bit codes find what 64 bits find."""
import math
import shutil

import numpy as np
import pytest
import torch

import index
from index import DenseIndex
from tools import codes
from tools.codes import CodedIndex, CodedQueries, Codes, multiplies_bytes


def awkward(kind, n=3000, width=40):
    """Vectors and queries that 8-bit codes find hard; whole numbers, so that equal scores are really
    equal."""
    rng = np.random.default_rng(len(kind))
    vectors, queries = (torch.from_numpy(rng.integers(-20, 21, (m, width)).astype(np.float32))
                        for m in (n, 11))
    if kind == "copies":
        vectors = vectors[torch.arange(n) % 7]
    # From 1e-3 to 1e6, and nothing at all.
    elif kind == "lengths":
        vectors *= 10.0 ** torch.arange(-3, 7)[torch.arange(n) % 10, None]
        vectors[::5] = 0
    # As the massive activations of language models.
    elif kind == "outliers":
        vectors[:, 3] += 5000
        vectors[::9, 7] *= 1000
        queries[:, 5] *= 300
    elif kind == "cone":
        vectors, queries = vectors + 1000, queries + 1000
    # No whole numbers: their mean and their scores are rounded.
    elif kind == "one point":
        vectors = torch.from_numpy(rng.standard_normal((1, width), np.float32)).expand(n, width).clone()
        queries = torch.from_numpy(rng.standard_normal((11, width), np.float32))
    queries[4] = 0
    return vectors, queries


@pytest.fixture
def bytes_multiply(monkeypatch):
    """Also where the processor can't: there torch._int_mm adds wrongly, and whole numbers stand in for it."""
    if not multiplies_bytes():
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
        monkeypatch.setattr(codes, "multiplies_bytes", lambda: True)


def test_bytes_multiply_only_where_they_do_it_right():
    a, b = (torch.randint(-127, 128, (n, 2048), dtype=torch.int8, generator=torch.Generator().manual_seed(n))
            for n in (100, 33))
    a[:9] = 127
    b[::4] = -127
    right = all(torch.equal(torch._int_mm(a, b[:n].T), a.int() @ b[:n].T.int()) for n in (1, 8, 33))
    assert right or not multiplies_bytes()


@pytest.mark.parametrize("kind", ["plain", "copies", "lengths", "outliers", "cone", "one point"])
@pytest.mark.parametrize("k", [1, 5, 2999])
def test_codes_find_what_64_bits_find(monkeypatch, bytes_multiply, tmp_path, kind, k):
    vectors, queries = awkward(kind)
    ix, coded = CodedIndex.of(vectors), CodedQueries(Codes.of(vectors), queries)
    monkeypatch.setattr(CodedIndex, "uses_codes", lambda self, k: True)  # however few they are
    true = queries.double() @ vectors.double().T
    assert (coded.bounds(0, 3000) >= torch.stack([coded.in_units(column) for column in true.T], 1)).all()
    # The lower row first among equals.
    order = np.lexsort((np.broadcast_to(np.arange(3000), true.shape), -true.float().numpy()))[:, :k]
    DenseIndex.of(vectors).save(tmp_path / "ix")
    codes.add(tmp_path / "ix")
    back = CodedIndex.open(tmp_path / "ix")
    for searched, step, batch in ((ix, 1 << 22, 128), (ix, 7000, 5), (back, 1 << 22, 1)):
        monkeypatch.setattr(codes, "BOUNDS", step)
        scores, rows = searched.search(queries, k, batch)
        assert np.array_equal(rows.numpy(), order)
        assert torch.equal(scores, true.float().gather(1, torch.from_numpy(order)))


def test_codes_leave_most_vectors_alone(monkeypatch, bytes_multiply):
    torch.manual_seed(0)
    # Directions of unlike weight, as embeddings have.
    spread = torch.arange(1, 65) ** -0.45
    vectors, queries = torch.randn(20_000, 64) * spread, torch.randn(8, 64) * spread
    ix = CodedIndex.of(vectors)
    looked_up, double = [], torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda x: (looked_up.append(len(x)), double(x))[1])
    scores, rows = ix.search(queries, 40)
    monkeypatch.undo()
    wanted = DenseIndex.of(vectors).search(queries, 40)
    assert torch.equal(rows, wanted[1]) and (scores - wanted[0]).abs().max() < 1e-5
    assert 8 * 40 < sum(looked_up) < 8 * 400, "8 queries, 20,000 documents: a fiftieth of them is plenty"
    with pytest.raises(ValueError, match="document row 3 .*infinity"):
        Codes.of(torch.tensor([[1.0], [2.0], [0.0], [math.inf]]))


def test_codes_of_a_built_index(tmp_path, built, bytes_multiply, monkeypatch):
    """Added beside it, found again, and refused when damaged or of other vectors."""
    folder = shutil.copytree(built / "dense", tmp_path / "ix")
    with pytest.raises(ValueError, match="has no codes: python -m tools.codes add"):
        CodedIndex.open(folder)
    codes.main(["add", "--index", str(folder)])
    with pytest.raises(ValueError, match="ix.codes exists; remove it to"):
        codes.add(folder)
    ix = CodedIndex.open(folder)
    assert (tmp_path / "ix.codes" / "codes.npy").stat().st_size < 1.1 * 101 * ix.vectors.shape[1] + 128
    rest = ix.vectors.float() - ix.codes.centre - ix.codes.parts[:, :1] * ix.codes.codes
    assert (rest.abs() <= 0.501 * ix.codes.parts[:, :1]).all()
    assert (rest.norm(dim=1) <= ix.codes.parts[:, 1]).all()
    queries = {"q": "the cat sat", "r": "dense vectors"}
    monkeypatch.setattr(CodedIndex, "uses_codes", lambda self, k: True)
    plain, coded = index.search(folder, queries, k=20), codes.search(folder, queries, k=20)
    for qid in queries:
        assert list(plain[qid]) == list(coded[qid])
        assert list(plain[qid].values()) == pytest.approx(list(coded[qid].values()), abs=1e-5)
    whole = (tmp_path / "ix.codes" / "codes.npy").read_bytes()
    (tmp_path / "ix.codes" / "codes.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="codes.npy: altered"):
        CodedIndex.open(folder)
    shutil.rmtree(folder)
    DenseIndex.of(ix.vectors * 2).save(folder)
    with pytest.raises(ValueError, match="codes of other vectors"):
        CodedIndex.open(folder)
