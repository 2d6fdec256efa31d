"""Files in, files out: readers for the formats people have, the memory-mapped corpus, training rows.

What surprises:
- A corpus is read once, into `collection.tsv.store` beside it (or in $CORPUS_CACHE): one file that every process maps, so that 8.8 million
  passages open in milliseconds and all ranks share one copy in the page cache. Training rows go the same way. A source that changed is read again.
- A line ends at \\n and nowhere else. MS MARCO's passages hold U+0085 and U+2028, where `str.splitlines` would cut them in two.
- A fault is an error that names file, line and cure. Only ids that the corpus or the queries lack are forgiven: counted, reported, left out.
"""
import argparse
import contextlib
import errno
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
from glob import escape as glob_escape
from itertools import islice
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np
from tqdm import tqdm

BLOCK = 1 << 20  # bytes read at a time: what numpy makes of 1 MB stays in the processor's cache, and 32 MB take three times as long


# Reading.


class Unpacked(gzip.GzipFile):
    def read(self, size=-1):
        try:  # here, so that every reader of a damaged file says which one it was
            return super().read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{self.name}: the gzip data end early or are damaged ({e}); fetch the file again") from e


def open_bytes(path) -> io.BufferedIOBase:
    """Open a file for reading, unpacked if it is gzip (told by its first bytes, not by its name), past a byte-order mark."""
    path = Path(path)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path}: {'is a folder, and a file is needed' if path.is_dir() else 'no such file'}")
    file = open(path, "rb")
    if file.peek(2)[:2] == b"\x1f\x8b":
        file.close()
        file = io.BufferedReader(Unpacked(path), BLOCK)
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


# Files and folders that are whole or absent, and known by their contents.


@contextlib.contextmanager
def write_whole(path, mode: str = "w"):
    """Write `path` whole or not at all: into a file beside it, renamed when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    how = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(aside, mode, **how) as file:
            yield file
            file.flush()
            # Else a power cut after the rename can leave the name without the bytes.
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as e:
        raise with_path(e, path) from e
    finally:
        aside.unlink(missing_ok=True)


def with_path(e: OSError, path) -> OSError:
    """A full disk does not say which file it was: the same error, with the path."""
    nameless = e.filename is None and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return OSError(e.errno, e.strerror, str(path)) if nameless else e


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which takes the name `path` when the block ends without an error: whole, or absent."""
    path, aside = Path(path), Path(f"{path}.partial")
    if path.exists():
        raise ValueError(f"{path} exists; remove it or choose another --out")
    # What a killed process left. Two that are alive exclude each other with `locked`.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, path)
    except OSError as e:
        raise with_path(e, path) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def discard(folder) -> None:
    """Remove a folder. The rename comes first, so that a kill leaves nothing that looks whole."""
    folder = Path(folder)
    gone = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone)


@contextlib.contextmanager
def locked(place, wait: bool = False):
    """Hold `{place}.lock`, so that nobody else who asks for it writes `place` meanwhile.

    The kernel frees the lock of a process that ends, however it ends."""
    path = Path(f"{place}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(f"{place}: process {holder} is writing there; wait until it has finished, or "
                             f"stop it (kill {holder}), or choose another --out") from None
        except OSError as e:
            file.close()
            raise OSError(e.errno, f"cannot be locked ({e.strerror})", str(path)) from e
        # The one before us removed the file that we waited for: then it guards nothing, and we ask again.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def checksum(file) -> list[int]:
    """[bytes, crc32] of a file, a few GB a second."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 24):
            crc = zlib.crc32(block, crc)
        return [opened.tell(), crc]


def stamp(file) -> list[int]:
    """[bytes, mtime_ns, crc32] of a file: what `check_files` compares."""
    size, crc = checksum(file)
    return [size, os.stat(file).st_mtime_ns, crc]


def check_files(folder, stamps: dict[str, list[int]], cure: str, full: bool = False) -> None:
    """Whether every file is the one that was written: {name: stamp}.

    A file with its size and time is believed, unless `full`; of any other the checksum is computed."""
    for name, (size, mtime, crc) in stamps.items():
        path = Path(folder) / name
        if not path.is_file():
            raise ValueError(f"{path}: missing; {cure}")
        now = path.stat()
        if now.st_size != size:
            raise ValueError(f"{path}: {now.st_size:,} bytes, and {size:,} were written; {cure}")
        # A copied file has another time and the same bytes.
        if (full or now.st_mtime_ns != mtime) and checksum(path)[1] != crc:
            raise ValueError(f"{path}: altered since it was written (its checksum differs); {cure}")


def fingerprint(path) -> str:
    """What tells one state of a file or folder from another, copies being equal; a hub name stands for itself.

    Of a file up to 64 blocks of 1 MB, spread evenly; of a folder its weights, settings and texts."""
    path = Path(path)
    if not path.exists():
        return str(path)
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        for file in sorted(path.iterdir()):
            if file.is_file() and file.name.removesuffix(".gz").endswith(FINGERPRINTED):
                digest.update(f"{file.name} {fingerprint(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode())
        blocks = min(64, -(-size >> 20))
        for k in range(blocks):
            file.seek(k * (size - (1 << 20)) // max(blocks - 1, 1) if size > 64 << 20 else k << 20)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


FINGERPRINTED = (".safetensors", ".bin", ".json", ".jsonl", ".tsv")


def read_json(path, cure: str = "write it again, or remove it"):
    """What a JSON file holds, gzipped or not."""
    try:
        with open_bytes(path) as file:
            return json.loads(file.read())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: is not JSON, or damaged ({e}); {cure}") from e


# Processes and the terminal.


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) from torchrun's environment; (0, 1) for a process that is alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave_with_parent(always: bool = False) -> None:
    """Under torchrun, or always, end this process within two seconds of its launcher's death.

    A launcher that is killed cannot stop its processes, and they would write on beside the next start."""
    if "RANK" not in os.environ and not always:
        return
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        with contextlib.suppress(OSError):
            os.write(2, b"the launcher of this process is gone, and so it leaves\n")
        # Not sys.exit: that ends a thread only. What is half-written is aside, as after any kill.
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def printable(text: str) -> str:
    r"""The text with its control characters made visible, so that none of them commands the terminal.

    >>> print(printable("caf\u00e9 \x1b[31mred\n"))
    café \x1b[31mred\n
    """
    # Zero-width joiners hold the letters of several scripts together, and are harmless.
    return "".join(c if c.isprintable() or c in "\u00a0\u200c\u200d" else c.encode("unicode_escape").decode()
                   for c in text)


# Command lines.


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _number(text: str, kind: type, low: float, high: float, expected: str):
    """A number of that kind between low and high, for argparse: which puts the flag before the message."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # nor is nan
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def positive_int(text: str) -> int:
    return _number(text, int, 1, math.inf, "a whole number above 0")


def natural(text: str) -> int:
    return _number(text, int, 0, math.inf, "a whole number, 0 or more")


def finite(text: str) -> float:
    return _number(text, float, -sys.float_info.max, sys.float_info.max, "a finite number")


def positive(text: str) -> float:
    return _number(text, float, math.ulp(0.0), sys.float_info.max, "a finite number above 0")


def non_negative(text: str) -> float:
    return _number(text, float, 0.0, sys.float_info.max, "a finite number, 0 or more")


def share(text: str) -> float:
    return _number(text, float, 0.0, 1.0, "a number from 0 to 1")


def run_command(name: str, call) -> None:
    """Run call(). A fault in what was given is `name: message` and exit 1: the message is the cure, a traceback noise."""
    try:
        call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        sys.exit(f"{name}: {e.filename}: {e.strerror}" if e.filename else f"{name}: {e}")
    except ValueError as e:
        sys.exit(f"{name}: {e}")


# Formats of passages and queries.


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
    if not docid or len(docid.encode("utf-8", "replace")) > 512 or min(docid) <= " ":
        raise ValueError(f"{where}: {docid[:40]!r} cannot be an id: 1 to 512 bytes without white space, or TREC files could not hold it")
    return docid


# Runs: evaluate.py reads them.


def write_run(path, run: dict[str, dict[str, float]], tag: str = "run"):
    """{qid: {docid: score}} as a TREC run, best first. Equal scores stay in the order they came in: trec_eval orders them anew, MS MARCO's
    script goes by the lines."""
    with write_whole(path) as file:
        for qid, docs in run.items():
            for rank, (docid, score) in enumerate(sorted(docs.items(), key=lambda item: -item[1]), 1):
                file.write(f"{qid} Q0 {check_id(docid, f'{path}: query {qid}')} {rank} {score} {tag}\n")


# Stores: one file per source, made once, mapped by every process.

MAGIC = b"store 1\n"


class Store:
    """A file of a text blob, the arrays that index it, and a JSON footer; mapped, so that it costs a process no memory of its own.

    The footer is the last thing written and names what the store was made from, so a torn or stale file cannot pass for a whole one.
    """

    def __init__(self, path, made_from: dict):
        self.path, self.made_from = Path(path), made_from
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 16 or os.pread(file.fileno(), 8, size - 8) != MAGIC:
                raise StaleStore(f"{path}: not a whole store")
            at = size - 16 - int.from_bytes(os.pread(file.fileno(), 8, size - 16), "little")
            self.meta = json.loads(os.pread(file.fileno(), size - 16 - at, at))
            if self.meta["made_from"] != made_from:
                raise StaleStore(f"{path}: was made from another state of its source; start again to have it made anew")
            self.blob = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for name, (kind, start, count) in self.meta["arrays"].items():
            setattr(self, name, np.frombuffer(self.blob, kind, count, start))

    def __reduce__(self):  # a DataLoader's worker maps the file again instead of receiving it
        return Store, (self.path, self.made_from)


class StaleStore(ValueError):
    pass


def open_store(source: Path, suffix: str, cache, made_from: dict, build) -> Store:
    """Map the store of `source`; make it first where it is missing or stale. `build(out)` writes the blob to `out`, returns (arrays, meta);
    `made_from` is what else the outcome depends on.

    Whoever comes first holds a lock and builds aside; whoever comes second waits and then finds it whole. The kernel drops the lock of a
    process that was killed, and the rename comes last, so nothing that the dead leave behind is ever opened.
    """
    made_from = {"source": state_of(source), **made_from}
    folder, name = source.parent, source.name + suffix
    if cache := cache or os.environ.get("CORPUS_CACHE"):  # one folder for many sources: the digest keeps two `corpus.jsonl` apart
        folder, name = Path(cache), f"{source.name}.{hashlib.sha1(str(source.resolve()).encode()).hexdigest()[:8]}{suffix}"
    place = folder / name
    with contextlib.suppress(FileNotFoundError, StaleStore):
        return Store(place, made_from)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / f"{name}.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as e:
        raise ValueError(f"{folder}: cannot hold the store of {source} ({e.strerror}); name a folder on a local disk: CORPUS_CACHE=DIR") from e
    with lock:
        with contextlib.suppress(FileNotFoundError, StaleStore):
            return Store(place, made_from)
        for left in folder.glob(f"{glob_escape(name)}.*.partial"):  # of builders that were killed: none can be alive while we hold the lock
            left.unlink()
        with write_whole(place, "wb") as out:
            arrays, meta = build(out)
            table = {}
            for key, array in arrays.items():
                out.write(b"\0" * (-out.tell() % 64))  # aligned, as mapped arrays must be
                table[key] = (array.dtype.str, out.tell(), len(array))
                out.write(array.data)
            footer = json.dumps({**meta, "made_from": made_from, "arrays": table}).encode()
            out.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
            if made_from["source"] != state_of(source):
                raise ValueError(f"{source}: changed while it was read; start again when its writer has finished")
        return Store(place, made_from)


def state_of(path: Path) -> list:
    """What tells one state of a file from another without reading all of it: size, time, and a digest of both ends."""
    open_bytes(path).close()  # says in words what is wrong with a path
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        ends = os.pread(file.fileno(), 1 << 16, 0) + os.pread(file.fileno(), 1 << 16, max(0, stat.st_size - (1 << 16)))
    return [stat.st_size, stat.st_mtime_ns, hashlib.sha1(ends).hexdigest()]


FNV_START, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3


def hash_ids(text: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """64-bit FNV-1a of every text[start : start + length] at once: column by column, over the ids that are long enough to have one."""
    h, live = np.full(len(start), FNV_START, np.uint64), np.arange(len(start))
    for j in range(length.max(initial=0)):
        live = live[length[live] > j]
        h[live] = (h[live] ^ text[start[live] + j]) * np.uint64(FNV_PRIME)
    return h


class Corpus:
    """The passages of a `collection.tsv`, a `corpus.jsonl` (either may be gzipped) or a BEIR folder, by row and by id.

    c = Corpus("beir/scifact"); c[0], c.docid(0), c.row(c.docid(0)), len(c)
    Held on disk: 8.8 M passages open in milliseconds, and what is read lives once in the page cache, whatever the number of processes.
    Memory while building: some 50 bytes a passage, whatever its length.
    """

    def __init__(self, path, cache=None):
        self.source = find_in(path, ["corpus.jsonl", "corpus.jsonl.gz", "collection.tsv", "collection.tsv.gz"])
        self.store = open_store(self.source, ".store", cache, {"layout": "corpus 1"}, self._build)

    @property
    def n_bytes(self) -> np.ndarray:
        """(N,) int32, the bytes of every text: to sort by length without reading one."""
        return self.store.text_length

    def __len__(self) -> int:
        return len(self.store.text_start)

    def __getitem__(self, row: int) -> str:
        start = int(self.store.text_start[row])
        return self.store.blob[start:start + int(self.store.text_length[row])].decode()

    def texts(self, rows) -> list[str]:
        return [self[row] for row in rows]

    def docid(self, row: int) -> str:
        end = int(self.store.text_start[row]) - 1  # the blob holds id<TAB>text, and so the id ends one byte before the text
        return self.store.blob[end - int(self.store.id_length[row]):end].decode()

    def row(self, docid: str) -> int:
        h = FNV_START
        for byte in docid.encode():
            h = (h ^ byte) * FNV_PRIME & 0xFFFFFFFFFFFFFFFF
        hashes = self.store.hashes.data  # a memoryview hands out plain ints: five times as fast as numpy's for one look-up
        at = bisect_left(hashes, h)
        while at < len(hashes) and hashes[at] == h:  # more than once only if two ids share a hash
            if self.docid(row := int(self.store.order[at])) == docid:
                return row
            at += 1
        raise ValueError(f"{self.source}: holds no passage {docid!r}; was the file that names it made for another collection?")

    def find(self, docids: list[str]) -> np.ndarray:
        """Rows of many ids at once, -1 where there is none: `row` for millions of them."""
        raw = [docid.encode() for docid in docids]
        length = np.fromiter(map(len, raw), np.int64, len(raw))
        text, start = np.frombuffer(b"".join(raw), np.uint8), np.cumsum(length) - length
        h, rows, todo = hash_ids(text, start, length), np.full(len(raw), -1), np.arange(len(raw))
        at, blob = np.searchsorted(self.store.hashes, h), np.frombuffer(self.store.blob, np.uint8)
        while len(todo := todo[at[todo] < len(self)]) and len(todo := todo[self.store.hashes[at[todo]] == h[todo]]):
            row = self.store.order[at[todo]]
            same = self.store.id_length[row] == length[todo]
            id_start = self.store.text_start[row] - 1 - length[todo]
            for j in range(length[todo].max(initial=0)):  # equal hashes are not yet equal ids
                long = np.flatnonzero(same & (length[todo] > j))
                same[long] = blob[id_start[long] + j] == text[start[todo[long]] + j]
            rows[todo[same]] = row[same]
            todo = todo[~same]
            at[todo] += 1
        return rows

    def _build(self, out) -> tuple[dict, dict]:
        columns, blocks = [], jsonl_blocks if is_jsonl(self.source) else tsv_blocks
        with tqdm(desc=f"reading {self.source.name}", unit=" passages", unit_scale=True, disable=None) as bar:
            for block, text_start, text_length, id_length in blocks(self.source):
                hashes = hash_ids(np.frombuffer(block, np.uint8), text_start - 1 - id_length, id_length)
                columns.append((text_start + out.tell(), text_length.astype(np.int32), id_length.astype(np.int32), hashes))
                out.write(block)
                bar.update(len(hashes))
        if not columns:
            raise ValueError(f"{self.source}: holds no passages")
        text_start, text_length, id_length, hashes = map(np.concatenate, zip(*columns))
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        self._forbid_twins(out, hashes, order, text_start, id_length)
        return dict(text_start=text_start, text_length=text_length, id_length=id_length, hashes=hashes, order=order), {}

    def _forbid_twins(self, out, hashes, order, text_start, id_length):
        out.flush()
        with open(out.name, "rb") as file:
            def id_of(row):
                return os.pread(file.fileno(), int(id_length[row]), int(text_start[row] - 1 - id_length[row]))
            seen = {}  # of the few ids that share their hash with another
            for at in np.flatnonzero(hashes[1:] == hashes[:-1]):
                for row in order[at:at + 2].tolist():
                    if (first := seen.setdefault(id_of(row), row)) != row:
                        a, b = (next(islice(read_lines(self.source), place, None))[0] for place in (first, row))
                        raise ValueError(f"{self.source}:{b}: passage id {id_of(row).decode()!r} stands on line {a} already; remove one of the two")


def tsv_blocks(path) -> Iterator[tuple]:
    """(bytes, text starts, text lengths, id lengths) of whole lines, cut with numpy: 8.8 M lines are too many for a loop."""
    with open_bytes(path) as file:
        while block := file.read(BLOCK):
            block += file.readline()
            block += b"" if block.endswith(b"\n") else b"\n"
            text = np.frombuffer(block, np.uint8)
            end = np.flatnonzero(text == 10)
            start = np.append(0, end[:-1] + 1)
            end = end - ((end > start) & (text[end - 1] == 13))  # \r\n
            control = np.flatnonzero(text <= 32)  # white space and control characters: the first one of a line has to be the tab after its id
            tab = control[np.searchsorted(control, start)]
            full, id_length = end > start, tab - start  # a blank line is nobody's passage
            if (full & ((text[tab] != 9) | (id_length < 1) | (id_length > 512))).any() or not is_utf8(block):
                for n, line in read_lines(path):  # a loop over the lines after all, which raises at the one that is wrong
                    columns_of(line, f"{path}:{n}")
            yield block, (tab + 1)[full], (end - tab - 1)[full], id_length[full]


def is_utf8(block: bytes) -> bool:
    try:
        return block.decode() is not None
    except UnicodeDecodeError:
        return False


def jsonl_blocks(path) -> Iterator[tuple]:
    """The same of a jsonl, turned into id<TAB>text lines (only the lengths say where one ends: a JSON text may hold any character)."""
    lines = read_lines(path)
    while chunk := list(islice(lines, 1 << 14)):
        pairs = [pair_of(line, f"{path}:{n}") for n, line in chunk]
        id_length, text_length = (np.fromiter(map(len, side), np.int64, len(pairs)) for side in zip(*pairs))
        text_start = np.cumsum(id_length + text_length + 2) - text_length - 1
        yield b"".join(b"%b\t%b\n" % pair for pair in pairs), text_start, text_length, id_length


def pair_of(line: str, where: str) -> tuple[bytes, bytes]:
    docid, text = record_of(line, where)
    try:
        return docid.encode(), text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: holds half of a surrogate pair (\\u{ord(e.object[e.start]):x}), which UTF-8 cannot carry; remove it") from e


class Row(NamedTuple):
    """A training row in the one form that all formats are turned into. In the store, passages are rows of the corpus (or texts, if inline)."""
    line: int
    qid: str | None
    query: str | None
    pos: list
    neg: list
    pos_scores: list[float] | None
    neg_scores: list[float] | None
    inline: bool


class Example(NamedTuple):
    qid: str
    query: str
    docids: list[str]  # the positive first, then the negatives
    texts: list[str]
    scores: list[float] | None  # the teacher's, in the order of docids
    positives: frozenset[str]  # every docid that this row knows to be relevant: not to be taken for negatives when a batch is shared


ROW_FORMATS = """rows are one of
  {"question", "pos_pid", "neg_pids": [...]} and for CL+KD "pos_score", "neg_scores"; "qid" in place of "question" is looked up in the queries
  {"query", "docids": [positive first, ...], "scores": [...]}
  {"qid", "pos": [pid], "neg": {"bm25": [pid], ...}}          sentence-transformers/msmarco-hard-negatives; scores in a file {qid: {pid: score}}
  {"query", "pos": [text], "neg": [text]} and "pos_scores", "neg_scores"          FlagEmbedding
  pos_score<TAB>neg_score<TAB>qid<TAB>pos_pid<TAB>neg_pid          MarginMSE"""


def parse_row(path, n: int, line: str) -> Row:
    """Line n in any of ROW_FORMATS, ids still as strings; None for what the format has not."""
    where, inline, pos_scores, neg_scores = f"{path}:{n}", False, None, None
    if not line.lstrip().startswith("{"):
        columns = line.split("\t")
        if len(columns) != 5:
            raise ValueError(f"{where}: expected JSON or 5 columns between tabs, got {len(columns)}; {ROW_FORMATS}")
        pos_scores, neg_scores, qid, query, pos, neg = columns[:1], columns[1:2], columns[2], None, columns[3:4], columns[4:]
    else:
        r = parse_json(line, where)
        qid, query = r.get("qid"), r.get("question", r.get("query"))
        if "pos_pid" in r:
            pos, neg = [r["pos_pid"]], r.get("neg_pids", [])
            pos_scores, neg_scores = ([r["pos_score"]], r.get("neg_scores", [])) if "pos_score" in r else (None, None)
        elif isinstance(r.get("docids"), list):
            pos, neg, scores = r["docids"][:1], r["docids"][1:], r.get("scores")
            pos_scores, neg_scores = (scores[:1], scores[1:]) if isinstance(scores, list) else (scores, scores)
        elif isinstance(r.get("neg"), dict):  # a list for each system that found them
            pos, neg = r.get("pos"), [docid for found in r["neg"].values() for docid in found]
        elif "pos" in r:
            pos, neg, pos_scores, neg_scores, inline = r["pos"], r.get("neg", []), r.get("pos_scores"), r.get("neg_scores", []), True
        else:
            raise ValueError(f"{where}: none of the known keys among {', '.join(r)}; {ROW_FORMATS}")
    if not isinstance(pos, list) or not isinstance(neg, list) or not all(isinstance(docid, (str, int)) for docid in pos + neg):
        raise ValueError(f"{where}: expected lists of passages, got {str(pos)[:40]} and {str(neg)[:40]}; {ROW_FORMATS}")
    if (qid is None and query is None) or not isinstance(query, str | None):
        raise ValueError(f"{where}: expected the query's text or a qid, got {query!r}; {ROW_FORMATS}")
    if pos_scores is not None:
        try:
            pos_scores, neg_scores = list(map(float, pos_scores)), list(map(float, neg_scores))
        except (TypeError, ValueError) as e:
            raise ValueError(f"{where}: expected numbers as scores ({e})") from e
        if (len(pos_scores), len(neg_scores)) != (len(pos), len(neg)) or not all(map(math.isfinite, pos_scores + neg_scores)):
            raise ValueError(f"{where}: {len(pos)} + {len(neg)} passages need as many finite scores, got {len(pos_scores)} + {len(neg_scores)}")
    return Row(n, None if qid is None else str(qid), query, list(map(str, pos)), list(map(str, neg)), pos_scores, neg_scores, inline)


def read_scores(path) -> dict[str, dict[str, float]]:
    """{qid: {pid: score}} of a json(.gz). All of it is held in memory while the rows' store is made, and not afterwards."""
    with open_bytes(path) as file:
        if file.peek(1)[:1] == b"\x80":
            raise ValueError(f"""{path}: is a pickle, which may run any code when it is opened. If you trust its source, turn it into JSON once:
  import gzip, json, pickle; scores = pickle.load(gzip.open("{path}"))  # or open(), if it is not packed
  json.dump(scores, gzip.open("scores.json.gz", "wt"))""")
        try:
            return json.load(file)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); one object {{qid: {{pid: score}}}} is expected") from e


class TrainingRows:
    """Queries with their positive, negatives and teacher's scores, out of any of ROW_FORMATS.

    The file is read once, whole: ids are looked up, what the corpus or the queries lack is counted and left out (print `report`), and the rows
    land in a store in one form. So a fault shows before the first step and not at the 30,000th; millions of rows cost no memory and pickle for free.
    corpus: a Corpus or a path, for rows that hold ids; queries: a dict or a path, for rows that hold qids; scores: a file for rows without any.
    """

    def __init__(self, path, corpus=None, queries=None, need_scores=False, need_negatives=False, scores=None, cache=None):
        self.path = Path(path)
        self.corpus = corpus if corpus is None or isinstance(corpus, Corpus) else Corpus(corpus, cache)
        queries = queries if queries is None or isinstance(queries, dict) else read_queries(queries)
        made_from = {"layout": "rows 1", "corpus": self.corpus and self.corpus.store.made_from["source"],
                     "queries": queries and digest(*queries, *queries.values()), "scores": scores and state_of(Path(scores))}
        self.store = open_store(self.path, ".rows", cache, made_from, lambda out: self._build(out, queries, scores))
        self.report, self.kept = self.store.meta["report"], range(len(self.store.start))
        if need_negatives and not self.store.negatives.all():
            self.kept = np.flatnonzero(self.store.negatives)
            self.report += f"; {len(self.store.start) - len(self.kept):,} without a negative left out"
            if not len(self.kept):
                raise ValueError(f"{path}: no row has a negative; `python -m tools.mine` finds some, or train with the batch's other passages alone")
        if need_scores and len(bare := np.flatnonzero(self.store.scored[self.kept] == 0)):
            raise ValueError(f"{self.ids(bare[0])}: has no teacher scores (nor have {len(bare) - 1:,} more of {len(self):,} rows); "
                             f"`python -m tools.score` writes them, and --objective cl needs none")

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Row:
        at = self.kept[i]
        return Row(*json.loads(self.store.blob[self.store.start[at]:self.store.start[at] + self.store.length[at]]))

    def ids(self, i: int) -> str:
        """FILE:LINE of row i."""
        return f"{self.path}:{self[i].line}"

    def too_few(self, n_negatives: int) -> int:
        """How many rows have fewer negatives than that, and so give some of them twice."""
        return int((self.store.negatives[self.kept] < n_negatives).sum())

    def example(self, i: int, n_negatives: int | None, rng: np.random.Generator | None = None) -> Example:
        """Row i with one of its positives and so many of its negatives, drawn with rng; None: its first positive and all negatives, in order.

        Drawn without replacement; a row that has too few gives each of them once before it gives one twice, and a row that has none gives none."""
        row = self[i]
        first, drawn = 0, range(len(row.neg))
        if n_negatives is not None:
            first = int(rng.integers(len(row.pos)))
            drawn = np.resize(rng.permutation(len(row.neg)), n_negatives if row.neg else 0)
        picked = [row.pos[first], *(row.neg[k] for k in drawn)]
        name = digest if row.inline else self.corpus.docid  # a text without an id is its own
        scores = row.pos_scores and [row.pos_scores[first], *(row.neg_scores[k] for k in drawn)]
        return Example(row.qid, row.query, list(map(name, picked)), picked if row.inline else self.corpus.texts(picked), scores,
                       frozenset(map(name, row.pos)))

    def _build(self, out, queries, scores) -> tuple[dict, dict]:
        scores, queries, first_fault = scores and read_scores(scores), queries or {}, ""
        count = dict.fromkeys(["rows", "rows without their query", "rows without a known positive", "unknown positives", "unknown negatives",
                               "negatives that are positives", "passages without a score"], 0)
        columns, lines, bar = [], read_lines(self.path), tqdm(desc=f"reading {self.path.name}", unit=" rows", unit_scale=True, disable=None)
        while chunk := [parse_row(self.path, n, line) for n, line in islice(lines, 4096)]:
            ids = [docid for row in chunk if not row.inline for docid in row.pos + row.neg]
            if ids and self.corpus is None:
                raise ValueError(f"{self.path}:{chunk[0].line}: rows hold passage ids, so the passages are needed: --corpus")
            found = iter(self.corpus.find(ids).tolist() if ids else [])
            for row in chunk:
                sides, of_query = [], scores and scores.get(row.qid, {})
                for side, docids, given in (("positives", row.pos, row.pos_scores), ("negatives", row.neg, row.neg_scores)):
                    places = docids if row.inline else list(islice(found, len(docids)))
                    given = [of_query.get(docid) for docid in docids] if scores else given or [None] * len(docids)
                    count[f"unknown {side}"] += places.count(-1)
                    sides.append({place: score for place, score in zip(places, given) if place != -1})  # a dict: repeats fall together
                pos, neg = sides
                for place in pos.keys() & neg.keys():  # pushed away and pulled near at once: no loss could make sense of it
                    count["negatives that are positives"] += 1
                    del neg[place]
                query = row.query if row.query is not None else queries.get(row.qid)
                if query is None or not pos:
                    count["rows without their query" if query is None else "rows without a known positive"] += 1
                    what = f"query {row.qid!r}" if query is None else f"passage {row.pos[0]!r}" if row.pos else "no positive at all"
                    first_fault = first_fault or f"; the first is {self.path}:{row.line}, {what}"
                    continue
                if scored := any(score is not None for score in pos.values()):  # a score file need not cover everything: keep what it covers
                    count["passages without a score"] += [*pos.values(), *neg.values()].count(None)
                    pos, neg = ({place: score for place, score in side.items() if score is not None} for side in (pos, neg))
                kept = Row(row.line, row.qid if row.qid is not None else query, query, list(pos), list(neg),
                           list(pos.values()) if scored else None, list(neg.values()) if scored else None, row.inline)
                columns.append((out.tell(), out.write(json.dumps(kept).encode()), len(neg), scored))
            count["rows"] += len(chunk)
            bar.update(len(chunk))
        bar.close()
        faults = ", ".join(f"{value:,} {key}" for key, value in count.items() if value and key != "rows")
        if not columns:
            raise ValueError(f"{self.path}: none of {count['rows']:,} rows can be used: {faults or 'it is empty'}{first_fault}; "
                             f"are these the corpus and the queries that the rows were made for?")
        start, length, negatives, scored = (np.array(column, kind) for column, kind in zip(zip(*columns), ("i8", "i4", "i4", "u1")))
        report = f"{len(start):,} of {count['rows']:,} rows" + (f"; left out: {faults}{first_fault}" if faults else "")
        return dict(start=start, length=length, negatives=negatives, scored=scored), {"report": report}


def digest(*texts: str) -> str:
    """16 hexadecimal digits for a text, or for many in their order."""
    h = hashlib.blake2b(digest_size=8)
    for text in texts:
        h.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return h.hexdigest()
