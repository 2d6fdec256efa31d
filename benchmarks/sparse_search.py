"""Exact sparse search beside its peers, ms a query.

    python benchmarks/sparse_search.py                               # 200,000 documents, three minutes
    python benchmarks/sparse_search.py --docs 1000000                # the targets' size, on one core
    python benchmarks/sparse_search.py --docs 1000000 --threads 2    # two queries at once, both sides
    python benchmarks/sparse_search.py --docs 8800000 --queries 256 --device cuda    # MS MARCO's size

On a GPU the peer is a plain torch loop on the same GPU.

On Zen 4 numpy's argpartition, a part of the authors' loop, is two and a half times slower with AVX-512 than
without. To see their loop at its best: NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL" python
benchmarks/sparse_search.py --docs 1000000

bm25s' kernel knows no query weights: it adds the same lists with weight one, and what it finds is compared
with a search that does so too. PISA is left out: the one wheel of it (pyterrier-pisa) wants a libtbb.so.2
that systems no longer ship."""

import argparse
import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from index import SparseIndex

VOCAB = 128_256
OURS, AUTHORS, NAIVE = "SparseIndex", "authors' numba loop", "torch, naive"


def collection(n_docs: int, n_queries: int, seed: int = 0):
    """Documents and queries as CSR, alike learned sparse vectors in what decides speed: a Zipf-like
    vocabulary of which most is never used, about 155 terms a document with a spread, topics that make terms
    occur together, weights as log1p of a skewed positive number and higher for rare terms, queries written
    from one document (its strong terms, then expansion from its topic, then common terms)."""
    rng = np.random.default_rng(seed)
    used, topics, per_topic = 40_000, 1000, 800
    # Token ids do not descend with frequency here: the harder case.
    ids = rng.permutation(VOCAB)[:used]
    zipf = 1 / (np.arange(used) + 20) ** 0.95
    # Drawing from a table is drawing an index.
    table = rng.choice(used, 1 << 20, p=zipf / zipf.sum()).astype(np.int32)
    topic_terms = np.minimum((used * rng.random((topics, per_topic)) ** 2).astype(np.int32), used - 1)
    rarity = (0.35 + 0.9 * np.log1p(np.arange(used)) / np.log1p(used)).astype(np.float32)

    def draw(topic, n_common, n_topical, gain):
        """For each of len(topic) texts `n_common` terms of the whole vocabulary and `n_topical` of its
        topic's, made unique: (text, term, weight)."""
        n = len(topic)
        common = table[rng.integers(0, len(table), (n, n_common))]
        place = (per_topic * rng.random((n, n_topical)) ** 1.5).astype(np.int32)
        topical = topic_terms[topic[:, None], place]
        terms = np.concatenate([common, topical], 1)
        # Short texts and long ones.
        terms[rng.random(terms.shape, dtype=np.float32) > rng.uniform(0.6, 1.0, (n, 1))] = used
        terms.sort(axis=1)
        keep = terms < used
        # Each term once.
        keep[:, 1:] &= terms[:, 1:] != terms[:, :-1]
        text, term = keep.nonzero()[0], terms[keep]
        skewed = rng.standard_gamma(0.8, len(term)).astype(np.float32)
        return text, term, np.log1p(gain * rarity[term] * skewed + 0.02).astype(np.float32)

    # Of every document that a query is written from, what the query needs to know.
    counts, terms, weights, kept = [], [], [], {}
    sources = np.sort(rng.choice(n_docs, n_queries, replace=n_queries > n_docs))
    for lo in range(0, n_docs, 50_000):
        n = min(50_000, n_docs - lo)
        topic = rng.integers(0, topics, n)
        text, term, weight = draw(topic, 150, 52, 2.5)
        ends = np.searchsorted(text, np.arange(n + 1))
        for s in sources[(sources >= lo) & (sources < lo + n)].tolist():
            a, b = ends[s - lo], ends[s - lo + 1]
            kept[s] = topic[s - lo], term[a:b], weight[a:b]
        counts.append(np.diff(ends)), terms.append(ids[term].astype(np.int32)), weights.append(weight)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    docs = starts, np.concatenate(terms), np.concatenate(weights)

    q_ptr, q_terms, q_weights = [0], [], []
    for s in sources.tolist():
        topic, term, weight = kept[s]
        own = rng.choice(len(term), min(len(term), 20), replace=False, p=weight / weight.sum())
        _, more, low = draw(np.array([topic]), 13, 13, 0.8)
        vector = dict(zip(more.tolist(), low.tolist()))
        vector |= zip(term[own].tolist(), (1.2 * weight[own]).tolist())
        q_terms += ids[list(vector)].tolist()
        q_weights += vector.values()
        q_ptr.append(len(q_terms))
    return docs, (np.array(q_ptr), np.array(q_terms, dtype=np.int32), np.array(q_weights, dtype=np.float32))


def authors_loop(starts, rows, weights, n_docs):
    """The authors' algorithm, restated: posting lists in a numba loop, candidates by argwhere, the best by
    argpartition, then sorted."""
    import numba

    @numba.njit(nogil=True, fastmath=False)
    def add(starts, rows, weights, terms, values, scores):
        for i in range(len(terms)):
            for p in range(starts[terms[i]], starts[terms[i] + 1]):
                scores[rows[p]] += values[i] * weights[p]

    def search(terms, values, k):
        scores = np.zeros(n_docs, np.float32)
        add(starts, rows, weights, terms, values, scores)
        found = np.argwhere(scores > 0)[:, 0]
        if len(found) > k:
            found = found[np.argpartition(-scores[found], k)[:k]]
        return found[np.argsort(-scores[found])]
    return search


def scipys(starts, rows, weights, n_docs):
    from scipy import sparse
    columns = sparse.csr_matrix((weights, rows, starts), shape=(VOCAB, n_docs))

    def search(terms, values, k):
        scores = columns[terms].T @ values
        best = np.argpartition(-scores, min(k, n_docs - 1))[:k]
        return best[np.argsort(-scores[best])]
    return search


def naive_torch(starts, rows, weights, n_docs, device="cpu"):
    starts = starts.tolist()
    rows, weights = torch.from_numpy(rows).to(device), torch.from_numpy(weights).to(device)

    def search(terms, values, k):
        scores = torch.zeros(n_docs, device=device)
        for t, w in zip(terms.tolist(), values.tolist()):
            s, e = starts[t], starts[t + 1]
            scores.index_add_(0, rows[s:e], weights[s:e], alpha=w)
        return scores.topk(k).indices.cpu()
    return search


def bm25s_kernel(starts, rows, weights, n_docs):
    from bm25s.numba.retrieve_utils import _retrieve_internal_jitted_serial as kernel

    def search(terms, values, k):
        return kernel(terms, np.array([0, len(terms)]), k, True, np.dtype("float32"), np.dtype("int32"),
                      weights, starts, rows, n_docs)[1][0]
    return search


def transposed(docs, n_docs):
    """(starts, rows, weights) by scipy, so that the peers do not lean on what is measured."""
    from scipy import sparse
    indptr, indices, values = docs
    columns = sparse.csr_matrix((values, indices, indptr), shape=(n_docs, VOCAB)).tocsc()
    return columns.indptr, columns.indices, columns.data


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--docs", type=int, default=200_000,
                        help="1000000 is the size of the targets, and takes 8 GB and ten minutes")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5,
                        help="every searcher takes its turn in every round; medians over them are printed")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1,
                        help="queries searched at once, by SparseIndex and by the authors' loop")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)

    began = time.perf_counter()
    docs, queries = collection(args.docs, args.queries, args.seed)
    indptr, terms, weights = queries
    print(f"{args.docs:,} documents x {len(docs[1]) / args.docs:.0f} terms, {args.queries} queries x "
          f"{len(terms) / args.queries:.0f} terms (made in {time.perf_counter() - began:.0f} s)")
    began = time.process_time()
    ix = SparseIndex.from_csr(*docs, VOCAB)
    print(f"inverted: {(time.process_time() - began) * 1e9 / len(docs[1]):.0f} ns a posting (target <= 100), "
          f"{sum(array.nbytes for array in ix.arrays) / len(docs[1]):.2f} bytes a posting (target <= 8.1)")
    df = np.diff(np.array(ix.starts))[terms]
    print(f"postings touched: {df.sum() / args.queries:,.0f} a query; the longest list holds "
          f"{df.max() / args.docs:.0%} of the documents\n")

    makers = {AUTHORS: authors_loop, "bm25s' kernel": bm25s_kernel, "scipy": scipys, NAIVE: naive_torch}
    if args.device == "cuda":
        ix, on_cpu = SparseIndex(ix.arrays, ix.n_docs, device="cuda"), ix
        makers = {NAIVE: functools.partial(naive_torch, device="cuda")}
        few = indptr[:9], terms, weights
        same = [torch.equal(a, b) for a, b in zip(ix.search(few, 1000), on_cpu.search(few, 1000))]
        assert all(same), "the GPU finds other bits than the CPU"
        print(f"{torch.cuda.get_device_name()}, {torch.cuda.memory_allocated() / 2**30:.1f} GiB held; the "
              "first 8 queries give the CPU's scores to the bit")
    # The peers share one copy of the lists, and the documents go: at a million they are 1.2 GB.
    lists = transposed(docs, args.docs)
    peers = {name: make(*lists, args.docs) for name, make in makers.items()}
    del docs, lists
    # bm25s' kernel knows no weights in a query: its answers are compared with those of weights 1.
    one_each = indptr, terms, np.ones_like(weights)

    def each(search, k, threads=1):
        """A peer's answers to all queries."""
        spans = list(zip(indptr, indptr[1:]))
        if threads == 1:
            return [search(terms[s:e], weights[s:e], k) for s, e in spans]
        # numba, as torch, lets go of Python's lock while it adds.
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda span: search(terms[slice(*span)], weights[slice(*span)], k), spans))

    calls = {OURS: lambda k: ix.search(queries, k, threads=args.threads)}
    calls |= {name: functools.partial(each, peer) for name, peer in peers.items()}
    rival = AUTHORS if args.device == "cpu" else NAIVE
    if args.threads > 1 and args.device == "cpu":
        rival = f"{AUTHORS}, {args.threads} threads"
        calls[rival] = lambda k: each(peers[AUTHORS], k, args.threads)
    for k in args.k:
        # Warms caches and compilers, and shows that all answer alike.
        found = {name: call(k) for name, call in calls.items()}
        ours, unweighted = found.pop(OURS)[1].numpy(), ix.search(one_each, k)[1].numpy()
        for name, theirs in found.items():
            same = unweighted if name.startswith("bm25s") else ours
            shared = np.mean([len(np.intersect1d(np.asarray(a), b)) / k for a, b in zip(theirs, same)])
            assert shared > 0.999, f"{name} finds other documents: {shared:.3%} shared"
        report(k, calls, rival, args)


def report(k, calls, rival, args):
    """Let everyone take turns, and print the medians with the targets."""
    # One thread: processor time, which a busy machine does not inflate. Several: the clock on the wall.
    on_cpu = args.device == "cpu"
    clock = time.process_time if args.threads == 1 and on_cpu else time.perf_counter
    times = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            began = clock()
            call(k)
            times[name].append((clock() - began) * 1000 / args.queries)
    middle = {name: float(np.median(t)) for name, t in times.items()}
    print(f"k = {k:<26}ms a query   {rival} / this")
    for name, ms in sorted(middle.items(), key=lambda item: item[1]):
        print(f"  {name:<28}{ms:8.2f}{middle[rival] / ms:14.2f}x")
    if not on_cpu:
        # Results come back to the CPU, so the clock has waited for the GPU.
        print(f"  {1000 / middle[OURS]:,.0f} queries a second; target with 8.8 M documents: >= 2,500\n")
        return
    ratio = middle[rival] / middle[OURS]
    targets = {f"{args.threads} threads each": 2.4}
    if args.threads == 1:
        targets = {"simple path": 1.7, "best path": {10: 3.5, 1000: 1.9}.get(k, 1.7)}
    for what, least in targets.items():
        print(f"  target, {what}: >= {least}x, {'met' if ratio >= least else 'MISSED'}")
    print()


if __name__ == "__main__":
    main()
