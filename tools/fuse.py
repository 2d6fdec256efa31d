"""One ranking from several: the sum of their scores, each run's brought to 0..1 for every query first.

    python -m tools.fuse --runs runs/bm25/dev.trec runs/sp-1b/dev.trec --out both.trec

A passage that a run lacks gets 0 from it, as the run's last passage does; a query whose passages a run scores
all alike gets 0 for each of them.
"""
import argparse

from data import Help, finite, positive, positive_int, run_command, write_run
from evaluate import read_run


def fuse(paths: list, weights: list[float] | None = None, scale: float = 1.0,
         k: int = 1000) -> tuple[dict, int]:
    """({qid: {docid: score}} with the k best of each query, how many queries are not in every run)."""
    weights = weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"--weights: {len(weights)} numbers for {len(paths)} runs")
    fused, times_seen = {}, {}
    for path, weight in zip(paths, weights):
        for qid, docs in read_run(path).items():
            times_seen[qid] = times_seen.get(qid, 0) + 1
            total = fused.setdefault(qid, {})
            # BM25's scores reach 30 and cosines 1: only on one scale can they be added. Scores that are all
            # alike have no range to divide by, and are 0 divided by 1.
            low, high = min(docs.values()), max(docs.values())
            for docid, value in docs.items():
                total[docid] = total.get(docid, 0.0) + scale * weight * (value - low) / (high - low or 1.0)
    best = {}
    for qid, docs in fused.items():
        # A stable sort: of equal sums the passage that an earlier run named comes first.
        ranked = sorted(docs.items(), key=lambda item: -item[1])
        best[qid] = dict(ranked[:k])
    return best, sum(times < len(paths) for times in times_seen.values())


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.fuse", description=__doc__.split("\n")[0],
                                allow_abbrev=False, formatter_class=Help)
    p.add_argument("--runs", nargs="+", required=True)
    p.add_argument("--weights", nargs="+", type=finite, help="one a run; all 1 without it")
    p.add_argument("--scale", type=positive, default=1.0,
                   help="multiplies the sum, which else lies between 0 and the number of runs")
    p.add_argument("--k", type=positive_int, default=1000, help="passages a query to keep")
    p.add_argument("--out", required=True)
    args = p.parse_args(argv)
    best, alone = fuse(args.runs, args.weights, args.scale, args.k)
    write_run(args.out, best, tag="fuse")
    print(f"{args.out}: {len(best):,} queries" + (f", {alone:,} of them not in every run" if alone else ""))


if __name__ == "__main__":
    run_command("tools.fuse", main)
