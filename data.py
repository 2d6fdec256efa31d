"""Files in, files out: queries, the memory-mapped corpus, training rows, and what every command leans on.

    corpus = Corpus("beir/scifact")           # corpus[0], corpus.docid(0), corpus.row("4983"), len(corpus)
    rows = TrainingRows("train.jsonl", corpus, "queries.tsv")        # rows.example(0, n_negatives=7, rng=rng)

What surprises:
- A corpus is read once, into `collection.tsv.store` beside it (or in $CORPUS_CACHE), and again if it changed.
  Every process maps that one copy: 8.8 million passages open in milliseconds. Training rows go the same way.
- A line ends at \\n and nowhere else. MS MARCO's passages hold U+0085, where `str.splitlines` would cut.
- A fault is an error that names file, line and cure. Only ids that the corpus or the queries lack are
  forgiven: counted, reported and left out.
"""
import argparse
import contextlib
import fcntl
import gzip
import io
import json
import math
import mmap
import os
import re
import shutil
import sys
import threading
import time
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from functools import partial
from hashlib import blake2b
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
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    file = open(path, "rb")
    # The first bytes tell what it is, for names lie. A peek takes nothing away.
    if file.peek(2)[:2] == b"\x1f\x8b":
        file.close()
        file = io.BufferedReader(Unpacked(path), MB)
    head = file.peek(512)
    for place, mark, kind, cure in NOT_TEXT:
        if head[place:].startswith(mark):
            file.close()
            raise ValueError(f"{path}: is a {kind}, and text is expected; {cure.format(path)}")
    # A byte-order mark would become a part of the first id.
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
                is_from = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
                raise ValueError(f"{path}:{n}: not UTF-8 ({e.reason} at byte {e.start}); "
                                 f"convert it: iconv -f {is_from} -t utf-8 {path} > fixed") from e
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
    # A list or a number would fail later, where nobody knows the line.
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


# What a folder is looked through for, in BEIR's layout or MS MARCO's.
CORPUS_FILES = ("corpus.jsonl", "corpus.jsonl.gz", "collection.tsv", "collection.tsv.gz")
QUERY_FILES = ("queries.jsonl", "queries.jsonl.gz", "queries.tsv", "queries.tsv.gz")


def find_in(path, names: tuple[str, ...]) -> Path:
    """`path` itself, or the first of `names` that stands in it if it is a folder."""
    path = Path(path)
    found = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path}: holds none of {', '.join(names)}")
    return found[0]


# 2. Queries and passages: an id and a text, as `id<TAB>text` or as JSON.

# The first of these that a record has: BEIR's, then those of Anserini, Pyserini and Tevatron.
ID_KEYS = ("_id", "id", "docid", "query_id", "qid")
TEXT_KEYS = ("text", "contents", "query")
# TREC's files have white space between their columns.
is_id = re.compile("[^\0- ]{1,512}").fullmatch


def read_texts(path) -> Iterator[tuple[int, tuple[str, str]]]:
    """(line number, (id, text)) of a tsv or jsonl; the first line tells which."""
    forms = []

    def parse(line: str) -> tuple[str, str]:
        # JSON begins with a brace, and an id does not. Not looked up beforehand: a pipe is read only once.
        if not forms:
            forms.append(text_of_json if line.lstrip().startswith("{") else text_of_columns)
        return forms[0](line)

    return read_lines(path, parse)


def text_of_columns(line: str) -> tuple[str, str]:
    # At the first tab: the passage may hold more of them.
    docid, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("expected id<TAB>text, got 1 column")
    return check_id(docid), text


def text_of_json(line: str) -> tuple[str, str]:
    """(id, text) of an object, whose title comes before its text."""
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
    return check_id(str(docid)), check_text(f"{title} {text}" if title and text else title or text)


def check_text(text: str) -> str:
    # JSON's escapes can spell what UTF-8 cannot carry.
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"holds half of a surrogate pair (\\u{ord(text[e.start]):x}); remove it") from e
    return text


def check_id(docid: str) -> str:
    if not is_id(docid) or not docid.isascii() and len(docid.encode("utf-8", "replace")) > 512:
        raise ValueError(f"{docid[:40]!r} cannot be an id: TREC's files hold 1 to 512 bytes, no white space")
    return docid


def check_qid(qid: str) -> str:
    # It begins a line of a run or of qrels, which "#" would make a comment.
    if qid.startswith("#"):
        raise ValueError(f"{qid[:40]!r} cannot be a query's id: a line that begins with # is a comment")
    return check_id(qid)


def read_queries(path) -> dict[str, str]:
    """{qid: text} of a tsv, a jsonl, either of them gzipped, or a BEIR folder."""
    path = find_in(path, QUERY_FILES)
    queries, line_of = {}, {}
    for n, (qid, text) in read_texts(path):
        if qid in queries:
            raise ValueError(f"{path}:{n}: query {qid!r} stands on line {line_of[qid]} already; remove one")
        queries[qid], line_of[qid] = text, n
    if not queries:
        raise ValueError(f"{path}: holds no queries")
    return queries


def write_run(path, run: dict[str, dict[str, float]], tag: str = "run") -> None:
    """{qid: {docid: score}} as a TREC run, best first; equal scores stay in the order they came in."""
    with write_whole(path) as file:
        for qid, docs in run.items():
            check_qid(qid)
            # Python's sort leaves equal ones as they came, in reverse, too.
            for rank, docid in enumerate(sorted(docs, key=docs.get, reverse=True), 1):
                file.write(f"{qid} Q0 {check_id(docid)} {rank} {docs[docid]} {tag}\n")


# 3. Stores: a folder for each source, made once, mapped by every process.

class Store:
    """A folder: a file `text`, the arrays that index it, and store.json, which says what it was made from.

    Mapped, it costs a process no memory of its own: store.text, and an attribute for each array."""

    def __init__(self, place: Path, made_from: dict):
        self.place, self.made_from = place, made_from
        self.meta = read_json(place / "store.json")
        if self.meta["made_from"] != made_from:
            raise ValueError(f"{place}: was made from another state of its source; start again to renew it")
        check_files(place, self.meta["files"], "remove the folder, and it will be made anew")
        with open(place / "text", "rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for file in place.glob("*.npy"):
            # As a plain array: numpy's memmap class takes three times as long for one number.
            setattr(self, file.stem, np.asarray(np.load(file, mmap_mode="r")))

    def __reduce__(self):
        # A DataLoader's worker maps the files again instead of receiving them.
        return Store, (self.place, self.made_from)


def open_store(source: Path, suffix: str, cache, made_from: dict, build: Callable) -> Store:
    """Map the store of `source`; make it first where it is missing, damaged or stale.

    build(file) writes `text`, and returns the arrays by their names and what else store.json shall hold."""
    made_from = {"source": state_of(source), **made_from}
    place, cache = source.with_name(source.name + suffix), cache or os.environ.get("CORPUS_CACHE")
    if cache:
        # One folder for many sources: the digest keeps two `corpus.jsonl` apart.
        place = Path(cache) / f"{source.name}.{digest(str(source.resolve()))[:8]}{suffix}"
    # As a rule it is there, perhaps where nobody may write a lock.
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
                with open(folder / "text", "wb", MB) as file:
                    arrays, meta = build(file)
                for name, values in arrays.items():
                    np.save(folder / name, values)
                if made_from["source"] != state_of(source):
                    raise ValueError(f"{source}: changed while it was read; start again when it is complete")
                files = {file.name: stamp(file) for file in folder.iterdir()}
                meta |= {"made_from": made_from, "files": files}
                (folder / "store.json").write_text(json.dumps(meta))
            return Store(place, made_from)
    except OSError as e:
        raise ValueError(f"{place.parent}: cannot hold the store of {source} ({e.strerror}); "
                         "name a folder on a local disk with room: CORPUS_CACHE=DIR") from e


def state_of(path) -> list:
    """What tells one state of a file from another at no cost: size, time, and both ends."""
    if Path(path).is_fifo():
        raise ValueError(f"{path}: is a pipe, and is read more than once; write it to a file first")
    # Opened only to say in words what is wrong with a path.
    with open_bytes(path):
        stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, fingerprint(path, blocks=2, block=1 << 16)]


def digest(*texts: str) -> str:
    """16 hexadecimal digits for a text, or for many in their order."""
    # The zero byte keeps ("ab", "c") apart from ("a", "bc").
    joined = "".join(f"{text}\0" for text in texts)
    return blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


# 4. The corpus.

def hash_id(docid: bytes) -> bytes:
    return blake2b(docid, digest_size=8).digest()


class Corpus:
    """The passages of a `collection.tsv`, `corpus.jsonl` (or their .gz) or BEIR folder, by row and id."""

    # In the store: `text`, id<TAB>text<LF> for every passage; `start` (N + 1) and `id_length` (N), which say
    # where they are; `hashes`, 64 bits of every id, ascending; `order`, the rows that these belong to.

    def __init__(self, path, cache=None):
        self.source = find_in(path, CORPUS_FILES)
        self.store = open_store(self.source, ".store", cache, {"layout": "corpus 2"}, self._build)

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
            raise ValueError(f"{self.source}: holds no passage {docid!r}; is it the right collection?")
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

    def _build(self, out) -> tuple[dict, dict]:
        # Flat arrays: millions of Python's numbers would take ten times the memory.
        lengths, id_lengths, hashes = array("q", [0]), array("i"), bytearray()
        passages = tqdm(read_texts(self.source), f"reading {self.source.name}", unit=" passages",
                        unit_scale=True, disable=None)
        for _, (docid, text) in passages:
            raw = docid.encode()
            hashes += hash_id(raw)
            id_lengths.append(len(raw))
            # Only the lengths say where a text ends: one that came from JSON may hold any character.
            lengths.append(out.write(f"{docid}\t{text}\n".encode()))
        if not hashes:
            raise ValueError(f"{self.source}: holds no passages")

        # Ids by their hash, ascending, for bisection. Equal neighbours are one id twice, or an accident that
        # happens once in half a million collections of MS MARCO's size.
        hashes = np.frombuffer(hashes, "<u8")
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        twins = np.flatnonzero(hashes[1:] == hashes[:-1])
        if len(twins):
            # Nobody kept the numbers of the lines: the file is read again.
            rows, passages = order[twins[0]:twins[0] + 2], enumerate(read_texts(self.source))
            (line, first), (n, docid) = [(n, docid) for row, (n, (docid, _)) in passages if row in rows]
            fault = f"passage id {docid!r} stands on line {line} already; remove"
            if docid != first:
                fault = f"{docid!r} has the hash of {first!r} (line {line}); rename"
            raise ValueError(f"{self.source}:{n}: {fault} one of the two")
        return {"start": np.cumsum(lengths), "id_length": id_lengths, "hashes": hashes, "order": order}, {}


# 5. Training rows. There is one form; tools.convert turns those of others into it.

ROW_FORM = ('{"query" or "qid", "pos": [...], "neg": [...]} of ids, or of texts with "inline": true; with a '
            'teacher "pos_scores", "neg_scores"')


class Row(NamedTuple):
    """A training row, as ROW_FORM has it in a file."""
    pos: list  # ids or texts; in the store rows of the corpus, or texts
    neg: list
    scores: list[float] | None  # a teacher's, of pos + neg
    qid: str | None
    query: str | None
    inline: bool = False  # whether pos and neg are texts
    line: int = 0


class Example(NamedTuple):
    """What a loss wants to know of a row."""
    qid: str
    query: str
    docids: list[str]  # the positive first, then the negatives
    texts: list[str]
    scores: list[float] | None  # the teacher's, in the order of docids
    # Every docid that any row with this qid knows to be relevant: no negatives in a shared batch.
    positives: frozenset[str]


def parse_row(line: str) -> Row:
    """A line in ROW_FORM, or an error that says what is wrong with it."""
    record = parse_json(line)
    # One form alone: each further one would be another way to take a row for what it is not.
    if type(record.get("pos")) is not list or type(record.get("neg", [])) is not list:
        raise ValueError(f"expected {ROW_FORM}; got {line[:80]}. Other rows: python -m tools.convert")
    passages, scores = [], []
    is_scored = "pos_scores" in record or "neg_scores" in record
    for side in ("pos", "neg"):
        some, scored = record.get(side, []), record.get(f"{side}_scores", [])
        # What is a number is an id.
        if not set(map(type, some)) <= {str, int}:
            raise ValueError(f'expected passages under "{side}", got {str(some)[:80]}')
        passages.append([check_text(str(passage)) for passage in some])
        # One finite score for each passage, or none at all.
        if is_scored and (type(scored) is not list or len(scored) != len(some)
                          or not all(map(is_finite, scored))):
            raise ValueError(f'expected {len(some)} finite numbers under "{side}_scores", one for each of '
                             f'"{side}", got {str(scored)[:80]}')
        scores += scored
    qid, query, inline = record.get("qid"), record.get("query"), record.get("inline", False)
    if qid is None and query is None or not isinstance(query, str | None):
        raise ValueError(f"expected the query's text or a qid, got {query!r}")
    if type(inline) is not bool:
        raise ValueError(f'expected "inline": true if pos and neg are texts, false if ids, got {inline!r}')
    return Row(*passages, scores if is_scored else None, None if qid is None else str(qid),
               query and check_text(query), inline)


def is_finite(score) -> bool:
    return type(score) in (int, float) and math.isfinite(score)


def read_scores(path) -> dict[str, dict[str, float]]:
    """A teacher's {qid: {docid: score}}."""
    scores, cure = read_json(path), "expected {qid: {pid: finite number}}"
    if type(scores) is not dict:
        raise ValueError(f"{path}: {cure}")
    for qid, found in scores.items():
        if type(found) is not dict or not all(map(is_finite, found.values())):
            raise ValueError(f"{path}: query {qid!r} has {str(found)[:80]}; {cure}")
    return scores


class TrainingRows:
    """Queries with their positives, negatives and teacher's scores, out of a file of rows.

    corpus: a Corpus or a path, for rows of ids; queries: a dict or a path, for rows of qids; scores: a file
    {qid: {pid: score}}. `report` says what was left out."""

    # The file is read once, whole, into a store: a fault shows before the first step and not at the 30,000th,
    # and millions of rows cost no memory. `text` holds a Row as JSON at each `start`; `negatives` says how
    # many it has, and `scored` whether it has scores.

    def __init__(self, path, corpus=None, queries=None, need_scores=False, need_negatives=False, scores=None):
        self.path = Path(path)
        self.corpus = Corpus(corpus) if isinstance(corpus, str | Path) else corpus
        queries = read_queries(queries) if isinstance(queries, str | Path) else queries
        # Another corpus or other queries make other rows of the same file.
        made_from = {"layout": "rows 4", "corpus": self.corpus and self.corpus.store.made_from["source"],
                     "queries": queries and digest(*queries, *queries.values()),
                     "scores": scores and state_of(scores)}
        build = partial(self._build, queries or {}, scores)
        self.store = open_store(self.path, ".rows", None, made_from, build)
        negatives, self.report = self.store.negatives, self.store.meta["report"]

        # Rows without a negative stay in the store: another run may want them.
        self.kept = range(len(negatives))
        if need_negatives and not negatives.all():
            self.kept = np.flatnonzero(negatives)
            self.report += f"; {len(negatives) - len(self):,} without a negative left out"
            if not len(self):
                raise ValueError(f"{path}: no row has a negative; `python -m tools.mine` finds some, and "
                                 "--negatives 0 needs none")
        # A distillation that skipped such rows in silence would train on another set than it was given.
        bare = np.flatnonzero(~self.store.scored[self.kept]) if need_scores else []
        if len(bare):
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
        return int((self.store.negatives[self.kept] < n_negatives).sum())

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
        known = row.pos if row.inline else self.store.meta["known"].get(row.qid, row.pos)
        return Example(row.qid, row.query, list(map(name, passages)), texts, scores,
                       frozenset(map(name, known)))

    def _build(self, queries: dict, scores, out) -> tuple[dict, dict]:
        scores = scores and read_scores(scores)
        count, first_fault, known, start, negatives, scored = Counter(), "", {}, [0], [], []
        rows = read_lines(self.path, partial(self._read, queries, scores, count))
        for n, row in tqdm(rows, f"reading {self.path.name}", unit=" rows", disable=None):
            if isinstance(row, str):
                first_fault = first_fault or f"; the first is {self.path}:{n}, {row}"
                continue
            start.append(start[-1] + out.write(json.dumps(row._replace(line=n)).encode()))
            negatives.append(len(row.neg))
            scored.append(row.scores is not None)
            # Mining writes a row for each positive: in another row of its query it is no negative either.
            if row.qid != row.query and not row.inline:
                known.setdefault(row.qid, set()).update(row.pos)
        n_rows = count.pop("rows", 0)
        faults = ", ".join(f"{value:,} {fault}" for fault, value in count.items() if value)
        if not scored:
            raise ValueError(f"{self.path}: none of {n_rows:,} rows can be used: {faults or 'it is empty'}"
                             f"{first_fault}; are these the corpus and the queries that they were made for? "
                             'Rows of texts need "inline": true')
        left_out = f"; left out: {faults}{first_fault}" if faults else ""
        arrays = {"start": start, "negatives": np.array(negatives, np.int32), "scored": scored}
        known = {qid: sorted(passages) for qid, passages in known.items() if len(passages) > 1}
        return arrays, {"report": f"{len(scored):,} of {n_rows:,} rows{left_out}", "known": known}

    def _read(self, queries: dict, teacher: dict | None, count: Counter, line: str) -> Row | str:
        # A row as it is used from now on, rows of the corpus in place of ids; or what it lacks to be of use.
        row = parse_row(line)
        passages = row.pos + row.neg
        if not row.inline:
            # Nothing is guessed: a model would learn from ids that were taken for texts, too.
            if not self.corpus:
                raise ValueError('pos and neg are ids, whose passages are needed: --corpus; if they are '
                                 'texts, add "inline": true to each row')
            passages = self.corpus.find(passages).tolist()
        # A score file takes the place of the row's own scores.
        n, scores = len(row.pos), row.scores or [None] * len(passages)
        if teacher is not None:
            scores = map(teacher.get(row.qid, {}).get, row.pos + row.neg)
        # Dicts: a passage that the row names twice is one passage. -1: the corpus lacks it. A negative that
        # is a positive, too, would be pulled near and pushed away at once.
        pairs = list(zip(passages, scores))
        pos = {passage: score for passage, score in pairs[:n] if passage != -1}
        neg = {passage: score for passage, score in pairs[n:] if passage != -1 and passage not in pos}
        count["rows"] += 1
        count["unknown positives"] += passages[:n].count(-1)
        count["unknown negatives"] += passages[n:].count(-1)
        count["negatives that are positives"] += len(pos.keys() & passages[n:])
        # A score file need not cover everything. What it covers is kept.
        if teacher is not None or any(score is not None for score in pos.values()):
            count["passages without a score"] += [*pos.values(), *neg.values()].count(None)
            pos = {passage: score for passage, score in pos.items() if score is not None}
            neg = {passage: score for passage, score in neg.items() if score is not None}
        # Without a query or a positive it teaches nothing. The report shows the first such row.
        query = queries.get(row.qid) if row.query is None else row.query
        if query is None:
            count["rows without their query"] += 1
            return f"query {row.qid!r}"
        if not pos:
            count["rows without a known positive"] += 1
            return f"passage {(row.pos or ['none'])[0]!r}"
        scores, qid = [*pos.values(), *neg.values()], query if row.qid is None else row.qid
        return Row(list(pos), list(neg), None if None in scores else scores, qid, query, row.inline)


# 6. Writing: whole or not at all, by one process at a time, and known again by its contents.

@contextlib.contextmanager
def naming(path):
    """An OSError that does not say its file, as that of a full disk, says this one."""
    try:
        yield
    except OSError as e:
        if e.errno and e.filename is None:
            e.filename = str(path)
        raise


def sync(file) -> None:
    """Onto the disk: else a power cut after a rename can leave the name without the bytes."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


@contextlib.contextmanager
def renamed(aside: Path, path: Path):
    """What the block writes at `aside` gets the name `path` if all went well, and is removed if not."""
    try:
        with naming(path):
            yield
        for file in filter(Path.is_file, [aside, *aside.rglob("*")]):
            sync(file)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole(path, mode: str = "w"):
    """A file to write, which takes the name `path` when the block ends without an error."""
    # Text is the same bytes on every system.
    how = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    # A rename would put a file in the place of a device, such as /dev/null, or of a pipe.
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, mode, **how) as file:
            yield file
        return
    # And one in the place of a link, whose target is meant.
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write one file by mistake do not share what they write aside.
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with renamed(aside, path), open(aside, mode, **how) as file:
        yield file


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which takes the name `path` when the block ends without an error."""
    path = Path(path)  # without a slash at its end, which would put what is beside it into it
    aside = Path(f"{path}.partial")
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another --out")
    # What a killed process left. Two that are alive exclude each other with `locked`.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with renamed(aside, path):
        yield aside


def discard(place) -> None:
    """Remove a folder or a file. The rename comes first, so that a kill leaves nothing that looks whole."""
    gone = Path(f"{Path(place)}.partial")
    # Left by a kill in the middle of this.
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(place, gone)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


@contextlib.contextmanager
def locked(place, wait: bool = False):
    """Hold `{place}.lock`: nobody else who asks for it writes `place` meanwhile. Its end frees it."""
    path = Path(f"{Path(place)}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # Not "w", which would wipe out who holds it.
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
    """[bytes, crc32] of a file, a few GB a second: it finds damage, not malice."""
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
        path, fault = Path(folder) / name, ""
        # The size costs nothing to look at, and gives most damage away. A file of that size and time is
        # believed; a copy has another time, and the same bytes.
        if not path.is_file():
            fault = "missing"
        elif path.stat().st_size != size:
            fault = f"{path.stat().st_size:,} bytes, and {size:,} were written"
        elif (full or path.stat().st_mtime_ns != mtime) and checksum(path)[1] != crc:
            fault = "altered since it was written (its checksum differs)"
        if fault:
            raise ValueError(f"{path}: {fault}; {cure}")


# What counts in a model's folder, where users write their runs and logs, too. Of a data folder it is what is
# read of it: who adds a file there has changed nothing.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json", "retriever.json",
               "tokenizer*.json")


def fingerprint(path, blocks: int = 64, block: int = MB) -> str:
    """What tells one state of a file or folder from another, copies being equal; a hub name is its own."""
    path, h = Path(path), blake2b(digest_size=16)
    if not path.exists():
        return str(path)
    # A folder: what it holds, file by file, under their names.
    if path.is_dir():
        is_model = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        for pattern in MODEL_FILES if is_model else CORPUS_FILES + QUERY_FILES:
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
    """The text with its control characters made visible, so that none of them commands the terminal."""
    # Zero-width joiners hold the letters of several scripts together, and are harmless.
    kept = "\u00a0\u200c\u200d"
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a module's docstring as it stands, and the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(kind: type, low: float, high: float, expected: str, text: str):
    # argparse puts the flag before the message.
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    # nan is between no bounds.
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


# Types for argparse. Above 0 is from the smallest float on, and finite up to the largest.
LARGEST, SMALLEST = sys.float_info.max, math.ulp(0.0)
positive_int = partial(number, int, 1, math.inf, "a whole number above 0")
natural = partial(number, int, 0, math.inf, "a whole number, 0 or more")
finite = partial(number, float, -LARGEST, LARGEST, "a finite number")
positive = partial(number, float, SMALLEST, LARGEST, "a finite number above 0")
non_negative = partial(number, float, 0, LARGEST, "a finite number, 0 or more")
share = partial(number, float, 0, 1, "a number from 0 to 1")


def run_command(name: str, call: Callable) -> None:
    """Run call(). A fault in what was given is `name: message` and exit 1: the message is the cure."""
    try:
        call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        # With the status by which a shell knows Ctrl-C, and stops its script.
        sys.stderr.write(f"\n{name}: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Python would complain when it flushes at its end. The
        # status is that of any program there: a training that ends so has not finished.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as e:
        # Without the traceback: who typed the command is to read what is wrong, and where.
        named = isinstance(e, OSError) and e.filename
        lines = f"{e.filename}: {e.strerror}" if named else str(e)
        sys.exit(f"{name}: " + "\n".join(map(printable, lines.split("\n"))))
