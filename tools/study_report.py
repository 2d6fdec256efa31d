"""What the rows of a study say: significance over seeds and queries, tables as markdown, pictures.

    python -m tools.study table --preset pocket     # prints the tables of the committed rows
    python -m tools.study plot  --preset pocket     # draws recipes/study/scaling.svg and noise.svg

This file knows rows, and nothing of how they come about. A row is a line of results.jsonl:

    {"job": "world/sparse-cl-64-seed0", "seed": 0, "split": "test",
     "source": "world", ..., "teacher_noise": 0.5,          # the fields of a Cell
     "metrics": {"mrr@10": 0.363, ...}, "ranks": "113a4.",  # what was measured: see reciprocal()
     "size": 213312, "steps": 496, "nnz_docs": 84.1, ...}   # and what it cost

A row with an "error" has its cell, but no metrics; one without a "split" made something that cells need.
One more thing that varies is a field of Cell and a line of VARIATIONS. What surprises:

- The tests are of MRR@10, whatever --metric is shown: only its value for every query is kept in a row.
- Tests are not corrected for their number: of twenty differences that are nothing, one looks sure.
"""
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools import plot
from tools.compare import table

# In the order in which tables show them.
STARTS = ("pretrained", "lexical")
HEADS = ("sparse", "dense")
OBJECTIVES = ("cl", "kd", "cl+kd")
# What a query, a document and an index of a sparse model cost; a dense row has only the last.
COSTS = ("nnz_queries", "nnz_docs", "index_bytes")


class Cell(NamedTuple):
    """What was varied. Rows that agree in all of it are repetitions with other seeds."""
    source: str                 # the collection
    start: str                  # what the base knew
    width: int | str            # its size: hidden units, or the name that a published model has
    head: str
    objective: str
    # Constant in the grid of a source, and moved by VARIATIONS alone.
    budget: float = 0.0         # FLOPs of the training; 0: its length is set in another way
    label_noise: float = 0.0    # share of training rows with a wrong positive
    teacher_noise: float = 0.0  # deviation of the noise on the teacher's scores


class Variation(NamedTuple):
    """A field of Cell that moves while the others stand: a panel of a picture, and a table."""
    field: str
    picture: str                # the file, without its ending
    x: str                      # the axis, as tools.plot knows it
    label: str
    table: str = ""             # the table's title; without one the grid's own tables show it
    objectives: tuple = OBJECTIVES


# Tables stand in this order, and so do the panels of a picture.
VARIATIONS = (
    Variation("width", "scaling", "size", "parameters"),
    Variation("label_noise", "noise", "noise", "share of wrong labels", "share of wrong labels", ("cl",)),
    Variation("teacher_noise", "noise", "noise", "noise of the teacher", "noise of the teacher (deviation)",
              ("kd", "cl+kd")),
    Variation("budget", "scaling", "flops", "FLOPs", "FLOPs"),
)


# Significance. A difference of cells is a matrix of seeds x queries, and so is any weighted sum of cells.


def reciprocal(ranks: str) -> np.ndarray:
    """Every query's MRR@10 from its letter: the first relevant passage's rank, 1 to 9, a for 10, or a dot.

    >>> reciprocal("12.a").tolist()
    [1.0, 0.5, 0.0, 0.1]
    """
    return np.array([0.0 if letter == "." else 1 / int(letter, 16) for letter in ranks])


def crossed_test(differences: np.ndarray) -> float:
    """Two-sided p that the mean of (seeds, queries) differences is 0 with other seeds and queries than these.

    Seeds and queries are crossed random effects, as subjects and items are in psychology (Clark 1973). The
    variance of the mean is (MS_seeds + MS_queries - MS_rest) / (seeds x queries), with Satterthwaite's
    degrees of freedom; a part that comes out negative is 0. With one seed it is the paired t-test over
    queries, and says nothing of seeds.
    """
    S, Q = differences.shape
    mean, of_seed, of_query = differences.mean(), differences.mean(1), differences.mean(0)
    parts = [(S * of_query.var(ddof=1), Q - 1)]  # (mean square, its degrees of freedom)
    if S > 1:
        # What neither the seed nor the query explains.
        rest = differences - of_seed[:, None] - of_query + mean
        rest = (rest**2).sum() / ((S - 1) * (Q - 1)), (S - 1) * (Q - 1)
        parts.append((Q * of_seed.var(ddof=1), S - 1))
        # Mean squares no larger than the rest's have no variance of their own to add.
        parts = [part for part in parts if part[0] > rest[0]]
        if not parts:
            parts = [rest]
        elif len(parts) == 2:
            # Seeds and queries each contain the rest once; it must not count twice.
            parts.append((-rest[0], rest[1]))
    total = sum(square for square, _ in parts)
    # Nothing varies: t would be 0 / 0, or infinite.
    if not total:
        return 1.0 if mean == 0 else 0.0
    freedom = total**2 / sum(square**2 / degrees for square, degrees in parts)
    return student_p(mean / math.sqrt(total / (S * Q)), max(1.0, freedom))


def student_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t: the angle with t = sqrt(freedom) tan(angle) has a power of cos for density.

    >>> round(float(student_p(2.086, 20)), 4)    # the table at the end of every textbook
    0.05
    """
    # NumPy has no t distribution, and SciPy would be a package for this line: so the trapezoid rule, from the
    # angle of t to the end. The whole area is a ratio of gamma functions.
    start = math.atan(abs(t) / math.sqrt(freedom))
    heights = np.cos(np.linspace(start, math.pi / 2, 20_001)) ** (freedom - 1)
    tail = (heights[1:] + heights[:-1]).mean() / 2 * (math.pi / 2 - start)
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return 2 * tail / whole


# Rows become cells.


class Cells:
    """Rows by what was varied. They were measured on the same queries."""

    def __init__(self, rows: list[dict]):
        # A failed cell has a place in the tables, but no figures to put there.
        self.rows, self.good = rows, [row for row in rows if "error" not in row]
        self.by_cell = {}  # {cell: {seed: row}}
        for row in self.good:
            cell = Cell(*(row[field] for field in Cell._fields))
            self.by_cell.setdefault(cell, {})[row["seed"]] = row

    def values(self, key: str, **facts) -> list:
        """The different values of a key among the rows with these facts, in order."""
        # Of failed cells, too: a column that is all gaps says what is missing.
        return sorted({row[key] for row in self.rows if all(row[k] == value for k, value in facts.items())})

    def get(self, cell: Cell) -> dict[int, dict]:
        """{seed: row}."""
        return self.by_cell.get(cell, {})

    def scores(self, cell: Cell, metric: str) -> list[float]:
        """One a seed."""
        return [row["metrics"][metric] for row in self.get(cell).values() if metric in row["metrics"]]

    def contrast(self, parts: list[tuple[float, Cell]]) -> str:
        """A weighted sum of cells' MRR@10 over the seeds that all of them have: +0.052 (p 0.003)."""
        # Only common seeds: the difference of a seed is paired, query by query, and a lone cell has no pair.
        found = [self.get(cell) for _, cell in parts]
        seeds = sorted(set.intersection(*map(set, found)))
        if not seeds:
            return "-"
        matrix = np.zeros((len(seeds), len(found[0][seeds[0]]["ranks"])))
        for (weight, _), rows in zip(parts, found):
            matrix += weight * np.array([reciprocal(rows[seed]["ranks"]) for seed in seeds])
        p = crossed_test(matrix)
        return f"{matrix.mean():+.3f} (p {p:.3f})" if p >= 0.001 else f"{matrix.mean():+.3f} (p < 0.001)"


def families(rows: list[dict]) -> list[Cells]:
    """Models of pocket size, then published ones: within a family sizes can be put in order."""
    # A published model's size is a word, as "135m", and its cells have a source and a budget of their own.
    pocket = [row for row in rows if isinstance(row["width"], int)]
    published = [row for row in rows if isinstance(row["width"], str)]
    return [cells for cells in (Cells(pocket), Cells(published)) if cells.good]


# Cells become tables.


def section(title: str, rows: list[list[str]], words: int = 2) -> list[str]:
    """A table under a title, its first columns being words."""
    return [f"### {title}", "", table(rows, "markdown", words=tuple(range(words))), ""]


class Report:
    """The tables of one family of cells."""

    def __init__(self, cells: Cells, metric: str):
        self.cells, self.metric, self.text = cells, metric, []
        self.objectives = [name for name in OBJECTIVES if name in cells.values("objective")]
        self.kinds = [{"objective": name, "head": head} for name in self.objectives for head in HEADS]
        self.widths = cells.values("width")
        self.smallest, self.middle, self.largest = (self.widths[i] for i in (0, len(self.widths) // 2, -1))
        self.sources = cells.values("source")
        # Against the alphabet: the generated world, where the truth is known, before real text.
        self.grids = [(source, start) for source in self.sources[::-1] for start in STARTS]

    def write(self) -> list[str]:
        """Everything that varies among the cells."""
        for source, start in self.grids:
            self.grid(source, start)
        # One size has no growth, and so none of what follows.
        if len(self.widths) > 1:
            for source, start in self.grids:
                for variation in VARIATIONS:
                    self.along(variation, source, start)
            self.starts()
            self.findings()
        return self.text

    # What the tables speak of.

    def cell(self, source: str, start: str, width, head: str, objective: str) -> Cell:
        """A cell of the grid: its source's common budget, and no noise but what all its cells have."""
        # Most cells belong to the grid, so what is common to it is what is most frequent.
        rows = [row for row in self.cells.rows if row["source"] == source]
        common = {field: statistics.mode(row[field] for row in rows) for field in Cell._field_defaults}
        return Cell(source, start, width, head, objective, **common)

    def pair(self, source: str, start: str, width, objective: str) -> list[Cell]:
        """[sparse, dense] of the grid."""
        return [self.cell(source, start, width, head, objective) for head in HEADS]

    def has_all_sizes(self, source: str, start: str) -> bool:
        return len(self.cells.values("width", source=source, start=start)) == len(self.widths)

    # What stands in a table.

    def score(self, cell: Cell) -> str:
        """0.432 ± 0.012 over the seeds; one seed has no deviation."""
        values = self.cells.scores(cell, self.metric)
        if not values:
            return "-"
        return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

    def heads_apart(self, pairs: list[list[Cell]]) -> str:
        """Sparse minus dense, the mean over these pairs."""
        share, parts = 1 / len(pairs), []
        for sparse, dense in pairs:
            parts += [(share, sparse), (-share, dense)]
        return self.cells.contrast(parts)

    def name_of(self, source: str, width) -> str:
        """A size as a reader knows it: parameters."""
        sizes = [row["size"] for row in self.cells.good if (row["source"], row["width"]) == (source, width)]
        return f"{width} ({sizes[0] / 1e6:.2f} M)" if sizes else str(width)

    # The tables, in their order.

    def grid(self, source: str, start: str):
        """Quality by size, what growing brought, and what the largest model costs; then the heads apart."""
        if not self.has_all_sizes(source, start):
            return
        sizes = [self.name_of(source, width) for width in self.widths]
        grows = len(sizes) > 1
        growth = ["largest - smallest"] if grows else []
        rows = [["objective", "head", *sizes, *growth, "steps", "nnz q / d", "index MB"]]
        for kind in self.kinds:
            cells = [self.cell(source, start, width, **kind) for width in self.widths]
            seeds = [list(self.cells.get(cell).values()) for cell in cells]
            # The same FLOPs are fewer steps of a larger model: without this column growth looks like a loss.
            steps = " ".join(str(found[0]["steps"]) if found else "-" for found in seeds)
            grown = [self.cells.contrast([(1, cells[-1]), (-1, cells[0])])] if grows else []
            rows.append([*kind.values(), *map(self.score, cells), *grown, steps, *costs_of(seeds[-1])])
        title = f"{source}, {start} start"
        self.text += section(f"{title}: {self.metric} by size, {cells[0].budget:.0e} FLOPs a cell", rows)

        rows = [["sparse - dense", *sizes, *(["all sizes"] if grows else [])]]
        for objective in self.objectives:
            pairs = [self.pair(source, start, width, objective) for width in self.widths]
            apart = [self.heads_apart([pair]) for pair in pairs] + [self.heads_apart(pairs)] * grows
            rows.append([objective, *apart])
        self.text += section(f"{title}: sparse against dense", rows, words=1)

    def along(self, variation: Variation, source: str, start: str):
        """The middle size along another axis, what the whole way brings, and the heads' difference in it."""
        values = self.cells.values(variation.field, source=source, start=start)
        # A panel belongs to one source and start: elsewhere nothing moves.
        if len(values) < 2 or not variation.table:
            return
        shown = (f"{value:g}" for value in values)
        rows = [["objective", "head", *shown, "last - first", "sparse's less dense's"]]
        for kind in self.kinds:
            if kind["objective"] not in variation.objectives:
                continue
            plain = self.cell(source, start, self.middle, **kind)
            cells = [plain._replace(**{variation.field: value}) for value in values]
            change = [(1, cells[-1]), (-1, cells[0])]
            # A difference of differences is one more weighted sum: the same with the signs turned.
            of_dense = [(-weight, cell._replace(head="dense")) for weight, cell in change]
            apart = self.cells.contrast(change + of_dense) if kind["head"] == "sparse" else ""
            rows.append([*kind.values(), *map(self.score, cells), self.cells.contrast(change), apart])
        self.text += section(f"{source}, {start} start, {variation.table}", rows)

    def starts(self):
        """The lexical start beside the pre-trained one, at the smallest size."""
        rows = [["source", "objective", "start", *HEADS, "sparse - dense"]]
        # The larger sizes have no lexical start to compare with.
        for source in self.sources:
            for objective in self.cells.values("objective", start="lexical"):
                for start in STARTS:
                    pair = self.pair(source, start, self.smallest, objective)
                    rows.append([source, objective, start, *map(self.score, pair), self.heads_apart([pair])])
        self.text += section("Two starts, smallest size", rows, words=3)

    def findings(self):
        """The paper's three findings, each as a sum of cells."""
        # 1. With CL larger models are better, with KD hardly. 2. Sparse is ahead of dense. 3. The best of all
        # is the largest sparse model of CL+KD.
        rows = [["finding", "source", "start", "contrast", "MRR@10"]]
        for source in self.sources:
            for start in STARTS:
                if self.has_all_sizes(source, start):
                    for number, *rest in self.contrasts(source, start):
                        rows.append([number, source, start, *rest])
        self.text += section("The paper's findings as contrasts", rows, words=4)

    def contrasts(self, source: str, start: str) -> list[tuple[str, str, str]]:
        """(finding, what is compared, by how much it differs)."""
        cl, kd = (self.growth(source, start, objective) for objective in ("cl", "kd"))
        less_kd = [(-weight, cell) for weight, cell in kd]
        pairs = [self.pair(source, start, width, objective)
                 for objective in self.objectives for width in self.widths]
        found = [
            ("1", "CL: largest - smallest, mean of both heads", self.cells.contrast(cl)),
            ("1", "KD: largest - smallest, mean of both heads", self.cells.contrast(kd)),
            ("1", "CL's growth less KD's", self.cells.contrast(cl + less_kd)),
            ("2", "sparse - dense, all sizes and objectives", self.heads_apart(pairs)),
        ]
        best = self.cell(source, start, self.largest, "sparse", "cl+kd")
        others = [cell for pair in pairs for cell in pair]
        others = [cell for cell in others if cell != best and self.cells.scores(cell, "mrr@10")]
        if others:
            # The rival is chosen by its score, which flatters it: the test errs against the finding.
            rival = max(others, key=lambda cell: np.mean(self.cells.scores(cell, "mrr@10")))
            name = f"{rival.head} {rival.objective} {rival.width}"
            apart = self.cells.contrast([(1, best), (-1, rival)])
            found.append(("3", f"largest sparse CL+KD - the best other cell ({name})", apart))
        return found

    def growth(self, source: str, start: str, objective: str) -> list[tuple[float, Cell]]:
        """From the smallest to the largest size, the mean of both heads."""
        large, small = (self.pair(source, start, width, objective) for width in (self.largest, self.smallest))
        parts = []
        for largest, smallest in zip(large, small):
            parts += [(0.5, largest), (-0.5, smallest)]
        return parts


def costs_of(rows: list[dict]) -> list[str]:
    """Non-zeros of a query and a document, and the size of the index, means over seeds."""
    if not rows:
        return ["-", "-"]
    queries, docs, size = (np.mean([row.get(key, math.nan) for row in rows]) for key in COSTS)
    return ["-" if math.isnan(docs) else f"{queries:.0f} / {docs:.0f}", f"{size / 1e6:.2f}"]


def plain_rows(rows: list[dict]) -> list[list[str]]:
    """A row a cell, for the settings that were tried and for real backbones."""
    # Real backbones have a metric for each data set that was there, and not all cells the same.
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["metrics"]))
    facts = ("source", "head", "objective", "setting", "width", "seed", "steps")
    shown = [[*facts, *metrics, "nnz q / d", "index MB"]]
    for row in rows:
        scores = (f"{row['metrics'].get(metric, math.nan):.4f}" for metric in metrics)
        shown.append([*(str(row.get(fact, "-")) for fact in facts), *scores, *costs_of([row])])
    return shown


def check_metric(rows: list[dict], metric: str):
    """Refuse a metric that was not measured: all of its places would be gaps."""
    known = list(dict.fromkeys(metric for row in rows for metric in row.get("metrics", ())))
    if metric not in known:
        raise ValueError(f"--metric {metric}: no finished cell has it; they have {', '.join(known)}")


def gaps(rows: list[dict], expected: list[str]) -> list[str]:
    """What failed, and what has not been run."""
    text = [f"- gap: {row['job']}: {row['error']}" for row in rows if "error" in row]
    known = {row["job"] for row in rows}
    missing = [name for name in expected if name not in known]
    if missing:
        text.append(f"- {len(missing)} cells have not been run, the first is {missing[0]}")
    return text


def tables(rows: list[dict], expected: list[str], preset: str, split: str, metric: str) -> str:
    """The whole page for the rows of a preset; `expected` are the names of all its cells."""
    measured = [row for row in rows if row.get("split") == split]
    cells = Cells(measured)
    # Without ranks there is no test, and what differs in a setting is in no grid.
    if all("ranks" in row and "setting" not in row for row in cells.good):
        check_metric(cells.good, metric)
        text = [line for family in families(measured) for line in Report(family, metric).write()]
    else:
        text = section(f"{preset}: every cell", plain_rows(cells.good), words=4)
    text += gaps(measured, expected)

    # Of all rows: bases and teachers took time, too.
    hours = sum(row["cpu_seconds"] for row in rows if "cpu_seconds" in row) / 3600
    seeds, when = cells.values("seed"), sorted(row["when"] for row in cells.good)
    head = (f"{len(cells.good)} cells, seeds {', '.join(map(str, seeds))}: mean ± standard deviation over "
            "seeds. p is two-sided, with seeds and\nqueries as crossed random effects (where there is one "
            "seed: paired t-test over queries), and not corrected\nfor the number of tests.\n"
            f"{hours:.1f} hours of processor time, {when[0]} to {when[-1]} UTC, "
            f"{cells.good[-1]['machine']}.\n")
    return "\n".join([head, *text])


# Cells become pictures.


def draw(rows: list[dict], metric: str, folder: Path, ending: str) -> list[Path]:
    """scaling: quality against parameters and FLOPs. noise: against wrong labels and a noisy teacher."""
    # Dev queries chose the settings; what is shown to others is test.
    measured = [row for row in rows if row.get("split") == "test"]
    check_metric(measured, metric)
    pictures, reports = {}, [Report(cells, metric) for cells in families(measured)]
    for variation in VARIATIONS:
        panels = pictures.setdefault(variation.picture, [])
        for report in reports:
            for source, start in report.grids:
                panels += panel(report, variation, source, start)
    # Up to: where a cell failed, a point has fewer.
    seeds = max((len(report.cells.values("seed")) for report in reports), default=0)
    note = f"mean of up to {seeds} seeds; bars: one standard deviation" if seeds > 1 else "one seed"
    return [plot.draw(panels, folder / f"{name}.{ending}", note=note)
            for name, panels in pictures.items() if panels]


def panel(report: Report, variation: Variation, source: str, start: str) -> list[plot.Panel]:
    """Quality along a variation as a panel, or nothing if nothing varies."""
    rows = rows_along(report, source, start, variation.field)
    if not rows:
        return []
    axis, title = plot.axis_of(variation.x), f"{source}, {start} start: {variation.label}"
    # A name must look the same in every panel, so it is told what names there are.
    curves = plot.curves_of(rows, variation.x, report.metric, among=report.kinds)
    return [plot.Panel(curves, title, plot.pretty(report.metric), axis.log, axis.unit, axis.chosen)]


def rows_along(report: Report, source: str, start: str, field: str) -> list[dict]:
    """The rows of a grid in which only `field` moves, of the kinds of model for which it does move."""
    rows = []
    values = report.cells.values(field, source=source, start=start)
    for kind in report.kinds:
        cell, found = report.cell(source, start, report.middle, **kind), []
        for value in values:
            # tools.plot draws the rows of any study: it asks for a metric with a value, and what to part by.
            shown = {"metric": report.metric, "setting": value, "noise": value}
            for row in report.cells.get(cell._replace(**{field: value})).values():
                if report.metric in row["metrics"]:
                    found.append(row | shown | {"value": row["metrics"][report.metric]})
        # A single point is no curve: the objectives that this does not concern have only the grid's.
        if len({row[field] for row in found}) > 1:
            rows += found
    return rows
