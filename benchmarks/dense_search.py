"""Exact dense search on CPU beside faiss IndexFlatIP, ms a query.

    python benchmarks/dense_search.py                                  # 50,000 x 2048, about a minute
    python benchmarks/dense_search.py --docs 200000 --threads 1        # the targets' size, 3.5 GB
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from index import DenseIndex

TARGETS = {1: 0.97, 32: 8.0, 128: 3.4}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--docs", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="both take their turn in every round; medians over the rounds are printed")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    import faiss
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)

    torch.manual_seed(0)
    centre = torch.randn(args.width)  # embeddings of texts lie in a cone, not all around
    vectors = torch.randn(args.docs, args.width) + 0.7 * centre
    flat = faiss.IndexFlatIP(args.width)
    flat.add(vectors.numpy())
    ix = DenseIndex(vectors)
    print(f"{args.docs:,} documents x {args.width}, fp32, k {args.k}, {args.threads} thread(s); faiss {faiss.__version__}")
    # One thread: processor time, which a busy machine does not inflate. Several: the clock on the wall is what matters.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    for batch in args.batch:
        queries = torch.randn(batch, args.width) + 0.7 * centre
        calls = {"faiss": lambda: flat.search(queries.numpy(), args.k)[1], "DenseIndex": lambda: ix.search(queries, args.k)[1].numpy()}
        found = {name: call() for name, call in calls.items()}
        assert (found["faiss"] == found["DenseIndex"]).mean() > 0.99, "they find other documents"  # float sums in another order may swap neighbours
        times, turns = {name: [] for name in calls}, max(1, 16 // batch)  # one query alone is too short a turn to time
        for _ in range(args.rounds):
            for name, call in calls.items():
                began = clock()
                for _ in range(turns):
                    call()
                times[name].append((clock() - began) * 1000 / batch / turns)
        theirs, ours = (float(np.median(times[name])) for name in calls)
        target = TARGETS.get(batch)
        print(f"batch {batch:>4}: faiss {theirs:8.2f}   DenseIndex {ours:8.2f} ms a query   {theirs / ours:5.2f}x"
              + (f"   target >= {target}x, {'met' if theirs / ours >= target else 'MISSED'}" if target else ""))


if __name__ == "__main__":
    main()
