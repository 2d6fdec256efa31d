"""What does it cost to hold a collection? Corpus against a dict of strings and a Hugging Face `datasets` table.

    python benchmarks/corpus.py                                    # 500,000 passages, under a minute
    python benchmarks/corpus.py --passages 8841823 --dict_passages 500000   # MS MARCO's size: 3 GB of text; the dict would need 4 GB a process
    python benchmarks/corpus.py --passages 8841823 --only corpus   # one way at a time, for short turns on a shared machine

Each way is prepared once (that is its build time), then opened by --processes processes at the same time, which read random passages by id:
all of them start together, read until the clock stops, and then report their memory while the others still hold theirs.
Private bytes are what one more process adds; PSS adds to that its share of the pages that several have mapped.

What surprises: the page cache is warm after the build, as it is in training after the first epoch; `--drop_cache` (root only) shows a cold
start. `datasets` has rows and no ids, so it is given the rows; Corpus looks its ids up, and is also timed by row.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Corpus, open_bytes, write_whole


def write_collection(path: Path, passages: int):
    """A tsv with MS MARCO's lengths: a passage has 335 bytes on average (log-normal, 56 words)."""
    rng = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)], object)
    text = " ".join(words[np.minimum(rng.zipf(1.3, 3_000_000), len(words)) - 1])
    lengths = np.clip(rng.lognormal(5.72, 0.43, passages), 30, 1600).astype(int).tolist()
    places = rng.integers(0, len(text) - 2000, passages).tolist()  # a window of one long text: as varied as needed, and written in seconds
    with write_whole(path) as file:
        for row, (at, length) in enumerate(zip(places, lengths)):
            file.write(f"{row}\t{text[at:at + length]}\n")


def prepare(way, source, folder):
    if way == "corpus":
        Corpus(source, cache=folder)
    elif way == "datasets":
        from datasets import load_dataset
        load_dataset("csv", data_files=str(source), sep="\t", names=["id", "text"], quoting=3, split="train",
                     cache_dir=str(folder / "hf"), encoding="utf-8").save_to_disk(str(folder / "table"))


def opened(way, source, folder):
    """A function from row numbers to texts, and the number of rows."""
    if way.startswith("corpus"):
        corpus = Corpus(source, cache=folder)
        if way == "corpus":
            return lambda rows: [corpus[corpus.row(str(row))] for row in rows], len(corpus)
        return corpus.texts, len(corpus)
    if way == "datasets":
        from datasets import load_from_disk
        table = load_from_disk(str(folder / "table"))
        return lambda rows: [table[row]["text"] for row in rows], len(table)
    texts = {}  # the authors' way: every process reads every line
    with open_bytes(source) as file:
        for line in file:
            docid, text = line.decode().rstrip("\n").split("\t", 1)
            texts[docid] = text
    return lambda rows: [texts[str(row)] for row in rows], len(texts)


def reader(way, source, folder, seconds, seed, barrier, results):
    if way == "datasets":
        import datasets  # noqa: F401  its import is not its memory: see `before`
    before = memory()
    began = time.perf_counter()
    read, n = opened(way, source, folder)
    read([0])
    open_seconds = time.perf_counter() - began
    rng = np.random.default_rng(seed)
    barrier.wait()
    began, reads, rates = time.perf_counter(), 0, []
    while time.perf_counter() - began < seconds:
        rows = rng.integers(0, n, 1000).tolist()
        start = time.perf_counter()
        read(rows)
        rates.append(len(rows) / (time.perf_counter() - start))
        reads += len(rows)
    barrier.wait()
    after = memory()  # every process still holds its own
    barrier.wait()
    results.put({"open": open_seconds, "reads": statistics.median(rates),
                 "private": after["private"] - before["private"], "pss": after["pss"] - before["pss"]})


def memory() -> dict:
    sizes = {key.rstrip(":"): int(value) * 1024 for key, value, *_ in map(str.split, open("/proc/self/smaps_rollup").readlines()[1:])}
    return {"pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def measure(way, source, folder, processes, seconds) -> dict:
    context = multiprocessing.get_context("spawn")  # nothing inherited: what a rank of torchrun would hold
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=reader, args=(way, source, folder, seconds, seed, barrier, results)) for seed in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join()
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--passages", type=int, default=500_000, help="8841823 is MS MARCO (3 GB, twice that on disk for each way)")
    parser.add_argument("--dict_passages", type=int, help="measure the dict on fewer and scale it up, where memory is short")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=3.0, help="of reading")
    parser.add_argument("--only", nargs="+", choices=["corpus", "datasets", "dict"], default=["corpus", "datasets", "dict"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/benchmark_corpus"), help="for the files; reused, and removed with --clean")
    parser.add_argument("--drop_cache", action="store_true", help="empty the page cache before opening (root)")
    parser.add_argument("--clean", action="store_true", help="remove the folder at the end")
    args = parser.parse_args()

    source, few = args.folder / f"collection.{args.passages}.tsv", args.dict_passages or args.passages
    if not source.exists():
        began = time.perf_counter()
        write_collection(source, args.passages)
        print(f"wrote {source}: {source.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
    print(f"{args.passages:,} passages, {args.processes} processes, {os.cpu_count()} cores\n")
    print(f"{'':26}{'build s':>9}{'open s':>9}{'private MB/proc':>17}{'PSS MB/proc':>13}{'reads/s/proc':>14}")
    for way in args.only:
        place, scale, build = source, 1.0, 0.0
        if way == "dict" and few < args.passages:
            place, scale = args.folder / f"collection.{few}.tsv", args.passages / few
            if not place.exists():
                write_collection(place, few)
        elif way != "dict":
            folder = args.folder / f"{way}.{args.passages}"
            shutil.rmtree(folder, ignore_errors=True)  # a build that finds itself done would be no build
            began = time.perf_counter()
            prepare(way, source, folder)
            build = time.perf_counter() - began
        for name in {"corpus": ["corpus", "corpus by row"]}.get(way, [way]):
            if args.drop_cache:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            found = measure(name, place, args.folder / f"{way}.{args.passages}", args.processes, args.seconds)
            label = f"{name}{f' (x {scale:.1f} from {few:,})' if scale > 1 else ''}"
            print(f"{label:26}{build:9.1f}{found['open'] * scale:9.3f}{found['private'] * scale / 1e6:17.1f}{found['pss'] * scale / 1e6:13.1f}{found['reads']:14,.0f}", flush=True)
            with open(args.folder / "results.jsonl", "a") as log:
                log.write(json.dumps({"way": name, "passages": args.passages, "build": build, "scale": scale, **found}) + "\n")
    if args.clean:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
