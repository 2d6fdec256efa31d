"""Runs compared for a paper, in plain text, Markdown, LaTeX or JSON, with costs, groups and single queries.

    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --latex > table.tex
    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --queries queries.tsv  # what changed most
    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --costs --json > report.json
"""
import argparse
import json
import re
from functools import partial
from pathlib import Path

import numpy as np

from data import Help, checksum, natural, printable, read_json, read_queries, run_command, write_whole
from evaluate import add_arguments, find_hits, holm, measure, randomization_p, read_pairs

# What index.py search notes beside a run, and the head of its column.
COSTS = {"nnz_docs": "nnz/doc", "nnz_queries": "nnz/query", "index_bytes": "index MB",
         "ms_per_query": "ms/query"}


# Runs become a report: plain values, as JSON has them.


def compare(args) -> dict:
    """Score every run on the same queries, and test each against the first."""
    qrels, runs, values = read_pairs(args.qrels, "qrels"), {}, {}
    for name, path in named(args.run, args.names).items():
        run = read_pairs(path, "run")
        hits = find_hits(qrels, run, args.ties, args.depth)
        values[name] = {metric: measure(hits, metric, args.min_grade) for metric in args.metrics}
        # An unjudged document counts as irrelevant: a run with many of them is worse only on paper.
        first_ten = np.minimum(hits.returned, 10).sum()
        runs[name] = {**{metric: float(value.mean()) for metric, value in values[name].items()},
                      "unjudged@10": float(1 - (hits.rank < 10).sum() / first_ten) if first_ten else None,
                      "missing": int((hits.returned == 0).sum()),
                      "not_in_qrels": len(set(run.qids) - set(qrels.qids)),
                      "costs": read_costs(path) if args.costs else {}}
    asked = ("metrics", "min_grade", "ties", "depth", "trials", "seed")
    tests = [test for metric in args.metrics for test in tests_of(values, metric, args.trials, args.seed)]
    return {**{key: getattr(args, key) for key in asked}, "queries": len(hits.qids),
            "queries_without_relevant": len(qrels.qids) - len(hits.qids), "runs": runs, "tests": tests,
            "qids": hits.qids, "values": values}


def named(paths: list, names: list | None = None) -> dict:
    """{name: path}; without names a file's own, with as many folders as tell it from the others.

    >>> list(named(["runs/bm25/dev.trec", "runs/sp-1b/dev.trec.gz"]))
    ['bm25/dev', 'sp-1b/dev']
    """
    # sparse/dev.trec and dense/dev.trec would both be "dev".
    parts = [Path(str(path).removesuffix(".gz")).absolute().with_suffix("").parts for path in paths]
    folders = 0
    while len({part[-1 - folders:] for part in parts}) < len(set(parts)):
        folders += 1
    names = names or ["/".join(part[-1 - folders:]) for part in parts]
    if not len(paths) == len(names) == len(set(names)):
        raise ValueError(f"{len(paths)} runs need as many different --names, got {', '.join(names)}")
    return dict(zip(names, paths))


def tests_of(values: dict, metric: str, trials: int, seed: int) -> list[dict]:
    """Each run against the first one, query by query."""
    first, *others = values
    tests = []
    for name in others:
        d = values[name][metric] - values[first][metric]
        tests.append({"run": name, "metric": metric, "difference": float(d.mean()),
                      "wins": int((d > 0).sum()), "losses": int((d < 0).sum()), "equal": int((d == 0).sum()),
                      "p": randomization_p(d, trials, seed)})
    # Of many comparisons some are below 0.05 by chance: Holm's p is what may be called significant.
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return tests


def read_costs(run_path) -> dict:
    """What index.py search noted beside the run, unless the run was written anew since."""
    # A kill between a run and its note leaves the note of the run before. An old note has no checksum.
    note = Path(f"{run_path}.json")
    costs = read_json(note) if note.exists() else {}
    return costs if costs.get("run") in (None, checksum(run_path)) else {}


# A report becomes sections: a string is a line of words, a list of rows a table.


def score_sections(report: dict, style: str, costs: bool) -> list:
    """The means of every run, and what the columns say."""
    runs, metrics, tests = report["runs"], report["metrics"], report["tests"]
    head = f"{report['queries']:,} queries with a relevant document"
    if report["queries_without_relevant"]:
        head += f" ({report['queries_without_relevant']} without one left out)"
    if report["min_grade"] != 1:
        head += f"; binary measures count grades >= {report['min_grade']}"
    # Best is what looks best: figures that print alike share the star.
    best = {metric: max(round(run[metric], 4) for run in runs.values()) for metric in metrics}
    sure = {(test["run"], test["metric"]) for test in tests if test["p_holm"] < 0.05}
    # A column that no run could fill is not shown.
    known = [cost for cost in COSTS if any(run["costs"].get(cost) is not None for run in runs.values())]
    rows = [["run", *metrics, "unjudged@10", "missing", *(COSTS[cost] for cost in known)]]
    for name, run in runs.items():
        is_best = {metric: len(runs) > 1 and round(run[metric], 4) == best[metric] for metric in metrics}
        cells = [cell(style, run[metric], is_best[metric], (name, metric) in sure) for metric in metrics]
        unjudged = "-" if run["unjudged@10"] is None else f"{run['unjudged@10']:.1%}"
        paid = [cost_cell(run["costs"], cost) for cost in known]
        rows.append([printable(name), *cells, unjudged, f"{run['missing']:,}", *paid])

    words = [f"*: best. †: differs from {next(iter(runs))} with p < 0.05"] if tests else []
    words += [
        "unjudged@10: the share of the first ten results that nobody has judged; they count as irrelevant",
        "missing: queries for which the run has no result; they count 0"]
    words += [f"{name}: {run['not_in_qrels']:,} of its queries are not in the qrels and do not count"
              for name, run in runs.items() if run["not_in_qrels"]]
    if costs and not known:
        words.append("--costs: no run has a RUN.json beside it that was written for it; index.py search "
                     "does that")
    return [head, rows, *words]


def test_sections(report: dict) -> list:
    """Wins, losses and p of every run against the first."""
    if not report["tests"]:
        return []
    first, *others = report["runs"]
    rows = [["against " + first, "metric", "difference", "wins", "losses", "equal", "p"]]
    for test in report["tests"]:
        # Rounded, a small p would read as 0, which no test of this kind can find.
        p = f"{test['p_holm']:.4f}" if test["p_holm"] >= 1e-4 else "< 0.0001"
        counts = [f"{test[key]:,}" for key in ("wins", "losses", "equal")]
        rows.append([test["run"], test["metric"], f"{test['difference']:+.4f}", *counts, p])
    return [rows, f"p: randomisation test, paired by query, two-sided, {report['trials']:,} sign flips, "
                  f"corrected (Holm) for {len(others)} comparisons a metric"]


def group_tables(report: dict, path) -> list:
    """For each metric a table of the runs' means within each group of queries."""
    group_of = read_json(path)
    if not isinstance(group_of, dict):
        raise ValueError(f"{path}: expected a JSON object {{qid: group}}, got {type(group_of).__name__}")
    # A query that the file does not name is in the group "-".
    group = np.array([printable(str(group_of.get(qid, "-"))) for qid in report["qids"]])
    names, tables = np.unique(group), []
    for metric in report["metrics"]:
        rows = [[f"{metric} by group", *(f"{name} ({(group == name).sum():,})" for name in names)]]
        for run, values in report["values"].items():
            rows.append([run, *(f"{values[metric][group == name].mean():.4f}" for name in names)])
        tables.append(rows)
    return [*tables, "by group: the means over the queries of each group, their number in brackets"]


def changed_tables(report: dict, path, most: int) -> list:
    """For each run but the first, the queries whose value of the first metric it changed most."""
    texts, metric, qids = read_queries(path), report["metrics"][0], report["qids"]
    first, *others = report["values"]
    tables = []
    for name in others:
        before, after = report["values"][first][metric], report["values"][name][metric]
        rows = [[f"{metric}, most changed", first, name, "change", "query"]]
        # Stable: equal changes stand in the order of the qrels.
        for i in np.argsort(-np.abs(after - before), kind="stable")[:most]:
            if after[i] != before[i]:
                numbers = [f"{before[i]:.4f}", f"{after[i]:.4f}", f"{after[i] - before[i]:+.4f}"]
                rows.append([qids[i], *numbers, printable(texts.get(qids[i], "(text not in --queries)"))])
        tables.append(rows)
    return tables


# How it is written.


def cell(style: str, value: float, best: bool, sure: bool) -> str:
    """A number with its marks: a star or bold for the best, a dagger for a sure difference."""
    # num_ret and the like are counts: whole numbers above 1 are shown without decimals.
    number = f"{value:,.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4f}"
    if style == "plain":
        # Two columns for the marks, so that the numbers stay in line.
        return number + ("*" if best else " ") + ("†" if sure else " ")
    bold = {"markdown": "**{}**", "latex": r"\textbf{{{}}}"}[style] if best else "{}"
    dagger = {"markdown": "†", "latex": r"$^\dagger$"}[style] if sure else ""
    return bold.format(number) + dagger


def table(rows: list, style: str = "plain", words=(0,)) -> str:
    """Rows of strings, the first one the head; the columns in `words` hold words, the others numbers."""
    columns = range(len(rows[0]))
    if style == "latex":
        lines = [" & ".join(map(latex, row)) + r" \\" for row in rows]
        align = "".join("l" if i in words else "r" for i in columns)
        head, *body = lines
        head = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}"])
    if style == "markdown":
        # A bar would end the cell, and a backslash before it would take away the bar's own.
        rows = [[re.sub(r"([\\|])", r"\\\1", text) for text in row] for row in rows]
    width = [max(len(row[i]) for row in rows) for i in columns]
    pad = [str.ljust if i in words else str.rjust for i in columns]
    lines = [[pad[i](row[i], width[i]) for i in columns] for row in rows]
    if style == "markdown":
        lines.insert(1, ["-" * width[i] if i in words else "-" * (width[i] - 1) + ":" for i in columns])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def latex(text: str) -> str:
    """With LaTeX's special characters escaped, unless it is a cell that is LaTeX already."""
    if r"\textbf" in text or r"\dagger" in text:
        return text
    # These need a command of their own; before the others a backslash is enough.
    special = {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "<": "$<$", ">": "$>$"}
    return "".join("\\" + c if c in "_%&#${}" else special.get(c, c) for c in text)


def say(words: str, style: str) -> str:
    """A line of words among tables."""
    if style == "plain":
        return words
    words = words.replace("*: best", "bold: best")
    return "% " + words.replace("†", r"$^\dagger$") if style == "latex" else f"\n{words}\n"


def cost_cell(costs: dict, cost: str) -> str:
    value = costs.get(cost)
    if value is None:
        return "-"
    return f"{value / 1e6:,.1f}" if cost == "index_bytes" else f"{value:,.{2 if value < 10 else 0}f}"


def write_values(report: dict, path) -> None:
    """Every query's values as tsv."""
    columns = [(name, metric) for name in report["values"] for metric in report["metrics"]]
    with write_whole(path) as file:
        print("qid", *(f"{name} {metric}" for name, metric in columns), sep="\t", file=file)
        for i, qid in enumerate(report["qids"]):
            row = [report["values"][name][metric][i] for name, metric in columns]
            print(qid, *(f"{value:.6f}" for value in row), sep="\t", file=file)


def show(args) -> None:
    report = compare(args)
    if args.per_query:
        write_values(report, args.per_query)
    if args.style == "json":
        # A value for each query and measure would bury the report; --per_query writes them.
        del report["values"], report["qids"]
        print(json.dumps(report, indent=1))
        return
    sections = [*score_sections(report, args.style, args.costs), *test_sections(report)]
    if args.groups:
        sections += group_tables(report, args.groups)
    if args.queries:
        sections += changed_tables(report, args.queries, args.changed)
    for section in sections:
        if isinstance(section, str):
            print(say(section, args.style))
        else:
            print("\n" + table(section, args.style, words=(0, 4) if section[0][-1] == "query" else (0,)))


def style_arguments(group) -> None:
    for style in ("markdown", "latex", "json"):
        group.add_argument(f"--{style}", action="store_const", const=style, dest="style", default="plain",
                           help=f"print {style}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    add_arguments(parser)
    g = parser.add_argument_group("what is shown")
    style_arguments(g)
    g.add_argument("--costs", action="store_true",
                   help="non-zeros, index size and time, from the RUN.json that index.py search writes")
    g.add_argument("--per_query", metavar="FILE", help="write every query's values as tsv")
    g.add_argument("--queries", help="query texts: show the queries that changed most by the first metric")
    g.add_argument("--changed", type=natural, default=5, help="how many of these")
    g.add_argument("--groups", metavar="FILE", help="a JSON {qid: group}: the metrics by group")
    run_command(parser.prog, partial(show, parser.parse_args(argv)))


if __name__ == "__main__":
    main()
