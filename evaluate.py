"""Run files and judgements in; numbers, tables and pictures that can go into a paper out.

    python evaluate.py --qrels Q --run bm25.trec dense.trec sparse.trec --metrics mrr@10 ndcg@10 recall@1000
    python evaluate.py --qrels dl19.qrels --run A --metrics ndcg@10 map recall@1000 --min_grade 2      # TREC DL: grade 1 is not relevant
    python evaluate.py beir --model runs/sp-1b --data beir/ --msmarco msmarco/                         # a model's row of the paper
    python evaluate.py plot scaling results.jsonl --out scaling.svg                                    # or: plot loss RUN..., plot tradeoff

What surprises:
- The numbers are trec_eval's (9.0, `-c`), digit for digit. It keeps scores as 32-bit floats, sorts them downwards, and orders equal scores by
  document id, downwards and as strings, whatever the rank column says. `--ties run_order` keeps the order of the lines, as MS MARCO's script does.
- Every query of the qrels counts, a query without results as 0. Queries without a relevant document score 0 in any run; trec_eval -c averages
  these zeros in, here they are left out and counted in the table's head.
- nDCG has linear gains and the ideal of all judged documents. `--min_grade` changes what binary measures count, never nDCG.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Pairs, find_in, read_lines, read_pairs, read_queries, write_run, write_whole

METRICS = ("mrr", "ndcg", "recall", "p", "map", "success", "r_cap", "judged", "num_ret", "num_rel", "num_rel_ret")
NEED_CUT = ("p", "success", "r_cap", "judged")


class Hits(NamedTuple):
    """The judged documents that a run returned, the only lines that any measure depends on, and what it takes to normalise."""
    qids: list            # the n queries that have a relevant document
    query: np.ndarray     # (hits,) place in qids, ascending; within a query the hits go down the ranking
    rank: np.ndarray      # (hits,) from 0
    grade: np.ndarray     # (hits,)
    returned: np.ndarray  # (n,) documents returned
    judged: tuple         # (query, grade) of every judged document, the best grades of a query first


def evaluate(qrels, run, metrics: list, min_grade: int = 1, ties: str = "docid", depth: int | None = None) -> dict:
    """{metric: {qid: value}} for every query of the qrels that has a relevant document, 0 where the run returned nothing.
    qrels and run are {qid: {docid: grade or score}} or `Pairs`; only the first `depth` results of a query count (trec_eval -M).

    >>> qrels = {"q": {"a": 1, "b": 0, "c": 2}}
    >>> evaluate(qrels, {"q": {"b": 9.0, "a": 8.0, "x": 7.0}}, ["mrr@10", "recall@10", "p@2"])   # ranking b a x: first relevant at rank 2, one of two
    {'mrr@10': {'q': 0.5}, 'recall@10': {'q': 0.5}, 'p@2': {'q': 0.5}}
    >>> evaluate(qrels, {"q": {"a": 1.0, "c": 1.0}}, ["ndcg@10"])                                # a tie: c goes first, so the ranking is ideal
    {'ndcg@10': {'q': 1.0}}
    """
    hits = find_hits(qrels, run, ties, depth)
    return {metric: dict(zip(hits.qids, measure(hits, metric, min_grade).tolist())) for metric in metrics}


def find_hits(qrels, run, ties: str = "docid", depth: int | None = None) -> Hits:
    """Rank the run and look its documents up in the qrels, all queries at once."""
    qrels, run = (x if isinstance(x, Pairs) else Pairs.of(x) for x in (qrels, run))
    relevant = np.unique(qrels.query[qrels.value > 0])
    if not len(relevant):
        raise ValueError("no query of the qrels has a relevant document (a grade above 0); is this the right file?")
    place = np.full(len(qrels.qids), -1)
    place[relevant] = np.arange(len(relevant))
    lines = np.flatnonzero(place[qrels.query] >= 0)
    lines = lines[np.lexsort((-qrels.value[lines], qrels.query[lines]))]
    judged = place[qrels.query[lines]], qrels.value[lines]
    qids = [qrels.qids[i] for i in relevant]

    query, docid = run.query, run.docid
    if len(nan := np.flatnonzero(np.isnan(run.value))):  # it would sort anywhere; files are checked when they are read
        raise ValueError(f"the score of document {docid[nan[0]].decode()!r} in query {run.qids[query[nan[0]]]!r} is not a number")
    with np.errstate(over="ignore"):  # beyond float32's range is a tie at infinity, there as here
        score = run.value.astype(np.float32)
    same = query[1:] == query[:-1]
    if (query[1:] < query[:-1]).any() or (same & (score[1:] > score[:-1])).any():  # most files are in order already, and sorting costs seconds
        order = np.lexsort((-score, query))
        query, docid, score = query[order], docid[order], score[order]
        same = query[1:] == query[:-1]
    tied = same & (score[1:] == score[:-1])
    if ties == "docid" and tied.any():
        spots = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
        group = np.cumsum(np.append(True, ~tied))[spots]
        docid = docid.copy()
        docid[spots] = docid[spots[np.lexsort((docid[spots], -group))[::-1]]]  # backwards: groups up, ids down
    start = np.searchsorted(query, np.arange(len(run.qids) + 1))
    depth = len(query) if depth is None else depth
    rank = np.arange(len(query)) - start[query]

    index = {qid: i for i, qid in enumerate(qids)}
    to = np.array([index.get(qid, -1) for qid in run.qids], dtype=np.int64)
    returned = np.zeros(len(qids), np.int64)
    returned[to[to >= 0]] = np.minimum(np.diff(start), depth)[to >= 0]
    query = to[query]
    keep = (query >= 0) & (rank < depth)
    if not keep.all():
        query, docid, rank = query[keep], docid[keep], rank[keep]

    # The join: a run has millions of lines, the qrels thousands. A table of the 20 low bits of the qrels' keys turns nearly every line away at once,
    # and those that remain look theirs up among the sorted keys.
    width = max(docid.itemsize, qrels.docid.itemsize)
    theirs, keys = (Pairs(None, None, ids, None).keys(of, width) for ids, of in ((qrels.docid[lines], judged[0]), (docid, query)))
    maybe = np.zeros(1 << 20, bool)
    maybe[theirs & np.uint64((1 << 20) - 1)] = True
    hit = np.flatnonzero(maybe[keys & np.uint64((1 << 20) - 1)])
    order = np.argsort(theirs)
    found = order[np.searchsorted(theirs[order], keys[hit]).clip(max=len(theirs) - 1)]
    same = (judged[0][found] == query[hit]) & (qrels.docid[lines][found] == docid[hit])
    hit, found = hit[same], found[same]
    order = np.lexsort((rank[hit], query[hit]))
    hit, found = hit[order], found[order]
    return Hits(qids, query[hit], rank[hit], judged[1][found], returned, judged)


def measure(hits: Hits, metric: str, min_grade: int = 1) -> np.ndarray:
    """One value for each of hits.qids. `metric` is a name with or without a cut, "ndcg@10", "map"; R = relevant documents of the query:
    mrr 1 / rank of the first relevant; recall found / R; p found / k; r_cap found / min(R, k), BEIR's for TREC-COVID; success found > 0;
    map mean over R of precision at each relevant rank; ndcg sum of grade / log2(rank + 1) over the ideal's; judged share of the top k with a grade."""
    name, _, cut = metric.lower().partition("@")
    if name not in METRICS or cut and not re.fullmatch("[1-9][0-9]*", cut) or name in NEED_CUT and not cut:
        raise ValueError(f"metric {metric!r}: expected one of {', '.join(METRICS)}, and @k behind it ({', '.join(NEED_CUT)} need it), as in ndcg@10")
    n, k = len(hits.qids), int(cut) if cut else math.inf
    relevant = (hits.grade >= min_grade) & (hits.rank < k)
    query, rank = hits.query[relevant], hits.rank[relevant]
    found = np.bincount(query, minlength=n)
    total = np.bincount(hits.judged[0], hits.judged[1] >= min_grade, n)
    if name == "mrr":
        best = np.zeros(n)
        np.maximum.at(best, query, 1 / (rank + 1))
        return best
    if name == "map":
        nth = np.arange(len(query)) - np.searchsorted(query, query) + 1  # of the relevant documents of its query
        return np.bincount(query, nth / (rank + 1), n) / np.maximum(total, 1)
    if name == "ndcg":
        ideal_rank = np.arange(len(hits.judged[0])) - np.searchsorted(hits.judged[0], hits.judged[0])
        ideal = discounted(hits.judged[0], ideal_rank, hits.judged[1], k, n)
        return discounted(hits.query, hits.rank, hits.grade, k, n) / ideal
    return {"recall": lambda: found / np.maximum(total, 1), "p": lambda: found / k, "success": lambda: np.minimum(found, 1.0),
            "r_cap": lambda: found / np.maximum(np.minimum(total, k), 1), "judged": lambda: np.bincount(hits.query, hits.rank < k, n) / k,
            "num_rel": lambda: np.bincount(hits.judged[0], hits.judged[1] > 0, n), "num_rel_ret": lambda: found, "num_ret": lambda: np.minimum(hits.returned, k)}[name]()


def discounted(query, rank, grade, k, n):
    """(n,) sums of gain / log2(rank + 2) over the ranks 0 to k - 1; a negative grade gains nothing, as in trec_eval."""
    return np.bincount(query, np.where(rank < k, np.maximum(grade, 0) / np.log2(rank + 2.0), 0), n)


# Is it a difference, or the luck of these queries?


def randomization_p(difference: np.ndarray, trials: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired test: were the systems equal, each query's difference might as well have had the other sign. p is the share of `trials`
    random sign flips (the observed one counts as one) whose sum is at least as far from 0."""
    d = difference[difference != 0]  # a tie is a tie under either sign
    rng, extreme = np.random.default_rng(seed), 1
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()  # sums that are equal on paper must count as equal
    for done in range(0, trials, 500):
        flips = np.unpackbits(rng.integers(0, 256, (min(500, trials - done), -(-len(d) // 8)), np.uint8), axis=1, count=len(d))
        extreme += int((np.abs(flips @ (2 * d) - d.sum()) >= least).sum())
    return extreme / (trials + 1)


def t_test_p(difference: np.ndarray) -> float:
    """Two-sided paired t-test: with df = n - 1 and t = mean / (deviation / sqrt(n)), p = I_x(df / 2, 1 / 2) at x = df / (df + t^2)."""
    n, spread = len(difference), difference.std(ddof=1) if len(difference) > 1 else 0.0
    if spread == 0:
        return 0.0 if n > 1 and difference[0] else 1.0
    t = difference.mean() / (spread / math.sqrt(n))
    return incomplete_beta((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised I_x(a, b) by its continued fraction 1 / (1 + c1 / (1 + c2 / (1 + ...))), evaluated from the front (Lentz)."""
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this; above it, its mirror image does
        return 1 - incomplete_beta(b, a, 1 - x)
    value, upper, lower = 1.0, 1.0, 0.0
    for i in range(1, 1000):
        m = i // 2
        c = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)) if i % 2 else m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        lower, upper = 1 / (1 + c * lower), 1 + c / upper
        value *= upper * lower
        if abs(upper * lower - 1) < 1e-15:
            break
    return math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / (a * value)


def holm(p: list) -> list:
    """Corrected for asking len(p) questions at once: the smallest p times m, the next times m - 1, ..., never falling, at most 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    out, floor = [0.0] * len(p), 0.0
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        out[i] = floor = max(floor, min(1.0, (len(p) - step) * p[i]))
    return out


# Tables.

COSTS = {"nnz_docs": "nnz/doc", "nnz_queries": "nnz/query", "index_bytes": "index MB", "ms_per_query": "ms/query"}  # what index.py search notes beside a run


def compare(args) -> dict:
    """Score every run on the same queries and test each against the first: everything that the tables show, as plain values for JSON."""
    names = args.names or [Path(run).name.removesuffix(".gz").rsplit(".", 1)[0] for run in args.run]
    if len(names) != len(args.run) or len(set(names)) < len(names):
        raise ValueError(f"--names: {len(args.run)} runs need as many different names, got {', '.join(names)}")
    metrics = list(dict.fromkeys(metric.lower() for metric in args.metrics))
    qrels = read_pairs(args.qrels, "qrels")
    report = {"min_grade": args.min_grade, "ties": args.ties, "depth": args.depth, "metrics": metrics, "runs": {}, "tests": []}
    values = {}
    for name, path in zip(names, args.run):
        run = read_pairs(path, "run")
        hits = find_hits(qrels, run, args.ties, args.depth)
        values[name] = {metric: measure(hits, metric, args.min_grade) for metric in metrics}
        report |= {"queries": len(hits.qids), "queries_without_relevant": len(qrels.qids) - len(hits.qids), "qids": hits.qids}
        top = np.minimum(hits.returned, 10).sum()
        note = Path(f"{path}.json")
        report["runs"][name] = {
            "path": str(path), **{metric: float(v.sum() if metric.startswith("num_") else v.mean()) for metric, v in values[name].items()},
            "missing": int((hits.returned == 0).sum()), "not_in_qrels": len(set(run.qids) - set(qrels.qids)),
            "unjudged@10": float(1 - (hits.rank < 10).sum() / top) if top else None,
            "costs": json.loads(note.read_text()) if args.costs and note.exists() else {}}
    for metric in metrics:
        tests = []
        for name in names[1:]:
            d = values[name][metric] - values[names[0]][metric]
            tests.append({"run": name, "metric": metric, "difference": float(d.mean()), "wins": int((d > 0).sum()), "losses": int((d < 0).sum()),
                          "equal": int((d == 0).sum()), "p_randomization": randomization_p(d, args.trials, args.seed), "p_t": t_test_p(d)})
        for kind in ("p_randomization", "p_t"):
            for test, p in zip(tests, holm([test[kind] for test in tests])):
                test[kind + "_holm"] = p
        report["tests"] += tests
    return report | {"values": values}


def scores(args):
    """The command without a verb."""
    report = compare(args)
    values, metrics = report["values"], report["metrics"]
    if args.per_query:
        with write_whole(args.per_query) as file:
            print("qid", *(f"{name} {metric}" for name in values for metric in metrics), sep="\t", file=file)
            for i, qid in enumerate(report["qids"]):
                print(qid, *(f"{values[name][metric][i]:.6f}" for name in values for metric in metrics), sep="\t", file=file)
    if args.style == "json":
        print(json.dumps({key: value for key, value in report.items() if key not in ("values", "qids")}, indent=1))
    else:
        show(report, args)


def show(report: dict, args):
    """Print a report: the scores, the tests, then what was asked for by group and by query."""
    style, names, metrics, values = args.style, list(report["runs"]), report["metrics"], report["values"]
    head = f"{report['queries']:,} queries with a relevant document"
    head += f" ({report['queries_without_relevant']} without one left out)" if report["queries_without_relevant"] else ""
    head += f"; binary measures count grades >= {args.min_grade}" if args.min_grade != 1 else ""
    notes = {"latex": "% {}", "markdown": "{}\n", "plain": "{}"}[style]
    print(notes.format(head))
    sure = {(test["run"], test["metric"]) for test in report["tests"] if test["p_randomization_holm"] < 0.05}
    cost_names = [cost for cost in COSTS if any(run["costs"].get(cost) is not None for run in report["runs"].values())]
    rows = [["run", *metrics, "unjudged@10", "missing", *(COSTS[cost] for cost in cost_names)]]
    for name, run in report["runs"].items():
        best = {metric: max(round(other[metric], 4) for other in report["runs"].values()) for metric in metrics}
        scores = [cell(run[metric], len(names) > 1 and round(run[metric], 4) == best[metric], (name, metric) in sure, style) for metric in metrics]
        rows.append([name, *scores, "-" if run["unjudged@10"] is None else f"{run['unjudged@10']:.1%}", f"{run['missing']:,}",
                     *(cost_cell(run["costs"], cost) for cost in cost_names)])
    print(table(rows, style))
    if args.costs and not cost_names:
        print(notes.format("--costs: no run has a RUN.json beside it; index.py search writes one"))
    if len(names) > 1:
        print(notes.format(f"{'* best, ' if style == 'plain' else ''}{mark(style)} differs from {names[0]} with p < 0.05 in the randomisation test"))
        rows = [["against " + names[0], "metric", "difference", "wins", "losses", "equal", "p randomisation", "p t-test"]]
        rows += [[t["run"], t["metric"], f"{t['difference']:+.4f}", *(f"{t[key]:,}" for key in ("wins", "losses", "equal")),
                  *(f"{t[key]:.4f}" if t[key] >= 1e-4 else "< 0.0001" for key in ("p_randomization_holm", "p_t_holm"))] for t in report["tests"]]
        print("\n" + table(rows, style))
        print(notes.format(f"paired over queries, two-sided, {args.trials:,} sign flips (seed {args.seed}); p corrected (Holm) for {len(names) - 1} comparisons a metric"))
    for name, run in report["runs"].items():
        if run["not_in_qrels"]:
            print(notes.format(f"{name}: {run['not_in_qrels']:,} of its queries are not in the qrels and do not count"))

    if args.groups:
        group_of = json.loads(Path(args.groups).read_text())
        groups = [str(group_of.get(qid, "-")) for qid in report["qids"]]
        members = {group: np.array([g == group for g in groups]) for group in sorted(set(groups))}
        for metric in metrics:
            rows = [[f"{metric} by group", *(f"{group} ({m.sum():,})" for group, m in members.items())]]
            print("\n" + table(rows + [[name, *(f"{values[name][metric][m].mean():.4f}" for m in members.values())] for name in names], style))
    if args.queries and len(names) > 1:
        texts, metric = read_queries(args.queries), metrics[0]
        for name in names[1:]:
            d = values[name][metric] - values[names[0]][metric]
            order = np.argsort(-np.abs(d), kind="stable")[:args.changed]
            rows = [[f"{metric}, most changed", names[0], name, "change", "query"]]
            rows += [[report["qids"][i], f"{values[names[0]][metric][i]:.4f}", f"{values[name][metric][i]:.4f}", f"{d[i]:+.4f}",
                      texts.get(report["qids"][i], "(text not in --queries)")] for i in order if d[i]]
            print("\n" + table(rows, style, left=(0, 4)))


def mark(style):
    return r"$^\dagger$" if style == "latex" else "†"


def cell(value, best, sure, style):
    number = f"{value:,.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"
    if style == "plain":  # two columns for the marks, so that the numbers stay in line
        return number + ("*" if best else " ") + ("†" if sure else " ")
    return ({"markdown": "**{}**", "latex": r"\textbf{{{}}}"}[style] if best else "{}").format(number) + (mark(style) if sure else "")


def cost_cell(costs, cost):
    value = costs.get(cost)
    return "-" if value is None else f"{value / 1e6:,.1f}" if cost == "index_bytes" else f"{value:,.{2 if value < 10 else 0}f}"


def table(rows: list, style: str = "plain", left=(0,)) -> str:
    """Rows of strings, the first one the head; the columns in `left` hold words, the others numbers."""
    columns = range(len(rows[0]))
    if style == "latex":
        special = {**{c: "\\" + c for c in "_%&#${}"}, "\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "<": "$<$", ">": "$>$"}
        escape = lambda text: text if r"\textbf" in text or mark(style) in text else "".join(special.get(c, c) for c in text)
        lines = [" & ".join(map(escape, row)) + r" \\" for row in rows]
        align = "".join("l" if i in left else "r" for i in columns)
        return "\n".join([rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])
    width = [max(len(row[i]) for row in rows) for i in columns]
    lines = [[text.ljust(width[i]) if i in left else text.rjust(width[i]) for i, text in enumerate(row)] for row in rows]
    if style == "markdown":
        lines.insert(1, ["-" * width[i] if i in left else "-" * (width[i] - 1) + ":" for i in columns])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


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
    for i, task in enumerate(todo):
        made_from = {**plan_of(task), "corpus": str(task.corpus), "k": None, "qrels": None}  # in the name, or a retrained model would find its old index
        folder = out / f"{Path(task.corpus).name}.{zlib.crc32(json.dumps(made_from).encode()):08x}.index"
        if not folder.exists():  # a folder is a whole index; a killed build goes on by itself
            if args.model == "bm25":
                index.bm25(task.corpus, folder, stemming=True)
            else:
                index.build(args.model, task.corpus, folder, adapter=args.adapter, base=args.base, head=args.head, dtype=args.dtype,
                            max_length=task.lengths[1], tokens_per_batch=args.tokens_per_batch, device=args.device)
        texts, qrels = read_queries(task.queries), read_pairs(task.qrels, "qrels")
        if lost := [qid for qid in qrels.qids if qid not in texts]:
            raise ValueError(f"{task.queries}: lacks {len(lost)} queries of {task.qrels}, the first is {lost[0]!r}; are these the same split?")
        path = out / f"{task.name}.trec"
        run = index.search(folder, {qid: texts[qid] for qid in qrels.qids}, args.k + task.drop_self, path, query_length=task.lengths[0], device=args.device)
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


# Pictures: hand-made SVG, and the same curves as a line of text.

STYLE = """svg{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
.paper{fill:#fff}.ink{fill:#1f2328}.soft{fill:#59636e}.grid{stroke:#e4e8ec}.axis{stroke:#8c959f}.hollow{fill:#fff}.rim{stroke:#fff}
.c0{color:#0969b8}.c1{color:#d1570a}.c2{color:#118a5c}.c3{color:#9a4fb5}.c4{color:#b5382f}.c5{color:#6e7781}
@media (prefers-color-scheme:dark){.paper{fill:#0d1117}.ink{fill:#e6edf3}.soft{fill:#9aa4af}.grid{stroke:#232a33}.axis{stroke:#6e7681}.hollow{fill:#0d1117}.rim{stroke:#0d1117}
.c0{color:#58a6ff}.c1{color:#f0883e}.c2{color:#3fb98a}.c3{color:#c98be0}.c4{color:#ff7b72}.c5{color:#9aa4af}}"""
COLORS = 6


class Curve(NamedTuple):
    name: str
    x: list
    y: list
    spread: list            # half the length of an error bar at each point; 0 draws none
    color: int
    dashed: bool = False    # and hollow markers: a second attribute beside the colour, which also survives a black-and-white printer
    faint: tuple = ()       # (x, y) drawn thin and pale behind the curve: what was smoothed


class Panel(NamedTuple):
    curves: list
    x_label: str
    y_label: str
    log_x: bool = False
    unit: str = ""          # of x: "bytes", "flops" or none
    at_points: bool = False # the x ticks stand where the points are: three model sizes are three ticks
    markers: bool = True


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list:
    """Round numbers from low to high: steps of 1, 2 or 5 times a power of ten; on a log axis powers of ten, with 2 and 5 where they are few.

    >>> ticks(0.31, 0.42)
    [0.32, 0.34, 0.36, 0.38, 0.4, 0.42]
    >>> ticks(3e17, 4e19, log=True)
    [1e+18, 1e+19]
    """
    if log and high / low > 8:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        stride = -(-len(powers) // 8)
        out = [10.0 ** p for p in powers if p % stride == 0 and low <= 10.0 ** p <= high]
        return out if len(out) > 1 else [m * 10.0 ** p for p in powers for m in (1, 2, 5) if low <= m * 10.0 ** p <= high]
    power = 10 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count + 0.5)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float, unit: str = "") -> str:
    """A number as a tick says it.

    >>> short(1.3e9), short(2.5e6, "bytes"), short(2e18, "flops"), short(0.25), short(1500)
    ('1.3B', '2.5 MB', '2×10¹⁸', '0.25', '1,500')
    """
    if unit == "flops" and value:
        power = math.floor(math.log10(value) + 1e-9)
        lead = f"{value / 10 ** power:.3g}"
        return ("" if lead == "1" else lead + "×") + "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    for size, letter in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k" if unit else "K")):
        if value >= size and (unit or value >= 1e4):
            return f"{value / size:.3g}" + (f" {letter}B" if unit == "bytes" else letter)
    return f"{value:,.10g}" + (" B" if unit == "bytes" else "")


def chart(panels: list, title: str, note: str = "") -> str:
    """Panels side by side as one SVG. The legend stands at the curves' right ends, in their order, so that nothing has to be looked up."""
    wide, tall, left, top = 330, 270, 64, 72
    right = [int(50 + 6.7 * max(len(curve.name) for curve in panel.curves)) for panel in panels]
    width, height = sum(left + wide + r for r in right) + 12, top + tall + 58 + (18 if note else 0)
    esc = lambda text: str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = lambda x, y, words, kind="ink", more="": f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" {more}>{esc(words)}</text>'
    line = lambda x1, y1, x2, y2, more: f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
           f"<title>{esc(title)}</title><style>{STYLE}</style>", f'<rect width="{width}" height="{height}" class="paper"/>',
           text(16, 28, title, more='font-size="15" font-weight="600"')]
    if note:
        out.append(text(16, height - 12, note, "soft", 'font-size="11"'))
    x0 = 0
    for panel, r in zip(panels, right):
        x0 += left
        xs = [x for curve in panel.curves for x in curve.x]
        ys = [y + side * e for curve in panel.curves for y, e in zip(curve.y, curve.spread) for side in (-1, 1)]
        if not panel.markers:  # a long curve: its first steps must not press the rest to the floor
            ys = [y for curve in panel.curves for values in (curve.y, *curve.faint[1:]) for y in np.quantile(values, (0.005, 0.97))]
        if panel.log_x and min(xs) <= 0:
            raise ValueError(f"{panel.x_label}: {min(xs)} has no place on a log axis; it must be above 0")
        scale = np.log10 if panel.log_x else np.float64
        (xa, xb), (ya, yb) = (scale(min(xs)), scale(max(xs))), (min(ys), max(ys))
        xpad, ypad = 0.05 * (xb - xa) or 0.2 * abs(xa) or 1, 0.06 * (yb - ya) or 0.1 * abs(ya) or 1
        xa, xb, ya, yb = xa - xpad * panel.markers, xb + xpad * panel.markers, ya - ypad, yb + ypad
        X = lambda x: x0 + (scale(x) - xa) / (xb - xa) * wide
        Y = lambda y: top + tall - (y - ya) / (yb - ya) * tall

        labels = [(y, short(y)) for y in ticks(ya, yb)]
        digits = max(len(label.partition(".")[2]) for _, label in labels)  # 0.40 between 0.38 and 0.42, not 0.4
        for y, label in labels:
            label = f"{y:.{digits}f}" if digits else label
            out += [line(x0, Y(y), x0 + wide, Y(y), 'class="grid"'), text(x0 - 8, Y(y) + 4, label, "soft", 'text-anchor="end"')]
        spots = sorted(set(xs)) if panel.at_points else ticks(*((10 ** xa, 10 ** xb) if panel.log_x else (xa, xb)), panel.log_x)
        last = -math.inf
        for x in spots:
            out.append(line(X(x), top + tall, X(x), top + tall + 5, 'class="axis"'))
            if X(x) - last > 7 * len(short(x, panel.unit)) + 6:  # a label that would touch the one before stays away, its tick does not
                out.append(text(X(x), top + tall + 20, short(x, panel.unit), "soft", 'text-anchor="middle"'))
                last = X(x)
        out += [line(x0, top + tall, x0 + wide, top + tall, 'class="axis"'),
                text(x0 + wide / 2, top + tall + 42, panel.x_label, more='text-anchor="middle"'), text(x0 - 48, top - 16, panel.y_label)]

        out.append(f'<clipPath id="clip{x0}"><rect x="{x0}" y="{top - 4}" width="{wide + 4}" height="{tall + 8}"/></clipPath>')
        path = lambda points, more: (f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" stroke="currentColor" '
                                     f'stroke-linejoin="round" {more}/>')
        at = lambda xs, ys: [(X(x), Y(y)) for x, y in zip(xs, ys)]
        stroke = lambda curve: 'stroke-width="2"' + (' stroke-dasharray="6 4"' if curve.dashed else "")
        dot = lambda x, y, curve: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" ' + (
            'class="hollow" stroke="currentColor" stroke-width="1.8"/>' if curve.dashed else 'fill="currentColor" class="rim" stroke-width="1"/>')
        for curve in panel.curves:
            out.append(f'<g class="c{curve.color % COLORS}" clip-path="url(#clip{x0})">')
            if curve.faint:
                out.append(path(at(*curve.faint), 'stroke-width="1" opacity="0.3"'))
            out.append(path(at(curve.x, curve.y), stroke(curve)))
            for x, y, e in zip(curve.x, curve.y, curve.spread) if panel.markers else ():
                bars = [(0, 0, y - e, y + e), (-3.5, 3.5, y - e, y - e), (-3.5, 3.5, y + e, y + e)] if e else []
                out += [line(X(x) + a, Y(c), X(x) + b, Y(d), 'stroke="currentColor" stroke-width="1.3"') for a, b, c, d in bars]
                out.append(dot(X(x), Y(y), curve))
            out.append("</g>")
        ends = [(X(curve.x[-1]), min(max(Y(curve.y[-1]), top), top + tall)) for curve in panel.curves]
        edge = x0 + wide
        for curve, (x, y), spot in zip(panel.curves, ends, apart([y for _, y in ends], 16, top, top + tall)):
            out.append(f'<g class="c{curve.color % COLORS}">')
            if x > edge - 30:  # a leader from further inside would cross other curves; there the sample of the line has to do
                out.append(line(x + 6 * panel.markers, y, edge + 8, spot, 'stroke="currentColor" opacity="0.5"'))
            out += [path([(edge + 10, spot), (edge + 34, spot)], stroke(curve)) if len(curve.x) > 1 else "", dot(edge + 22, spot, curve) if panel.markers else "",
                    text(edge + 40, spot + 4, curve.name, "", 'fill="currentColor" font-weight="500"'), "</g>"]
        x0 += wide + r
    return "\n".join([*out, "</svg>", ""])


def apart(spots: list, gap: float, low: float, high: float) -> list:
    """The same places, moved as little as need be until neighbours are `gap` apart and all lie between low and high (as far as there is room)."""
    order = sorted(range(len(spots)), key=spots.__getitem__)
    out = [spots[i] for i in order]
    gap = min(gap, (high - low) / max(1, len(out) - 1))
    for _ in range(500):
        for i in range(len(out) - 1):
            if (push := (gap - (out[i + 1] - out[i])) / 2) > 0:
                out[i], out[i + 1] = out[i] - push, out[i + 1] + push
        out = [min(max(spot, low + gap * i), high - gap * (len(out) - 1 - i)) for i, spot in enumerate(out)]
    back = dict(zip(order, out))
    return [back[i] for i in range(len(spots))]


def sparkline(values: list, width: int = 40) -> str:
    """Values as bars of text, each the mean of its stretch.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(values, float), min(width, len(values)))]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low)) if high > low else 3] for value in means)


def pretty(metric: str) -> str:
    """As a paper writes it: MRR@10, nDCG@10."""
    return metric.upper().replace("NDCG", "nDCG").replace("RECALL", "recall").replace("SUCCESS", "success")


def read_rows(path) -> list:
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:  # a run that was killed, or still writes, may leave half a line
            print(f"{path}:{number}: not JSON ({e.msg}), left out", file=sys.stderr)
    return rows


def by_cell(rows: list, x_key: str, metric: str, path) -> list:
    """One curve for each head and objective: the mean over seeds at each size (and "setting", where rows have one), the standard deviation over
    seeds as its bar."""
    rows = [row for row in rows if row.get("metric") == metric and all(isinstance(row.get(key), (int, float)) for key in ("value", x_key))]
    if not rows:
        raise ValueError(f"{path}: no row has metric {metric!r} with numbers as value and {x_key}; rows look like "
                         '{"head": "sparse", "objective": "cl", "size": 1.2e9, "flops": 3e18, "seed": 0, "metric": "mrr@10", "value": 0.38}')
    objectives = sorted({row["objective"] for row in rows}, key=lambda name: ({"cl": 0, "kd": 1, "cl+kd": 2}.get(name, 3), name))
    curves = []
    for head in sorted({row["head"] for row in rows}, reverse=True):
        for objective in objectives:
            cells = {}
            for row in rows:
                if (row["head"], row["objective"]) == (head, objective):
                    cells.setdefault((row.get("size"), row.get("setting")), []).append((row[x_key], row["value"]))
            points = sorted((np.mean([x for x, _ in cell]), np.mean([y for _, y in cell]), np.std([y for _, y in cell], ddof=1) if len(cell) > 1 else 0.0)
                            for cell in cells.values())
            if points:
                curves.append(Curve(f"{head} {objective}", *map(list, zip(*points)), objectives.index(objective), dashed=head == "dense"))
    return curves


def plot(args):
    """Read what a study left behind, print its curves as text and draw them."""
    note = ""
    if args.kind == "scaling":
        axes = {"size": ("parameters", "", True), "flops": ("training FLOPs", "flops", False)}
        rows = [row for path in args.files for row in read_rows(path)]
        panels = [Panel(by_cell(rows, x, args.metric, args.files[0]), label, pretty(args.metric), True, unit, at_points)
                  for x, (label, unit, at_points) in axes.items() if x == "size" or any(row.get("flops") for row in rows)]
        seeds = {row.get("seed") for row in rows}
        note = f"bars: one standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    elif args.kind == "loss":
        curves = []
        for i, path in enumerate(args.files):
            file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
            points = [(row["step"], row[args.key]) for row in read_rows(file) if isinstance(row.get(args.key), (int, float)) and math.isfinite(row[args.key])]
            if not points:
                raise ValueError(f"{file}: no line has a number as {args.key!r}; --key names another")
            x, y = (np.array(column, float) for column in zip(*points))
            half = round(len(y) * args.smooth / 2)
            pieces = np.array_split(np.arange(len(y)), min(len(y), 400))  # more points than pixels only make a big file
            sums = np.cumsum(np.insert(y, 0, 0))
            start, end = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
            smooth = (sums[end] - sums[start]) / (end - start)  # around each step: a mean of only the past would lag behind the curve
            mean = lambda values: [float(values[piece].mean()) for piece in pieces]
            curves.append(Curve(file.parent.name if file.name == "metrics.jsonl" else file.stem, mean(x), mean(smooth), [0] * len(pieces), i,
                                dashed=i >= COLORS, faint=(mean(x), mean(y)) if half else ()))
        panels = [Panel(curves, "step", args.key, args.log_x, markers=False)]
        note = f"bold: running mean over {args.smooth:.0%} of the steps" if args.smooth else ""
    else:
        label, unit = {"index_bytes": ("index size", "bytes"), "nnz_docs": ("non-zeros a document", ""), "ms_per_query": ("ms a query", "")}[args.x]
        report = json.loads(Path(args.files[0]).read_text()) if Path(args.files[0]).suffix == ".json" else None
        if report:  # what evaluate.py --json --costs printed
            points = [(name, run["costs"].get(args.x), run.get(args.metric)) for name, run in report["runs"].items()]
            curves = [Curve(name, [x], [y], [0], i % COLORS, i >= COLORS) for i, (name, x, y) in enumerate(points) if x and y is not None]
            if not curves:
                raise ValueError(f"{args.files[0]}: no run has both {args.metric} and {args.x}; it should be what evaluate.py --json --costs printed")
        else:
            curves = by_cell([row for path in args.files for row in read_rows(path)], args.x, args.metric, args.files[0])
        panels = [Panel(curves, label, pretty(args.metric), True, unit)]
    for panel in panels[:1]:
        names = max(len(curve.name) for curve in panel.curves)
        for curve in panel.curves:
            print(f"{curve.name:<{names}}  " + (f"{sparkline(curve.y)}  {curve.y[0]:.4f} -> {curve.y[-1]:.4f}" if len(curve.y) > 1 else f"{curve.y[0]:.4f}"))
    if args.out:
        with write_whole(args.out) as file:
            file.write(chart(panels, args.title or f"{panels[0].y_label} against {' and '.join(panel.x_label for panel in panels)}", note))
        print(args.out)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def main():
    verb = sys.argv[1] if sys.argv[1:2] in (["beir"], ["plot"]) else ""  # the common case, run files against qrels, needs no verb
    about = {"": __doc__.split("\n")[0], "beir": "a model's row of the paper: BEIR, MS MARCO dev, TREC DL", "plot": "pictures as SVG, and in the terminal"}[verb]
    parser = argparse.ArgumentParser(prog=f"evaluate.py {verb}".strip(), description=about, allow_abbrev=False, formatter_class=Help,
                                     epilog="" if verb else "more: evaluate.py beir --help, evaluate.py plot --help")
    {"": scores_arguments, "beir": beir_arguments, "plot": plot_arguments}[verb](parser)
    args = parser.parse_args(sys.argv[1 + bool(verb):])
    try:
        {"": scores, "beir": beir, "plot": plot}[verb](args)
    except BrokenPipeError:  # `| head` has seen enough; Python's own last flush would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:  # a fault in what was given, not in the program: the message is the cure, the traceback is noise
        sys.exit(f"{parser.prog}: {e}")


def style_arguments(g):
    for style in ("markdown", "latex", "json"):
        g.add_argument(f"--{style}", action="store_const", const=style, dest="style", default="plain", help=f"print {style}")


def scores_arguments(parser):
    parser.add_argument("--qrels", required=True, help="TREC, MS MARCO, BEIR or JSON; gzipped or not")
    parser.add_argument("--run", required=True, nargs="+", help="TREC, MS MARCO or JSON; the first is what the others are compared with")
    parser.add_argument("--names", nargs="+", help="one a run, for the tables; the files' names without it")
    g = parser.add_argument_group("what is measured")
    g.add_argument("--metrics", nargs="+", default=["mrr@10", "ndcg@10", "recall@1000"], help=f"of {', '.join(METRICS)}; @k cuts")
    g.add_argument("--min_grade", type=int, default=1, help="the grade that is relevant to binary measures (2 for TREC DL, as trec_eval -l 2)")
    g.add_argument("--ties", choices=["docid", "run_order"], default="docid", help="equal scores by document id, as trec_eval; or as the lines stand, as MS MARCO's script")
    g.add_argument("--depth", type=int, help="look at so many results a query only (trec_eval -M)")
    g = parser.add_argument_group("what is shown")
    style_arguments(g)
    g.add_argument("--costs", action="store_true", help="add non-zeros, index size and time from the RUN.json that index.py search writes beside RUN")
    g.add_argument("--per_query", metavar="FILE", help="write every query's values as tsv")
    g.add_argument("--queries", help="query texts: show the queries that changed most by the first metric")
    g.add_argument("--changed", type=int, default=5, help="how many of these")
    g.add_argument("--groups", metavar="FILE", help="a JSON {qid: group}: the metrics by group")
    g = parser.add_argument_group("tests of significance")
    g.add_argument("--trials", type=int, default=10_000, help="random sign flips; p is no finer than 1 / trials")
    g.add_argument("--seed", type=int, default=0)


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


def plot_arguments(parser):
    parser.add_argument("kind", choices=["scaling", "loss", "tradeoff"], help="quality against model size and FLOPs; metrics.jsonl; quality against what it costs")
    parser.add_argument("files", nargs="+", help="scaling, tradeoff: results.jsonl (head, objective, size, flops, seed, metric, value); loss: run folders; "
                        "tradeoff also: a .json that evaluate.py --json --costs printed")
    parser.add_argument("--out", help="SVG to write; without it only the terminal's version")
    parser.add_argument("--title")
    parser.add_argument("--metric", default="mrr@10")
    g = parser.add_argument_group("loss")
    g.add_argument("--key", default="loss", help="which number of metrics.jsonl")
    g.add_argument("--smooth", type=float, default=0.02, help="share of the curve in a running mean; 0 draws the values alone")
    g.add_argument("--log_x", action="store_true")
    g = parser.add_argument_group("tradeoff")
    g.add_argument("--x", choices=["index_bytes", "nnz_docs", "ms_per_query"], default="index_bytes")


if __name__ == "__main__":
    main()
