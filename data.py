"""Files in, files out: queries, the memory-mapped corpus, training rows, and what every command leans on.

    corpus = Corpus("beir/scifact")           # corpus[0], corpus.docid(0), corpus.row("4983"), len(corpus)
    rows = TrainingRows("train.jsonl", corpus, "queries.tsv")        # rows.example(0, n_negatives=7, rng=rng)

What surprises:
- A corpus is read once, into `collection.tsv.store` beside it (or in the folder $CORPUS_CACHE). Every process
  maps that: 8.8 million passages open in milliseconds, and all share one copy in the page cache. Training
  rows go the same way. A source that changed is read again.
- A line ends at \\n and nowhere else. MS MARCO's passages hold U+0085, where `str.splitlines` would cut.
- A fault is an error that names file, line and cure. Only ids that the corpus or the queries lack are
  forgiven: they are counted, reported and left out.
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
import shutil
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
from tqdm import tqdm

MB = 1 << 20

# 1. Reading: what users wrote comes in here.

# What people download in place of text: (place of its mark, the mark, its name, the cure).
NOT_TEXT = [
    (0, b"PK\x03\x04", "zip archive", "unzip {}"),
    (4, b"1AY&SY", "bzip2 file", "bunzip2 {}"),
    (0, b"\xfd7zXZ\0", "xz file", "unxz {}"),
    (0, b"\x28\xb5\x2f\xfd", "zstd file", "unzstd {}"),
    (257, b"ustar", "tar archive", "tar -xf {}"),
    (0, b"PAR1\x15", "parquet file", "pandas.read_parquet('{}').to_json(FILE, orient='records', lines=True)"),
    (0, b"\x80", "pickle, which may run any code when it is opened",
     "python -m tools.convert --format scores {} --out scores.json"),
]


class Unpacked(gzip.GzipFile):
    """A gzip file whose damage is reported with its name."""

    def read(self, size=-1):
        try:
            return super().read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{self.name}: the gzip data end early or are damaged ({e}); fetch it "
                             "again") from e


def open_bytes(path) -> io.BufferedIOBase:
    """Open a file of text for reading: unpacked if it is gzip, past a byte-order mark."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, and a file is needed")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    file = open(path, "rb")
    # The first bytes tell what it is: names lie.
    if file.peek(2)[:2] == b"\x1f\x8b":
        file.close()
        file = io.BufferedReader(Unpacked(path), MB)
    # What is no text says so in its first bytes, too. A peek takes nothing away.
    head = file.peek(512)
    for place, mark, kind, cure in NOT_TEXT:
        if head[place:].startswith(mark):
            file.close()
            raise ValueError(f"{path}: is a {kind}, and text is expected; {cure.format(path)}")
    if head.startswith(b"\xef\xbb\xbf"):
        file.read(3)
    return file


def read_lines(path, parse: Callable = str) -> Iterator[tuple]:
    """(line number, parse(line)) of each line that is not blank; what parse refuses is an error there."""
    with open_bytes(path) as file:
        # A file of bytes ends its lines at \n only.
        for n, raw in enumerate(file, 1):
            try:
                line = raw.decode().removesuffix("\n").removesuffix("\r")
                parsed = parse(line) if line else None
            except UnicodeDecodeError as e:
                raise ValueError(f"{path}:{n}: not UTF-8 ({e.reason} at byte {e.start}); "
                                 f"convert it: iconv -f latin1 -t utf-8 {path} > fixed") from e
            except ValueError as e:
                raise ValueError(f"{path}:{n}: {e}") from e
            # Blank lines are nobody's, wherever they stand.
            if line:
                yield n, parsed


def parse_json(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg} at column {e.colno}); one object a line is expected") from e
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    return record


def read_json(path, cure: str = "write it again, or remove it"):
    """What a JSON file holds, gzipped or not."""
    try:
        with open_bytes(path) as file:
            return json.loads(file.read())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: is not JSON, or damaged ({e}); {cure}") from e


def find_in(path, names: list[str]) -> Path:
    """`path` itself, or the first of `names` that stands in it if it is a folder."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).exists():
            return path / name
    raise ValueError(f"{path}: holds none of {', '.join(names)}")


# 2. Queries and passages: an id and a text, as `id<TAB>text` or as JSON.

# The first of these that a record has: BEIR's, then those of Anserini, Pyserini and Tevatron.
ID_KEYS = ("_id", "id", "docid", "query_id", "qid")
TEXT_KEYS = ("text", "contents", "query")


def read_texts(path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number, (id, text)) of a tsv or jsonl; the first line tells which."""
    # JSON begins with a brace, and an id does not.
    first = next(read_lines(path), (0, ""))[1]
    return read_lines(path, text_of_json if first.lstrip().startswith("{") else text_of_columns)


def text_of_columns(line: str) -> tuple[str, str]:
    # At the first tab: the passage may hold more of them.
    docid, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("expected id<TAB>text, got 1 column")
    return check_id(docid), text


def text_of_json(line: str) -> tuple[str, str]:
    """(id, "title text").

    >>> text_of_json('{"_id": "7", "title": "Cats", "text": "They purr."}')
    ('7', 'Cats They purr.')
    """
    record = parse_json(line)
    docid = next((record[key] for key in ID_KEYS if key in record), None)
    text = next((record[key] for key in TEXT_KEYS if key in record), None)
    # Some copies write null for an empty title.
    title = record.get("title") or ""
    keys = f"the keys are {', '.join(record)}"
    if type(docid) not in (str, int):
        raise ValueError(f"expected an id under one of {', '.join(ID_KEYS)}, got {docid!r}; {keys}")
    if type(text) is not str or type(title) is not str:
        raise ValueError(f"expected a string under one of {', '.join(TEXT_KEYS)}; {keys}")
    text = f"{title} {text}" if title and text else title or text
    # JSON's escapes can spell what UTF-8 cannot carry.
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(text[e.start]):x}"
        raise ValueError(f"holds half of a surrogate pair ({half}), which UTF-8 cannot carry; remove "
                         "it") from e
    return check_id(str(docid)), text


def check_id(docid: str) -> str:
    # TREC's files have spaces between their columns.
    if not docid or len(docid.encode("utf-8", "replace")) > 512 or min(docid) <= " ":
        raise ValueError(f"{docid[:40]!r} cannot be an id: 1 to 512 bytes without white space, or TREC files "
                         "could not hold it")
    return docid


def read_queries(path) -> dict[str, str]:
    """{qid: text} of a tsv, a jsonl, either of them gzipped, or a BEIR folder."""
    path = find_in(path, ["queries.jsonl", "queries.jsonl.gz", "queries.tsv", "queries.tsv.gz"])
    queries, line_of = {}, {}
    for n, (qid, text) in read_texts(path):
        if qid in queries:
            raise ValueError(f"{path}:{n}: query id {qid!r} stands on line {line_of[qid]} already; remove "
                             "one of the two")
        queries[qid], line_of[qid] = text, n
    if not queries:
        raise ValueError(f"{path}: holds no queries")
    return queries


def write_run(path, run: dict[str, dict[str, float]], tag: str = "run") -> None:
    """{qid: {docid: score}} as a TREC run, best first; equal scores stay in the order they came in."""
    with write_whole(path) as file:
        for qid, docs in run.items():
            # sorted is stable.
            ranked = sorted(docs.items(), key=lambda item: -item[1])
            for rank, (docid, score) in enumerate(ranked, 1):
                file.write(f"{qid} Q0 {check_id(docid)} {rank} {score} {tag}\n")


# 3. Stores: a folder for each source, made once, mapped by every process.


class Store:
    """A folder: a file `text`, the arrays that index it, and store.json, which says what it was made from.

    Mapped, it costs a process no memory of its own: store.text, and an attribute for each array."""

    def __init__(self, place: Path, made_from: dict):
        self.place, self.made_from = place, made_from
        self.meta = read_json(place / "store.json")
        if self.meta["made_from"] != made_from:
            raise ValueError(f"{place}: was made from another state of its source; start again, and it is "
                             "made anew")
        self.verify(full=False)
        # Mapped, and read a page at a time by whoever asks; the kernel keeps one copy for all.
        with open(place / "text", "rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for array in place.glob("*.npy"):
            # As a plain array: numpy's memmap class takes three times as long for one number.
            setattr(self, array.stem, np.asarray(np.load(array, mmap_mode="r")))

    def __reduce__(self):
        # A DataLoader's worker maps the files again instead of receiving them.
        return Store, (self.place, self.made_from)

    def verify(self, full: bool = True) -> None:
        """Compare every byte with the checksums of the day it was made."""
        check_files(self.place, self.meta["files"], "remove the folder, and it will be made anew", full)


def open_store(source: Path, suffix: str, cache, made_from: dict, build: Callable[[Path], dict]) -> Store:
    """Map the store of `source`; make it first where it is missing, damaged or stale.

    build(folder) writes `text` and the arrays, and returns what else store.json shall hold."""
    made_from = {"source": state_of(source), **made_from}
    place = source.with_name(source.name + suffix)
    cache = cache or os.environ.get("CORPUS_CACHE")
    if cache:
        # One folder for many sources: the digest keeps two `corpus.jsonl` apart.
        place = Path(cache) / f"{source.name}.{digest(str(source.resolve()))[:8]}{suffix}"
    # As a rule it is there.
    with contextlib.suppress(ValueError):
        return Store(place, made_from)
    try:
        with locked(place, wait=True):
            # Who waited for the lock finds that another process has made it.
            with contextlib.suppress(ValueError):
                return Store(place, made_from)
            if place.exists():
                discard(place)
            with new_folder(place) as folder:
                meta = build(folder)
                if made_from["source"] != state_of(source):
                    raise ValueError(f"{source}: changed while it was read; start again when its writer is "
                                     "done")
                files = {file.name: stamp(file) for file in folder.iterdir()}
                meta |= {"made_from": made_from, "files": files}
                (folder / "store.json").write_text(json.dumps(meta))
            return Store(place, made_from)
    except OSError as e:
        raise ValueError(f"{place.parent}: cannot hold the store of {source} ({e.strerror}); "
                         f"name a folder on a local disk with room: CORPUS_CACHE=DIR") from e


def state_of(path) -> list:
    """What tells one state of a file from another at no cost: size, time, and both ends."""
    # Opened only to say in words what is wrong with a path.
    open_bytes(path).close()
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, fingerprint(path, blocks=2, block=1 << 16)]


def digest(*texts: str) -> str:
    """16 hexadecimal digits for a text, or for many in their order."""
    h = hashlib.blake2b(digest_size=8)
    # The zero byte keeps ("ab", "c") apart from ("a", "bc").
    for text in texts:
        h.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return h.hexdigest()


# 4. The corpus.

# Passages that are looked at together.
CHUNK = 1 << 12


def hash_id(docid: bytes) -> bytes:
    return hashlib.blake2b(docid, digest_size=8).digest()


class Corpus:
    """The passages of a `collection.tsv`, `corpus.jsonl` (or their .gz) or BEIR folder, by row and id."""

    # In the store: `text`, id<TAB>text<LF> for every passage; `start` (N + 1) and `id_length` (N), which say
    # where they are; `hashes`, 64 bits of every id, ascending; `order`, the rows that these belong to.

    def __init__(self, path, cache=None):
        names = ["corpus.jsonl", "corpus.jsonl.gz", "collection.tsv", "collection.tsv.gz"]
        self.source = find_in(path, names)
        self.store = open_store(self.source, ".store", cache, {"layout": "corpus 2"}, self._build)

    @property
    def n_bytes(self) -> np.ndarray:
        """(N,) int32, the bytes of every text: to sort by length without reading one."""
        return (np.diff(self.store.start) - self.store.id_length - 2).astype(np.int32)

    def __len__(self) -> int:
        return len(self.store.id_length)

    def __getitem__(self, row: int) -> str:
        start = int(self.store.start[row]) + int(self.store.id_length[row]) + 1
        return self.store.text[start:int(self.store.start[row + 1]) - 1].decode()

    def texts(self, rows) -> list[str]:
        return [self[row] for row in rows]

    def docid(self, row: int) -> str:
        start = int(self.store.start[row])
        return self.store.text[start:start + int(self.store.id_length[row])].decode()

    def row(self, docid: str) -> int:
        wanted = int.from_bytes(hash_id(docid.encode()), "little")
        # A memoryview hands out plain ints: five times as fast as numpy, for one look-up.
        place = bisect_left(self.store.hashes.data, wanted)
        # What stands there may have another hash, and equal hashes are not yet equal ids.
        row = int(self.store.order[min(place, len(self) - 1)])
        if self.docid(row) != docid:
            raise ValueError(f"{self.source}: holds no passage {docid!r}; was the file that names it made "
                             "for another collection?")
        return row

    def find(self, docids: list[str]) -> np.ndarray:
        """Rows of many ids at once, -1 where there is none: `row` for millions of them."""
        # Where each hash would stand, and the row that has it there.
        raw = [docid.encode() for docid in docids]
        places = np.searchsorted(self.store.hashes, np.frombuffer(b"".join(map(hash_id, raw)), "<u8"))
        rows = self.store.order[places.clip(max=len(self) - 1)]
        # That row's own id decides: what is not in the collection has a place, too.
        start = self.store.start[rows]
        ends = (start + self.store.id_length[rows]).tolist()
        same = [self.store.text[a:b] == docid for a, b, docid in zip(start.tolist(), ends, raw)]
        return np.where(same, rows, -1)

    def _build(self, folder: Path) -> dict:
        passages, lengths, hashes = read_texts(self.source), [], []
        bar = tqdm(desc=f"reading {self.source.name}", unit=" passages", unit_scale=True, disable=None)
        with bar, open(folder / "text", "wb") as out:
            while chunk := [passage for _, passage in islice(passages, CHUNK)]:
                ids = [docid.encode() for docid, _ in chunk]
                lines = [f"{docid}\t{text}\n".encode() for docid, text in chunk]
                # Only the lengths say where a text ends: one that came from JSON may hold any character.
                lengths.append(np.array([list(map(len, lines)), list(map(len, ids))]))
                hashes.append(np.frombuffer(b"".join(map(hash_id, ids)), "<u8"))
                out.write(b"".join(lines))
                bar.update(len(chunk))
        if not hashes:
            raise ValueError(f"{self.source}: holds no passages")

        # Ids by their hash, ascending, for bisection. Equal neighbours are one id twice, or a rare accident.
        length, id_length = np.concatenate(lengths, axis=1)
        hashes = np.concatenate(hashes)
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        twins = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twins):
            self._blame(*order[twins[0]:twins[0] + 2])
        np.save(folder / "start.npy", np.append(0, length.cumsum()))
        np.save(folder / "id_length.npy", id_length.astype(np.int32))
        np.save(folder / "hashes.npy", hashes)
        np.save(folder / "order.npy", order)
        return {}

    def _blame(self, *rows: int):
        # Two rows whose ids have one hash.
        twins = [(n, docid) for row, (n, (docid, _)) in enumerate(read_texts(self.source)) if row in rows]
        (line, first), (n, docid) = twins
        if docid == first:
            raise ValueError(f"{self.source}:{n}: passage id {docid!r} stands on line {line} already; remove "
                             "one of the two")
        # Once in half a million collections of MS MARCO's size.
        raise ValueError(f"{self.source}:{n}: {docid!r} has the hash of {first!r} (line {line}); rename one "
                         "of the two")


# 5. Training rows.


class Row(NamedTuple):
    """A training row in the one form that all formats are turned into."""
    pos: list                   # ids or texts; in the store rows of the corpus, or texts
    neg: list
    scores: list[float] | None  # a teacher's, of pos + neg
    qid: str | None
    query: str | None
    # Whether pos and neg are texts; None: the format does not say.
    inline: bool | None = False
    line: int = 0


class Example(NamedTuple):
    """What a loss wants to know of a row."""
    qid: str
    query: str
    docids: list[str]           # the positive first, then the negatives
    texts: list[str]
    scores: list[float] | None  # the teacher's, in the order of docids
    # Every docid that the row knows to be relevant: no negatives in a shared batch.
    positives: frozenset[str]


def read_mined(r: dict) -> Row:
    scores = [r["pos_score"], *r.get("neg_scores", [])] if "pos_score" in r else None
    return Row([r["pos_pid"]], r.get("neg_pids", []), scores, r.get("qid"), r.get("question", r.get("query")))


def read_ranked(r: dict) -> Row:
    return Row(r["docids"][:1], r["docids"][1:], r.get("scores"), r.get("qid"), r.get("query"))


def read_lists(r: dict) -> Row:
    pos, neg, inline = r["pos"], r.get("neg", []), r.get("inline")
    if isinstance(neg, dict):
        # sentence-transformers': ids, in a list for each system that found them.
        neg, inline = [docid for found in neg.values() for docid in found], False
    scores = r.get("pos_scores") and r["pos_scores"] + r.get("neg_scores", [])
    if scores and len(r["pos_scores"]) != len(pos):
        raise ValueError(f"{len(pos)} positives need as many scores, got {len(r['pos_scores'])}")
    return Row(pos, neg, scores, r.get("qid"), r.get("query", r.get("question")), inline)


def read_margin_mse(columns: list[str]) -> Row:
    pos_score, neg_score, qid, pos, neg = columns
    return Row([pos], [neg], [pos_score, neg_score], qid, None)


class RowFormat(NamedTuple):
    # The key that only these rows have, or their number of columns.
    mark: str | int
    read: Callable
    looks_like: str


# A new format is a function and a row of this table. tools/convert.py reads other people's in the same way.
ROW_FORMATS = [
    RowFormat("pos_pid", read_mined,
              '{"question" or "qid", "pos_pid", "neg_pids": [...]}, and "pos_score", "neg_scores"'),
    RowFormat("docids", read_ranked, '{"query", "docids": [positive first, ...], "scores": [...]}'),
    RowFormat("pos", read_lists,
              '{"query" or "qid", "pos": [id or text], "neg": [...] or {"bm25": [id], ...}}, and '
              '"pos_scores", "neg_scores", "inline": whether pos and neg are texts'),
    RowFormat(5, read_margin_mse, "pos_score<TAB>neg_score<TAB>qid<TAB>pos_pid<TAB>neg_pid"),
]


def parse_row(line: str) -> Row:
    """A line in any of the formats; ids are still strings."""
    if line.lstrip().startswith("{"):
        record = parse_json(line)
        marks, wrong = record, f"none of the known keys among {', '.join(record)}"
    else:
        record = line.split("\t")
        marks, wrong = [len(record)], f"expected JSON or 5 columns between tabs, got {len(record)}"
    # A row that has a format's mark is of that format, or wrong.
    for form in ROW_FORMATS:
        if form.mark in marks:
            try:
                return check_row(form.read(record))
            except TypeError as e:
                raise ValueError(f"expected {form.looks_like} ({e})") from e
    raise ValueError("\n  ".join([f"{wrong}; rows are one of", *(form.looks_like for form in ROW_FORMATS)]))


def check_row(row: Row) -> Row:
    """The row with its ids as strings and its scores as numbers, or an error that says what is wrong."""
    # Passages: lists of strings, or of numbers, which are ids.
    if not isinstance(row.pos, list) or not isinstance(row.neg, list):
        raise ValueError(f"expected lists of passages, got {str(row.pos)[:40]} and {str(row.neg)[:40]}")
    kinds = set(map(type, row.pos + row.neg))
    if not kinds <= {str, int}:
        raise ValueError(f"expected lists of passages, got {str(row.pos + row.neg)[:80]}")
    if row.qid is None and row.query is None or not isinstance(row.query, str | None):
        raise ValueError(f"expected the query's text or a qid, got {row.query!r}")
    # One finite score for each passage, or none at all.
    scores = row.scores
    if scores is not None:
        try:
            scores = list(map(float, scores))
        except (TypeError, ValueError) as e:
            raise ValueError(f"expected numbers as scores ({e})") from e
        if len(scores) != len(row.pos + row.neg) or not all(map(math.isfinite, scores)):
            raise ValueError(f"{len(row.pos)} + {len(row.neg)} passages need as many finite scores, got "
                             f"{len(scores)}")
    # Numbers are ids, whatever the format leaves open.
    inline = False if row.inline is None and int in kinds else row.inline
    qid = None if row.qid is None else str(row.qid)
    return Row(list(map(str, row.pos)), list(map(str, row.neg)), scores, qid, row.query, inline)


def holds_texts(row: Row, places: list[int] | None) -> bool:
    """Whether pos and neg are texts. `places`: their rows in the corpus, if there is one."""
    if row.inline is not None:
        return row.inline
    # The format leaves it open. What the corpus knows is an id; what has white space is a text.
    passages = row.pos + row.neg
    # A wrong guess would train on ids as if they were sentences: what stays unclear is an error.
    texts = any(len(passage.split()) != 1 for passage in passages)
    if places is None:
        unclear = not texts and any(map(str.isdigit, passages))
    else:
        unclear = texts == (max(places, default=-1) >= 0)
    if unclear:
        shown = json.dumps({"pos": row.pos, "neg": row.neg}, ensure_ascii=False)[:120]
        raise ValueError(f'are these ids or texts? {shown}: add "inline": true to the row if they are texts; '
                         f'if they are ids, "inline": false, and name their --corpus')
    return texts or places is None


def known_passages(row: Row, passages: list, teacher: dict | None, count: Counter) -> tuple[dict, dict]:
    """A row's positives and negatives as {passage: score or None}; unknown ones are counted, left out."""
    n, scores = len(row.pos), row.scores or [None] * len(passages)
    if teacher is not None:
        # A score file takes the place of the row's own scores.
        scores = list(map(teacher.get, row.pos + row.neg))

    # Dicts: a passage that the row names twice is one passage. -1: the corpus lacks it.
    pos, neg = dict(zip(passages[:n], scores)), dict(zip(passages[n:], scores[n:]))
    count["unknown positives"] += passages[:n].count(-1)
    count["unknown negatives"] += passages[n:].count(-1)
    pos.pop(-1, None)
    neg.pop(-1, None)

    # Pulled near and pushed away at once: no loss could make sense of it.
    for passage in pos.keys() & neg.keys():
        count["negatives that are positives"] += 1
        del neg[passage]

    # A score file need not cover everything. What it covers is kept.
    if any(score is not None for score in pos.values()):
        count["passages without a score"] += [*pos.values(), *neg.values()].count(None)
        pos = {passage: score for passage, score in pos.items() if score is not None}
        neg = {passage: score for passage, score in neg.items() if score is not None}
    return pos, neg


class TrainingRows:
    """Queries with their positives, negatives and teacher's scores, out of any of ROW_FORMATS.

    corpus: a Corpus or a path, for rows of ids; queries: a dict or a path, for rows of qids; scores: a file
    {qid: {pid: score}}. `report` says what was left out."""

    # The file is read once, whole, into a store: a fault shows before the first step and not at the 30,000th,
    # and millions of rows cost no memory. `text` holds a Row as JSON at each `start`; `negatives` and
    # `scored` count.

    def __init__(self, path, corpus=None, queries=None, need_scores=False, need_negatives=False, scores=None,
                 cache=None):
        self.path = Path(path)
        self.corpus = corpus if corpus is None or isinstance(corpus, Corpus) else Corpus(corpus, cache)
        queries = queries if queries is None or isinstance(queries, dict) else read_queries(queries)
        # Another corpus or other queries make other rows of the same file.
        made_from = {
            "layout": "rows 2",
            "corpus": self.corpus and self.corpus.store.made_from["source"],
            "queries": queries and digest(*queries, *queries.values()),
            "scores": scores and state_of(scores),
        }
        self.store = open_store(self.path, ".rows", cache, made_from,
                                lambda folder: self._build(folder, queries or {}, scores))
        # Rows without a negative stay in the store: another run may want them.
        self.report, self.kept = self.store.meta["report"], range(len(self.store.negatives))
        if need_negatives and not self.store.negatives.all():
            self.kept = np.flatnonzero(self.store.negatives)
            self.report += f"; {len(self.store.negatives) - len(self):,} without a negative left out"
            if not len(self):
                raise ValueError(f"{path}: no row has a negative; `python -m tools.mine` finds some, or "
                                 "train with the batch's other passages alone")
        # A distillation that skipped such rows in silence would train on another set than it was given.
        bare = [i for i, row in enumerate(self.kept) if not self.store.scored[row]] if need_scores else []
        if bare:
            raise ValueError(f"{self.ids(bare[0])}: has no teacher scores (nor have {len(bare) - 1:,} more "
                             f"of {len(self):,} rows); `python -m tools.score` writes them, and --objective "
                             "cl needs none")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Row:
        start, end = self.store.start[self.kept[i]:][:2]
        return Row(*json.loads(self.store.text[start:end]))

    def ids(self, i: int) -> str:
        """FILE:LINE of row i."""
        return f"{self.path}:{self[i].line}"

    def too_few(self, n_negatives: int) -> int:
        """How many rows have fewer negatives than that, and so give some of them twice."""
        return int((self.store.negatives[np.asarray(self.kept)] < n_negatives).sum())

    def example(self, i: int, n_negatives: int | None, rng: np.random.Generator | None = None) -> Example:
        """Row i with one of its positives and so many of its negatives, drawn with rng.

        None: its first positive and all negatives, in order. A row without negatives gives none."""
        row = self[i]
        # All of them in their order, or a draw.
        first, drawn = 0, range(len(row.neg))
        if n_negatives is not None:
            first = int(rng.integers(len(row.pos)))
            # Without replacement. Where there are too few, each comes once before one comes twice.
            drawn = np.resize(rng.permutation(len(row.neg)), n_negatives if row.neg else 0)
        places = [first, *(len(row.pos) + k for k in drawn)]
        passages = [(row.pos + row.neg)[k] for k in places]
        scores = row.scores and [row.scores[k] for k in places]
        # A text without an id is its own.
        name = digest if row.inline else self.corpus.docid
        texts = passages if row.inline else self.corpus.texts(passages)
        docids, positives = list(map(name, passages)), frozenset(map(name, row.pos))
        return Example(row.qid, row.query, docids, texts, scores, positives)

    def _parse(self, line: str) -> tuple[Row, list]:
        # (row, its passages): texts, or rows of the corpus with -1 for unknown ids.
        row = parse_row(line)
        passages, places = row.pos + row.neg, None
        if self.corpus and not row.inline:
            places = self.corpus.find(passages).tolist()
        row = row._replace(inline=holds_texts(row, places))
        if not row.inline and places is None:
            raise ValueError("rows hold passage ids, so the passages are needed: --corpus")
        return row, passages if row.inline else places

    def _build(self, folder: Path, queries: dict, scores) -> dict:
        scores = scores and read_json(scores, "one object {qid: {pid: score}} is expected")
        count, lengths, negatives, scored, first_fault = Counter(), [0], [], [], ""
        rows = read_lines(self.path, self._parse)
        rows = tqdm(rows, desc=f"reading {self.path.name}", unit=" rows", disable=None)
        with open(folder / "text", "wb") as out:
            for n, (row, passages) in rows:
                count["rows"] += 1
                query = row.query if row.query is not None else queries.get(row.qid)
                # What the corpus does not hold cannot be shown to the model.
                pos, neg = known_passages(row, passages, scores and scores.get(row.qid, {}), count)
                # Ids that the corpus or the queries lack: such a row is counted, and the first one shown.
                if query is None or not pos:
                    fault = "rows without their query" if query is None else "rows without a known positive"
                    count[fault] += 1
                    lacks = f"query {row.qid!r}" if query is None else f"passage {(row.pos or ['none'])[0]!r}"
                    first_fault = first_fault or f"; the first is {self.path}:{n}, {lacks}"
                    continue
                # A row as it is used from now on: ids are places in the corpus, and the query is its text.
                scored.append(None not in pos.values())
                negatives.append(len(neg))
                row = Row(list(pos), list(neg), [*pos.values(), *neg.values()] if scored[-1] else None,
                          query if row.qid is None else row.qid, query, row.inline, n)
                lengths.append(out.write(json.dumps(row).encode()))
        faults = ", ".join(f"{value:,} {key}" for key, value in count.items() if value and key != "rows")
        if not scored:
            faults = faults or "it is empty"
            raise ValueError(f"{self.path}: none of {count['rows']:,} rows can be used: {faults}"
                             f"{first_fault}; are these the corpus and the queries that they were made for?")
        np.save(folder / "start.npy", np.cumsum(lengths))
        np.save(folder / "negatives.npy", np.array(negatives, np.int32))
        np.save(folder / "scored.npy", np.array(scored))
        left_out = f"; left out: {faults}{first_fault}" if faults else ""
        return {"report": f"{len(scored):,} of {count['rows']:,} rows{left_out}"}


# 6. Writing: whole or not at all, by one process at a time, and known again by its contents.


@contextlib.contextmanager
def naming(path):
    """An OSError that does not say its file, as that of a full disk, says this one."""
    try:
        yield
    except OSError as e:
        if e.filename is None and e.errno:
            raise OSError(e.errno, e.strerror, str(path)) from e
        raise


def flush_to_disk(path) -> None:
    # Else a power cut after a rename can leave the name without the bytes.
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def write_whole(path, mode: str = "w"):
    """Write `path` whole or not at all: into a file beside it, renamed when all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write one file by mistake do not share what they write aside.
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    how = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with naming(path), open(aside, mode, **how) as file:
            yield file
        flush_to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which takes the name `path` when the block ends without an error."""
    path, aside = Path(path), Path(f"{path}.partial")
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another --out")
    # What a killed process left. Two that are alive exclude each other with `locked`.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with naming(path):
            yield aside
        for file in filter(Path.is_file, aside.rglob("*")):
            flush_to_disk(file)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def discard(place) -> None:
    """Remove a folder or a file. The rename comes first, so that a kill leaves nothing that looks whole."""
    gone = Path(f"{place}.partial")
    # Left by a kill in the middle of this.
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(place, gone)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


@contextlib.contextmanager
def locked(place, wait: bool = False):
    """Hold `{place}.lock`: nobody else who asks for it writes `place` meanwhile. Its end frees it."""
    path = Path(f"{place}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")
        try:
            with naming(path):
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another one"
            raise ValueError(f"{place}: process {holder} is writing there; wait until it has finished, stop "
                             f"it (kill {holder}), or choose another --out") from None
        # The one before us removed the file that we waited for: then it guards nothing, and we ask again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    # Whoever finds it locked reads here by whom.
    with file:
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def checksum(file) -> list[int]:
    """[bytes, crc32] of a file, a few GB a second."""
    # Damage is what it finds, not malice.
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(16 * MB):
            crc = zlib.crc32(block, crc)
        return [opened.tell(), crc]


def stamp(file) -> list[int]:
    """[bytes, mtime_ns, crc32] of a file: what `check_files` compares."""
    size, crc = checksum(file)
    return [size, os.stat(file).st_mtime_ns, crc]


def check_files(folder, stamps: dict[str, list[int]], cure: str, full: bool = False) -> None:
    """Whether every file of {name: stamp} is the one that was written; with `full`, whatever its time."""
    for name, (size, mtime, crc) in stamps.items():
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; {cure}")
        now = path.stat()
        # The size costs nothing to look at, and gives most damage away.
        if now.st_size != size:
            raise ValueError(f"{path}: {now.st_size:,} bytes, and {size:,} were written; {cure}")
        # A file of that size and time is believed. A copy has another time, and the same bytes.
        if (full or now.st_mtime_ns != mtime) and checksum(path)[1] != crc:
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {cure}")


# What counts in a model's folder, where users write their runs and logs, too; and in any other.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "retriever.json",
               "tokenizer*.json")
OTHER_FILES = ("*.json", "*.jsonl", "*.jsonl.gz", "*.tsv", "*.tsv.gz")


def fingerprint(path, blocks: int = 64, block: int = MB) -> str:
    """What tells one state of a file or folder from another, copies being equal; a hub name is its own."""
    path, h = Path(path), hashlib.blake2b(digest_size=16)
    if not path.exists():
        return str(path)
    # A folder: what it holds, file by file, under their names.
    if path.is_dir():
        is_model = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        for pattern in MODEL_FILES if is_model else OTHER_FILES:
            for file in sorted(path.glob(pattern)):
                h.update(f"{file.name} {fingerprint(file)}\n".encode())
        return h.hexdigest()
    # All of a small file; of a large one blocks that are spread evenly, in a fraction of a second.
    size = path.stat().st_size
    starts = range(0, size, block)
    if size > blocks * block:
        starts = np.linspace(0, size - block, blocks).astype(int)
    h.update(f"{size}\n".encode())
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            h.update(file.read(block))
    return h.hexdigest()


# 7. Processes, the terminal, and command lines.


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) from torchrun's environment; (0, 1) for a process that is alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave_with_parent(always: bool = False) -> None:
    """Under torchrun, or always, end this process after its parent: it would write on beside the next."""
    if "RANK" not in os.environ and not always:
        return
    # An orphan has another parent. There is no signal that says so on every system.
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        with contextlib.suppress(OSError):
            os.write(2, b"the launcher of this process is gone, and so it leaves\n")
        # Not sys.exit, which ends a thread only. What is half-written is aside, as after any kill.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def printable(text: str) -> str:
    r"""The text with its control characters made visible, so that none of them commands the terminal.

    >>> print(printable("\x1b[31mred\n"))
    \x1b[31mred\n
    """
    # Zero-width joiners hold the letters of several scripts together, and are harmless.
    shown = [c if c.isprintable() or c in "\u00a0\u200c\u200d" else c.encode("unicode_escape").decode()
             for c in text]
    return "".join(shown)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a module's docstring as it stands, and the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Number(NamedTuple):
    """A type for argparse, which puts the flag before the message."""
    kind: type
    low: float
    high: float
    expected: str

    def __call__(self, text: str):
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        # nan is between no bounds.
        if not self.low <= value <= self.high:
            raise argparse.ArgumentTypeError(f"expected {self.expected}, got {text!r}")
        return value


# Bounds are inclusive: above 0 is from the smallest float on, and finite up to the largest.
LARGEST, SMALLEST = sys.float_info.max, math.ulp(0.0)
positive_int = Number(int, 1, math.inf, "a whole number above 0")
natural = Number(int, 0, math.inf, "a whole number, 0 or more")
finite = Number(float, -LARGEST, LARGEST, "a finite number")
positive = Number(float, SMALLEST, LARGEST, "a finite number above 0")
non_negative = Number(float, 0, LARGEST, "a finite number, 0 or more")
share = Number(float, 0, 1, "a number from 0 to 1")


def run_command(name: str, call: Callable) -> None:
    """Run call(). A fault in what was given is `name: message` and exit 1: the message is the cure."""
    try:
        call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{name}: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as e:
        # Without the traceback: who typed the command is to read what is wrong, and where.
        named = isinstance(e, OSError) and e.filename
        lines = f"{e.filename}: {e.strerror}" if named else str(e)
        sys.exit(f"{name}: " + "\n".join(map(printable, lines.split("\n"))))
