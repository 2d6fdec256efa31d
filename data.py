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


# Stores: one file per source, made once, mapped by every process.
