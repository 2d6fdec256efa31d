"""index.py against brute force in float64, scipy, faiss, bm25s, protobuf, and against itself under kills,
shards and ranks."""
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import index
from conftest import ROOT, documents, run, torchrun
from data import checksum
from evaluate import read_run
from index import (CHUNK, DenseIndex, SparseIndex, build, main, open_index, products, read_manifest, search,
                   top_k)
from tools import bm25


def random_csr(rng, n, n_terms, per_row, whole=False):
    """CSR with skewed terms, empty rows, and weights that are whole numbers (ties!) or not."""
    rows = [np.unique((n_terms * rng.random(rng.integers(0, per_row)) ** 3).astype(np.int32))
            for _ in range(n)]
    indices = np.concatenate([*rows, np.zeros(0, np.int32)])
    if whole:
        values = rng.integers(1, 4, len(indices)).astype(np.float32)
    else:
        values = np.log1p(rng.gamma(1.0, 1.0, len(indices))).astype(np.float32) + 1e-3
    return np.cumsum([0, *map(len, rows)]), indices, values


def dense_of(csr, n_terms):
    out = np.zeros((len(csr[0]) - 1, n_terms))
    for i, (s, e) in enumerate(zip(csr[0], csr[0][1:])):
        out[i, csr[1][s:e]] = csr[2][s:e]
    return out


def brute_force(docs, queries, n_terms, k):
    """Scores and rows in float64, by a full sort; nothing that scores zero."""
    scores = dense_of(queries, n_terms) @ dense_of(docs, n_terms).T
    out = []
    for line in scores:
        # lexsort's last key comes first: by score, and among equals by row.
        order = np.lexsort((np.arange(len(line)), -line))[:k]
        out.append([(int(row), line[row]) for row in order if line[row] > 0])
    return out


def lists(scores, rows):
    pairs = zip(rows.tolist(), scores.tolist())
    return [[(row, score) for row, score in zip(r, s) if row >= 0] for r, s in pairs]


def same(found, wanted, tolerance=1e-5):
    """Equal scores; and equal rows but where float64 sees two scores closer than float32 can tell apart."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert len(a) == len(b)
        exact = dict(b)
        for (row, score), (other, truth) in zip(a, b):
            assert abs(score - truth) < tolerance
            assert row == other or abs(exact.get(row, truth) - truth) < tolerance


@pytest.fixture
def command(monkeypatch):
    """`python index.py ARGS`, without the five seconds that a process takes to start."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["index.py", *map(str, args)])
        main()
    return call


@pytest.mark.parametrize("k", [1, 10, 100, 5000])
def test_sparse_search_is_brute_force(k):
    rng = np.random.default_rng(0)
    docs, queries = random_csr(rng, 3000, 500, 60), random_csr(rng, 20, 500, 30)
    found = SparseIndex.from_csr(*docs, 500).search(queries, k)
    assert found[0].shape == found[1].shape == (20, k)
    same(lists(*found), brute_force(docs, queries, 500, k))


@pytest.mark.parametrize("k", [1, 7, 50, 700])
def test_ties_go_to_the_lower_row(k):
    rng = np.random.default_rng(1)
    # Sums of small whole numbers: exact, and equal by the hundred
    docs, queries = random_csr(rng, 5000, 30, 6, whole=True), random_csr(rng, 30, 30, 6, whole=True)
    wanted = brute_force(docs, queries, 30, k)
    assert lists(*SparseIndex.from_csr(*docs, 30).search(queries, k)) == wanted
    q, d = dense_of(queries, 30), dense_of(docs, 30)
    order = np.lexsort((np.broadcast_to(np.arange(5000), (30, 5000)), -(q @ d.T)))[:, :k]
    assert np.array_equal(DenseIndex.of(d.astype(np.float32)).search(q, k)[1].numpy(), order)


def test_threads_groups_and_the_order_of_terms_give_the_same_bits():
    rng = np.random.default_rng(2)
    docs, queries = random_csr(rng, 4000, 300, 50), random_csr(rng, 33, 300, 30)
    ix = SparseIndex.from_csr(*docs, 300)
    one = ix.search(queries, 200, threads=1)
    pieces = [slice(start, end) for start, end in zip(queries[0], queries[0][1:])]
    alone = [ix.search(([0, s.stop - s.start], queries[1][s], queries[2][s]), 200) for s in pieces]
    for other in (ix.search(queries, 200, threads=3), [torch.cat(found) for found in zip(*alone)]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    shuffled = [(queries[0]), queries[1].copy(), queries[2].copy()]
    # A query is a set: the order of its terms must not reach the sums.
    for s, e in zip(queries[0], queries[0][1:]):
        shuffled[1][s:e], shuffled[2][s:e] = queries[1][s:e][::-1], queries[2][s:e][::-1]
    assert torch.equal(one[0], ix.search(shuffled, 200)[0])


@pytest.mark.parametrize("n", [0, 1, 7, 64, 65, 1000, 9000])
@pytest.mark.parametrize("k", [1, 8, 100, 10_000])
def test_top_k_is_a_stable_sort(n, k):
    rng = np.random.default_rng(n + k)
    scores = torch.from_numpy(rng.integers(0, 50, (3, n)).astype(np.float32))
    best, columns = top_k(scores, k, torch.tensor([-np.inf, 10.0, 60.0]))
    few = top_k(scores, k, torch.tensor([-np.inf, 10.0, 60.0]), few=True)
    assert torch.equal(best, few[0]) and torch.equal(columns, few[1])
    # One row goes a shorter way.
    assert torch.equal(best[1:2], top_k(scores[1:2], k, torch.tensor([10.0]))[0])
    for b, above in enumerate([-np.inf, 10.0, 60.0]):
        order = [c for c in np.argsort(-scores[b].numpy(), kind="stable") if scores[b, c] > above][:k]
        assert columns[b].tolist() == order + [-1] * (k - len(order))
        assert best[b, :len(order)].tolist() == scores[b, order].tolist()
        assert (best[b, len(order):] == -np.inf).all()


def test_the_edges():
    none = np.array([0]), np.zeros(0, np.int32), np.zeros(0, np.float32)
    empty = SparseIndex.from_csr(*none, 10)
    scores, rows = empty.search(([0, 1], [3], [1.0]), 5)
    assert rows.tolist() == [[-1] * 5]
    one = SparseIndex.from_csr([0, 2], [1, 3], [1.0, 2.0], 10, docids=["only"])
    # A match, an empty query, a term nobody has.
    assert lists(*one.search(([0, 1, 1, 2], [3, 7], [0.5, 1.0]), 5)) == [[(0, 1.0)], [], []]
    assert one.search(none, 5)[0].shape == (0, 5)
    nobody = DenseIndex.of(np.zeros((0, 4), np.float32))
    assert nobody.search(np.ones((2, 4)), 3)[1].tolist() == [[-1] * 3] * 2
    refused = [([3, 10], [1.0, 1.0], "term 10 .* outside the vocabulary of 10 terms"),
               ([3, -1], [1.0, 1.0], "term -1 .* outside"), ([3, 4], [1.0, np.nan], "weight nan.* finite"),
               ([3, 4], [1.0, np.inf], "weight inf.* finite"),
               ([3, 4], [1.0, -1.0], "weight -1.0.* not negative")]
    for indices, values, words in refused:
        with pytest.raises(ValueError, match=f"document row 1: .*{words}"):
            SparseIndex.from_csr([0, 1, 2], indices, values, 10)
        with pytest.raises(ValueError, match=f"query 1: .*{words}"):
            one.search(([0, 1, 2], indices, values), 5)
    with pytest.raises(ValueError, match="document row 1 holds term 4 twice"):
        SparseIndex.from_csr([0, 1, 3], [4, 4, 4], [1.0, 1.0, 1.0], 10)
    # What fp16 does not hold would be infinite; what it would round to zero keeps some weight.
    with pytest.raises(ValueError, match="document row 1: term 4 with weight 100000.0, .* of fp16"):
        SparseIndex.from_csr([0, 1, 2], [4, 4], [1.0, 1e5], 10, dtype="fp16")
    for dtype in ("fp16", "int8"):
        small = SparseIndex.from_csr([0, 1, 2, 3], [4, 4, 4], [1e-8, 0.0, 65504.0], 10, dtype=dtype)
        assert small.search(([0, 1], [4], [1.0]), 3)[1].tolist() == [[2, 0, -1]]
    with pytest.raises(ValueError, match="document row 2 .* NaN"):
        DenseIndex.of(np.array([[1.0], [2.0], [np.nan], [3.0]], np.float32)).search(np.ones((1, 1)), 2)
    with pytest.raises(ValueError, match="4 wide"):
        DenseIndex.of(np.zeros((3, 4), np.float32)).search(np.ones((1, 5)))
    with pytest.raises(ValueError, match="float64"):
        DenseIndex.of(np.zeros((3, 4)))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_saved_and_opened(tmp_path, dtype):
    rng = np.random.default_rng(3)
    docs, queries = random_csr(rng, 2000, 200, 40), random_csr(rng, 10, 200, 20)
    ix = SparseIndex.from_csr(*docs, 200, docids=[f"d{i}é" for i in range(2000)], dtype=dtype)
    back = SparseIndex.open(ix.save(tmp_path / "ix"))
    assert all(torch.equal(a, b) for a, b in zip(ix.search(queries, 50), back.search(queries, 50)))
    assert list(back.docids) == [f"d{i}é" for i in range(2000)]
    per_posting = sum(f.stat().st_size for f in (tmp_path / "ix").glob("[rw]*.npy")) / len(docs[1])
    assert per_posting < {"fp32": 8.1, "fp16": 6.1, "int8": 5.1}[dtype]
    stored = dense_of(docs, 200)  # exact for what is stored, whatever that is
    for row, terms, weights in documents(back):
        error = np.abs(stored[row, terms.numpy()] - weights.numpy())
        allowed = {"fp32": 0, "fp16": 1e-3 * stored[row].max(initial=0), "int8": docs[2].max() / 255}[dtype]
        assert (stored[row] > 0).sum() == len(terms) and (error <= allowed).all()
        stored[row, terms.numpy()] = weights.numpy()
    # Brute force over the rounded weights: what rounding costs was bounded above, here search adds nothing.
    held = stored.nonzero()
    as_stored = docs[0], held[1].astype(np.int32), stored[held].astype(np.float32)
    same(lists(*back.search(queries, 50)), brute_force(as_stored, queries, 200, 50))


def test_damage_is_named(tmp_path, command):
    rng = np.random.default_rng(4)
    sparse = SparseIndex.from_csr(*random_csr(rng, 100, 50, 20), 50)
    for kind, ix in (("sparse", sparse), ("dense", DenseIndex.of(rng.random((100, 8), np.float32)))):
        folder = ix.save(tmp_path / kind)
        with pytest.raises(ValueError, match="exists"):
            ix.save(folder)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # new times, same bytes: fine
        assert open_index(copy).n_docs == 100
        for name in json.loads((copy / "manifest.json").read_text())["files"]:
            whole = (copy / name).read_bytes()
            (copy / name).write_bytes(whole[:-1])
            with pytest.raises(ValueError, match=f"{name}: .* bytes, and .* were written"):
                open_index(copy)
            (copy / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
            with pytest.raises(ValueError, match=f"{name}: altered"):
                open_index(copy)
            stat = (folder / name).stat()
            # Damage under an unchanged time: for tools.check, which reads it all.
            os.utime(copy / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            with pytest.raises(ValueError, match=f"{name}: altered"):
                read_manifest(copy, full=True)
            (copy / name).unlink()
            with pytest.raises(ValueError, match=f"{name}: missing"):
                open_index(copy)
            (copy / name).write_bytes(whole)
        shutil.rmtree(copy)
    (folder / "vectors.npy").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = run("-m", "tools.check", folder, check=False)
    assert done.returncode == 1 and "vectors.npy: altered" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [5, CHUNK, 2 * CHUNK + 77])
def test_dense_search_is_faiss(tmp_path, dtype, n):
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(n)
    vectors = torch.from_numpy(rng.standard_normal((n, 24), np.float32)).to(dtype)
    queries = rng.standard_normal((9, 24), np.float32)
    flat = faiss.IndexFlatIP(24)
    flat.add(vectors.float().numpy())
    wanted = flat.search(queries, 200)
    for ix in (DenseIndex.of(vectors), DenseIndex.open(DenseIndex.of(vectors).save(tmp_path / "ix"))):
        scores, rows = ix.search(queries, 200, batch=4)
        there = rows.numpy() >= 0
        assert np.array_equal(there, wanted[1] >= 0)
        assert np.abs(scores.numpy() - wanted[0])[there].max() < 1e-4
        # Neighbours whose sums differ in the last bit may have changed places.
        for ours, theirs in zip(rows.tolist(), wanted[1].tolist()):
            assert len(set(ours) ^ set(theirs)) <= 2 and np.mean(np.array(ours) == theirs) > 0.97


@pytest.mark.parametrize("onednn", [True, False])
def test_products_are_those_of_64_bits(monkeypatch, onednn):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    torch.manual_seed(0)
    for n, B in ((1, 1), (64, 1), (63, 3), (2048 + 65, 1), (5000, 9)):
        queries, vectors = torch.randn(B, 48), torch.randn(n, 48).half()
        assert (products(queries, vectors) - queries.double() @ vectors.double().T).abs().max() < 1e-4


# From a model: build, kill, resume, ranks, search, explain.


def test_build_holds_what_the_model_says(tmp_path, built, tiny_model, corpus):
    from data import Corpus
    from model import Retriever
    for head in ("sparse", "dense"):
        r, docs = Retriever.load(tiny_model, head=head), Corpus(corpus)
        wanted = r.encode(docs.texts(range(101)), "passage").to_dense()
        ix = open_index(built / head)
        assert [ix.docids[i] for i in range(101)] == [f"p{i * 3}" for i in range(101)]
        if head == "dense":
            got = ix.vectors
        else:
            got = torch.stack([torch.zeros(r.width).index_put((t,), w) for _, t, w in documents(ix)])
        assert (got - wanted).abs().max() < 1e-5
        queries = dict(line.split("\t") for line in (corpus / "queries.tsv").read_text().splitlines())
        scores = r.encode(list(queries.values()), "query").to_dense().double() @ wanted.double().T
        found = search(built / head, corpus / "queries.tsv", k=1000)
        for i, qid in enumerate(queries):
            assert len(found[qid]) == (int((scores[i] > 0).sum()) if head == "sparse" else 101)
            for docid, score in found[qid].items():
                assert abs(score - scores[i, int(docid[1:]) // 3]) < 1e-4
            assert list(found[qid].values()) == sorted(found[qid].values(), reverse=True)
        assert search(built / head, corpus / "queries.tsv", k=1000, out=tmp_path / f"{head}.trec") == {}
        assert read_run(tmp_path / f"{head}.trec") == found
        costs = json.loads((tmp_path / f"{head}.trec.json").read_text())
        assert costs["run"] == checksum(tmp_path / f"{head}.trec")
        assert costs["ms_per_query"] == pytest.approx(sum(costs["ms"].values()))


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "manifest.json"}


KILL = """
import os, index
real, calls = index.csr_of, []
def dies(*args):
    calls.append(args)
    if len(calls) == 3: os.kill(os.getpid(), 9)
    return real(*args)
index.csr_of = dies
index.main()
"""


TWO_RANKS = """
import sys, index
sys.argv = sys.argv[1:]
index.dist.destroy_process_group = lambda: None  # one launch, four commands: joined once, left at the exit
while sys.argv:
    end = sys.argv.index(";")
    if end == len(sys.argv) - 1:  # for the last of them only rank 0's GPU has room
        index.Index.fits = property(lambda ix: index.rank_and_world()[0] == 0, lambda ix, fits: None)
    rest, sys.argv = sys.argv[end + 1:], ["index.py", *sys.argv[:end]]
    index.main()
    sys.argv = rest
"""


def test_five_shards_two_ranks_a_kill_and_a_resume(tmp_path, built, tiny_model, corpus):
    common = dict(head="sparse", dtype="fp32", device="cpu", tokens_per_batch=64)
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    first = ["build", "--model", tiny_model, "--corpus", corpus, "--out", sparse, "--shard_docs", 21]
    first += [x for key, value in common.items() for x in (f"--{key}", value)]
    assert run("-c", KILL, *first, check=False).returncode == -signal.SIGKILL and not sparse.exists()
    # Killed within the third of five.
    assert len([*(tmp_path / "sparse.shards").glob("*.npz")]) == 2
    with pytest.raises(ValueError, match="begun with shard_docs = 21, now it is 20"):
        build(tiny_model, corpus, sparse, shard_docs=20, **common)
    build(tiny_model, corpus, dense, shard_docs=21, **{**common, "head": "dense"})
    common_words = ["--queries", corpus / "queries.tsv", "--k", 40, "--batch", 2, "--device", "cpu", ";"]
    searches = [["search", "--index", ix, "--out", f"{out}.trec", *common_words]
                for ix, out in ((sparse, sparse), (dense, dense), (sparse, tmp_path / "unlike"))]
    (tmp_path / "two.py").write_text(TWO_RANKS)
    torchrun(2, tmp_path / "two.py", *first, ";", *sum(searches, []), env={"PYTHONPATH": str(ROOT)})
    # Ranks that disagreed on the size of a batch would leave out queries.
    assert list(read_run(tmp_path / "unlike.trec")) == ["q1", "q2", "q3", "q4"]
    for out in (sparse, dense):
        assert not out.with_suffix(".shards").exists()
        ours, whole = contents(out), contents(built / out.name)
        assert ours.keys() == whole.keys() and ours["docids.npy"] == whole["docids.npy"]
        a, b = open_index(out), open_index(built / out.name)
        if out == sparse:
            # Every passage once, each in its row.
            assert ours["starts.npy"] == whole["starts.npy"] and ours["rows.npy"] == whole["rows.npy"]
        # Other batches: other last bits, no more.
        assert ((a.weights - b.weights) if out == sparse else (a.vectors - b.vectors)).abs().max() < 1e-5
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the ranks have it: with two, the encoder's sums round otherwise
        one, two = search(out, corpus / "queries.tsv", k=40, batch=2), read_run(f"{out}.trec")
        torch.set_num_threads(threads)
        # In the order of their hits, too.
        assert one.keys() == two.keys()
        assert all(list(one[qid].items()) == list(two[qid].items()) for qid in one)


def test_whose_queries(tmp_path, built, tiny_model, corpus):
    """An index made from arrays takes a model by name; one of BM25 weights takes none."""
    saved = open_index(built / "sparse")
    bare = SparseIndex(saved.arrays, 101, saved.docids).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="give --model"):
        search(bare, {"q": "the cat"})
    assert search(bare, {"q": "the cat"}, model=str(tiny_model)) == search(built / "sparse", {"q": "the cat"})
    # Another model encodes as the index's own did.
    manifest = read_manifest(built / "sparse")
    manifest["encoder"] |= {"attn": "eager", "compute": "bf16"}
    r = index.query_encoder(built / "sparse", manifest, str(tiny_model))
    assert (r.llama.dtype, r.llama.config._attn_implementation) == (torch.bfloat16, "eager")
    with pytest.raises(ValueError, match="BM25 weights"):
        search(bm25.build(corpus, tmp_path / "bm25"), {"q": "the cat"}, model=str(tiny_model))


class Ones:
    """Encodes every text as the vector (1)."""
    def encode(self, texts, kind, max_length):
        return torch.ones(len(texts), 1)


def test_rows_of_one_id_count_once_by_the_best(tmp_path, monkeypatch):
    """As the chunks of a document do. And --threads are those of a product, until it is done."""
    ix = DenseIndex.of(torch.tensor([[1.0], [3.0], [2.0], [5.0]]), ["doc1", "doc2", "doc2", "doc1"])
    folder, seen, before = ix.save(tmp_path / "ix"), [], torch.get_num_threads()

    def counted(queries, vectors):
        seen.append(torch.get_num_threads())
        return products(queries, vectors)

    monkeypatch.setattr(index, "products", counted)
    found = search(folder, {"q": ""}, encoder=Ones(), device="cpu", threads=before + 1)
    assert list(found["q"].items()) == [("doc1", 5.0), ("doc2", 3.0)]
    assert seen == [before + 1] and torch.get_num_threads() == before
    # What no run can hold.
    for qid in ("the cat", "#1"):
        with pytest.raises(ValueError, match=f"'{qid}' cannot be"):
            search(folder, {qid: ""}, out=tmp_path / "run", encoder=Ones(), device="cpu")
    with pytest.raises(ValueError, match="is a folder"):
        search(folder, {"q": ""}, out=tmp_path, encoder=None, device="cpu")


def test_vectors_larger_than_the_gpu_are_copied_there_once(monkeypatch, built, corpus):
    whole = search(built / "dense", corpus / "queries.tsv", k=50, batch=2)
    opened, copies = open_index(built / "dense"), []
    opened.fits = False

    def counted(queries, vectors):
        copies.append(len(queries))
        return products(queries, vectors)

    monkeypatch.setattr(index, "products", counted)
    streamed = search(built / "dense", corpus / "queries.tsv", k=50, batch=2, opener=lambda *args: opened)
    assert copies == [4]  # all four queries at once
    for qid, docs in whole.items():
        assert list(docs) == list(streamed[qid]) and all(abs(docs[d] - streamed[qid][d]) < 1e-5 for d in docs)


def test_top_terms_and_impacts(tmp_path, tiny_model, corpus, built):
    options = {"head": "sparse", "dtype": "int8", "top_terms": 9, "device": "cpu"}
    # A slash at the end, as a shell completes a name: what lies beside the folder must not lie within.
    ix = open_index(build(str(tiny_model), corpus, f"{tmp_path}/ix/", **options))
    full = {row: (t, w) for row, t, w in documents(open_index(built / "sparse"))}
    for row, terms, weights in documents(ix):
        t, w = full[row]
        kept = set(t[w.argsort(descending=True)[:9]].tolist())
        assert set(terms.tolist()) == kept and len(kept) == min(9, len(t))
