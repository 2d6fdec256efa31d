"""A model's row of the paper: BEIR, MS MARCO dev and TREC DL, from a checkpoint to its numbers.

    torchrun --nproc_per_node=4 -m tools.beir --model runs/sp-1b --data beir/ --msmarco msmarco/
    python -m tools.beir --model bm25 --data beir/ --datasets scifact --out runs/bm25

What surprises:
- Each task that is finished stands in OUT/TASK.json and is not done again: the same line goes on after a
  kill. If the model, the collection, the queries or the judgements have changed since, that is an error and
  not a reuse. Of a file above 64 MB, its size and 64 pieces of 1 MB are compared: a change between them is
  not seen.
- BEIR takes a result with the query's own id for the query itself, and leaves it out (arguana, quora). How
  many there were is said under the table. MS MARCO's ids of queries and passages have nothing to do with one
  another.
"""
import argparse
import contextlib
import json
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import (QUERY_FILES, Help, checksum, discard, find_in, fingerprint, leave_with_parent, locked,
                  positive_int, rank_and_world, read_json, read_queries, run_command, write_run, write_whole)
from evaluate import Pairs, find_hits, measure, read_pairs
from tools.compare import COSTS, cost_cell, read_costs, say, style_arguments, table

# The 13 sets of the paper, in its order.
BEIR = ("arguana", "fiqa", "nfcorpus", "quora", "scidocs", "scifact", "trec-covid", "webis-touche2020",
        "climate-fever", "dbpedia-entity", "fever", "hotpotqa", "nq")


class Split(NamedTuple):
    """A task on MS MARCO's collection. Files go by MS MARCO's own names or by Anserini's."""

    metrics: tuple
    # The grade from which on a passage counts as relevant to a measure that knows no grades.
    min_grade: int
    queries: tuple
    qrels: tuple


# TREC's assessors gave 1 to what is on the topic without answering: an answer begins at 2.
MSMARCO = {
    "msmarco-dev": Split(("mrr@10", "ndcg@10", "recall@1000"), 1,
                         ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt"),
                         ("qrels.dev.small.tsv", "qrels.msmarco-passage.dev-subset.txt")),
    "trec-dl-2019": Split(("ndcg@10", "mrr@10", "recall@1000"), 2,
                          ("msmarco-test2019-queries.tsv", "topics.dl19-passage.txt"),
                          ("2019qrels-pass.txt", "qrels.dl19-passage.txt")),
    "trec-dl-2020": Split(("ndcg@10", "mrr@10", "recall@1000"), 2,
                          ("msmarco-test2020-queries.tsv", "topics.dl20.txt"),
                          ("2020qrels-pass.txt", "qrels.dl20-passage.txt")),
}


class Task(NamedTuple):
    """Queries to be searched in a collection; tasks with the same collection share an index."""

    name: str
    # A file, so that its fingerprint is that of the passages alone.
    corpus: Path
    queries: Path
    qrels: Path
    # The first is the headline, the one in the paper's row.
    metrics: tuple
    min_grade: int
    # Tokens of a query and of a passage; None leaves it to the checkpoint.
    lengths: tuple
    # Whether a document with the query's own id is the query.
    drop_self: bool


# Which tasks there are.


def find_tasks(args) -> tuple[list[Task], list[str]]:
    """The tasks whose files are there, in the paper's order, and the names of those that are not."""
    names = args.datasets if args.datasets is not None else BEIR if args.data else ()
    if names and not args.data:
        raise ValueError("--datasets: --data must say in which folder they are")
    # A stable sort: sets that the paper does not have follow as they were given.
    names = sorted(names, key=lambda name: BEIR.index(name) if name in BEIR else len(BEIR))
    found = {name: marco_task(name, args) for name in (MSMARCO if args.msmarco else ())}
    found |= {name: beir_task(name, args) for name in names}
    tasks = [task for task in found.values() if task]
    missing = [name for name, task in found.items() if not task]
    if not tasks:
        raise ValueError(f"nothing to do: {', '.join(missing) or 'neither --data nor --msmarco'} "
                         f"not found under {args.data} and {args.msmarco}")
    return tasks, missing


def marco_task(name: str, args) -> Task | None:
    split, folder = MSMARCO[name], Path(args.msmarco)
    files = [first_of(folder, names) for names in (("collection.tsv",), split.queries, split.qrels)]
    lengths = args.query_length, args.passage_length
    return Task(name, *files, split.metrics, split.min_grade, lengths, False) if all(files) else None


def beir_task(name: str, args) -> Task | None:
    folder = Path(args.data) / name
    if not folder.is_dir():
        return None
    corpus = find_in(folder, ["corpus.jsonl", "corpus.jsonl.gz"])
    qrels = find_in(folder / "qrels", ["test.tsv", "test.tsv.gz"])
    # Recall with a cap: a query of TREC-COVID has more relevant documents than fit into a hundred.
    metrics = ("ndcg@10", "recall@100", "r_cap@100")
    return Task(name, corpus, folder, qrels, metrics, 1, (args.beir_length, args.beir_length), True)


def first_of(folder: Path, names: tuple) -> Path | None:
    return next((folder / end for name in names for end in (name, f"{name}.gz")
                 if (folder / end).exists()), None)


# What a result was made from.


def plan_of(task: Task, args) -> dict:
    """Everything that the task's result depends on: the inputs by their contents, and the settings."""
    queries = find_in(task.queries, QUERY_FILES)
    # A list of lengths: the plan is compared with what JSON gives back, and JSON has no tuples.
    return {"model": weights_of(args.model), "adapter": weights_of(args.adapter),
            "base": weights_of(args.base), "head": args.head, "dtype": args.dtype,
            "lengths": list(task.lengths), "k": args.k, "corpus": fingerprint(task.corpus),
            "queries": fingerprint(queries), "qrels": fingerprint(task.qrels)}


def weights_of(model):
    """A folder's weights and settings by their contents; a hub name stands for itself."""
    folder = Path(model or "")
    if model is None or not folder.is_dir():
        return model
    settings = ("config.json", "adapter_config.json", "retriever.json", "tokenizer.json")
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *(folder / name for name in settings)]
    return {file.name: fingerprint(file) for file in sorted(files) if file.exists()}


def index_of(task: Task, plan: dict, out: Path) -> Path:
    """Where the index of the task's collection stands: another place for another model or collection."""
    # Neither queries nor judgements: tasks on one collection share its index. Of the lengths the passages'.
    made_from = {key: plan[key] for key in ("model", "adapter", "base", "head", "dtype", "corpus")}
    number = zlib.crc32(json.dumps([made_from, task.lengths[1]]).encode())
    return out / f"{task.corpus.parent.name}.{number:08x}.index"


def unfinished(tasks: list[Task], plans: dict, out: Path) -> list[Task]:
    """The tasks without a result. A result that was made from something else is an error."""
    todo = []
    for task in tasks:
        done = out / f"{task.name}.json"
        if not done.exists():
            todo.append(task)
            continue
        before = read_json(done, "remove it, and the same line makes it anew")["plan"]
        changed = [key for key, value in plans[task.name].items() if before.get(key) != value]
        if changed:
            raise ValueError(f"{done} was made with another {', '.join(changed)}; remove it or choose "
                             "another --out")
    return todo


def read_inputs(task: Task) -> tuple[dict, Pairs]:
    """The texts of the judged queries, and the judgements."""
    texts, qrels = read_queries(task.queries), read_pairs(task.qrels, "qrels")
    lost = [qid for qid in qrels.qids if qid not in texts]
    if lost:
        raise ValueError(f"{task.queries}: lacks {len(lost)} queries of {task.qrels}, the first is "
                         f"{lost[0]!r}; are these the same split?")
    return {qid: texts[qid] for qid in qrels.qids}, qrels


def check_bm25(args, world: int) -> None:
    if world > 1:
        raise ValueError("--model bm25 indexes in one process: start it with plain python")
    flags = ("adapter", "base", "head", "dtype", "query_length", "passage_length", "device")
    given = [f"--{flag} {getattr(args, flag)}" for flag in flags if getattr(args, flag) is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: --model bm25 has no use for that; leave it out")


# From texts to numbers.


def beir(args) -> None:
    """Index, search and score one model on every task, and print its row."""
    if not args.out and not Path(args.model).is_dir():
        raise ValueError(f"--out: say where runs and results go, {args.model} is not a folder that could "
                         "take them")
    rank, world = rank_and_world()
    if args.model == "bm25":
        check_bm25(args, world)
    leave_with_parent()
    out = Path(args.out or Path(args.model) / "beir")
    tasks, missing = find_tasks(args)
    # The ranks work on one place together, so one of them holds the lock for all.
    with locked(out) if rank == 0 else contextlib.nullcontext():
        plans = {task.name: plan_of(task, args) for task in tasks}
        # The same list on every rank: rank 0 finishes the first task only when all have begun it.
        todo = unfinished(tasks, plans, out)
        # All of them before anything is encoded: a missing file must not show after a night's work.
        inputs = {task.name: read_inputs(task) for task in todo}
        for i, task in enumerate(todo):
            folder = index_of(task, plans[task.name], out)
            path = search(task, folder, inputs[task.name][0], out, args)
            if rank == 0:
                score(task, plans[task.name], inputs[task.name][1], path, args)
                # An index goes as soon as no later task needs it: on the disk there is one at a time.
                later = [index_of(other, plans[other.name], out) for other in todo[i + 1:]]
                if not args.keep_indexes and folder not in later:
                    discard(folder)
        if todo and world > 1:
            import torch.distributed
            torch.distributed.destroy_process_group()
        if rank == 0:
            results = {task.name: read_json(out / f"{task.name}.json") for task in tasks}
            # What a call that was killed has left, under the names of these tasks alone: other indexes in the
            # folder are somebody's, as are those that an earlier call was told to keep.
            if todo and not args.keep_indexes:
                for task in tasks:
                    folder = index_of(task, plans[task.name], out)
                    if folder.exists() and not results[task.name].get("kept"):
                        discard(folder)
            show(results, missing, args)


def search(task: Task, folder: Path, queries: dict, out: Path, args) -> Path:
    """The run of the task's queries, from an index that is built if it is not there; a killed build goes on
    by itself."""
    path = out / f"{task.name}.trec"
    # One more than asked for, where the query itself will be left out.
    k = args.k + task.drop_self
    if args.model == "bm25":
        from tools import bm25
        if not folder.exists():
            bm25.build(task.corpus, folder, stemming=True)
        bm25.search(folder, queries, k, path)
        return path
    # Only here: to show what is finished needs no torch.
    import index
    if not folder.exists():
        index.build(args.model, task.corpus, folder, adapter=args.adapter, base=args.base, head=args.head,
                    dtype=args.dtype, max_length=task.lengths[1], tokens_per_batch=args.tokens_per_batch,
                    device=args.device)
    index.search(folder, queries, k, path, query_length=task.lengths[0], device=args.device)
    return path


def score(task: Task, plan: dict, qrels: Pairs, path: Path, args) -> None:
    """The task's result, whole or not at all: its scores, what they were made from, and what they cost."""
    run, costs, dropped = read_pairs(path, "run"), read_costs(path), 0
    if task.drop_self:
        run, dropped = without_self(run, args.k)
        # The run is written anew, so the note of its costs gets the new file's checksum.
        write_run(path, run.nested())
        with write_whole(f"{path}.json") as file:
            json.dump({**costs, "run": checksum(path)}, file)
    hits = find_hits(qrels, run)
    scores = {metric: float(measure(hits, metric, task.min_grade).mean()) for metric in task.metrics}
    result = {"plan": plan, "queries": len(hits.qids), "missing": int((hits.returned == 0).sum()),
              "dropped": dropped, "kept": args.keep_indexes, "scores": scores, "costs": costs}
    with write_whole(path.with_suffix(".json")) as file:
        json.dump(result, file, indent=1)


def without_self(run: Pairs, k: int) -> tuple[Pairs, int]:
    """The first k results of each query that are not the query itself, and how many were."""
    own = np.array([qid.encode() for qid in run.qids])[run.query] == run.docid
    run = Pairs(run.qids, run.query[~own], run.docid[~own], run.value[~own])
    # A query's lines stand together: a line's rank is its distance from its query's first line.
    rank = np.arange(len(run.query)) - np.searchsorted(run.query, run.query)
    return Pairs(run.qids, *(column[rank < k] for column in run[1:])), int(own.sum())


# What is shown.


def show(results: dict, missing: list, args) -> None:
    """One row a task, gaps for what is missing, the mean over BEIR, and all as the one row of a paper."""
    names = sorted([*results, *missing], key=place_in_paper)
    sets = [name for name in names if name not in MSMARCO]
    present = [name for name in sets if name in results]
    metrics = list(dict.fromkeys(metric for result in results.values() for metric in result["scores"]))
    # Over BEIR's sets alone, which are all scored by the same measures.
    mean = {metric: np.mean([results[name]["scores"][metric] for name in present]) for metric in metrics
            if present and metric in results[present[0]]["scores"]}
    row = {f"{name} {split.metrics[0]}":
           results[name]["scores"][split.metrics[0]] if name in results else None
           for name, split in MSMARCO.items()}
    # A mean over fewer sets than the paper's is another number, and says so.
    head = "BEIR-13 ndcg@10" if present == list(BEIR) else f"BEIR ({len(present)} sets) ndcg@10"
    row[head] = mean.get("ndcg@10")
    if args.style == "json":
        print(json.dumps({"results": results, "missing": missing, "mean": mean, "row": row}, indent=1))
        return

    costs = [cost for cost in COSTS
             if any(result["costs"].get(cost) is not None for result in results.values())]
    rows = [["", "queries", *metrics, *(COSTS[cost] for cost in costs)]]
    for name in names:
        result = results.get(name, {"scores": {}, "costs": {}})
        queries = f"{result['queries']:,}" if name in results else "-"
        scores = [number(result["scores"].get(metric)) for metric in metrics]
        rows.append([name, queries, *scores, *(cost_cell(result["costs"], cost) for cost in costs)])
    if present:
        without = [name for name in sets if name in missing]
        label = f"mean of {len(present)}" + (f" (without {', '.join(without)})" if without else "")
        rows.append([label, "", *(number(mean.get(metric)) for metric in metrics), *("" for _ in costs)])
    print(table(rows, args.style), "", sep="\n")
    print(table([["model", *row], [args.model, *map(number, row.values())]], args.style))
    dropped = [f"{name} {results[name]['dropped']:,}" for name in present if results[name]["dropped"]]
    if dropped:
        print("\n" + say(f"results with the query's own id, left out: {', '.join(dropped)}", args.style))


def place_in_paper(name: str) -> int:
    order = [*MSMARCO, *BEIR]
    return order.index(name) if name in order else len(order)


def number(value) -> str:
    return "-" if value is None else f"{value:.4f}"


def add_arguments(parser) -> None:
    parser.add_argument("--model", required=True, help="run folder, adapter folder or hub name; or bm25, for "
                        "the baseline with Porter's stems")
    parser.add_argument("--data", help="the folder of the BEIR sets' folders")
    parser.add_argument("--datasets", nargs="+", help="sets under --data; the paper's 13 without it, and "
                        "those that are not there stay gaps")
    parser.add_argument("--msmarco", help="folder with collection.tsv and the queries and qrels of dev, TREC "
                        "DL 2019 and 2020, as far as they are there")
    parser.add_argument("--out", help="where runs, indexes and results go; MODEL/beir without it")
    g = parser.add_argument_group("the model, where its folder does not say")
    g.add_argument("--adapter")
    g.add_argument("--base")
    g.add_argument("--head", help="sparse or dense")
    g.add_argument("--beir_length", type=positive_int, default=512, help="tokens of a BEIR query and passage")
    g.add_argument("--query_length", type=positive_int,
                   help="tokens of an MS MARCO query; the checkpoint's own (the paper: 64) without it")
    g.add_argument("--passage_length", type=positive_int, help="and of a passage (192)")
    g = parser.add_argument_group("machine and disk")
    g.add_argument("--k", type=positive_int, default=1000, help="results a query")
    g.add_argument("--dtype", help="of the index, as in index.py build")
    g.add_argument("--tokens_per_batch", type=positive_int, default=16384,
                   help="halve it if you run out of memory")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--keep_indexes", action="store_true",
                   help="each is removed when its tasks are done without this")
    style_arguments(parser.add_argument_group("what is shown"))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.beir", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    add_arguments(parser)
    run_command(parser.prog, partial(beir, parser.parse_args(argv)))


if __name__ == "__main__":
    main()
