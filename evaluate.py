"""Run files and judgements in; numbers and tables that can go into a paper out.

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
import gzip
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

from data import open_bytes, read_queries, write_whole

# Runs and qrels: read_qrels, read_run.


class Pairs(NamedTuple):
    """A run or qrels in columns: line i says that query `qids[query[i]]` and document `docid[i]` have score or grade `value[i]`.
    Seven million lines are three arrays instead of seven million Python objects, and `evaluate` works on these."""
    qids: list[str]     # in order of first appearance
    query: np.ndarray   # int64, places in qids
    docid: np.ndarray   # fixed-width UTF-8 ("S8"): the order of bytes is the order of code points, and strcmp's, and so trec_eval's
    value: np.ndarray   # float64

    @classmethod
    def of(cls, nested: dict) -> "Pairs":
        """From {qid: {docid: value}}. A query without documents keeps its place in qids."""
        sizes = [len(docs) for docs in nested.values()]
        docids = np.array([docid.encode() for docs in nested.values() for docid in docs], dtype=np.bytes_)
        values = np.array([value for docs in nested.values() for value in docs.values()], dtype=np.float64)
        return cls(list(nested), np.repeat(np.arange(len(nested)), sizes), docids, values)

    def nested(self, kind=float) -> dict:
        """To {qid: {docid: value}}, in the order of the lines."""
        out = {qid: {} for qid in self.qids}
        for q, docid, value in zip(self.query.tolist(), self.docid.tolist(), self.value.tolist()):
            out[self.qids[q]][docid.decode()] = kind(value)
        return out

    def keys(self, query, width: int):
        """One 64-bit number for each (query, docid), so that joins and the search for repeats compare no strings. Equal pairs have equal keys;
        the reverse is only nearly certain, so whoever finds equal keys compares the strings. `width`: bytes a docid, on both sides of a join."""
        words = -(-width // 8)
        keys = query.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)  # else the bits of query 1 meet those of the id's last digit
        for word in self.docid.astype(f"S{words * 8}").view(np.uint64).reshape(-1, words).T:
            keys = (keys ^ word) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)  # products mix upwards only: bring the high bits down
        return keys


SHAPES = {  # kind of file -> number of columns -> (places of qid, docid and value; what a user calls the columns)
    "run": {6: ((0, 2, 4), "qid Q0 docid rank score tag"), 3: ((0, 1, 2), "qid docid rank")},
    "qrels": {4: ((0, 2, 3), "qid 0 docid grade"), 3: ((0, 1, 2), "qid docid grade")},
}


def read_pairs(path, kind: str) -> Pairs:
    """A "run" (TREC, or MS MARCO's three columns) or "qrels" (TREC, MS MARCO, BEIR with or without its header), with blanks or tabs, or
    {qid: {docid: value}} as JSON, gzipped or not. MS MARCO's rank r becomes the score -r."""
    seen, parts, n, header = {}, [], 0, 0
    for piece in _pieces(path):
        if not parts and piece.lstrip().startswith(b"{"):
            return _pairs_of_json(path, kind)
        if not n:
            header = int(kind == "qrels" and piece.startswith(b"query-id"))  # BEIR's
            piece = piece.split(b"\n", 1)[1] if header else piece
            n = len(piece.split(b"\n", 1)[0].split())
        piece = piece.rstrip() + b"\n"
        if piece == b"\n":
            continue
        if n not in SHAPES[kind]:
            wanted = " or ".join(f"{count} columns ({names})" for count, (_, names) in SHAPES[kind].items())
            raise ValueError(f"{path}:{1 + header}: expected {wanted} in {'a run' if kind == 'run' else 'qrels'}, got {n} columns")
        (qid_at, docid_at, value_at), names = SHAPES[kind][n]
        text = np.frombuffer(piece, np.uint8)
        black = text > 32
        edge = np.flatnonzero(np.append(black[0], black[1:] != black[:-1]))  # where a column starts, ends, starts, ...
        first, last, ends = edge[0::2], edge[1::2], np.flatnonzero(text == 10)
        if len(first) != n * len(ends) or (first[n - 1::n] > ends).any() or (first[n::n] < ends[:-1]).any():
            _blame(path, kind, n, header)

        def column(j):
            start, size = first[j::n], last[j::n] - first[j::n]
            width = size.max()
            chars = np.lib.stride_tricks.sliding_window_view(np.append(text, np.zeros(width, np.uint8)), width)[start]  # (lines, width)
            chars[np.arange(width) >= size[:, None]] = 0  # what stands behind the column in the text
            return chars.view(f"S{width}").ravel()

        qid = column(qid_at)
        heads = np.flatnonzero(np.append(True, qid[1:] != qid[:-1]))  # a query's lines mostly stand together: one look-up for each block
        codes = [seen.setdefault(name, len(seen)) for name in qid[heads].tolist()]
        try:
            value = _numbers(column(value_at))
        except ValueError:  # numpy names the word and not the line
            _blame(path, kind, n, header)
        if not np.isfinite(value).all() or _is_whole(kind, n) and (value != np.rint(value)).any():
            _blame(path, kind, n, header)
        parts.append((np.repeat(codes, np.diff(np.append(heads, len(qid)))), column(docid_at), -value if (kind, n) == ("run", 3) else value))
    if not parts:
        return Pairs.of({})
    pairs = Pairs([qid.decode() for qid in seen], *map(np.concatenate, zip(*parts)))
    keys = np.sort(pairs.keys(pairs.query, pairs.docid.itemsize))
    return pairs if (keys[1:] != keys[:-1]).all() else _without_repeats(path, kind, pairs, header)


def _pieces(path) -> Iterator[bytes]:
    """The file in pieces of whole lines. A piece that stays in the processor's cache is several times as fast to cut as all of a big file."""
    with open_bytes(path) as file:
        try:
            while piece := file.read(1 << 18):
                yield piece + file.readline()
        except (EOFError, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}: the gzip data end early or are damaged ({e}); fetch the file again") from e


def _numbers(words):
    """Words such as b"-12.345" as float64. At most 15 digits over a power of ten are two exact floats, and one division rounds their quotient as
    strtod would, in a third of the time; whatever looks otherwise, or is longer, goes to numpy."""
    if words.itemsize > 17:  # sign, point and 15 digits
        return words.astype(np.float64)
    n = len(words)
    whole, behind, digits, pointed, plain = np.zeros(n), np.zeros(n, np.int8), np.zeros(n, np.int8), np.zeros(n, bool), np.ones(n, bool)
    chars = np.ascontiguousarray(words.view(np.uint8).reshape(n, -1).T)  # (width, lines)
    for i, char in enumerate(chars):
        digit = char - np.uint8(48)  # wraps around: everything else lands above 9
        is_digit, is_point = digit < 10, char == 46
        plain &= is_digit | (is_point & ~pointed) | (char == 0) | ((char == 45) & (i == 0))
        whole = np.where(is_digit, 10 * whole + digit, whole)
        digits += is_digit
        behind += is_digit & pointed
        pointed |= is_point
    plain &= (digits > 0) & (digits <= 15)
    value = np.where(chars[0] == 45, -whole, whole) / 10.0 ** np.arange(18)[behind]
    value[~plain] = words[~plain].astype(np.float64)
    return value


def _is_whole(kind, n):
    return kind == "qrels" or n == 3  # grades and ranks are integers, scores are not


def _blame(path, kind, n, header):
    """Something in this file is off: read it once more, slowly, and say where, what was expected, and what stands there."""
    (*_, value_at), names = SHAPES[kind][n]
    for number, line in enumerate(b"".join(_pieces(path)).rstrip().split(b"\n")[header:], 1 + header):
        columns = [column.decode(errors="replace") for column in line.split()]
        if len(columns) != n:
            raise ValueError(f"{path}:{number}: expected {n} columns as in line {1 + header} ({names}), got {len(columns)}: {' '.join(columns)[:80]!r}")
        try:
            value = float(columns[value_at])
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or _is_whole(kind, n) and not value.is_integer():
            wanted = "an integer" if _is_whole(kind, n) else "a finite number"
            raise ValueError(f"{path}:{number}: expected {wanted} as {names.split()[value_at]} ({names}), got {columns[value_at]!r}")
    raise ValueError(f"{path}: holds control characters where only blanks, tabs and line ends may part the columns; is it a text file?")


def _without_repeats(path, kind, pairs, header):
    """A document twice in one query of a run is an error. In qrels the same judgement twice says nothing new, and only a contradiction is one."""
    first, keep = {}, []
    for i, pair in enumerate(zip(pairs.query.tolist(), pairs.docid.tolist())):
        j = first.setdefault(pair, i)
        if j == i:
            keep.append(i)
        elif kind == "run" or pairs.value[i] != pairs.value[j]:
            raise ValueError(f"{path}:{i + 1 + header}: document {pair[1].decode()!r} of query {pairs.qids[pair[0]]!r} "
                             f"stands in line {j + 1 + header} already; remove one of the two")
    return Pairs(pairs.qids, pairs.query[keep], pairs.docid[keep], pairs.value[keep])


def _pairs_of_json(path, kind):
    def once(items):  # Python's reader would keep the last of two equal names without a word
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object; remove one of the two")
        return dict(items)

    try:
        pairs = Pairs.of(json.loads(b"".join(_pieces(path)), object_pairs_hook=once))
        if not np.isfinite(pairs.value).all() or kind == "qrels" and (pairs.value != np.rint(pairs.value)).any():
            raise ValueError("a score is not finite" if kind == "run" else "a grade is not an integer")
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: expected one JSON object {{qid: {{docid: {'score' if kind == 'run' else 'grade'}}}}}: {e}") from e
    return pairs


def read_qrels(path) -> dict[str, dict[str, int]]:
    """{qid: {docid: grade}} from any file that `read_pairs` knows."""
    return read_pairs(path, "qrels").nested(int)


def read_run(path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} from any file that `read_pairs` knows."""
    return read_pairs(path, "run").nested()


# Measures.

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
    if len(nan := np.flatnonzero(np.isnan(run.value))):  # it would sort anywhere; files are checked when they are read
        raise ValueError(f"the score of document {docid[nan[0]].decode()!r} in query {run.qids[query[nan[0]]]!r} is not a number")
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
    depth = len(query) if depth is None else depth
    rank = np.arange(len(query)) - start[query]

    index = {qid: i for i, qid in enumerate(qids)}
    to = np.array([index.get(qid, -1) for qid in run.qids], dtype=np.int64)
    returned = np.zeros(len(qids), np.int64)
    returned[to[to >= 0]] = np.minimum(np.diff(start), depth)[to >= 0]
    query = to[query]
    keep = (query >= 0) & (rank < depth)
    if not keep.all():
        query, docid, rank = query[keep], docid[keep], rank[keep]

    # The join: a run has millions of lines, the qrels thousands. A table of the 20 low bits of the qrels' keys turns nearly every line away at once,
    # and those that remain look theirs up among the sorted keys.
    width = max(docid.itemsize, qrels.docid.itemsize)
    theirs, keys = (Pairs(None, None, ids, None).keys(of, width) for ids, of in ((qrels.docid[lines], judged[0]), (docid, query)))
    maybe = np.zeros(1 << 20, bool)
    maybe[theirs & np.uint64((1 << 20) - 1)] = True
    hit = np.flatnonzero(maybe[keys & np.uint64((1 << 20) - 1)])
    order = np.argsort(theirs)
    found = order[np.searchsorted(theirs[order], keys[hit]).clip(max=len(theirs) - 1)]
    same = (judged[0][found] == query[hit]) & (qrels.docid[lines][found] == docid[hit])
    hit, found = hit[same], found[same]
    order = np.lexsort((rank[hit], query[hit]))
    hit, found = hit[order], found[order]
    return Hits(qids, query[hit], rank[hit], judged[1][found], returned, judged)


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


# Is it a difference, or the luck of these queries?


def randomization_p(difference: np.ndarray, trials: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired test: were the systems equal, each query's difference might as well have had the other sign. p is the share of `trials`
    random sign flips (the observed one counts as one) whose sum is at least as far from 0."""
    d = difference[difference != 0]  # a tie is a tie under either sign
    rng, extreme = np.random.default_rng(seed), 1
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # sums that are equal on paper must count as equal
    for done in range(0, trials, 500):
        flips = np.unpackbits(rng.integers(0, 256, (min(500, trials - done), -(-len(d) // 8)), np.uint8), axis=1, count=len(d))
        extreme += int((np.abs(flips @ (2 * d) - d.sum()) >= least).sum())
    return extreme / (trials + 1)


def t_test_p(difference: np.ndarray) -> float:
    """Two-sided paired t-test: with df = n - 1 and t = mean / (deviation / sqrt(n)), p = I_x(df / 2, 1 / 2) at x = df / (df + t^2)."""
    n, spread = len(difference), difference.std(ddof=1) if len(difference) > 1 else 0.0
    if spread == 0:
        return 0.0 if n > 1 and difference[0] else 1.0
    t = difference.mean() / (spread / math.sqrt(n))
    return incomplete_beta((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised I_x(a, b) by its continued fraction 1 / (1 + c1 / (1 + c2 / (1 + ...))), evaluated from the front (Lentz)."""
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this; above it, its mirror image does
        return 1 - incomplete_beta(b, a, 1 - x)
    value, upper, lower = 1.0, 1.0, 0.0
    for i in range(1, 1000):
        m = i // 2
        c = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) if i % 2 else m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower, upper = 1 / (1 + c * lower), 1 + c / upper
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / (a * value)


def holm(p: list) -> list:
    """Corrected for asking len(p) questions at once: the smallest p times m, the next times m - 1, ..., never falling, at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    out, floor = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        out[i] = floor = max(floor, min(1.0, (len(p) - step) * p[i]))
    return out


# Tables.

COSTS = {"nnz_docs": "nnz/doc", "nnz_queries": "nnz/query", "index_bytes": "index MB", "ms_per_query": "ms/query"}  # what index.py search notes beside a run


def compare(args) -> dict:
    """Score every run on the same queries and test each against the first: everything that the tables show, as plain values for JSON."""
    names = args.names or [Path(run).name.removesuffix(".gz").rsplit(".", 1)[0] for run in args.run]
    if len(names) != len(args.run) or len(set(names)) < len(names):
        raise ValueError(f"--names: {len(args.run)} runs need as many different names, got {', '.join(names)}")
    metrics = list(dict.fromkeys(metric.lower() for metric in args.metrics))
    qrels = read_pairs(args.qrels, "qrels")
    report = {"min_grade": args.min_grade, "ties": args.ties, "depth": args.depth, "metrics": metrics, "runs": {}, "tests": []}
    values = {}
    for name, path in zip(names, args.run):
        run = read_pairs(path, "run")
        hits = find_hits(qrels, run, args.ties, args.depth)
        values[name] = {metric: measure(hits, metric, args.min_grade) for metric in metrics}
        report |= {"queries": len(hits.qids), "queries_without_relevant": len(qrels.qids) - len(hits.qids), "qids": hits.qids}
        top = np.minimum(hits.returned, 10).sum()
        note = Path(f"{path}.json")
        report["runs"][name] = {
            "path": str(path), **{metric: float(v.sum() if metric.startswith("num_") else v.mean()) for metric, v in values[name].items()},
            "missing": int((hits.returned == 0).sum()), "not_in_qrels": len(set(run.qids) - set(qrels.qids)),
            "unjudged@10": float(1 - (hits.rank < 10).sum() / top) if top else None,
            "costs": json.loads(note.read_text()) if args.costs and note.exists() else {}}
    for metric in metrics:
        tests = []
        for name in names[1:]:
            d = values[name][metric] - values[names[0]][metric]
            tests.append({"run": name, "metric": metric, "difference": float(d.mean()), "wins": int((d > 0).sum()), "losses": int((d < 0).sum()),
                          "equal": int((d == 0).sum()), "p_randomization": randomization_p(d, args.trials, args.seed), "p_t": t_test_p(d)})
        for kind in ("p_randomization", "p_t"):
            for test, p in zip(tests, holm([test[kind] for test in tests])):
                test[kind + "_holm"] = p
        report["tests"] += tests
    return report | {"values": values}


def scores(args):
    """The command without a verb."""
    report = compare(args)
    values, metrics = report["values"], report["metrics"]
    if args.per_query:
        with write_whole(args.per_query) as file:
            print("qid", *(f"{name} {metric}" for name in values for metric in metrics), sep="\t", file=file)
            for i, qid in enumerate(report["qids"]):
                print(qid, *(f"{values[name][metric][i]:.6f}" for name in values for metric in metrics), sep="\t", file=file)
    if args.style == "json":
        print(json.dumps({key: value for key, value in report.items() if key not in ("values", "qids")}, indent=1))
    else:
        show(report, args)


def show(report: dict, args):
    """Print a report: the scores, the tests, then what was asked for by group and by query."""
    style, names, metrics, values = args.style, list(report["runs"]), report["metrics"], report["values"]
    head = f"{report['queries']:,} queries with a relevant document"
    head += f" ({report['queries_without_relevant']} without one left out)" if report["queries_without_relevant"] else ""
    head += f"; binary measures count grades >= {args.min_grade}" if args.min_grade != 1 else ""
    notes = {"latex": "% {}", "markdown": "{}\n", "plain": "{}"}[style]
    print(notes.format(head))
    sure = {(test["run"], test["metric"]) for test in report["tests"] if test["p_randomization_holm"] < 0.05}
    cost_names = [cost for cost in COSTS if any(run["costs"].get(cost) is not None for run in report["runs"].values())]
    rows = [["run", *metrics, "unjudged@10", "missing", *(COSTS[cost] for cost in cost_names)]]
    for name, run in report["runs"].items():
        best = {metric: max(round(other[metric], 4) for other in report["runs"].values()) for metric in metrics}
        scores = [cell(run[metric], len(names) > 1 and round(run[metric], 4) == best[metric], (name, metric) in sure, style) for metric in metrics]
        rows.append([name, *scores, "-" if run["unjudged@10"] is None else f"{run['unjudged@10']:.1%}", f"{run['missing']:,}",
                     *(cost_cell(run["costs"], cost) for cost in cost_names)])
    print(table(rows, style))
    if args.costs and not cost_names:
        print(notes.format("--costs: no run has a RUN.json beside it; index.py search writes one"))
    if len(names) > 1:
        print(notes.format(f"{'* best, ' if style == 'plain' else ''}{mark(style)} differs from {names[0]} with p < 0.05 in the randomisation test"))
        rows = [["against " + names[0], "metric", "difference", "wins", "losses", "equal", "p randomisation", "p t-test"]]
        rows += [[t["run"], t["metric"], f"{t['difference']:+.4f}", *(f"{t[key]:,}" for key in ("wins", "losses", "equal")),
                  *(f"{t[key]:.4f}" if t[key] >= 1e-4 else "< 0.0001" for key in ("p_randomization_holm", "p_t_holm"))] for t in report["tests"]]
        print("\n" + table(rows, style))
        print(notes.format(f"paired over queries, two-sided, {args.trials:,} sign flips (seed {args.seed}); p corrected (Holm) for {len(names) - 1} comparisons a metric"))
    for name, run in report["runs"].items():
        if run["not_in_qrels"]:
            print(notes.format(f"{name}: {run['not_in_qrels']:,} of its queries are not in the qrels and do not count"))

    if args.groups:
        group_of = json.loads(Path(args.groups).read_text())
        groups = [str(group_of.get(qid, "-")) for qid in report["qids"]]
        members = {group: np.array([g == group for g in groups]) for group in sorted(set(groups))}
        for metric in metrics:
            rows = [[f"{metric} by group", *(f"{group} ({m.sum():,})" for group, m in members.items())]]
            print("\n" + table(rows + [[name, *(f"{values[name][metric][m].mean():.4f}" for m in members.values())] for name in names], style))
    if args.queries and len(names) > 1:
        texts, metric = read_queries(args.queries), metrics[0]
        for name in names[1:]:
            d = values[name][metric] - values[names[0]][metric]
            order = np.argsort(-np.abs(d), kind="stable")[:args.changed]
            rows = [[f"{metric}, most changed", names[0], name, "change", "query"]]
            rows += [[report["qids"][i], f"{values[names[0]][metric][i]:.4f}", f"{values[name][metric][i]:.4f}", f"{d[i]:+.4f}",
                      texts.get(report["qids"][i], "(text not in --queries)")] for i in order if d[i]]
            print("\n" + table(rows, style, left=(0, 4)))


def mark(style):
    return r"$^\dagger$" if style == "latex" else "†"


def cell(value, best, sure, style):
    number = f"{value:,.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"
    if style == "plain":  # two columns for the marks, so that the numbers stay in line
        return number + ("*" if best else " ") + ("†" if sure else " ")
    return ({"markdown": "**{}**", "latex": r"\textbf{{{}}}"}[style] if best else "{}").format(number) + (mark(style) if sure else "")


def cost_cell(costs, cost):
    value = costs.get(cost)
    return "-" if value is None else f"{value / 1e6:,.1f}" if cost == "index_bytes" else f"{value:,.{2 if value < 10 else 0}f}"


def table(rows: list, style: str = "plain", left=(0,)) -> str:
    """Rows of strings, the first one the head; the columns in `left` hold words, the others numbers."""
    columns = range(len(rows[0]))
    if style == "latex":
        special = {**{c: "\\" + c for c in "_%&#${}"}, "\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "<": "$<$", ">": "$>$"}
        escape = lambda text: text if r"\textbf" in text or mark(style) in text else "".join(special.get(c, c) for c in text)
        lines = [" & ".join(map(escape, row)) + r" \\" for row in rows]
        align = "".join("l" if i in left else "r" for i in columns)
        return "\n".join([rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])
    width = [max(len(row[i]) for row in rows) for i in columns]
    lines = [[text.ljust(width[i]) if i in left else text.rjust(width[i]) for i, text in enumerate(row)] for row in rows]
    if style == "markdown":
        lines.insert(1, ["-" * width[i] if i in left else "-" * (width[i] - 1) + ":" for i in columns])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    scores_arguments(parser)
    args = parser.parse_args(argv)
    try:
        scores(args)
    except BrokenPipeError:  # `| head` has seen enough; Python's own last flush would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:  # a fault in what was given, not in the program: the message is the cure, the traceback is noise
        sys.exit(f"{parser.prog}: {e}")


def style_arguments(g):
    for style in ("markdown", "latex", "json"):
        g.add_argument(f"--{style}", action="store_const", const=style, dest="style", default="plain", help=f"print {style}")


def scores_arguments(parser):
    parser.add_argument("--qrels", required=True, help="TREC, MS MARCO, BEIR or JSON; gzipped or not")
    parser.add_argument("--run", required=True, nargs="+", help="TREC, MS MARCO or JSON; the first is what the others are compared with")
    parser.add_argument("--names", nargs="+", help="one a run, for the tables; the files' names without it")
    g = parser.add_argument_group("what is measured")
    g.add_argument("--metrics", nargs="+", default=["mrr@10", "ndcg@10", "recall@1000"], help=f"of {', '.join(METRICS)}; @k cuts")
    g.add_argument("--min_grade", type=int, default=1, help="the grade that is relevant to binary measures (2 for TREC DL, as trec_eval -l 2)")
    g.add_argument("--ties", choices=["docid", "run_order"], default="docid", help="equal scores by document id, as trec_eval; or as the lines stand, as MS MARCO's script")
    g.add_argument("--depth", type=int, help="look at so many results a query only (trec_eval -M)")
    g = parser.add_argument_group("what is shown")
    style_arguments(g)
    g.add_argument("--costs", action="store_true", help="add non-zeros, index size and time from the RUN.json that index.py search writes beside RUN")
    g.add_argument("--per_query", metavar="FILE", help="write every query's values as tsv")
    g.add_argument("--queries", help="query texts: show the queries that changed most by the first metric")
    g.add_argument("--changed", type=int, default=5, help="how many of these")
    g.add_argument("--groups", metavar="FILE", help="a JSON {qid: group}: the metrics by group")
    g = parser.add_argument_group("tests of significance")
    g.add_argument("--trials", type=int, default=10_000, help="random sign flips; p is no finer than 1 / trials")
    g.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    main()
