"""From a run file to its scores: evaluate.py beside pytrec_eval and ranx, reading included.

    python benchmarks/evaluate.py                     # 1,000 queries x 1,000 results, about a minute
    python benchmarks/evaluate.py --queries 6980      # MS MARCO dev: 7 million lines, 250 MB

Each measurement is a fresh process, so that nobody profits from another's memory, and the ways take turns.
Imports are not counted, and ranx has compiled itself on a small run before its clock starts. pytrec_eval
reads with its own `parse_run`, ranx with `from_file`. Target: faster than pytrec_eval. Means are compared,
too, and a way that disagrees is named.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
METRICS = ["mrr", "ndcg@10", "recall@1000"]


def write_files(folder: Path, queries: int, k: int, distinct: int):
    """Runs with MS MARCO's ids and a retriever's scores, rounded so that some results tie; one relevant
    passage a query, mostly near the top."""
    rng = np.random.default_rng(0)
    with open(folder / "run", "w") as run, open(folder / "qrels", "w") as qrels:
        for q in range(queries):
            docs = rng.choice(8_841_823, k, replace=False).tolist()
            scores = np.sort(np.round(rng.normal(20, 3, k) * distinct) / distinct)[::-1].tolist()
            run.writelines(f"{1000 + 7 * q} Q0 {d} {i} {s:.6f} run\n"
                           for i, (d, s) in enumerate(zip(docs, scores), 1))
            qrels.write(f"{1000 + 7 * q} 0 {docs[min(int(rng.exponential(30)), k - 1)]} 1\n")


def ours(folder):
    from evaluate import find_hits, measure, read_pairs
    start = time.perf_counter()
    qrels, run = read_pairs(folder / "qrels", "qrels"), read_pairs(folder / "run", "run")
    read = time.perf_counter()
    hits = find_hits(qrels, run)
    return start, read, [float(measure(hits, metric).mean()) for metric in METRICS]


def pytrec_eval(folder):
    import pytrec_eval
    start = time.perf_counter()
    with open(folder / "qrels") as qrels_file, open(folder / "run") as run_file:
        qrels, run = pytrec_eval.parse_qrel(qrels_file), pytrec_eval.parse_run(run_file)
    read = time.perf_counter()
    found = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank", "ndcg_cut.10", "recall.1000"}).evaluate(run)
    names = ("recip_rank", "ndcg_cut_10", "recall_1000")
    return start, read, [sum(query[name] for query in found.values()) / len(qrels) for name in names]


def ranx(folder):
    import ranx
    warm = ranx.Qrels({"q": {"a": 1}}), ranx.Run({"q": {"a": 1.0, "b": 0.5}})
    ranx.evaluate(*warm, METRICS)
    start = time.perf_counter()
    qrels = ranx.Qrels.from_file(str(folder / "qrels"), kind="trec")
    run = ranx.Run.from_file(str(folder / "run"), kind="trec")
    read = time.perf_counter()
    return start, read, list(ranx.evaluate(qrels, run, METRICS, make_comparable=True).values())


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--distinct", type=int, default=1_000_000,
                        help="scores are multiples of 1 / DISTINCT; 100 makes many ties")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["ours", "pytrec_eval", "ranx"])
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.one:
        sys.path[0] = str(ROOT)  # this folder holds an evaluate.py too
        start, read, means = globals()[args.one[0]](Path(args.one[1]))
        end = time.perf_counter()
        print(json.dumps({"read": read - start, "score": end - read, "total": end - start, "means": means,
                          "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
        return

    seen = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), args.queries, args.k, args.distinct)
        print(f"{args.queries * args.k:,} lines, {(Path(folder) / 'run').stat().st_size / 1e6:,.0f} MB, "
              f"{args.threads} thread, medians of {args.rounds} rounds")
        threads = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        env = {**os.environ, **dict.fromkeys(threads, str(args.threads))}
        for _ in range(args.rounds):
            for way in args.ways:
                out = subprocess.run([sys.executable, __file__, "--one", way, folder], env=env, text=True,
                                     capture_output=True, timeout=900)
                if out.returncode:
                    sys.exit(f"{way} failed:\n{out.stderr[-2000:]}")
                seen[way].append(json.loads(out.stdout.splitlines()[-1]))
    print(f"{'':12} {'read s':>8} {'score s':>8} {'total s':>8} {'peak MB':>8} {'x ours':>7}   "
          f"{'  '.join(METRICS)}")
    median = lambda way, key: statistics.median(one[key] for one in seen[way])
    for way in args.ways:
        # Ratios within a round, so that a busy moment slows both sides.
        ratio = statistics.median(a["total"] / b["total"] for a, b in zip(seen[way], seen[args.ways[0]]))
        print(f"{way:12} {median(way, 'read'):8.2f} {median(way, 'score'):8.2f} {median(way, 'total'):8.2f} "
              f"{median(way, 'peak_mb'):8.0f} {ratio:7.2f}   "
              + "  ".join(f"{mean:.6f}" for mean in seen[way][0]["means"]))
    for way in args.ways[1:]:
        if not np.allclose(seen[way][0]["means"], seen[args.ways[0]][0]["means"], atol=1e-9):
            print(f"{way} and {args.ways[0]} disagree"
                  + (": ranx leaves ties in its own order" if way == "ranx" else ""))
    if "pytrec_eval" in seen and "ours" in seen:
        ratio = median("pytrec_eval", "total") / median("ours", "total")
        print("target, faster than pytrec_eval end to end: "
              f"{'met' if ratio > 1 else 'MISSED'} ({ratio:.1f}x)")


if __name__ == "__main__":
    main()
