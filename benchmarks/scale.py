"""The whole path at MS MARCO's size, without a model: in what memory, on what disk, how far from the least?

    python benchmarks/scale.py --passages 100000      # a minute, to see that it runs
    python benchmarks/scale.py --passages 8841823     # MS MARCO's size: half an hour, 60 GB of disk

Passages have MS MARCO's lengths. Sparse vectors are drawn, like those of a trained model in what decides
the cost: about 145 terms a passage, a Zipf-like vocabulary, topics whose terms occur together, so that a
ranking has a top. They are written as the shards of a build and put together by index.py's own assembly.
Dense vectors have 256 dimensions in fp16, and a spectrum like that of real ones.

Every stage runs in a process of its own. `anonymous` is the largest memory that it could not have given
back; `resident` also counts the pages of mapped files, which the kernel takes back when it needs them. `at
least` is what arithmetic asks for: the bytes to be read and written, over the bandwidths that this script
measures first.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import index
from corpus import write_collection
from data import Corpus, new_folder
from dense_search import drawer
from index import SparseIndex, DenseIndex, created, finish, invert, open_index, read_manifest
from tools.codes import CodedIndex, add, codes_folder, multiplies_bytes
from tools.export import export

VOCAB, SHARD, WIDTH = 128_256, 100_000, 256
USED, TOPICS, PER_TOPIC = 40_000, 2000, 600
# Queries that the ranks share.
RANKED = 512


# What is drawn.


class World:
    """Passages and queries as sparse vectors; a range of passages is a function of the seed and the range."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.seed = seed
        # Token ids do not follow frequency.
        self.names = rng.permutation(VOCAB)[:USED].astype(np.int32)
        # Drawing from a table is drawing an index.
        zipf = 1 / (np.arange(USED) + 20) ** 0.95
        self.table = rng.choice(USED, 1 << 20, p=zipf / zipf.sum()).astype(np.int32)
        self.topics = (USED * rng.random((TOPICS, PER_TOPIC)) ** 2).astype(np.int32)
        self.rarity = (0.35 + 0.9 * np.log1p(np.arange(USED)) / np.log1p(USED)).astype(np.float32)

    def draw(self, rng, topic, n_common: int, n_topical: int, gain: float) -> tuple:
        """(offsets, terms, weights) of len(topic) texts, each term once, the terms of a text ascending."""
        n = len(topic)
        common = self.table[rng.integers(0, len(self.table), (n, n_common))]
        place = (PER_TOPIC * rng.random((n, n_topical), dtype=np.float32) ** 1.5).astype(np.int32)
        terms = self.names[np.concatenate([common, self.topics[topic[:, None], place]], 1)]
        rank = np.concatenate([common, self.topics[topic[:, None], place]], 1)
        order = np.argsort(terms, 1)
        terms, rank = np.take_along_axis(terms, order, 1), np.take_along_axis(rank, order, 1)
        # Short texts, and long ones.
        share = rng.uniform(0.55, 1.0, (n, 1))
        keep = rng.random(terms.shape, dtype=np.float32) < share
        # Sorted, so that a term that was drawn twice stands beside itself.
        keep[:, 1:] &= terms[:, 1:] != terms[:, :-1]
        skewed = rng.standard_gamma(0.8, int(keep.sum()), dtype=np.float32)
        weights = np.log1p(gain * self.rarity[rank[keep]] * skewed + 0.02).astype(np.float32)
        return np.append(0, keep.sum(1).cumsum()), terms[keep], weights

    def passages(self, first: int, n: int) -> tuple:
        rng = np.random.default_rng((self.seed, 1, first))
        return self.draw(rng, rng.integers(0, TOPICS, n), 155, 55, 2.5)

    def queries(self, n: int) -> tuple:
        rng = np.random.default_rng((self.seed, 2))
        return self.draw(rng, rng.integers(0, TOPICS, n), 22, 32, 0.8)


# Stages: functions of (folder, number of passages) that return a dict of what they found out.


def draw_shards(folder: Path, n: int) -> dict:
    world, postings = World(), 0
    (folder / "shards").mkdir()
    for first in range(0, n, SHARD):
        ends, terms, weights = world.passages(first, min(SHARD, n - first))
        postings += len(terms)
        np.savez(folder / "shards" / f"{first:010d}.npz", ends, terms, weights)
    return {"bytes": 0, "note": f"{postings / n:.0f} postings a passage"}


def build_corpus(folder: Path, n: int) -> dict:
    corpus, size = Corpus(folder / "collection.tsv"), (folder / "collection.tsv").stat().st_size
    assert len(corpus) == n
    return {"disk": 2 * size, "note": f"{size / 1e9:.1f} GB of text"}


def build_sparse(folder: Path, n: int) -> dict:
    files = sorted((folder / "shards").iterdir())

    def pieces():
        for file in files:
            with np.load(file) as arrays:
                yield int(file.stem), *map(torch.from_numpy, arrays.values())

    with new_folder(folder / "sparse") as aside:
        arrays, _ = invert(pieces, VOCAB, "fp32", aside)
        finish(aside, arrays, {}, map(str, range(n)), [f"t{term}" for term in range(VOCAB)])
    size = size_of(folder / "sparse")
    return {"disk": 2 * size_of(folder / "shards") + size, "note": f"{size / 1e9:.1f} GB index"}


def build_dense(folder: Path, n: int) -> dict:
    draw = drawer(WIDTH, white=False)
    with new_folder(folder / "dense") as aside:
        vectors = created(aside, "vectors", (n, WIDTH), torch.float16)
        for first in range(0, n, SHARD):
            some = draw(min(SHARD, n - first))
            vectors[first:first + len(some)] = some
        finish(aside, (vectors,), {}, map(str, range(n)))
    return {"disk": size_of(folder / "dense"), "note": "drawn and stored"}


def open_sparse(folder: Path, n: int) -> dict:
    began = time.perf_counter()
    ix = SparseIndex.open(folder / "sparse")
    ms = 1000 * (time.perf_counter() - began)
    assert ix.n_docs == n
    return {"bytes": 0, "note": f"{ms:.0f} ms"}


def search_sparse(folder: Path, n: int, k: int, at_once: int, threads: int) -> dict:
    ix, (ends, terms, weights) = open_index(folder / "sparse"), World().queries(64)
    # Once unmeasured: the lists come into memory.
    ix.search((ends, terms, weights), k, threads=threads)
    touched = int(np.diff(ix.starts)[terms].sum())
    began = time.perf_counter()
    for q in range(0, 64, at_once):
        here = slice(ends[q], ends[q + at_once])
        some = ends[q:q + at_once + 1] - ends[q], terms[here], weights[here]
        scores, rows = ix.search(some, k, threads=threads)
        assert (rows >= 0).all()
    seconds = time.perf_counter() - began
    note = f"{1000 * seconds / 64:.1f} ms a query, {touched / 64e6:.1f} M postings a query"
    return {"seconds": seconds, "memory": 8 * touched / threads, "note": note}


class Drawn:
    """Stands for the model that encodes queries: the text of a query is the place of a drawn vector."""

    def __init__(self, n: int):
        ends, terms, weights = World().queries(n)
        self.vectors = [(terms[a:b], weights[a:b]) for a, b in zip(ends, ends[1:])]

    def encode(self, texts, kind, max_length=None):
        terms, weights = zip(*(self.vectors[int(text)] for text in texts))
        ends = np.append(0, np.cumsum([len(own) for own in terms]))
        shape = len(texts), VOCAB
        return torch.sparse_csr_tensor(ends, np.concatenate(terms), np.concatenate(weights), shape)


def one_rank(rank: int, ranks: int, port: int, folder: Path, pipe) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    index.join_ranks()
    encoder, queries = Drawn(RANKED), {f"q{i}": str(i) for i in range(RANKED)}
    # All ranks are here: the clock does not count who started late.
    index.exchange()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        index.search(folder / "sparse", queries, 1000, folder / "ranks.trec", encoder=encoder)
    pipe.send(time.perf_counter() - began)


def search_by_ranks(folder: Path, n: int, ranks: int) -> dict:
    """index.search with its run file, as torchrun starts it."""
    context, port = multiprocessing.get_context("spawn"), 20_000 + os.getpid() % 20_000
    pipes = [context.Pipe() for _ in range(ranks)]
    processes = [context.Process(target=one_rank, args=(rank, ranks, port, folder, theirs))
                 for rank, (_, theirs) in enumerate(pipes)]
    for process in processes:
        process.start()
    seconds = max(mine.recv() for mine, _ in pipes)
    for process in processes:
        process.join()
    return {"seconds": seconds, "note": f"{1000 * seconds / RANKED:.1f} ms a query"}


def add_codes(folder: Path, n: int) -> dict:
    add(folder / "dense")
    return {"disk": size_of(codes_folder(folder / "dense")), "memory": size_of(folder / "dense"), "note": ""}


def search_dense(folder: Path, n: int, k: int, at_once: int, kind=DenseIndex) -> dict:
    ix = kind.open(folder / "dense")
    queries = drawer(WIDTH, white=False)(64)
    # Once unmeasured, as above.
    ix.search(queries[:1], k)
    began = time.perf_counter()
    for q in range(0, 64, at_once):
        ix.search(queries[q:q + at_once], k)
    seconds = time.perf_counter() - began
    read = ix.codes.codes if kind is CodedIndex and ix.uses_codes(k) else ix.vectors
    return {"seconds": seconds, "memory": read.nbytes * (64 // at_once),
            "note": f"{1000 * seconds / 64:.0f} ms a query"}


def verify(folder: Path, n: int, kind: str) -> dict:
    read_manifest(folder / kind, full=True)
    return {"disk_read": size_of(folder / kind), "note": ""}


def export_npz(folder: Path, n: int) -> dict:
    export(folder / "sparse", folder / "exported", "npz")
    size = size_of(folder / "exported")
    shutil.rmtree(folder / "exported")
    return {"disk": 3 * size, "note": f"{size / 1e9:.1f} GB for scipy"}


def stages_for(n: int) -> dict:
    """{name: function}, in the order in which they run."""
    stages = {"corpus store": build_corpus, "vectors drawn (not ours)": draw_shards,
              "sparse index put together": build_sparse, "sparse index opened": open_sparse}
    for k in (10, 1000):
        for at_once, threads in ((1, 1), (64, 1), (64, 2)):
            name = f"sparse, k {k}, {at_once} at a time, {threads} thread{'s' * (threads > 1)}"
            stages[name] = partial(search_sparse, k=k, at_once=at_once, threads=threads)
    for ranks in (1, 2):
        name = f"sparse, k 1000, to a run file, {ranks} rank{'s' * (ranks > 1)}"
        stages[name] = partial(search_by_ranks, ranks=ranks)
    stages["sparse index verified"] = partial(verify, kind="sparse")
    stages["sparse index exported (npz)"] = export_npz
    stages["dense index stored"] = build_dense
    for at_once in (1, 64):
        stages[f"dense, k 1000, {at_once} at a time"] = partial(search_dense, k=1000, at_once=at_once)
    if multiplies_bytes():
        stages["8-bit codes of the dense index"] = add_codes
        for at_once in (1, 64):
            coded = partial(search_dense, k=1000, at_once=at_once, kind=CodedIndex)
            stages[f"dense by codes, k 1000, {at_once} at a time"] = coded
    return stages


# Measuring.


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def bandwidths(folder: Path) -> dict:
    """Bytes a second: copied in memory, written to disk and flushed, read back."""
    block = torch.ones(2**26)
    began = time.perf_counter()
    for _ in range(8):
        block.clone()
    memory = 8 * 2 * block.nbytes / (time.perf_counter() - began)
    file = folder / "bandwidth"
    began = time.perf_counter()
    with open(file, "wb") as out:
        for _ in range(8):
            out.write(block.numpy().data)
        out.flush()
        os.fsync(out.fileno())
    disk = 8 * block.nbytes / (time.perf_counter() - began)
    file.unlink()
    # What is read was written a moment ago, and comes from the page cache, mostly.
    return {"memory": memory, "disk": disk, "disk_read": memory}


def in_a_process(stage, folder: Path, n: int, pipe) -> None:
    # Ten looks a second: the kernel keeps the highest resident memory, but not the highest anonymous one.
    peak, done = {"anonymous": 0}, threading.Event()

    def watch():
        while not done.wait(0.1):
            peak["anonymous"] = max(peak["anonymous"], memory("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    torch.set_num_threads(1)
    began = time.perf_counter()
    found = stage(folder, n)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    pipe.send({"seconds": seconds, **found, **peak, "resident": memory("VmHWM")})


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}: this needs Linux")


def measure(stage, folder: Path, n: int) -> dict:
    # A new interpreter, so that no stage inherits another one's memory.
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=in_a_process, args=(stage, folder, n, theirs))
    process.start()
    theirs.close()
    try:
        found = mine.recv()
    except EOFError:
        raise SystemExit(f"the stage failed; {folder} is left to look at") from None
    process.join()
    return found


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="made, and removed (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    rate = bandwidths(args.folder)
    print(f"{args.passages:,} passages, {os.cpu_count()} cores; memory {rate['memory'] / 1e9:.1f} GB/s, "
          f"disk {rate['disk'] / 1e9:.2f} GB/s written\n")
    write_collection(args.folder / "collection.tsv", args.passages)
    print(f"{'stage':<44}{'seconds':>9}{'at least':>10}{'anonymous':>11}{'resident':>10}{'disk':>9}")
    rows, largest = [], 0
    for name, stage in stages_for(args.passages).items():
        found = measure(stage, args.folder, args.passages)
        least = sum(found.get(kind, 0) / speed for kind, speed in rate.items())
        disk = size_of(args.folder)
        largest = max(largest, disk)
        rows.append({"stage": name, **found, "at_least": least, "on_disk": disk})
        print(f"{name:<44}{found['seconds']:>9.1f}{least:>10.1f}{found['anonymous'] / 1e9:>8.2f} GB"
              f"{found['resident'] / 1e9:>7.2f} GB{disk / 1e9:>6.1f} GB  {found['note']}", flush=True)
    peak = max(row["anonymous"] for row in rows)
    print(f"\nat most {peak / 1e9:.1f} GB of anonymous memory and {largest / 1e9:.1f} GB of disk")
    if args.json:
        report = {"passages": args.passages, "bandwidths": rate, "stages": rows}
        args.json.write_text(json.dumps(report, indent=1))
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
