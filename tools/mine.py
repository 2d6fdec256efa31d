"""Hard negatives out of any run file, as training rows.

    python -m tools.mine --run R.trec --qrels qrels.train.tsv --queries queries.train.tsv --out train.jsonl

A row is a known positive with passages that the run ranks high and that nobody calls relevant. The run has to
be over the training queries; a second round, mined from a run of your own model, is better than one from
BM25."""

import argparse
import json

import numpy as np
from tqdm import tqdm

from data import Corpus, Help, natural, positive, positive_int, read_queries, run_command, write_whole
from evaluate import Pairs, read_pairs, read_qrels


class Rankings:
    """A run, one query at a time: {docid: score}, best first. The run stays in columns, a tenth of nested
    dicts."""

    def __init__(self, run: Pairs):
        self.run = run
        self.place = {qid: k for k, qid in enumerate(run.qids)}
        # By query, best first; the sort is stable, so that ties stay in the order of the file.
        self.order = np.lexsort((-run.value, run.query))
        self.edges = np.searchsorted(run.query[self.order], np.arange(len(run.qids) + 1))

    def __contains__(self, qid: str) -> bool:
        return qid in self.place

    def __getitem__(self, qid: str) -> dict[str, float]:
        k = self.place[qid]
        # Ids become strings for one query at a time: as bytes in one array they take far less memory.
        lines = self.order[self.edges[k]:self.edges[k + 1]]
        docids = [docid.decode() for docid in self.run.docid[lines].tolist()]
        return dict(zip(docids, self.run.value[lines].tolist()))


class Count(dict):
    """What became of everything, in the words of the report."""

    def __missing__(self, key: str) -> int:
        return 0

    def __str__(self) -> str:
        return ", ".join(f"{value:,} {key}" for key, value in self.items() if value)


def known(docids: list[str], corpus: Corpus | None, count: Count) -> list[str]:
    """Those that the corpus has; without a corpus, all."""
    if corpus is None:
        return docids
    kept = [docid for docid, row in zip(docids, corpus.find(docids).tolist()) if row >= 0]
    count["unknown passages"] += len(docids) - len(kept)
    return kept


def far_below(relevant: str, ranked: list[str], ranking: dict, args) -> list[str]:
    """Those of the ranked whose score is at most --max_score_ratio times that of the relevant one."""
    # A share of a negative score lies above it, and of zero it is zero: the bar would mean nothing.
    if ranking[relevant] <= 0:
        raise ValueError(f"{args.run}: the positive {relevant!r} has the score {ranking[relevant]}; "
                         f"--max_score_ratio needs scores above 0")
    # What scores nearly as high as the known answer is likely an answer that nobody has judged.
    bar = args.max_score_ratio * ranking[relevant]
    return [docid for docid in ranked if ranking[docid] <= bar]


def mine(args) -> Count:
    """Write the rows; return the report's numbers."""
    rankings, qrels = Rankings(read_pairs(args.run, "run")), read_qrels(args.qrels)
    queries = args.queries and read_queries(args.queries)
    corpus = args.corpus and Corpus(args.corpus)
    rng, count = np.random.default_rng(args.seed), Count(rows=0, negatives=0)
    needs_score = args.scores or args.max_score_ratio
    with write_whole(args.out) as out:
        for qid, grades in tqdm(qrels.items(), desc="mining", unit=" queries", disable=None):
            if qid not in rankings:
                count["queries without a ranking"] += 1
                continue
            if queries and qid not in queries:
                count["queries without a text"] += 1
                continue

            # What an assessor graded above 0 is no negative, even below --min_grade. A grade of 0 is the best
            # negative.
            ranking = rankings[qid]
            ranked = [docid for docid in list(ranking)[args.skip_top:args.depth] if grades.get(docid, 0) <= 0]
            ranked = known(ranked, corpus, count)
            positives = [docid for docid, grade in grades.items() if grade >= args.min_grade]
            for relevant in known(positives, corpus, count):
                # Outside the run it has no score, and ranks below everything that the run kept.
                if needs_score and relevant not in ranking:
                    count["positives outside the run"] += 1
                    continue
                far = far_below(relevant, ranked, ranking, args) if args.max_score_ratio else ranked
                count["negatives too close to the positive"] += len(ranked) - len(far)
                if not far:
                    count["positives without a negative left"] += 1
                    continue

                # Drawn at random, written in the order of their ranks.
                drawn = [far[k] for k in sorted(rng.permutation(len(far))[:args.negatives])]
                row = {"qid": qid, "query": queries[qid]} if queries else {"qid": qid}
                row |= {"pos": [relevant], "neg": drawn}
                if args.scores:
                    scores = [ranking[docid] for docid in drawn]
                    row |= {"pos_scores": [ranking[relevant]], "neg_scores": scores}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count["rows"] += 1
                count["negatives"] += len(drawn)
        if not count["rows"]:
            raise ValueError(f"{args.run}: no row can be made with {args.qrels} ({count}); "
                             f"do both name the same queries and passages?")
    return count


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m tools.mine", description=__doc__.split("\n")[0],
                                allow_abbrev=False, formatter_class=Help)
    p.add_argument("--run", required=True, help="TREC run over the training queries")
    p.add_argument("--qrels", required=True)
    p.add_argument("--queries", help="texts to write into the rows; without it they hold qids, and train.py "
                   "needs --queries")
    p.add_argument("--corpus", help="leave out (and count) passages that it lacks")
    p.add_argument("--out", required=True)
    g = p.add_argument_group("which negatives")
    g.add_argument("--negatives", type=positive_int, default=32,
                   help="at most so many a row, drawn at random from what the flags below leave")
    g.add_argument("--skip_top", type=natural, default=0,
                   help="leave out so many top ranks, where unjudged positives hide")
    g.add_argument("--depth", type=positive_int, default=200, help="and everything below this rank")
    g.add_argument("--max_score_ratio", type=positive, metavar="SHARE",
                   help="leave out what scores above this share of the positive's score: likely a positive, "
                   "too (0.95 is common)")
    g.add_argument("--min_grade", type=positive_int, default=1,
                   help="from which grade on a passage is a positive (2 for TREC DL)")
    g.add_argument("--scores", action="store_true",
                   help="write the run's scores as the teacher's; positives that the run lacks are left out")
    g.add_argument("--seed", type=natural, default=0)
    args = p.parse_args(argv)
    print(f"{args.out}: {mine(args)}")


if __name__ == "__main__":
    run_command("tools.mine", main)
