"""Runs compared for a paper: evaluate.py's table as Markdown, LaTeX or JSON, with costs, groups and single queries.

    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --latex > table.tex
    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --queries queries.tsv    # what changed most
    python -m tools.compare --qrels Q --run bm25.trec sparse.trec --costs --json > report.json    # for tools.plot
"""
import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np

import evaluate
from data import Help, checksum, natural, printable, read_json, read_queries, run_command, write_whole

# What index.py search notes beside a run, and the head of its column.
COSTS = {"nnz_docs": "nnz/doc", "nnz_queries": "nnz/query", "index_bytes": "index MB", "ms_per_query": "ms/query"}


# How a table is written.


def cell(style: str, value: float, best: bool, sure: bool) -> str:
    """A number with its marks: bold for the best, a dagger for a sure difference."""
    if style == "plain":
        return evaluate.plain_cell(value, best, sure)
    bold = {"markdown": "**{}**", "latex": r"\textbf{{{}}}"}[style] if best else "{}"
    dagger = {"markdown": "†", "latex": r"$^\dagger$"}[style] if sure else ""
    return bold.format(evaluate.plain_cell(value, False, False).strip()) + dagger


def table(rows: list, style: str = "plain", words=(0,)) -> str:
    """Rows of strings, the first one the head; the columns in `words` hold words, the others numbers."""
    columns = range(len(rows[0]))
    if style == "latex":
        lines = [" & ".join(map(latex, row)) + r" \\" for row in rows]
        align = "".join("l" if i in words else "r" for i in columns)
        lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}"])
    width = [max(len(row[i]) for row in rows) for i in columns]
    lines = [[row[i].ljust(width[i]) if i in words else row[i].rjust(width[i]) for i in columns] for row in rows]
    if style == "markdown":
        lines.insert(1, ["-" * width[i] if i in words else "-" * (width[i] - 1) + ":" for i in columns])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def latex(text: str) -> str:
    """With LaTeX's special characters escaped, unless it is a cell that is LaTeX already."""
    if r"\textbf" in text or r"\dagger" in text:
        return text
    special = {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}", "<": "$<$", ">": "$>$"}
    return "".join("\\" + c if c in "_%&#${}" else special.get(c, c) for c in text)


def say(words: str, style: str) -> str:
    """A line of words among tables."""
    if style == "latex":
        return "% " + words.replace("†", r"$^\dagger$")
    return f"\n{words.replace('*: best', 'bold: best')}\n" if style == "markdown" else words


def cost_cell(costs: dict, cost: str) -> str:
    value = costs.get(cost)
    if value is None:
        return "-"
    return f"{value / 1e6:,.1f}" if cost == "index_bytes" else f"{value:,.{2 if value < 10 else 0}f}"


# What evaluate.py does not say.


def read_costs(run_path) -> dict:
    """What index.py search noted beside the run, unless the run was written anew since."""
    note = Path(f"{run_path}.json")
    costs = read_json(note) if note.exists() else {}
    return costs if costs.get("run") in (None, checksum(run_path)) else {}


def add_costs(rows: list, report: dict) -> str:
    """More columns for the table of scores; a line of words where there are none."""
    runs = report["runs"].values()
    known = [cost for cost in COSTS if any(run["costs"].get(cost) is not None for run in runs)]
    rows[0] += [COSTS[cost] for cost in known]
    for row, run in zip(rows[1:], runs):
        row += [cost_cell(run["costs"], cost) for cost in known]
    return "" if known else "--costs: no run has a RUN.json beside it that was written for it; index.py search writes one"


def group_tables(report: dict, path) -> list:
    """For each metric a table of the runs' means within each group of queries."""
    group_of = read_json(path)
    if not isinstance(group_of, dict):
        raise ValueError(f"{path}: expected a JSON object {{qid: group}}, got {type(group_of).__name__}")
    group = np.array([printable(str(group_of.get(qid, "-"))) for qid in report["qids"]])
    tables = []
    for metric in report["metrics"]:
        rows = [[f"{metric} by group", *(f"{name} ({np.count_nonzero(group == name):,})" for name in np.unique(group))]]
        for run, values in report["values"].items():
            rows.append([run, *(f"{values[metric][group == name].mean():.4f}" for name in np.unique(group))])
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
        for i in np.argsort(-np.abs(after - before), kind="stable")[:most]:
            if after[i] != before[i]:
                numbers = [f"{before[i]:.4f}", f"{after[i]:.4f}", f"{after[i] - before[i]:+.4f}"]
                rows.append([qids[i], *numbers, printable(texts.get(qids[i], "(text not in --queries)"))])
        tables.append(rows)
    return tables


def write_values(report: dict, path) -> None:
    """Every query's values as tsv."""
    columns = [(name, metric) for name in report["values"] for metric in report["metrics"]]
    with write_whole(path) as file:
        print("qid", *(f"{name} {metric}" for name, metric in columns), sep="\t", file=file)
        for i, qid in enumerate(report["qids"]):
            print(qid, *(f"{report['values'][name][metric][i]:.6f}" for name, metric in columns), sep="\t", file=file)


def show(args) -> None:
    report = evaluate.report_of(args)
    for run, path in zip(report["runs"].values(), args.run):
        run["costs"] = read_costs(path) if args.costs else {}
    if args.per_query:
        write_values(report, args.per_query)
    if args.style == "json":
        print(json.dumps({key: value for key, value in report.items() if key not in ("values", "qids")}, indent=1))
        return
    sections = evaluate.sections(report, partial(cell, args.style))
    if args.costs:
        scores = next(section for section in sections if isinstance(section, list))
        sections.append(add_costs(scores, report))
    if args.groups:
        sections += group_tables(report, args.groups)
    if args.queries:
        sections += changed_tables(report, args.queries, args.changed)
    for section in filter(None, sections):
        if isinstance(section, str):
            print(say(section, args.style))
        else:
            print("\n" + table(section, args.style, words=(0, 4) if section[0][-1] == "query" else (0,)))


def style_arguments(group) -> None:
    for style in ("markdown", "latex", "json"):
        group.add_argument(f"--{style}", action="store_const", const=style, dest="style", default="plain",
                           help=f"print {style}")


def add_arguments(parser) -> None:
    evaluate.add_arguments(parser)
    g = parser.add_argument_group("what is shown")
    style_arguments(g)
    g.add_argument("--costs", action="store_true",
                   help="non-zeros, index size and time from the RUN.json that index.py search writes beside RUN")
    g.add_argument("--per_query", metavar="FILE", help="write every query's values as tsv")
    g.add_argument("--queries", help="query texts: show the queries that changed most by the first metric")
    g.add_argument("--changed", type=natural, default=5, help="how many of these")
    g.add_argument("--groups", metavar="FILE", help="a JSON {qid: group}: the metrics by group")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__.split("\n")[0],
                                     allow_abbrev=False, formatter_class=Help)
    add_arguments(parser)
    run_command(parser.prog, partial(show, parser.parse_args(argv)))


if __name__ == "__main__":
    main()
