"""What grows faster than the work? Time and memory of what holds much at once, at 1, 4 and 16 times a size.

    python benchmarks/growth.py             # ten minutes
    python benchmarks/growth.py --unit 0.1  # in miniature

BM25's build, a search that writes its run, evaluation, mining, and the store of training rows. Each runs
in a process of its own; memory is the anonymous memory beyond what its imports hold, which pages of
mapped files do not count to. `power` is the exponent of growth from 1x to 16x: 1 is in step with the
work, 0 is none, above 1 is a fault.
"""
import argparse
import json
import math
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from corpus import write_collection
from data import Corpus, TrainingRows
from evaluate import find_hits, measure as score, read_pairs
from scale import measure
from tools import bm25, mine


def write_run(path: Path, queries: int, hits: int, passages: int) -> None:
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for q in range(queries):
            for rank, docid in enumerate(rng.permutation(passages)[:hits].tolist(), 1):
                file.write(f"q{q} Q0 {docid} {rank} {1000 - rank + 0.25} run\n")


def write_qrels(path: Path, queries: int, passages: int) -> None:
    rng = random.Random(0)
    path.write_text("".join(f"q{q} 0 {rng.randrange(passages)} 1\n" for q in range(queries)))


def write_queries(path: Path, queries: int) -> None:
    rng = random.Random(0)
    words = [a + b + c for a in "bdfglmnt" for b in "aeiou" for c in ("", "ra", "ni", "so")]
    path.write_text("".join(f"q{q}\t{' '.join(rng.choices(words, k=6))}\n" for q in range(queries)))


# A task prepares its input in `prepare`, which is not measured, and does its work in `run`, which is.


class BuildBM25:
    name = "BM25 build, passages"
    base = 10_000

    def prepare(self, folder, n):
        write_collection(folder / "collection.tsv", n)
        Corpus(folder / "collection.tsv")

    def run(self, folder, n):
        bm25.build(folder / "collection.tsv", folder / "bm25")


class SearchToRun:
    name = "search to a run of k 1000, queries"
    base = 250

    def prepare(self, folder, n):
        BuildBM25().prepare(folder, 20_000)
        BuildBM25().run(folder, 20_000)
        write_queries(folder / "queries.tsv", n)

    def run(self, folder, n):
        bm25.search(folder / "bm25", folder / "queries.tsv", 1000, folder / "run.trec", threads=1)


class Evaluate:
    name = "evaluation of k 1000, queries"
    base = 250

    def prepare(self, folder, n):
        write_run(folder / "run.trec", n, 1000, 100_000)
        write_qrels(folder / "qrels.tsv", n, 100_000)

    def run(self, folder, n):
        hits = find_hits(read_pairs(folder / "qrels.tsv", "qrels"), read_pairs(folder / "run.trec", "run"))
        for metric in ("mrr@10", "ndcg@10", "recall@1000"):
            score(hits, metric)


class Mine:
    name = "mining of 200 a query, queries"
    base = 1000

    def prepare(self, folder, n):
        write_run(folder / "run.trec", n, 200, 100_000)
        write_qrels(folder / "qrels.tsv", n, 100_000)
        write_queries(folder / "queries.tsv", n)

    def run(self, folder, n):
        mine.main(["--run", str(folder / "run.trec"), "--qrels", str(folder / "qrels.tsv"),
                   "--queries", str(folder / "queries.tsv"), "--out", str(folder / "rows.jsonl")])


class Rows:
    name = "training rows of 200 negatives, rows"
    base = 1000

    def prepare(self, folder, n):
        write_collection(folder / "collection.tsv", 100_000)
        Corpus(folder / "collection.tsv")
        rng = np.random.default_rng(0)
        with open(folder / "rows.jsonl", "w") as file:
            for row in range(n):
                first, *others = map(str, rng.integers(0, 100_000, 201).tolist())
                record = {"query": f"what is {row}", "pos": [first], "neg": others}
                file.write(json.dumps(record) + "\n")

    def run(self, folder, n):
        TrainingRows(folder / "rows.jsonl", Corpus(folder / "collection.tsv"))


TASKS = (BuildBM25, SearchToRun, Evaluate, Mine, Rows)


def prepared(task, folder: Path, n: int) -> dict:
    task().prepare(folder, n)
    return {}


def done(task, folder: Path, n: int) -> dict:
    task().run(folder, n)
    return {}


def nothing(folder: Path, n: int) -> dict:
    return {}


def power(first: float, last: float) -> float:
    """The exponent of growth over sixteen times the work."""
    return math.log(max(last, 1e-9) / max(first, 1e-9)) / math.log(16)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--unit", type=float, default=1.0, help="multiplies every size (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("growth"), help="made, and removed (%(default)s)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    # What every process holds before it works.
    imports = measure(nothing, args.folder, 0)["anonymous"]
    print(f"{'':<40}{'1x':>20}{'4x':>20}{'16x':>20}   power of time, memory")
    for task in TASKS:
        seconds, peaks = [], []
        for times in (1, 4, 16):
            folder, n = args.folder / f"{task.__name__}{times}", round(args.unit * task.base * times)
            folder.mkdir()
            # In a process of its own as well: what it leaves in memory is not the work's.
            measure(partial(prepared, task), folder, n)
            found = measure(partial(done, task), folder, n)
            shutil.rmtree(folder)
            seconds.append(found["seconds"])
            peaks.append(max(0, found["anonymous"] - imports))
        cells = "".join(f"{s:>9.1f} s {peak / 1e6:>6.0f} MB" for s, peak in zip(seconds, peaks))
        print(f"{task.name} {task.base * args.unit:,.0f}".ljust(40) + cells
              + f"   {power(seconds[0], seconds[-1]):.2f}, {power(peaks[0], peaks[-1]):.2f}", flush=True)
    args.folder.rmdir()


if __name__ == "__main__":
    main()
