"""Run files and judgements in, numbers and a table with tests of significance out.

    python evaluate.py --qrels Q --run bm25.trec dense.trec sparse.trec --metrics mrr@10 ndcg@10 recall@1000
    python evaluate.py --qrels dl19.qrels --run A --metrics ndcg@10 map --min_grade 2    # TREC DL: 1 is not relevant
    python -m tools.compare ...    # the same for a paper: Markdown, LaTeX, JSON, costs, groups, single queries

What surprises:
- The numbers are trec_eval's (`-c`), digit for digit. It keeps scores as 32-bit floats, and orders equal scores by
  document id, downwards and as strings, whatever the rank column says. `--ties run_order` keeps the order of the
  lines, as MS MARCO's script does.
- Every query of the qrels counts, a query without results as 0. Queries without a relevant document score 0 in any
  run; trec_eval -c averages these zeros in, here they are left out and counted above the table.
- nDCG has linear gains, and the ideal of all judged documents; `--min_grade` changes binary measures only.
- Three columns of a run are `qid docid score` if the first line has a decimal point, else MS MARCO's `qid docid rank`:
  ranks that do not rise from 1 are an error, for they may be scores. The forms are listed in FORMS.
"""
import argparse
import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from data import Help, natural, open_bytes, positive_int, printable, run_command

# 1. Runs and qrels: files become columns.


class Pairs(NamedTuple):
    """A run or qrels in columns: line i says that query `qids[query[i]]` and document `docid[i]` have score or grade
    `value[i]`. Seven million lines are three arrays instead of seven million Python objects."""

    qids: list[str]     # in order of first appearance
    query: np.ndarray   # int64, places in qids
    docid: np.ndarray   # fixed-width UTF-8 ("S8"): bytes sort as strcmp sorts them, and so as trec_eval does
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
        for query, docid, value in zip(self.query.tolist(), self.docid.tolist(), self.value.tolist()):
            out[self.qids[query]][docid.decode()] = kind(value)
        return out


def read_qrels(path) -> dict[str, dict[str, int]]:
    """{qid: {docid: grade}} from TREC's, MS MARCO's or BEIR's lines or JSON, gzipped or not."""
    return read_pairs(path, "qrels").nested(int)


def read_run(path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} from lines of 6, 4 or 3 columns or JSON, gzipped or not; MS MARCO's rank r scores -r."""
    return read_pairs(path, "run").nested()


class Form(NamedTuple):
    """The columns of a line, and the places of its document and its value."""

    names: str
    docid: int
    value: int


FORMS = {
    "run": [Form("qid Q0 docid rank score tag", 2, 4), Form("qid docid rank score", 1, 3),
            Form("qid docid rank", 1, 2), Form("qid docid score", 1, 2)],
    "qrels": [Form("qid 0 docid grade", 2, 3), Form("qid docid grade", 1, 2)],
}
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))


def read_pairs(path, kind: str) -> Pairs:
    """A "run" or "qrels" as columns, in the order of the lines."""
    parts, place_of, form, number = [], {}, None, 1
    with open_bytes(path) as file:
        # Whole lines at a time: a piece that stays in the processor's cache is several times as fast to cut.
        while piece := file.read(1 << 18):
            piece += file.readline()
            if form is None and piece.lstrip().startswith(b"{"):
                return pairs_of_json(path, kind)
            if kind == "qrels" and piece.startswith(b"query-id"):
                piece = b"#" + piece[1:]  # BEIR's header is as good as a comment
            form = form or form_of(piece, kind, path)
            if not form or not piece.strip():
                continue
            qid, docid, value, line = cut(piece, form, path, number)
            number += piece.count(b"\n")
            # A query's lines mostly stand together: one look-up for each block of them.
            heads = np.flatnonzero(np.append(True, qid[1:] != qid[:-1])[:len(qid)])
            places = np.array([place_of.setdefault(name, len(place_of)) for name in qid[heads].tolist()], np.int64)
            parts.append((np.repeat(places, np.diff(np.append(heads, len(qid)))), docid, value, line))
    if not place_of:
        raise ValueError(f"{path}: holds no line of {'a run' if kind == 'run' else kind}; is it the right file?")
    query, docid, value, line = map(np.concatenate, zip(*parts))
    if form.names.endswith("rank"):
        check_ranks(path, query, value, line)
        value = -value
    return without_repeats(path, kind, Pairs([qid.decode() for qid in place_of], query, docid, value), line)


def form_of(piece: bytes, kind: str, path) -> Form | None:
    """The form of the first line that is not blank or a comment; None if there is none."""
    lines = [line for line in piece.decode(errors="replace").split("\n") if line.strip() and line[0] != "#"]
    if not lines:
        return None
    words = lines[0].split()
    fitting = [form for form in FORMS[kind] if len(form.names.split()) == min(len(words), 6)]
    if kind == "run" and len(words) == 3:  # a decimal point tells scores from ranks
        fitting = fitting[1:] if "." in words[2] else fitting[:1]
    if kind == "run" and len(words) == 4 and words[2] not in ("0", "1"):  # qrels have four columns, too
        fitting = []
    if not fitting or kind == "qrels" and len(words) > 4:
        known = " or ".join(repr(form.names) for form in FORMS[kind])
        raise ValueError(f"{path}: expected {known} in {'a run' if kind == 'run' else kind}, got {len(words)} columns: "
                         f"{printable(lines[0])[:80]!r}")
    return fitting[0]


def cut(piece: bytes, form: Form, path, number: int) -> tuple:
    """(qid, docid, value, number of the line) of whole lines; the first of them has this number in its file."""
    if len(piece.translate(None, CONTROLS)) < len(piece):
        raise ValueError(f"{path}: holds control characters; is it a text file?")
    names, text = form.names.split(), np.frombuffer(piece.rstrip() + b"\n", np.uint8)
    black = text > 32
    # Where a word starts, ends, starts, ends, ...; and the place of each line's first word among them.
    edges = np.flatnonzero(np.append(black[0], black[1:] != black[:-1]))
    first, last, line_ends = edges[0::2], edges[1::2], np.flatnonzero(text == ord("\n"))
    begin = np.append(0, np.searchsorted(first, line_ends))
    count, begin = np.diff(begin), begin[:-1]
    # As trec_eval 10 reads them: comments are none, and text behind a run's sixth column is not looked at.
    kept = np.flatnonzero(text[np.append(0, line_ends[:-1] + 1)] != ord("#"))
    wrong = kept[(count[kept] < 6) if len(names) == 6 else (count[kept] != len(names))]
    if len(wrong):
        line = printable(piece.split(b"\n")[wrong[0]].decode(errors="replace"))
        raise ValueError(f"{path}:{number + wrong[0]}: expected {len(names)} columns as in the first line ({form.names}), "
                         f"got {count[wrong[0]]}: {line[:80]!r}")

    def column(place):
        start, size = first[begin[kept] + place], last[begin[kept] + place] - first[begin[kept] + place]
        # A window as wide as the widest word at each start, and zeros over what stands behind the word.
        width = size.max(initial=1)
        padded = np.append(text, np.zeros(width, np.uint8))
        chars = np.lib.stride_tricks.sliding_window_view(padded, width)[start]  # (lines, width)
        chars[np.arange(width) >= size[:, None]] = 0
        return chars.view(f"S{width}").ravel()

    words, name = column(form.value), names[form.value]
    value = numbers(words)
    wrong = ~np.isfinite(value) | (name != "score") & (value != np.rint(value))
    if wrong.any():
        raise ValueError(f"{path}:{number + kept[wrong][0]}: expected {'a finite number' if name == 'score' else 'an integer'} "
                         f"as {name} ({form.names}), got {words[wrong][0].decode(errors='replace')!r}")
    return column(0), column(form.docid), value, number + kept


def numbers(words: np.ndarray) -> np.ndarray:
    """Words such as b"-12.345" as float64, three times as fast as numpy: 0.14 s a million instead of 0.47.

    At most 15 digits over a power of ten are two exact floats, and one division of them rounds as strtod would.
    Whatever looks otherwise, or is longer, goes to numpy; what is no number becomes nan."""
    n = len(words)
    whole, digits, behind = np.zeros(n), np.zeros(n, np.int8), np.zeros(n, np.int8)
    pointed, plain = np.zeros(n, bool), np.ones(n, bool)
    chars = np.ascontiguousarray(words.view(np.uint8).reshape(n, -1).T)  # (width, lines)
    for place, char in enumerate(chars):
        digit = char - np.uint8(ord("0"))  # wraps around: everything else lands above 9
        is_digit, is_point = digit < 10, char == ord(".")
        plain &= is_digit | (is_point & ~pointed) | (char == 0) | ((char == ord("-")) & (place == 0))
        whole = np.where(is_digit, 10 * whole + digit, whole)
        digits += is_digit
        behind += is_digit & pointed
        pointed |= is_point
    plain &= (digits > 0) & (digits <= 15)
    value = np.where(chars[0] == ord("-"), -whole, whole) / 10.0 ** np.arange(18)[np.minimum(behind, 17)]
    odd = words[~plain]
    try:
        value[~plain] = odd.astype(np.float64)
    except ValueError:  # one of them is no number: nan says which
        number = re.compile(rb"[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][-+]?[0-9]+)?")
        value[~plain] = [float(word) if number.fullmatch(word) else math.nan for word in odd.tolist()]
    return value


def pairs_of_json(path, kind: str) -> Pairs:
    def once(items):  # Python's reader would keep the last of two equal names without a word
        names = sorted(name for name, _ in items)
        for name, after in zip(names, names[1:]):
            if name == after:
                raise ValueError(f"{name!r} stands twice in one object; remove one of the two")
        return dict(items)

    word, wanted = ("score", "finite") if kind == "run" else ("grade", "an integer")
    try:
        with open_bytes(path) as file:
            pairs = Pairs.of(json.loads(file.read(), object_pairs_hook=once))
        if not len(pairs.value):
            raise ValueError(f"it holds no {word}")
        if not np.isfinite(pairs.value).all() or kind == "qrels" and (pairs.value != np.rint(pairs.value)).any():
            raise ValueError(f"a {word} is not {wanted}")
    except (ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: expected one JSON object {{qid: {{docid: {word}}}}}: {e}") from e
    return pairs


def check_ranks(path, query: np.ndarray, rank: np.ndarray, line: np.ndarray) -> None:
    """Within each query they start at 0 or 1, and rise line by line; else they may be scores."""
    order = np.argsort(query, kind="stable")
    query, rank, line = query[order], rank[order], line[order]
    begins = np.append(True, query[1:] != query[:-1])
    wrong = np.where(begins, (rank < 0) | (rank > 1), rank <= np.append(0, rank[:-1]))
    if wrong.any():
        raise ValueError(
            f"{path}:{line[wrong].min()}: three columns without a decimal point are 'qid docid rank', but here the ranks "
            f"of a query do not rise from 1. Write scores as 12.0, or all six columns: {FORMS['run'][0].names}")


def without_repeats(path, kind: str, pairs: Pairs, line: np.ndarray) -> Pairs:
    """A document twice in one query of a run is an error. In qrels only a contradiction is one."""
    keys = np.sort(keys_of(pairs.query, pairs.docid, pairs.docid.itemsize))
    if (keys[1:] != keys[:-1]).all():
        return pairs
    first, keep = {}, []
    for i, pair in enumerate(zip(pairs.query.tolist(), pairs.docid.tolist())):
        before = first.setdefault(pair, i)
        if before == i:
            keep.append(i)
        elif kind == "run" or pairs.value[i] != pairs.value[before]:
            raise ValueError(f"{path}:{line[i]}: document {pair[1].decode()!r} of query {pairs.qids[pair[0]]!r} "
                             f"stands in line {line[before]} already; remove one of the two")
    return Pairs(pairs.qids, pairs.query[keep], pairs.docid[keep], pairs.value[keep])


def keys_of(query: np.ndarray, docid: np.ndarray, width: int) -> np.ndarray:
    """One 64-bit number for each (query, docid of at most `width` bytes), so that a join compares no strings. Equal
    pairs have equal keys; the reverse is only nearly certain: whoever finds equal keys compares the strings."""
    words = -(-width // 8)
    # The factor: else the bits of query 1 meet those of the id's last digit.
    keys = query.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    for word in docid.astype(f"S{words * 8}").view(np.uint64).reshape(-1, words).T:
        keys = (keys ^ word) * np.uint64(0x9E3779B97F4A7C15)
        # Products mix upwards only: bring the high bits down.
        keys ^= keys >> np.uint64(29)
    return keys


# 2. A ranking meets its judgements.


class Hits(NamedTuple):
    """The judged documents that a run returned, the only lines that any measure depends on, and what normalises it."""

    qids: list                # the n queries that have a relevant document
    query: np.ndarray         # (hits,) place in qids, ascending; within a query the hits go down the ranking
    rank: np.ndarray          # (hits,) from 0
    grade: np.ndarray         # (hits,)
    returned: np.ndarray      # (n,) documents returned
    judged_query: np.ndarray  # (judged,) all that was judged, the best grades of a query first
    judged_grade: np.ndarray


def evaluate(qrels, run, metrics: list, min_grade: int = 1, ties: str = "docid", depth: int | None = None) -> dict:
    """{metric: {qid: value}} for every query with a relevant document, 0 where the run returned nothing. qrels and run
    are {qid: {docid: grade or score}} or `Pairs`; only the first `depth` results of a query count (trec_eval -M).

    The ranking is b a x: the first relevant one at rank 2, one of two found. Then a tie: of equal scores c goes first.

    >>> qrels = {"q": {"a": 1, "b": 0, "c": 2}}
    >>> evaluate(qrels, {"q": {"b": 9.0, "a": 8.0, "x": 7.0}}, ["mrr@10", "recall@10", "p@2"])
    {'mrr@10': {'q': 0.5}, 'recall@10': {'q': 0.5}, 'p@2': {'q': 0.5}}
    >>> evaluate(qrels, {"q": {"a": 1.0, "c": 1.0}}, ["ndcg@10"])
    {'ndcg@10': {'q': 1.0}}
    """
    hits = find_hits(qrels, run, ties, depth)
    return {metric: dict(zip(hits.qids, measure(hits, metric, min_grade).tolist())) for metric in metrics}


def find_hits(qrels, run, ties: str = "docid", depth: int | None = None) -> Hits:
    """Look the run's documents up in the qrels, and find the ranks of those that are judged; all queries at once."""
    qrels, run = (x if isinstance(x, Pairs) else Pairs.of(x) for x in (qrels, run))
    qids, judged = best_first(qrels)
    if np.isnan(run.value).any():  # it would rank anywhere; files are checked when they are read
        i = np.flatnonzero(np.isnan(run.value))[0]
        qid, docid = run.qids[run.query[i]], run.docid[i].decode()
        raise ValueError(f"the score of document {docid!r} in query {qid!r} is not a number")
    if (run.query[1:] < run.query[:-1]).any():
        order = np.argsort(run.query, kind="stable")
        run = Pairs(run.qids, run.query[order], run.docid[order], run.value[order])
    start = np.searchsorted(run.query, np.arange(len(run.qids) + 1))

    # From the run's places of queries to those of the qrels; -1: a query that they do not know.
    place_of = {qid: place for place, qid in enumerate(qids)}
    place = np.array([place_of.get(qid, -1) for qid in run.qids], dtype=np.int64)
    returned = np.zeros(len(qids), np.int64)
    returned[place[place >= 0]] = np.diff(start)[place >= 0]

    line, found = join(place[run.query], run.docid, judged)
    rank = ranks_of(run, start, line, ties)
    order = np.lexsort((rank, judged.query[found]))
    found, rank = found[order], rank[order]
    if depth is not None:
        found, rank, returned = found[rank < depth], rank[rank < depth], np.minimum(returned, depth)
    return Hits(qids, judged.query[found], rank, judged.value[found], returned, judged.query, judged.value)


def best_first(qrels: Pairs) -> tuple[list, Pairs]:
    """The queries that have a relevant document, and all that was judged for them, the best grades of a query first."""
    relevant = np.unique(qrels.query[qrels.value > 0])
    if not len(relevant):
        raise ValueError("no query of the qrels has a relevant document (a grade above 0); is this the right file?")
    place = np.full(len(qrels.qids), -1)
    place[relevant] = np.arange(len(relevant))
    lines = np.flatnonzero(place[qrels.query] >= 0)
    lines = lines[np.lexsort((-qrels.value[lines], qrels.query[lines]))]
    qids = [qrels.qids[query] for query in relevant]
    return qids, Pairs(qids, place[qrels.query[lines]], qrels.docid[lines], qrels.value[lines])


def join(query: np.ndarray, docid: np.ndarray, judged: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The lines (query, docid) that are judged, and the places of their judgements.

    A run has millions of lines, the qrels thousands. A table of the 20 low bits of the qrels' keys turns nearly every
    line away at once; those that remain look theirs up among the sorted keys."""
    width = max(docid.itemsize, judged.docid.itemsize)
    keys, theirs = keys_of(query, docid, width), keys_of(judged.query, judged.docid, width)
    low_bits, maybe = np.uint64((1 << 20) - 1), np.zeros(1 << 20, bool)
    maybe[theirs & low_bits] = True
    line = np.flatnonzero(maybe[keys & low_bits])
    order = np.argsort(theirs)
    found = order[np.searchsorted(theirs[order], keys[line]).clip(max=len(theirs) - 1)]
    equal = (judged.query[found] == query[line]) & (judged.docid[found] == docid[line])
    return line[equal], found[equal]


def ranks_of(run: Pairs, start: np.ndarray, lines: np.ndarray, ties: str) -> np.ndarray:
    """The ranks of some lines, from 0: how many documents of their query score more, or the same and go before."""
    # As trec_eval has them. Beyond float32's range is a tie at infinity, there as here.
    with np.errstate(over="ignore"):
        score = run.value.astype(np.float32)
    rank = np.zeros(len(lines), np.int64)
    for i, line in enumerate(lines.tolist()):
        first, end = start[run.query[line]], start[run.query[line] + 1]
        scores = score[first:end]
        rank[i] = np.count_nonzero(scores > score[line])
        tied = first + np.flatnonzero(scores == score[line])
        if len(tied) > 1:
            rank[i] += np.count_nonzero(run.docid[tied] > run.docid[line] if ties == "docid" else tied < line)
    return rank


# 3. Measures. A new one is a function and a row of METRICS.


class Top(NamedTuple):
    """What a measure sees: the relevant documents that a run has above the cut k, and counts by query."""

    query: np.ndarray     # (relevant hits,) place of the query, ascending
    rank: np.ndarray      # (relevant hits,) from 0, ascending within a query
    found: np.ndarray     # (n,) how many they are
    relevant: np.ndarray  # (n,) how many there are
    k: float              # infinite without a cut
    hits: Hits            # all judged documents, for graded measures


def mrr(top: Top):
    """1 / rank of the first relevant document."""
    best = np.zeros(len(top.found))
    np.maximum.at(best, top.query, 1 / (top.rank + 1))
    return best


def average_precision(top: Top):
    """The mean over all relevant documents of the precision at their ranks, 0 for those not found."""
    nth_of_query = np.arange(len(top.query)) - np.searchsorted(top.query, top.query) + 1
    return np.bincount(top.query, nth_of_query / (top.rank + 1), len(top.found)) / np.maximum(top.relevant, 1)


def ndcg(top: Top):
    """The sum of grade / log2(rank + 1), ranks from 1, over that of the best ranking of all judged documents."""
    query, grade = top.hits.judged_query, top.hits.judged_grade
    best_rank = np.arange(len(query)) - np.searchsorted(query, query)
    return gain(top, top.hits.query, top.hits.rank, top.hits.grade) / gain(top, query, best_rank, grade)


def gain(top: Top, query, rank, grade):
    # Ranks from 0. A negative grade gains nothing, as in trec_eval.
    gains = np.where(rank < top.k, np.maximum(grade, 0) / np.log2(rank + 2.0), 0)
    return np.bincount(query, gains, len(top.found))


def recall(top: Top):
    return top.found / np.maximum(top.relevant, 1)


def capped_recall(top: Top):
    """BEIR's for TREC-COVID: no query can find more than k."""
    return top.found / np.maximum(np.minimum(top.relevant, top.k), 1)


def precision(top: Top):
    return top.found / top.k


def success(top: Top):
    return np.minimum(top.found, 1.0)


def judged(top: Top):
    """The share of the first k results that somebody has judged."""
    return np.bincount(top.hits.query, top.hits.rank < top.k, len(top.found)) / top.k


def num_ret(top: Top):
    return np.minimum(top.hits.returned, top.k)


def num_rel(top: Top):
    """As trec_eval counts them: whatever the least grade."""
    return np.bincount(top.hits.judged_query, top.hits.judged_grade > 0, len(top.found))


def num_rel_ret(top: Top):
    return top.found


class Metric(NamedTuple):
    function: Callable[[Top], np.ndarray]
    needs_cut: bool = False


METRICS = {
    "mrr": Metric(mrr), "ndcg": Metric(ndcg), "recall": Metric(recall), "map": Metric(average_precision),
    "p": Metric(precision, needs_cut=True), "success": Metric(success, needs_cut=True),
    "r_cap": Metric(capped_recall, needs_cut=True), "judged": Metric(judged, needs_cut=True),
    "num_ret": Metric(num_ret), "num_rel": Metric(num_rel), "num_rel_ret": Metric(num_rel_ret),
}


def measure(hits: Hits, metric: str, min_grade: int = 1) -> np.ndarray:
    """One value for each of hits.qids; `metric` is a name of METRICS with or without a cut: "ndcg@10", "map"."""
    name, _, cut = metric.lower().partition("@")
    if name not in METRICS or cut and not re.fullmatch("[1-9][0-9]*", cut) or METRICS[name].needs_cut and not cut:
        with_cut = ", ".join(name for name, metric in METRICS.items() if metric.needs_cut)
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}, and @k behind it "
                         f"({with_cut} need it), as in ndcg@10")
    k, n = int(cut) if cut else math.inf, len(hits.qids)
    seen = (hits.grade >= min_grade) & (hits.rank < k)
    found = np.bincount(hits.query[seen], minlength=n)
    relevant = np.bincount(hits.judged_query, hits.judged_grade >= min_grade, n)
    return METRICS[name].function(Top(hits.query[seen], hits.rank[seen], found, relevant, k, hits))


# 4. Is it a difference, or the luck of these queries?


def randomization_p(difference: np.ndarray, trials: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired test: were the systems equal, each query's difference might as well have the other sign. p is the
    share of `trials` random sign flips (and the observed one) whose sum is at least as far from 0."""
    d = difference[difference != 0]  # a tie is a tie under either sign
    rng, extreme = np.random.default_rng(seed), 1
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # sums that are equal on paper must count as equal
    for done in range(0, trials, 500):
        random_bytes = rng.integers(0, 256, (min(500, trials - done), -(-len(d) // 8)), np.uint8)
        flips = np.unpackbits(random_bytes, axis=1, count=len(d))
        extreme += int((np.abs(flips @ (2 * d) - d.sum()) >= least).sum())
    return extreme / (trials + 1)


def holm(p: list) -> list:
    """Corrected for asking len(p) questions at once: the smallest p times m, the next times m - 1, ..., never falling.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    out, floor = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        out[i] = floor = max(floor, min(1.0, (len(p) - step) * p[i]))
    return out


# 5. Several runs, one table.


def compare(qrels_path, paths: dict, metrics: list, min_grade: int = 1, ties: str = "docid", depth: int | None = None,
            trials: int = 10_000, seed: int = 0) -> dict:
    """Score each run of {name: path} and test it against the first: all that the tables show, as plain values."""
    qrels, runs, values = read_pairs(qrels_path, "qrels"), {}, {}
    for name, path in paths.items():
        run = read_pairs(path, "run")
        hits = find_hits(qrels, run, ties, depth)
        values[name] = {metric: measure(hits, metric, min_grade) for metric in metrics}
        first_ten = np.minimum(hits.returned, 10).sum()
        runs[name] = {metric: float(value.mean()) for metric, value in values[name].items()} | {
            "unjudged@10": float(1 - (hits.rank < 10).sum() / first_ten) if first_ten else None,
            "missing": int((hits.returned == 0).sum()),
            "not_in_qrels": len(set(run.qids) - set(qrels.qids)),
        }
    return {
        "metrics": metrics, "min_grade": min_grade, "ties": ties, "depth": depth, "trials": trials, "seed": seed,
        "queries": len(hits.qids), "queries_without_relevant": len(qrels.qids) - len(hits.qids), "runs": runs,
        "tests": [test for metric in metrics for test in tests_of(values, metric, trials, seed)],
        "qids": hits.qids, "values": values,
    }


def tests_of(values: dict, metric: str, trials: int, seed: int) -> list[dict]:
    """Each run against the first one, query by query."""
    first, *others = values
    tests = []
    for name in others:
        d = values[name][metric] - values[first][metric]
        tests.append({
            "run": name, "metric": metric, "difference": float(d.mean()), "wins": int((d > 0).sum()),
            "losses": int((d < 0).sum()), "equal": int((d == 0).sum()), "p": randomization_p(d, trials, seed),
        })
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return tests


def plain_cell(value: float, best: bool, sure: bool) -> str:
    number = f"{value:,.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"
    # Two columns for the marks, so that the numbers stay in line.
    return number + ("*" if best else " ") + ("\u2020" if sure else " ")


def sections(report: dict, cell=plain_cell) -> list:
    """What is shown of a report: a string is a line of words, a list of rows a table."""
    runs, metrics, tests = report["runs"], report["metrics"], report["tests"]
    head = f"{report['queries']:,} queries with a relevant document"
    if report["queries_without_relevant"]:
        head += f" ({report['queries_without_relevant']} without one left out)"
    if report["min_grade"] != 1:
        head += f"; binary measures count grades >= {report['min_grade']}"
    best = {metric: max(round(run[metric], 4) for run in runs.values()) for metric in metrics}
    sure = {(test["run"], test["metric"]) for test in tests if test["p_holm"] < 0.05}
    scores = [["run", *metrics, "unjudged@10", "missing"]]
    for name, run in runs.items():
        is_best = {metric: len(runs) > 1 and round(run[metric], 4) == best[metric] for metric in metrics}
        cells = [cell(run[metric], is_best[metric], (name, metric) in sure) for metric in metrics]
        unjudged = "-" if run["unjudged@10"] is None else f"{run['unjudged@10']:.1%}"
        scores.append([printable(name), *cells, unjudged, f"{run['missing']:,}"])
    words = ["unjudged@10: the share of the first ten results that nobody has judged; they count as not relevant",
             "missing: queries for which the run has no result; they count 0"]
    words += [f"{name}: {run['not_in_qrels']:,} of its queries are not in the qrels and do not count"
              for name, run in runs.items() if run["not_in_qrels"]]
    if not tests:
        return [head, scores, *words]

    first, *others = runs
    words.insert(0, f"*: best. \u2020: differs from {first} with p < 0.05")
    rows = [["against " + first, "metric", "difference", "wins", "losses", "equal", "p"]]
    for test in tests:
        p = f"{test['p_holm']:.4f}" if test["p_holm"] >= 1e-4 else "< 0.0001"
        counts = [f"{test[key]:,}" for key in ("wins", "losses", "equal")]
        rows.append([test["run"], test["metric"], f"{test['difference']:+.4f}", *counts, p])
    method = (f"p: randomisation test, paired by query, two-sided, {report['trials']:,} sign flips, "
              f"corrected (Holm) for {len(others)} comparisons a metric")
    return [head, scores, *words, rows, method]


def table(rows: list) -> str:
    """Rows of strings, the first one the head; the first column holds words, the others numbers."""
    width = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(width[0]), *(text.rjust(w) for text, w in zip(row[1:], width[1:]))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def names_of(paths: list) -> list[str]:
    """Each file's name without its ending, and as many folders before it as tell it from the others.

    >>> names_of(["runs/bm25/dev.trec", "runs/sp-1b/dev.trec.gz"])
    ['bm25/dev', 'sp-1b/dev']
    """
    parts = [Path(str(path).removesuffix(".gz")).absolute().with_suffix("").parts for path in paths]
    folders = 0
    while len({part[-1 - folders:] for part in parts}) < len(set(parts)):
        folders += 1
    return ["/".join(part[-1 - folders:]) for part in parts]


def report_of(args) -> dict:
    """What the command line asks for."""
    names = args.names or names_of(args.run)
    if len(names) != len(args.run) or len(set(names)) < len(names):
        raise ValueError(f"--names: {len(args.run)} runs need as many different names, got {', '.join(names)}")
    metrics = list(dict.fromkeys(metric.lower() for metric in args.metrics))
    runs = dict(zip(names, args.run))
    return compare(args.qrels, runs, metrics, args.min_grade, args.ties, args.depth, args.trials, args.seed)


def show(args) -> None:
    for section in sections(report_of(args)):
        print(section if isinstance(section, str) else f"\n{table(section)}")


def add_arguments(parser) -> None:
    parser.add_argument("--qrels", required=True, help="TREC, MS MARCO, BEIR or JSON; gzipped or not")
    parser.add_argument("--run", required=True, nargs="+", help="TREC, MS MARCO or JSON; the others are compared with the first")
    parser.add_argument("--names", nargs="+", help="one a run, for the tables; the files' names without it")
    parser.add_argument("--metrics", nargs="+", default=["mrr@10", "ndcg@10", "recall@1000"],
                        help=f"of {', '.join(METRICS)}; @k cuts")
    parser.add_argument("--min_grade", type=natural, default=1,
                        help="the grade that is relevant to binary measures (2 for TREC DL, as trec_eval -l 2)")
    parser.add_argument("--ties", choices=["docid", "run_order"], default="docid",
                        help="equal scores by document id, as trec_eval; or as the lines stand, as MS MARCO's script")
    parser.add_argument("--depth", type=positive_int, help="look at so many results a query only (trec_eval -M)")
    parser.add_argument("--trials", type=positive_int, default=10_000,
                        help="random sign flips; p is no finer than 1 / trials")
    parser.add_argument("--seed", type=natural, default=0, help="of the sign flips")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     formatter_class=Help)
    add_arguments(parser)
    run_command(parser.prog, partial(show, parser.parse_args(argv)))


if __name__ == "__main__":
    main()
