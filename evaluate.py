"""Run files and judgements in, trec_eval's numbers out, with tests of significance.

    python evaluate.py --qrels Q --run bm25.trec sparse.trec --metrics mrr@10 ndcg@10 recall@1000
    python evaluate.py --qrels dl19.qrels --run A --metrics ndcg@10 map --min_grade 2  # DL: 1 is not relevant
    python -m tools.compare --qrels Q --run A B  # Markdown, LaTeX, JSON; wins, costs, groups, single queries

What surprises:
- The numbers are trec_eval's (`-c`), digit for digit: scores are 32-bit floats, and equal ones go by document
  id, downwards and as strings, whatever the ranks say. `--ties run_order` takes the lines as they stand.
- A query without results counts 0. One without a relevant document, 0 in any run, is left out; trec_eval
  averages these zeros in.
- nDCG has linear gains, and the ideal of all judged documents; `--min_grade` changes binary measures only.
"""
import argparse
import contextlib
import json
import math
import re
from functools import partial
from typing import Iterator, NamedTuple

import numpy as np

from data import Help, check_id, check_qid, natural, open_bytes, positive_int, printable, run_command

# 1. Runs and qrels: files become columns.

class Pairs(NamedTuple):
    """Document docid[i] of query qids[query[i]] has the score or grade value[i]."""
    # Three arrays instead of millions of Python objects.
    qids: list[str]     # in order of first appearance
    query: np.ndarray   # int64, places in qids
    docid: np.ndarray   # fixed-width UTF-8 ("S8"): bytes sort as strcmp sorts them, and so as trec_eval does
    value: np.ndarray   # float64

    @classmethod
    def of(cls, nested: dict) -> "Pairs":
        """From {qid: {docid: value}}; a query without documents keeps its place in qids."""
        query = np.repeat(np.arange(len(nested)), [len(docs) for docs in nested.values()])
        docids = np.array([docid.encode() for docs in nested.values() for docid in docs], np.bytes_)
        values = np.array([value for docs in nested.values() for value in docs.values()], np.float64)
        # NaN would rank anywhere. Files are checked when they are read.
        if np.isnan(values).any():
            i = np.isnan(values).argmax()
            place = f"document {docids[i].decode()!r} in query {list(nested)[query[i]]!r}"
            raise ValueError(f"the score of {place} is not a number")
        return cls(list(nested), query, docids, values)

    def nested(self, kind=float) -> dict:
        """{qid: {docid: value}}, in the order of the lines."""
        out = {qid: {} for qid in self.qids}
        for query, docid, value in zip(self.query.tolist(), self.docid.tolist(), self.value.tolist()):
            out[self.qids[query]][docid.decode()] = kind(value)
        return out

    def lines(self, chosen) -> "Pairs":
        return Pairs(self.qids, *(column[chosen] for column in self[1:]))


def read_qrels(path) -> dict[str, dict[str, int]]:
    """{qid: {docid: grade}} from any of FORMS, below BEIR's header or not, or JSON; gzipped or not."""
    return read_pairs(path, "qrels").nested(int)


def read_run(path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} likewise; a rank r becomes the score -r."""
    return read_pairs(path, "run").nested()


# The columns of a line, told by their number; a point in the third makes a score of a rank.
FORMS = {
    "run": ["qid Q0 docid rank score tag", "qid docid rank score", "qid docid rank", "qid docid score"],
    "qrels": ["qid 0 docid grade", "qid docid grade"],
}
CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))


def read_pairs(path, kind: str) -> Pairs:
    """A "run" or "qrels" as columns, in the order of the lines."""
    parts, place_of, form, number = [], {}, None, 1
    for piece in pieces(path, kind):
        form = form or form_of(piece, kind, path)
        if form and piece.strip():
            qid, docid, value, line = cut(piece, form, path, number)
            # A query's lines mostly stand together: one look-up for each block of them.
            heads = np.flatnonzero(np.append(True, qid[1:] != qid[:-1])[:len(qid)])
            places = [place_of.setdefault(name, len(place_of)) for name in qid[heads].tolist()]
            query = np.repeat(np.array(places, np.int64), np.diff(heads, append=len(qid)))
            parts.append((query, docid, value, line))
        # Errors name a line of the file, not of the piece.
        number += piece.count(b"\n")
    # A search that failed is no run that found nothing.
    if not place_of:
        raise ValueError(f"{path}: holds no line of {kind}; the right file?")
    query, docid, value, line = map(np.concatenate, zip(*parts))
    # No scores: the first rank is the highest.
    if form.endswith("rank"):
        check_ranks(path, query, value, line)
        value = -value
    qids = [qid.decode() for qid in place_of]
    return without_repeats(path, kind, Pairs(qids, query, docid, value), line)


# Whole lines at a time: a piece that stays in the processor's cache is several times as fast to cut.
def pieces(path, kind: str) -> Iterator[bytes]:
    with open_bytes(path) as file:
        piece = file.read(1 << 18)
        if piece.lstrip().startswith(b"{"):
            piece = lines_of_json(path, kind, piece + file.read())
        # BEIR's header is as good as a comment.
        if kind == "qrels" and piece.startswith(b"query-id"):
            piece = b"#" + piece[1:]
        # A piece ends where a line does.
        while piece:
            yield piece + file.readline()
            piece = file.read(1 << 18)


def lines_of_json(path, kind: str, text: bytes) -> bytes:
    # JSON becomes lines, too, so that the same checks see it: white space in a name would make columns there.
    line, lines = "{} Q0 {} 0 {} json\n" if kind == "run" else "{} 0 {} {}\n", []
    try:
        # Lists of pairs: dicts would keep the last of two equal names.
        for qid, docs in json.loads(text, object_pairs_hook=list):
            qid = check_qid(qid)
            for docid, value in docs:
                # A string may be a number, but no two.
                float(value)
                lines.append(line.format(qid, check_id(docid), value))
        return "".join(lines).encode()
    except (ValueError, TypeError, OverflowError) as e:
        raise ValueError(f"{path}: expected one JSON object {{qid: {{docid: score or grade}}}}: {e}") from e


def form_of(piece: bytes, kind: str, path) -> str | None:
    """The form of the first line that is not blank or a comment; None if there is none."""
    # As in `cut`, a comment begins in the first column.
    lines = [line for line in piece.decode(errors="replace").split("\n") if line.strip() and line[0] != "#"]
    if not lines:
        return None
    words = lines[0].split()
    forms = {len(form.split()): form for form in FORMS[kind]}
    form = forms.get(min(len(words), 6) if kind == "run" else len(words))
    if form == "qid docid score" and "." not in words[2]:
        form = "qid docid rank"
    # Qrels have four columns, too, but no ranks.
    if form is None or form == "qid docid rank score" and words[2] not in ("0", "1"):
        known = " or ".join(map(repr, FORMS[kind]))
        raise ValueError(f"{path}: expected {known} in {kind}, got {len(words)} columns: {lines[0][:80]!r}")
    return form


def cut(piece: bytes, form: str, path, number: int) -> tuple:
    """(qid, docid, value, number of the line) of whole lines, the first of which is line `number`."""
    # Words start and end by turns; then how many of them each line has.
    text = np.frombuffer(piece.rstrip() + b"\n", np.uint8)
    edges = np.flatnonzero(np.diff(text > 32, prepend=False))
    starts, ends, line_ends = edges[0::2], edges[1::2], np.flatnonzero(text == ord("\n"))
    words_so_far = np.searchsorted(starts, line_ends)
    count = np.diff(words_so_far, prepend=0)

    # As trec_eval 10: comments are passed over, and so is text behind a run's sixth column.
    kept = np.flatnonzero(text[np.append(0, line_ends[:-1] + 1)] != ord("#"))
    names, count = form.split(), count[kept]
    first_word, line = words_so_far[kept] - count, number + kept
    wrong = count != len(names)
    if wrong.any() and len(piece.translate(None, CONTROLS)) < len(piece):
        raise ValueError(f"{path}: holds control characters; a text file?")
    wrong &= (count < 6) | (len(names) < 6)
    if wrong.any():
        odd = piece.split(b"\n")[kept[wrong][0]].decode(errors="replace")[:80]
        raise ValueError(f"{path}:{line[wrong][0]}: expected {len(names)} columns as in the first line "
                         f"({form}), got {count[wrong][0]}: {odd!r}")

    # Of scores and ranks the score.
    name = next(name for name in ("score", "grade", "rank") if name in names)
    places = [first_word + names.index(column) for column in ("qid", "docid", name)]
    qid, docid, words = (strings(text, starts[place], ends[place]) for place in places)
    value = numbers(words)
    wrong = ~np.isfinite(value) | (name != "score") & (value != np.rint(value))
    if wrong.any():
        wanted = "a finite number" if name == "score" else "an integer"
        raise ValueError(f"{path}:{line[wrong][0]}: expected {wanted} as {name} ({form}), "
                         f"got {words[wrong][0].decode(errors='replace')!r}")
    return qid, docid, value, line


def strings(text: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The bytes of `text` from each start to its end, as one array of fixed width."""
    # A window as wide as the widest at each start, and zeros over what stands behind the end.
    width = (end - start).max(initial=1)
    padded = np.append(text, np.zeros(width, np.uint8))
    chars = np.lib.stride_tricks.sliding_window_view(padded, width)[start]  # (lines, width)
    chars[np.arange(width) >= (end - start)[:, None]] = 0
    return chars.view(f"S{width}").ravel()


def numbers(words: np.ndarray) -> np.ndarray:
    """Words such as b"-12.345" as float64; nan where a word is no number."""
    # At most 15 digits and a power of ten are exact floats, and their quotient rounds as strtod would, in a
    # third of numpy's time. What looks otherwise, or is longer, goes to numpy.
    n = len(words)
    whole, digits, behind = np.zeros(n), np.zeros(n, np.int8), np.zeros(n, np.int8)
    pointed, plain = np.zeros(n, bool), np.full(n, words.itemsize <= 17)
    chars = np.ascontiguousarray(words.view(np.uint8).reshape(n, -1).T)[:17]  # (width, lines)
    for place, char in enumerate(chars):
        # Wraps around: everything but a digit lands above 9.
        digit = char - np.uint8(ord("0"))
        is_digit, is_point = digit < 10, char == ord(".")
        plain &= is_digit | (is_point & ~pointed) | (char == 0) | ((char == ord("-")) & (place == 0))
        whole = np.where(is_digit, 10 * whole + digit, whole)
        digits += is_digit
        behind += is_digit & pointed
        pointed |= is_point
    plain &= (digits > 0) & (digits <= 15)
    value = np.where(chars[0] == ord("-"), -whole, whole) / 10.0 ** np.arange(18)[behind]
    others = np.flatnonzero(~plain)
    value[others] = math.nan
    try:
        value[others] = words[others].astype(np.float64)
    except ValueError:
        # One of them at least is no number; the others are.
        for i in others:
            with contextlib.suppress(ValueError):
                value[i] = float(words[i])
    return value


# Within each query ranks start at 0 or 1, and rise line by line; else they may be scores.
def check_ranks(path, query: np.ndarray, rank: np.ndarray, line: np.ndarray) -> None:
    order = np.argsort(query, kind="stable")
    query, rank, line = query[order], rank[order], line[order]
    begins = np.append(True, query[1:] != query[:-1])
    wrong = np.where(begins, (rank < 0) | (rank > 1), rank <= np.append(0, rank[:-1]))
    if wrong.any():
        raise ValueError(f"{path}:{line[wrong].min()}: three columns without a decimal point are 'qid docid "
                         "rank', and these ranks do not rise from 1; write scores with a point (12.0)")


# A document twice in one query of a run is an error. In qrels only a contradiction is one.
def without_repeats(path, kind: str, pairs: Pairs, line: np.ndarray) -> Pairs:
    # Nearly always there is none, and sorted keys say so at once.
    keys = np.sort(keys_of(pairs.query, pairs.docid, pairs.docid.itemsize))
    if (keys[1:] != keys[:-1]).all():
        return pairs
    first = {}
    for i, (query, docid) in enumerate(zip(pairs.query.tolist(), pairs.docid.tolist())):
        before = first.setdefault((query, docid), i)
        if before < i and (kind == "run" or pairs.value[i] != pairs.value[before]):
            raise ValueError(f"{path}:{line[i]}: document {docid.decode()!r} of query {pairs.qids[query]!r} "
                             f"stands in line {line[before]} already; remove one")
    return pairs.lines(list(first.values()))


# One 64-bit number for each (query, docid of at most `width` bytes), so that a join compares few strings.
# Equal pairs have equal keys; the reverse is nearly certain, and who finds equal keys looks again.
def keys_of(query: np.ndarray, docid: np.ndarray, width: int) -> np.ndarray:
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
    """The judged documents that a run returned, and all that were judged: no measure needs more."""
    qids: list                # the n queries that have a relevant document
    query: np.ndarray         # (hits,) place in qids, ascending; within a query the hits go down the ranking
    rank: np.ndarray          # (hits,) from 0
    grade: np.ndarray         # (hits,)
    returned: np.ndarray      # (n,) documents returned
    judged_query: np.ndarray  # (judged,) the best grades of a query first
    judged_grade: np.ndarray


def evaluate(qrels, run, metrics: list, min_grade: int = 1, ties: str = "docid", depth: int | None = None):
    """{metric: {qid: value}} of qrels and a run: `Pairs`, or {qid: {docid: grade or score}}.

    The ranking is b a x: the first relevant one at rank 2, one of two found. Then a tie: c goes before a.
    >>> qrels = {"q": {"a": 1, "b": 0, "c": 2}}
    >>> evaluate(qrels, {"q": {"b": 9.0, "a": 8.0, "x": 7.0}}, ["mrr@10", "recall@10", "p@2"])
    {'mrr@10': {'q': 0.5}, 'recall@10': {'q': 0.5}, 'p@2': {'q': 0.5}}
    >>> evaluate(qrels, {"q": {"a": 1.0, "c": 1.0}}, ["ndcg@10"])
    {'ndcg@10': {'q': 1.0}}
    """
    hits = find_hits(qrels, run, ties, depth)
    return {metric: dict(zip(hits.qids, measure(hits, metric, min_grade).tolist())) for metric in metrics}


def find_hits(qrels, run, ties: str = "docid", depth: int | None = None) -> Hits:
    """Look the run's documents up in the qrels, and find the ranks of those that are judged."""
    qrels, run = (x if isinstance(x, Pairs) else Pairs.of(x) for x in (qrels, run))
    # A query without a relevant document is out. Of the others the best grades come first: the ideal ranking.
    relevant = np.unique(qrels.query[qrels.value > 0])
    if not len(relevant):
        raise ValueError("no query of the qrels has a relevant document")
    judged = qrels.lines(np.lexsort((-qrels.value, qrels.query)))
    judged = judged.lines(np.isin(judged.query, relevant))
    judged = judged._replace(qids=[qrels.qids[query] for query in relevant],
                             query=np.searchsorted(relevant, judged.query))

    # A run need not keep a query's lines together, what follows needs them so.
    if (run.query[1:] < run.query[:-1]).any():
        run = run.lines(np.argsort(run.query, kind="stable"))
    start = np.searchsorted(run.query, np.arange(len(run.qids) + 1))

    # From the run's places of queries to those of the qrels, -1 for a query that they do not know.
    place_of = {qid: place for place, qid in enumerate(judged.qids)}
    place = np.array([place_of.get(qid, -1) for qid in run.qids], np.int64)
    returned = np.zeros(len(judged.qids), np.int64)
    returned[place[place >= 0]] = np.diff(start)[place >= 0]

    # The judged documents, down the ranking.
    line, found = join(place[run.query], run.docid, judged)
    rank = ranks_of(run, start, line, ties)
    order = np.lexsort((rank, judged.query[found]))
    found, rank = found[order], rank[order]
    # Cut last: what is tied at the cut goes by document, too.
    if depth is not None:
        found, rank, returned = found[rank < depth], rank[rank < depth], np.minimum(returned, depth)
    hits = judged.lines(found)
    return Hits(judged.qids, hits.query, rank, hits.value, returned, judged.query, judged.value)


def join(query: np.ndarray, docid: np.ndarray, judged: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The lines (query, docid) that are judged, and the places of their judgements."""
    width = max(docid.itemsize, judged.docid.itemsize)
    keys, theirs = keys_of(query, docid, width), keys_of(judged.query, judged.docid, width)
    # A run has millions of lines, the qrels thousands. A table of the 20 low bits of the qrels' keys turns
    # nearly every line away; those that remain look theirs up among the sorted keys.
    low_bits, maybe = np.uint64((1 << 20) - 1), np.zeros(1 << 20, bool)
    maybe[theirs & low_bits] = True
    line = np.flatnonzero(maybe[keys & low_bits])
    order = np.argsort(theirs)
    found = order[np.searchsorted(theirs[order], keys[line]).clip(max=len(theirs) - 1)]
    equal = (judged.query[found] == query[line]) & (judged.docid[found] == docid[line])
    return line[equal], found[equal]


def ranks_of(run: Pairs, start: np.ndarray, lines: np.ndarray, ties: str) -> np.ndarray:
    """The ranks of some lines, from 0: how many of their query's documents go before them."""
    # As trec_eval has them. Beyond float32's range is a tie at infinity, there as here.
    with np.errstate(over="ignore"):
        score = run.value.astype(np.float32)
    # No sort: of a query's thousand results only the few judged ones need a rank.
    rank = np.zeros(len(lines), np.int64)
    for i, line in enumerate(lines.tolist()):
        first, end = start[run.query[line]], start[run.query[line] + 1]
        scores = score[first:end]
        tied = first + np.flatnonzero(scores == score[line])
        before = run.docid[tied] > run.docid[line] if ties == "docid" else tied < line
        rank[i] = np.count_nonzero(scores > score[line]) + np.count_nonzero(before)
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
    # A query without one stays at 0.
    best = np.zeros(len(top.found))
    np.maximum.at(best, top.query, 1 / (top.rank + 1))
    return best


def average_precision(top: Top):
    """The mean over all relevant documents of the precision at their ranks, 0 for those not found."""
    nth_of_query = np.arange(len(top.query)) - np.searchsorted(top.query, top.query) + 1
    return np.bincount(top.query, nth_of_query / (top.rank + 1), len(top.found)) / np.maximum(top.relevant, 1)


def ndcg(top: Top):
    """The sum of grade / log2(rank + 1) over that of the best ranking of all judged documents."""
    query, grade = top.hits.judged_query, top.hits.judged_grade
    best_rank = np.arange(len(query)) - np.searchsorted(query, query)
    return gain(top, top.hits.query, top.hits.rank, top.hits.grade) / gain(top, query, best_rank, grade)


def gain(top: Top, query, rank, grade):
    # Ranks count from 0 here. A negative grade gains nothing, as in trec_eval.
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
    # As trec_eval counts them: above 0, whatever the least grade.
    return np.bincount(top.hits.judged_query, top.hits.judged_grade > 0, len(top.found))


def num_rel_ret(top: Top):
    return top.found


# "@k": divided by k, and so without a value if there is no cut.
METRICS = {
    "mrr": mrr, "ndcg": ndcg, "recall": recall, "map": average_precision, "p@k": precision,
    "success@k": success, "r_cap@k": capped_recall, "judged@k": judged,
    "num_ret": num_ret, "num_rel": num_rel, "num_rel_ret": num_rel_ret,
}


def measure(hits: Hits, metric: str, min_grade: int = 1) -> np.ndarray:
    """One value for each of hits.qids; `metric` is a name of METRICS, with or without a cut as in ndcg@10."""
    name, at, cut = metric.lower().partition("@")
    function = METRICS.get(name + "@k" * bool(at)) or METRICS.get(name)
    if not function or (at and not re.fullmatch("[1-9][0-9]*", cut)):
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}; a cut as in ndcg@10")
    # Looked up once; what counts as relevant is each call's own.
    k, n = int(cut) if at else math.inf, len(hits.qids)
    seen = (hits.grade >= min_grade) & (hits.rank < k)
    found = np.bincount(hits.query[seen], minlength=n)
    relevant = np.bincount(hits.judged_query, hits.judged_grade >= min_grade, n)
    return function(Top(hits.query[seen], hits.rank[seen], found, relevant, k, hits))


# 4. Is it a difference, or the luck of these queries?

def randomization_p(difference: np.ndarray, trials: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired test: were the systems equal, each difference might as well have the other sign. p is
    the share of random sign flips (the observed one among them) whose sum is at least as far from 0."""
    # A tie is a tie under either sign.
    d = difference[difference != 0]
    rng, extreme = np.random.default_rng(seed), 1
    # Sums that are equal on paper must count as equal.
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    # 500 at a time, since a trial is as long as the queries.
    for done in range(0, trials, 500):
        random_bytes = rng.integers(0, 256, (min(500, trials - done), -(-len(d) // 8)), np.uint8)
        flips = np.unpackbits(random_bytes, axis=1, count=len(d))
        # d for a 1 and -d for a 0: that is 2d for the ones, less all d.
        extreme += int((np.abs(flips @ (2 * d) - d.sum()) >= least).sum())
    return extreme / (trials + 1)


def holm(p: list) -> list:
    """Corrected for asking m questions at once: the smallest p times m, the next times m - 1, never falling.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    # A larger p, times less, must not pass where a smaller one failed.
    out, floor = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        out[i] = floor = max(floor, min(1.0, (len(p) - step) * p[i]))
    return out


# 5. The command line.

def show(args) -> None:
    qrels, values, missing = read_pairs(args.qrels, "qrels"), {}, []
    names = args.names or args.run
    if not len(args.run) == len(names) == len(set(names)):
        raise ValueError(f"{len(args.run)} runs need as many different --names, got {', '.join(names)}")
    for name, path in zip(names, args.run):
        hits = find_hits(qrels, read_pairs(path, "run"), args.ties, args.depth)
        values[name] = [measure(hits, metric, args.min_grade) for metric in args.metrics]
        missing.append(str(np.count_nonzero(hits.returned == 0)))
    # A row for each run: its means, and how sure it is that they differ from those of the first run.
    first, *others = values
    columns = [["run", *map(printable, values)]]
    for i, metric in enumerate(args.metrics):
        p = [randomization_p(values[name][i] - values[first][i], args.trials, args.seed) for name in others]
        columns.append([metric, *(f"{value[i].mean():.4f}" for value in values.values())])
        columns.append(["p", "", *(f"{chance:.4f}" for chance in holm(p))])
    columns.append(["missing", *missing])
    width = [max(map(len, column)) for column in columns]
    for name, *row in zip(*columns):
        print(name.ljust(width[0]), *(text.rjust(size) for text, size in zip(row, width[1:])), sep="  ")
    n = len(hits.qids)
    print(f"{n:,} queries; {len(qrels.qids) - n:,} without a relevant document are left out\n"
          "missing: queries for which a run has no result; they count 0")
    if others:
        print(f"p: against {first}, randomisation test by query, corrected for {len(others)} comparisons")


def add_arguments(parser) -> None:
    # A function of its own: tools.compare takes the same flags.
    add, metrics = parser.add_argument, ["mrr@10", "ndcg@10", "recall@1000"]
    add("--qrels", required=True, help="TREC, MS MARCO, BEIR or JSON; gzipped or not")
    add("--run", required=True, nargs="+", help="the others are compared with the first")
    add("--names", nargs="+", help="one a run, for the table")
    add("--metrics", nargs="+", type=str.lower, default=metrics, help=f"of {', '.join(METRICS)}")
    add("--min_grade", type=natural, default=1, help="the least that binary measures count (TREC DL: 2)")
    add("--ties", choices=["docid", "run_order"], default="docid", help="what orders equal scores")
    add("--depth", type=positive_int, help="look at so many results of a query (trec_eval -M)")
    add("--trials", type=positive_int, default=10_000, help="sign flips: p is at least 1 / trials")
    add("--seed", type=natural, default=0, help="of the sign flips")


def main(argv=None):
    parser = argparse.ArgumentParser("evaluate.py", allow_abbrev=False, formatter_class=Help)
    add_arguments(parser)
    run_command(parser.prog, partial(show, parser.parse_args(argv)))


if __name__ == "__main__":
    main()
