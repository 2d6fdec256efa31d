"""Run files and judgements in; numbers, tables and pictures that can go into a paper out.

    python evaluate.py --qrels Q --run bm25.trec dense.trec sparse.trec --metrics mrr@10 ndcg@10 recall@1000
    python evaluate.py --qrels dl19.qrels --run A --metrics ndcg@10 map recall@1000 --min_grade 2      # TREC DL: grade 1 is not relevant

What surprises:
- The numbers are trec_eval's (9.0, `-c`), digit for digit. It keeps scores as 32-bit floats, sorts them downwards, and orders equal scores by
  document id, downwards and as strings, whatever the rank column says. `--ties run_order` keeps the order of the lines, as MS MARCO's script does.
- Every query of the qrels counts, a query without results as 0. Queries without a relevant document score 0 in any run; trec_eval -c averages
  these zeros in, here they are left out and counted in the table's head.
- nDCG has linear gains and the ideal of all judged documents. `--min_grade` changes what binary measures count, never nDCG.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Pairs, read_pairs, read_queries, write_whole

METRICS = ("mrr", "ndcg", "recall", "p", "map", "success", "r_cap", "judged", "num_ret", "num_rel", "num_rel_ret")
NEED_CUT = ("p", "success", "r_cap", "judged")


class Hits(NamedTuple):
    """The judged documents that a run returned, the only lines that any measure depends on, and what it takes to normalise."""
    qids: list            # the n queries that have a relevant document
    query: np.ndarray     # (hits,) place in qids, ascending; within a query the hits go down the ranking
    rank: np.ndarray      # (hits,) from 0
    grade: np.ndarray     # (hits,)
    returned: np.ndarray  # (n,) documents returned
    judged: tuple         # (query, grade) of every judged document, the best grades of a query first


def evaluate(qrels, run, metrics: list, min_grade: int = 1, ties: str = "docid", depth: int | None = None) -> dict:
    """{metric: {qid: value}} for every query of the qrels that has a relevant document, 0 where the run returned nothing.
    qrels and run are {qid: {docid: grade or score}} or `Pairs`; only the first `depth` results of a query count (trec_eval -M).

    >>> qrels = {"q": {"a": 1, "b": 0, "c": 2}}
    >>> evaluate(qrels, {"q": {"b": 9.0, "a": 8.0, "x": 7.0}}, ["mrr@10", "recall@10", "p@2"])   # ranking b a x: first relevant at rank 2, one of two
    {'mrr@10': {'q': 0.5}, 'recall@10': {'q': 0.5}, 'p@2': {'q': 0.5}}
    >>> evaluate(qrels, {"q": {"a": 1.0, "c": 1.0}}, ["ndcg@10"])                                # a tie: c goes first, so the ranking is ideal
    {'ndcg@10': {'q': 1.0}}
    """
    hits = find_hits(qrels, run, ties, depth)
    return {metric: dict(zip(hits.qids, measure(hits, metric, min_grade).tolist())) for metric in metrics}


def find_hits(qrels, run, ties: str = "docid", depth: int | None = None) -> Hits:
    """Rank the run and look its documents up in the qrels, all queries at once."""
    qrels, run = (x if isinstance(x, Pairs) else Pairs.of(x) for x in (qrels, run))
    relevant = np.unique(qrels.query[qrels.value > 0])
    if not len(relevant):
        raise ValueError("no query of the qrels has a relevant document (a grade above 0); is this the right file?")
    place = np.full(len(qrels.qids), -1)
    place[relevant] = np.arange(len(relevant))
    lines = np.flatnonzero(place[qrels.query] >= 0)
    lines = lines[np.lexsort((-qrels.value[lines], qrels.query[lines]))]
    judged = place[qrels.query[lines]], qrels.value[lines]
    qids = [qrels.qids[i] for i in relevant]

    query, docid = run.query, run.docid
    with np.errstate(over="ignore"):  # beyond float32's range is a tie at infinity, there as here
        score = run.value.astype(np.float32)
    same = query[1:] == query[:-1]
    if (query[1:] < query[:-1]).any() or (same & (score[1:] > score[:-1])).any():  # most files are in order already, and sorting costs seconds
        order = np.lexsort((-score, query))
        query, docid, score = query[order], docid[order], score[order]
        same = query[1:] == query[:-1]
    tied = same & (score[1:] == score[:-1])
    if ties == "docid" and tied.any():
        spots = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        group = np.cumsum(np.append(True, ~tied))[spots]
        docid = docid.copy()
        docid[spots] = docid[spots[np.lexsort((docid[spots], -group))[::-1]]]  # backwards: groups up, ids down
    start = np.searchsorted(query, np.arange(len(run.qids) + 1))
    rank = np.arange(len(query)) - start[query]

    index = {qid: i for i, qid in enumerate(qids)}
    to = np.array([index.get(qid, -1) for qid in run.qids], dtype=np.int64)
    returned = np.zeros(len(qids), np.int64)
    returned[to[to >= 0]] = np.minimum(np.diff(start), depth or len(query))[to >= 0]
    keep = np.flatnonzero((to[query] >= 0) & (rank < (depth or len(query))))
    query, docid, rank = to[query[keep]], docid[keep], rank[keep]

    # The join: a run has millions of lines, the qrels thousands, so sort the qrels' keys and let every line look for its own.
    width = max(docid.itemsize, qrels.docid.itemsize)
    keys = Pairs(None, None, qrels.docid[lines], None).keys(judged[0], width)
    order = np.argsort(keys)
    found = order[np.searchsorted(keys[order], Pairs(None, None, docid, None).keys(query, width)).clip(max=len(keys) - 1)]
    hit = np.flatnonzero((judged[0][found] == query) & (qrels.docid[lines][found] == docid))
    hit = hit[np.lexsort((rank[hit], query[hit]))]
    return Hits(qids, query[hit], rank[hit], judged[1][found[hit]], returned, judged)


def measure(hits: Hits, metric: str, min_grade: int = 1) -> np.ndarray:
    """One value for each of hits.qids. `metric` is a name with or without a cut, "ndcg@10", "map"; R = relevant documents of the query:
    mrr 1 / rank of the first relevant; recall found / R; p found / k; r_cap found / min(R, k), BEIR's for TREC-COVID; success found > 0;
    map mean over R of precision at each relevant rank; ndcg sum of grade / log2(rank + 1) over the ideal's; judged share of the top k with a grade."""
    name, _, cut = metric.lower().partition("@")
    if name not in METRICS or cut and not re.fullmatch("[1-9][0-9]*", cut) or name in NEED_CUT and not cut:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}, and @k behind it ({', '.join(NEED_CUT)} need it), as in ndcg@10")
    n, k = len(hits.qids), int(cut) if cut else math.inf
    relevant = (hits.grade >= min_grade) & (hits.rank < k)
    query, rank = hits.query[relevant], hits.rank[relevant]
    found = np.bincount(query, minlength=n)
    total = np.bincount(hits.judged[0], hits.judged[1] >= min_grade, n)
    if name == "mrr":
        best = np.zeros(n)
        np.maximum.at(best, query, 1 / (rank + 1))
        return best
    if name == "map":
        nth = np.arange(len(query)) - np.searchsorted(query, query) + 1  # of the relevant documents of its query
        return np.bincount(query, nth / (rank + 1), n) / np.maximum(total, 1)
    if name == "ndcg":
        ideal_rank = np.arange(len(hits.judged[0])) - np.searchsorted(hits.judged[0], hits.judged[0])
        ideal = discounted(hits.judged[0], ideal_rank, hits.judged[1], k, n)
        return discounted(hits.query, hits.rank, hits.grade, k, n) / ideal
    return {"recall": lambda: found / np.maximum(total, 1), "p": lambda: found / k, "success": lambda: np.minimum(found, 1.0),
            "r_cap": lambda: found / np.maximum(np.minimum(total, k), 1), "judged": lambda: np.bincount(hits.query, hits.rank < k, n) / k,
            "num_rel": lambda: np.bincount(hits.judged[0], hits.judged[1] > 0, n), "num_rel_ret": lambda: found, "num_ret": lambda: np.minimum(hits.returned, k)}[name]()


def discounted(query, rank, grade, k, n):
    """(n,) sums of gain / log2(rank + 2) over the ranks 0 to k - 1; a negative grade gains nothing, as in trec_eval."""
    return np.bincount(query, np.where(rank < k, np.maximum(grade, 0) / np.log2(rank + 2.0), 0), n)
