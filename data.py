"""Files in, files out: readers for the formats people have, the memory-mapped corpus, training rows, and what makes more of them.

    python data.py demo --out data/demo                                                  # a whole offline world to train in
    python data.py mine --run R --qrels Q --queries QS --out rows.jsonl                   # hard negatives from any run file
    python data.py score --teacher NAME --train rows.jsonl --corpus C --out scored.jsonl  # teacher scores for KD and CL+KD
    python data.py fuse --runs A.trec B.trec --out both.trec                              # one ranking from several

What surprises:
- A corpus is read once, into `collection.tsv.store` beside it (or in $CORPUS_CACHE): one file that every process maps, so that 8.8 million
  passages open in milliseconds and all ranks share one copy in the page cache. Training rows go the same way. A source that changed is read again.
- A line ends at \\n and nowhere else. MS MARCO's passages hold U+0085 and U+2028, where `str.splitlines` would cut them in two.
- A fault is an error that names file, line and cure. Only ids that the corpus or the queries lack are forgiven: counted, reported, left out.
"""
import argparse
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import sys
import time
from itertools import groupby, islice
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
from tqdm import tqdm

BLOCK = 1 << 25  # 32 MB: large enough that numpy's cost per call vanishes, small enough that memory never notices


def open_bytes(path) -> io.BufferedIOBase:
    """Open a file for reading, unpacked if it is gzip (told by its first bytes, not by its name), past a byte-order mark."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path}: {'is a folder, and a file is needed' if path.is_dir() else 'no such file'}")
    raw = open(path, "rb")
    file = io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
    if file.peek(3)[:3] == b"\xef\xbb\xbf":
        file.read(3)
    return file


def open_text(path) -> io.TextIOWrapper:
    """The same as text. newline="\\n": universal newlines would also cut at a lone \\r inside a passage."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8", newline="\n")


def read_lines(path) -> Iterator[tuple[int, str]]:
    """(line number, line) of every line that is not blank, without its \\n or \\r\\n."""
    n = 0
    with open_bytes(path) as file:
        try:
            for n, raw in enumerate(file, 1):  # a binary file ends its lines at \n only
                line = raw.decode().removesuffix("\n").removesuffix("\r")
                if line:
                    yield n, line
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}:{n}: not UTF-8 ({e.reason} at byte {e.start}); convert it: iconv -f latin1 -t utf-8 {path} > fixed") from e
        except (EOFError, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}:{n + 1}: the gzip data end early or are damaged ({e}); fetch the file again") from e


@contextlib.contextmanager
def write_whole(path, mode: str = "w"):
    """Write `path` whole or not at all: into a temporary file beside it, renamed when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename can leave the name and no bytes
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def is_jsonl(path) -> bool:
    """Whether the first line that is not blank opens a JSON object. The content decides: names lie."""
    return next((line for _, line in read_lines(path)), "").lstrip().startswith("{")


def parse_json(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"{where}: not JSON ({e.msg} at column {e.colno}); one object a line is expected") from e
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def read_queries(path) -> dict[str, str]:
    """{qid: text} of a tsv (`id<TAB>text`), a jsonl (`_id`, `text`), either of them gzipped, or a BEIR folder."""
    path = find_in(path, ["queries.jsonl", "queries.jsonl.gz", "queries.tsv", "queries.tsv.gz"])
    queries, seen, jsonl = {}, {}, is_jsonl(path)
    for n, line in read_lines(path):
        qid, text = (record_of(line, f"{path}:{n}") if jsonl else columns_of(line, f"{path}:{n}"))
        if qid in seen:
            raise ValueError(f"{path}:{n}: query id {qid!r} stands on line {seen[qid]} already; remove one of the two")
        queries[qid], seen[qid] = text, n
    if not queries:
        raise ValueError(f"{path}: holds no queries")
    return queries


def find_in(path, names: list[str]) -> Path:
    """`path` itself, or the first of `names` that stands in it if it is a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).exists():
            return path / name
    raise ValueError(f"{path}: holds none of {', '.join(names)}")


def columns_of(line: str, where: str) -> tuple[str, str]:
    docid, tab, text = line.partition("\t")  # at the first tab: the passage may hold more
    if not tab:
        raise ValueError(f"{where}: expected id<TAB>text, got 1 column")
    return check_id(docid, where), text


def record_of(line: str, where: str) -> tuple[str, str]:
    """(id, "title text") of one BEIR line."""
    record = parse_json(line, where)
    docid = record.get("_id")
    if not isinstance(docid, (str, int)) or isinstance(docid, bool):
        raise ValueError(f"{where}: expected a string under '_id', got {docid!r}; the keys are {', '.join(record)}")
    parts = [record.get("title") or "", record.get("text") or ""]  # some copies write null for an empty title
    if not all(isinstance(part, str) for part in parts) or "text" not in record:
        raise ValueError(f"{where}: expected a string under 'text' (and 'title'); the keys are {', '.join(record)}")
    return check_id(str(docid), where), " ".join(part for part in parts if part)


def check_id(docid: str, where: str) -> str:
    if not docid or len(docid) > 512 or any(map(str.isspace, docid)):
        raise ValueError(f"{where}: {docid[:40]!r} cannot be an id: 1 to 512 characters without white space, or TREC files could not hold it")
    return docid


# Runs and qrels: read_qrels, read_run, write_run.


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
            return Pairs.of(json.loads(b"".join(_pieces(path)), object_pairs_hook=lambda items: _once(path, items)))
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
            value = column(value_at).astype(np.float64)
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


def _is_whole(kind, n):
    return kind == "qrels" or n == 3  # grades and ranks are integers, scores are not


def _blame(path, kind, n, header):
    """Something in this file is off: read it once more, slowly, and say where, what was expected, and what stands there."""
    (*_, value_at), names = SHAPES[kind][n]
    for number, line in enumerate(b"".join(_pieces(path)).decode(errors="replace").split("\n")[header:], 1 + header):
        columns = line.split()
        if len(columns) != n:
            raise ValueError(f"{path}:{number}: expected {n} columns as in line {1 + header} ({names}), got {len(columns)}: {line[:80]!r}")
        try:
            value = float(columns[value_at])
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or _is_whole(kind, n) and not value.is_integer():
            wanted = "an integer" if _is_whole(kind, n) else "a finite number"
            raise ValueError(f"{path}:{number}: expected {wanted} as {names.split()[value_at]} ({names}), got {columns[value_at]!r}")


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


def _once(path, items):
    names = [name for name, _ in items]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: {next(name for name in names if names.count(name) > 1)!r} stands twice in one JSON object; remove one of the two")
    return dict(items)


def read_qrels(path) -> dict[str, dict[str, int]]:
    """{qid: {docid: grade}} from any file that `read_pairs` knows."""
    return read_pairs(path, "qrels").nested(int)


def read_run(path) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} from any file that `read_pairs` knows."""
    return read_pairs(path, "run").nested()


def write_run(path, run: dict[str, dict[str, float]], tag: str = "run"):
    """{qid: {docid: score}} as a TREC run, best first. Equal scores stay in the order they came in: trec_eval orders them anew, MS MARCO's
    script goes by the lines."""
    with write_whole(path) as file:
        for qid, docs in run.items():
            for rank, (docid, score) in enumerate(sorted(docs.items(), key=lambda item: -item[1]), 1):
                file.write(f"{qid} Q0 {check_id(docid, f'{path}: query {qid}')} {rank} {score} {tag}\n")


# Stores: one file per source, made once, mapped by every process.
