"""A model's row of the paper: BEIR, MS MARCO dev and TREC DL, from a checkpoint to its numbers.

    torchrun --nproc_per_node=4 -m tools.beir --model runs/sp-1b --data beir/ --msmarco msmarco/
    python -m tools.beir --model bm25 --data beir/ --datasets scifact --out runs/bm25
"""
import argparse
import json
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from data import Help, find_in, read_queries, write_run, write_whole
from evaluate import find_hits, measure, read_pairs
from tools.compare import COSTS, cost_cell, style_arguments, table

# The paper's row: BEIR, MS MARCO dev and TREC DL, from a model to its numbers.

BEIR = ("arguana", "fiqa", "nfcorpus", "quora", "scidocs", "scifact", "trec-covid", "webis-touche2020", "climate-fever", "dbpedia-entity", "fever",
        "hotpotqa", "nq")  # the 13 sets of the paper, in its order
MSMARCO = {  # name -> measures, the paper's first; binary measures' min_grade; the names that queries and qrels go by, MS MARCO's own and Anserini's
    "msmarco-dev": (("mrr@10", "ndcg@10", "recall@1000"), 1, ("queries.dev.small.tsv", "topics.msmarco-passage.dev-subset.txt"),
                    ("qrels.dev.small.tsv", "qrels.msmarco-passage.dev-subset.txt")),
    "trec-dl-2019": (("ndcg@10", "mrr@10", "recall@1000"), 2, ("msmarco-test2019-queries.tsv", "topics.dl19-passage.txt"),
                     ("2019qrels-pass.txt", "qrels.dl19-passage.txt")),
    "trec-dl-2020": (("ndcg@10", "mrr@10", "recall@1000"), 2, ("msmarco-test2020-queries.tsv", "topics.dl20.txt"),
                     ("2020qrels-pass.txt", "qrels.dl20-passage.txt"))}


class Task(NamedTuple):
    name: str
    corpus: Path     # what index.build takes; tasks with the same corpus share an index
    queries: Path
    qrels: Path
    metrics: tuple   # the headline first
    min_grade: int
    lengths: tuple   # tokens of a query and of a passage; None leaves it to the checkpoint
    drop_self: bool  # BEIR: a document with the query's own id is the query (arguana, quora), not an answer


def find_tasks(args) -> tuple[list, list]:
    """The tasks whose files are there, in the paper's order, and the names of those that are not."""
    tasks, missing = [], []
    folder = Path(args.msmarco or "")
    for name, (metrics, min_grade, *files) in MSMARCO.items() if args.msmarco else ():
        queries, qrels = (next((path for f in names for path in (folder / f, folder / (f + ".gz")) if path.exists()), None) for names in files)
        corpus = next((folder / f for f in ("collection.tsv", "collection.tsv.gz") if (folder / f).exists()), None)
        if queries and qrels and corpus:
            tasks.append(Task(name, corpus, queries, qrels, metrics, min_grade, (args.query_length, args.passage_length), False))
        else:
            missing.append(name)
    wanted = args.datasets if args.datasets is not None else BEIR if args.data else ()
    if wanted and not args.data:
        raise ValueError("--datasets: --data must say in which folder they are")
    for name in sorted(wanted, key=lambda name: BEIR.index(name) if name in BEIR else len(BEIR)):  # a stable sort: others follow as they were given
        folder = Path(args.data) / name
        if folder.is_dir():
            qrels = find_in(folder / "qrels", ["test.tsv", "test.tsv.gz"])
            tasks.append(Task(name, folder, folder, qrels, ("ndcg@10", "recall@100", "r_cap@100"), 1, (args.beir_length, args.beir_length), True))
        else:
            missing.append(name)
    if not tasks:
        raise ValueError(f"nothing to do: {', '.join(missing) or 'neither --data nor --msmarco'} not found under {args.data} and {args.msmarco}")
    return tasks, missing


def beir(args):
    """Index, search and score one model on every task. What is finished stands in OUT/TASK.json and is not done again."""
    if not args.out and not Path(args.model).is_dir():
        raise ValueError(f"--out: say where runs and results go, {args.model} is not a folder that could take them")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.model == "bm25" and world > 1:
        raise ValueError("--model bm25 indexes in one process: start it with plain python")
    out = Path(args.out or Path(args.model) / "beir")
    tasks, missing = find_tasks(args)
    model = os.path.abspath(args.model) if os.path.exists(args.model) else args.model
    weights = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for pattern in ("*.safetensors", "*.bin") for f in Path(args.model).glob(pattern))
    plan_of = lambda task: json.loads(json.dumps({"model": model, "weights": weights, "adapter": args.adapter, "base": args.base, "head": args.head,
                                                  "dtype": args.dtype, "lengths": task.lengths, "k": args.k, "qrels": os.path.abspath(task.qrels)}))
    todo = []  # the same list on every rank, for rank 0 finishes the first task only when all have begun it
    for task in tasks:
        done = out / f"{task.name}.json"
        if not done.exists():
            todo.append(task)
        elif changed := [key for key, value in plan_of(task).items() if json.loads(done.read_text())["plan"].get(key) != value]:
            raise ValueError(f"{done} was made with another {', '.join(changed)}; remove it or choose another --out")

    if todo:
        import index  # only here: neither scoring run files nor showing what is finished needs torch
        from tools import bm25
    for i, task in enumerate(todo):
        made_from = {**plan_of(task), "corpus": str(task.corpus), "k": None, "qrels": None}  # in the name, or a retrained model would find its old index
        folder = out / f"{Path(task.corpus).name}.{zlib.crc32(json.dumps(made_from).encode()):08x}.index"
        if not folder.exists():  # a folder is a whole index; a killed build goes on by itself
            if args.model == "bm25":
                bm25.build(task.corpus, folder, stemming=True)
            else:
                index.build(args.model, task.corpus, folder, adapter=args.adapter, base=args.base, head=args.head, dtype=args.dtype,
                            max_length=task.lengths[1], tokens_per_batch=args.tokens_per_batch, device=args.device)
        texts, qrels = read_queries(task.queries), read_pairs(task.qrels, "qrels")
        if lost := [qid for qid in qrels.qids if qid not in texts]:
            raise ValueError(f"{task.queries}: lacks {len(lost)} queries of {task.qrels}, the first is {lost[0]!r}; are these the same split?")
        path = out / f"{task.name}.trec"
        wanted = {qid: texts[qid] for qid in qrels.qids}
        if args.model == "bm25":
            run = bm25.search(folder, wanted, args.k + task.drop_self, path)
        else:
            run = index.search(folder, wanted, args.k + task.drop_self, path, query_length=task.lengths[0], device=args.device)
        if rank:
            continue
        if task.drop_self:
            run = {qid: dict([item for item in docs.items() if item[0] != qid][:args.k]) for qid, docs in run.items()}
            write_run(path, run, tag="run")
        hits, note = find_hits(qrels, run), Path(f"{path}.json")
        with write_whole(out / f"{task.name}.json") as file:
            json.dump({"plan": plan_of(task), "queries": len(hits.qids), "missing": int((hits.returned == 0).sum()),
                       "scores": {metric: float(measure(hits, metric, task.min_grade).mean()) for metric in task.metrics},
                       "costs": json.loads(note.read_text()) if note.exists() else {}}, file, indent=1)
        if not args.keep_indexes and task.corpus not in [other.corpus for other in todo[i + 1:]]:
            shutil.rmtree(folder)
    if todo and world > 1:
        index.dist.destroy_process_group()
    if rank == 0:
        show_beir({task.name: json.loads((out / f"{task.name}.json").read_text()) for task in tasks}, missing, args)


def show_beir(results: dict, missing: list, args):
    """One row a task, gaps for what is missing, the mean over BEIR, and all of it as the one row that a paper prints."""
    names = [name for name in (*MSMARCO, *BEIR) if name in results or name in missing]
    names += [name for name in (*results, *missing) if name not in names]
    columns = list(dict.fromkeys(metric for result in results.values() for metric in result["scores"]))
    score = lambda name, metric: results.get(name, {"scores": {}})["scores"].get(metric)
    number = lambda value: "-" if value is None else f"{value:.4f}"
    cost_names = [cost for cost in COSTS if any(result["costs"].get(cost) is not None for result in results.values())]
    rows = [["", "queries", *columns, *(COSTS[cost] for cost in cost_names)]]
    rows += [[name, f"{results[name]['queries']:,}" if name in results else "-", *(number(score(name, metric)) for metric in columns),
              *(cost_cell(results[name]["costs"] if name in results else {}, cost) for cost in cost_names)] for name in names]
    sets = [name for name in names if name not in MSMARCO]
    present = [name for name in sets if name in results]
    label = f"mean of {len(present)}" + (f" (without {', '.join(name for name in sets if name in missing)})" if set(sets) & set(missing) else "")
    mean = {metric: sum(score(name, metric) for name in present) / len(present) for metric in columns if present and score(present[0], metric) is not None}
    rows += [[label, "", *(number(mean.get(metric)) for metric in columns), *("" for _ in cost_names)]] if present else []
    heads = [(f"{name} {metrics[0]}", score(name, metrics[0])) for name, (metrics, *_) in MSMARCO.items()]
    heads.append(("BEIR-13 ndcg@10" if sets == present == list(BEIR) else f"BEIR ({len(present)} sets) ndcg@10", mean.get("ndcg@10")))
    if args.style == "json":
        print(json.dumps({"results": results, "missing": missing, "mean": mean, "row": dict(heads)}, indent=1))
    else:
        row = [["model", *(head for head, _ in heads)], [args.model, *(number(value) for _, value in heads)]]
        print(table(rows, args.style), table(row, args.style), sep="\n\n")


def beir_arguments(parser):
    parser.add_argument("--model", required=True, help="run folder, adapter folder or hub name; or bm25, for the baseline with Porter's stems")
    parser.add_argument("--data", help="the folder of the BEIR sets' folders")
    parser.add_argument("--datasets", nargs="+", help="sets under --data; the paper's 13 without it, and those that are not there stay gaps")
    parser.add_argument("--msmarco", help="folder with collection.tsv and the queries and qrels of dev, TREC DL 2019 and 2020, as far as they are there")
    parser.add_argument("--out", help="where runs, indexes and results go; MODEL/beir without it")
    g = parser.add_argument_group("the model, where its folder does not say")
    g.add_argument("--adapter")
    g.add_argument("--base")
    g.add_argument("--head", choices=["sparse", "dense"])
    g.add_argument("--beir_length", type=int, default=512, help="tokens of a BEIR query and passage")
    g.add_argument("--query_length", type=int, help="tokens of an MS MARCO query; the checkpoint's own (the paper: 64) without it")
    g.add_argument("--passage_length", type=int, help="and of a passage (192)")
    g = parser.add_argument_group("machine and disk")
    g.add_argument("--k", type=int, default=1000, help="results a query")
    g.add_argument("--dtype", help="of the index, as in index.py build")
    g.add_argument("--tokens_per_batch", type=int, default=16384, help="halve it if you run out of memory")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--keep_indexes", action="store_true", help="each is removed when its tasks are done without this")
    style_arguments(parser.add_argument_group("what is shown"))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.beir", description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    beir_arguments(parser)
    args = parser.parse_args(argv)
    try:
        beir(args)
    except BrokenPipeError:  # `| head` has seen enough; Python's own last flush would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:  # a fault in what was given, not in the program: the message is the cure, the traceback is noise
        sys.exit(f"{parser.prog}: {e}")


if __name__ == "__main__":
    main()
