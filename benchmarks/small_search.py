"""Small collections, where the fixed cost of a query is all there is: BM25 search beside bm25s, ms a query.

    python benchmarks/small_search.py --corpus ../shared/data/scifact    # 5,183 abstracts, 1,109 queries
    python benchmarks/small_search.py --corpus data/demo --queries data/demo/queries.test.jsonl

The same analyzer, k1 and b on both sides, one thread, all queries in one call; texts are analyzed before the
clock starts. Medians of interleaved rounds. bm25s knows no weights of query terms, so it adds less.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bm25s
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Corpus, read_queries
from index import open_index
from tools import bm25


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--queries", type=Path, help="the corpus' folder without it")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    corpus, texts = Corpus(args.corpus), list(read_queries(args.queries or args.corpus).values())
    with tempfile.TemporaryDirectory() as folder:
        bm25.build(args.corpus, f"{folder}/bm25", stemming=True)
        ix, words = open_index(f"{folder}/bm25"), bm25.Words(f"{folder}/bm25")
        ways = our_ways(ix, words, texts) | their_ways(corpus, texts)
        print(f"\n{len(corpus):,} passages, {len(texts):,} queries, one thread, ms a query, {args.rounds} "
              "rounds")
        for k in (10, 1000):
            seconds = {name: [] for name in ways}
            for round_number in range(args.rounds + 1):
                # Everyone takes a turn in every round, so that what else the machine does hits all alike.
                for name, way in ways.items():
                    began = time.perf_counter()
                    way(k)
                    # The first one compiles numba's loops.
                    if round_number:
                        seconds[name].append(time.perf_counter() - began)
            ms = {name: 1000 * statistics.median(times) / len(texts) for name, times in seconds.items()}
            cells = [f"{name} {value:.3f} ({value / ms['here']:.2f}x of ours)" for name, value in ms.items()]
            print(f"k {k:<5} {', '.join(cells)}")


def our_ways(ix, words, texts) -> dict:
    queries = words.encode(texts)
    return {"here": lambda k: ix.search(queries, k, threads=1)}


def their_ways(corpus: Corpus, texts: list[str]) -> dict:
    documents = [bm25.analyze(corpus[row], True) for row in range(len(corpus))]
    queries = [bm25.analyze(text, True) for text in texts]
    ways = {}
    for backend in ("numpy", "numba"):
        retriever = bm25s.BM25(method="lucene", k1=0.9, b=0.4, backend=backend)
        retriever.index(documents, show_progress=False)

        def search(k, retriever=retriever, backend=backend):
            # 0 is its way without a pool of threads.
            threads = 0 if backend == "numpy" else 1
            retriever.retrieve(queries, k=min(k, len(documents)), show_progress=False, n_threads=threads)
        ways[f"bm25s {backend}"] = search
    return ways


if __name__ == "__main__":
    main()
