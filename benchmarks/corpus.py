"""What does it cost to hold a collection? Corpus against a dict of strings and a table of `datasets`.

    python benchmarks/corpus.py                                             # 500,000 passages, two minutes
    python benchmarks/corpus.py --passages 8841823 --dict_passages 1000000  # MS MARCO's size: 3 GB of text
    python benchmarks/corpus.py --passages 8841823 --only corpus            # one way alone, for a short turn

(At MS MARCO's size the dict alone would need 4 GB a process: hence --dict_passages.)

Each way is prepared once (that is its build time), then opened by --processes processes at the same time,
which read random passages by id: all of them start together, read until the clock stops, and then report
their memory while the others still hold theirs. Private bytes are what one more process adds; PSS adds to
that its share of the pages that several have mapped (and that the page cache may take back). With --processes
1 nobody shares them, and they count as private.

What surprises: the page cache is warm after the build, as it is in training after the first epoch;
--drop_cache shows a cold start. Even warm, the first read of a page costs a fault: a short look at a big
collection sees mostly those. `datasets` knows rows and no ids, a dict ids and no rows; Corpus is timed by
both.
"""

import argparse
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


# What is timed of each way.
READS = {"corpus": ["corpus by id", "corpus by row"], "datasets": ["datasets"], "dict": ["dict"]}


def write_collection(path: Path, passages: int):
    """A tsv with MS MARCO's lengths: a passage has 335 bytes on average (log-normal, 56 words)."""
    rng = np.random.default_rng(0)
    syllables = np.array([a + b for a in "bdfgklmnprstvz" for b in "aeiou"])
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)], object)
    text = " ".join(words[np.minimum(rng.zipf(1.3, 3_000_000), len(words)) - 1])
    lengths = np.clip(rng.lognormal(5.72, 0.43, passages), 30, 1600).astype(int).tolist()
    # A window of one long text: as varied as needed, and written in seconds.
    places = rng.integers(0, len(text) - 2000, passages).tolist()
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
        if way == "corpus by id":
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
    began, reads = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        read(rng.integers(0, n, 100).tolist())
        reads += 100
    reads /= time.perf_counter() - began
    barrier.wait()
    after = memory()  # every process still holds its own
    barrier.wait()
    results.put({"open": open_seconds, "reads": reads,
                 "private": after["private"] - before["private"], "pss": after["pss"] - before["pss"]})


def memory() -> dict:
    sizes = {key.rstrip(":"): int(value) * 1024
             for key, value, *_ in map(str.split, open("/proc/self/smaps_rollup").readlines()[1:])}
    return {"pss": sizes["Pss"], "private": sizes["Private_Clean"] + sizes["Private_Dirty"]}


def measure(way, source, folder, processes, seconds) -> dict:
    context = multiprocessing.get_context("spawn")  # nothing inherited: what a rank of torchrun would hold
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=reader, args=(way, source, folder, seconds, seed, barrier, results))
               for seed in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=1800) for _ in workers]
    for worker in workers:
        worker.join()
    return {key: statistics.median(one[key] for one in found) for key in found[0]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--passages", type=int, default=500_000,
                        help="8841823 is MS MARCO (3 GB, twice that on disk for each way)")
    parser.add_argument("--dict_passages", type=int,
                        help="measure the dict on fewer and scale it up, where memory is short")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of reading, in each round")
    parser.add_argument("--rounds", type=int, default=2, help="the ways take turns; medians are printed")
    parser.add_argument("--only", nargs="+", choices=["corpus", "datasets", "dict"],
                        default=["corpus", "datasets", "dict"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/benchmark_corpus"),
                        help="for the files; removed with --clean")
    parser.add_argument("--drop_cache", action="store_true",
                        help="empty the page cache before each opening (root)")
    parser.add_argument("--clean", action="store_true", help="remove the folder at the end")
    return parser.parse_args()


def collection(folder, passages):
    """The collection of so many passages, written if it is not there yet."""
    source = folder / f"collection.{passages}.tsv"
    if not source.exists():
        began = time.perf_counter()
        write_collection(source, passages)
        seconds = time.perf_counter() - began
        print(f"wrote {source}: {source.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s")
    return source


def main():
    args = parse_args()
    few, built, rounds = args.dict_passages or args.passages, {}, {}
    source = {way: collection(args.folder, few if way == "dict" else args.passages) for way in args.only}
    for way in args.only:
        folder = args.folder / f"{way}.{args.passages}"
        shutil.rmtree(folder, ignore_errors=True)  # a build that finds itself done would be no build
        began = time.perf_counter()
        prepare(way, source[way], folder)
        built[way] = time.perf_counter() - began
    for _ in range(args.rounds):
        for name in [name for way in args.only for name in READS[way]]:
            way = name.split()[0]
            if args.drop_cache:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("1")
            found = measure(name, source[way], args.folder / f"{way}.{args.passages}", args.processes,
                            args.seconds)
            # Its time to open and its memory grow with the passages, the time of a read does not.
            if way == "dict":
                found |= {key: found[key] * args.passages / few for key in ("open", "private", "pss")}
            rounds.setdefault(name, []).append(found)
    report(rounds, built, few, args)
    if args.clean:
        shutil.rmtree(args.folder)


def report(rounds, built, few, args):
    print(f"\n{args.passages:,} passages, {args.processes} processes on {os.cpu_count()} cores, medians of "
          f"{args.rounds} rounds")
    print(f"{'':16}{'build s':>10}{'open s':>10}{'private MB/proc':>17}{'PSS MB/proc':>13}"
          f"{'reads/s/proc':>14}")
    median = {name: {key: statistics.median(one[key] for one in found) for key in found[0]}
              for name, found in rounds.items()}
    for name, m in median.items():
        print(f"{name:16}{built[name.split()[0]]:10.1f}{m['open']:10.3f}{m['private'] / 1e6:17.1f}"
              f"{m['pss'] / 1e6:13.1f}{m['reads']:14,.0f}")
    if "dict" in median and few < args.passages:
        print(f"(dict: {args.passages / few:.1f} x what {few:,} passages took)")
    if "corpus" in args.only:
        ours = median["corpus by row"]
        print(f"target: opens in under 1 s: {ours['open']:.3f} s, "
              f"{'reached' if ours['open'] < 1 else 'MISSED'}")
        print(f"target: under 50 MB of its own a process: {ours['private'] / 1e6:.1f} MB, "
              f"{'reached' if ours['private'] < 50e6 else 'MISSED'}")
        for peer in ("datasets", "dict"):
            if peer in median:
                print(f"against {peer}: {median[peer]['private'] / max(ours['private'], 1e5):,.0f}x less "
                      f"memory of its own, opens {median[peer]['open'] / ours['open']:,.0f}x faster, "
                      f"reads by row {ours['reads'] / median[peer]['reads']:.2f}x as fast, "
                      f"by id {median['corpus by id']['reads'] / median[peer]['reads']:.2f}x")


if __name__ == "__main__":
    main()
