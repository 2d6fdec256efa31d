"""Pictures for a paper as SVG, PDF or PNG, and the same curves as a line of text in the terminal.

    python -m tools.plot study results.jsonl --out scaling.svg         # quality against parameters and FLOPs
    python -m tools.plot study results.jsonl --x noise --out noise.pdf # or against any number in the rows
    python -m tools.plot loss runs/sparse runs/dense --out loss.svg    # metrics.jsonl of training runs
    python -m tools.plot costs report.json --out cost.png              # of tools.compare --json --costs

    pip install -r tools/requirements.txt    # matplotlib; text alone needs none

What surprises:
- A point is the mean over seeds, its bar one standard deviation (n - 1). Curves with bars stand a few points
  of print beside one another, so that no bar hides another: read x from the ticks.
- Colour and marker say the objective, line and filling the head: it survives a printer without colours.
- There is no title unless --title gives one: a paper has captions.
"""
import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Help, read_json, read_lines, run_command, share, write_whole


class Curve(NamedTuple):
    """A line with its points. Curves of the same name, in whatever panel, share an entry of the legend and a
    look."""
    name: str
    x: list
    y: list
    spread: list = []       # half the length of an error bar at each point; 0 draws none
    color: int = 0          # place among COLORS and MARKERS
    line: int = 0           # place among LINES; every line but the first has hollow markers
    faint: tuple = ()       # (x, y), drawn thin and pale behind the curve: what was smoothed


class Panel(NamedTuple):
    """One pair of axes."""
    curves: list
    x_label: str
    y_label: str
    log_x: bool = False
    unit: str = ""          # of x: "bytes", "flops" or none
    at_points: bool = False # the x ticks stand where the points are: three model sizes are three ticks
    markers: bool = True


class Axis(NamedTuple):
    """What is known of a key of the rows when it becomes an x axis."""
    label: str
    unit: str = ""
    log: bool = False
    # Set by whoever ran the study, and so part of a cell; else measured, a mean over seeds.
    chosen: bool = True


AXES = {
    "size": Axis("parameters", "count", log=True),
    "flops": Axis("training FLOPs", "flops", log=True, chosen=False),
    "steps": Axis("training steps", log=True),
    "noise": Axis("share of wrong labels"),
    "index_bytes": Axis("index size", "bytes", log=True, chosen=False),
    "nnz_docs": Axis("non-zeros a document", log=True, chosen=False),
    "ms_per_query": Axis("milliseconds a query", log=True, chosen=False),
}
# The order of legends; names that are not here follow, by alphabet.
KNOWN = ["sparse", "dense", "cl", "kd", "cl+kd"]

# The first three differ in lightness, too. After Okabe and Ito, for readers who see red and green alike.
COLORS = ["#0B6FB3", "#D9660A", "#128A6B", "#A8477E", "#6B5B95", "#5C6670"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
LINES = ["-", (0, (4, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2))]
LOOK = {
    "font.family": "sans-serif", "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 10,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#6E7781", "axes.linewidth": 0.8,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": "#E4E8EC", "grid.linewidth": 0.7,
    "text.color": "#1F2328", "axes.labelcolor": "#1F2328", "xtick.color": "#59636E", "ytick.color": "#59636E",
    "lines.linewidth": 1.6, "lines.markersize": 5.2, "savefig.dpi": 200,
    # Words stay words: small files, and a search finds them. TrueType is what publishers ask for.
    "svg.fonttype": "none", "pdf.fonttype": 42,
    # The same data make the same bytes.
    "svg.hashsalt": "retrieval",
}


# Rows of a study become curves.


def read_rows(path) -> list[dict]:
    """The JSON lines of a file; one that a killed run left half written is left out, and said."""
    rows = []
    for number, line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            print(f"{path}:{number}: not JSON ({e.msg}), left out", file=sys.stderr)
    return rows


def curves_of(rows: list[dict], x: str, metric: str, by=("head", "objective"), among=()) -> list[Curve]:
    """One curve for each combination of the keys `by`: the mean over seeds in each cell, and their standard
    deviation. A cell is one size and one setting (where rows have them), and one value of x if x was chosen
    and not measured. `among`: the rows of all panels, so that a name has one look in each of them."""
    everyone = [tuple(row.get(key) for key in by) for row in among or rows]
    rows = [row for row in rows if row.get("metric") == metric and is_number(row.get("value"))]
    rows = [row for row in rows if is_number(row.get(x))]
    if not rows:
        raise ValueError(f"no row has metric {metric!r} with numbers as 'value' and {x!r}; a row looks like "
                         "{'head': 'sparse', 'objective': 'cl', 'size': 1.2e9, 'flops': 3e18, 'seed': 0, "
                         "'metric': 'mrr@10', 'value': 0.38}")
    # {curve: {cell: its rows}}. What was measured differs from seed to seed, and so cannot name a cell.
    chosen = ("size", "setting") + ((x,) if axis_of(x).chosen else ())
    cells = {}
    for row in rows:
        name, cell = (tuple(row.get(key) for key in keys) for keys in (by, chosen))
        cells.setdefault(name, {}).setdefault(cell, []).append(row)

    # The first key is the line, the others together are the colour.
    heads = sorted({name[0] for name in everyone}, key=rank_of)
    tints = sorted({name[1:] for name in everyone}, key=ranks_of)
    curves = []
    for name in sorted(cells, key=ranks_of):
        points = []
        for cell in cells[name].values():
            check_seeds(cell, by)
            values = [row["value"] for row in cell]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            points.append((float(np.mean([row[x] for row in cell])), float(np.mean(values)), float(spread)))
        color, line = tints.index(name[1:]), heads.index(name[0])
        if len(by) == 1:
            # One key alone is told by colours.
            color, line = line, 0
        curves.append(Curve(" ".join(map(pretty, name)), *map(list, zip(*sorted(points))), color, line))
    return curves


def check_seeds(cell: list[dict], by):
    """Rows that are averaged must be repetitions: of the same seed there can be only one."""
    seeds = [row.get("seed") for row in cell]
    if len(set(seeds)) == len(seeds):
        return
    twice = next(seed for seed in seeds if seeds.count(seed) > 1)
    one, two = [row for row in cell if row.get("seed") == twice][:2]
    keys = (one.keys() | two.keys()) - {"value", "seed"}
    differ = sorted(key for key in keys if one.get(key) != two.get(key))
    cure = f"name what differs in --by {' '.join(by)}: one of {', '.join(differ)}" if differ else "remove one"
    # Whatever else differs between the two may be what parts them.
    both = f"{json.dumps(one)} and {json.dumps(two)}"
    raise ValueError(f"two rows of seed {twice} fall on one point: {both}; {cure}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def axis_of(key: str) -> Axis:
    return AXES.get(key, Axis(key.replace("_", " ")))


def rank_of(word) -> tuple:
    """Known names in their order, numbers by size, and then the rest by alphabet."""
    if is_number(word):
        return 1, word, ""
    return (0, KNOWN.index(word), "") if word in KNOWN else (2, 0, str(word))


def ranks_of(words) -> list:
    return [rank_of(word) for word in words]


def pretty(word) -> str:
    """As a paper writes it.

    >>> pretty("ndcg@10"), pretty("mrr@10"), pretty("cl+kd"), pretty("sparse"), pretty(1.2e9)
    ('nDCG@10', 'MRR@10', 'CL+KD', 'sparse', '1.2B')
    """
    if is_number(word):
        return short(word, "count")
    for name, written in (("ndcg", "nDCG"), ("mrr", "MRR"), ("map", "MAP")):
        if word == name or str(word).startswith(f"{name}@"):
            return written + word[len(name):]
    return word.upper() if word in ("cl", "kd", "cl+kd", "mntp", "clm") else str(word)


RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"


def short(value: float, unit: str = "") -> str:
    """A number as a tick says it.

    >>> short(1.3e9, "count"), short(2.5e6, "bytes"), short(2e18, "flops"), short(0.25), short(1500)
    ('1.3B', '2.5 MB', '2×10¹⁸', '0.25', '1,500')
    """
    if unit == "flops" and value:
        power = math.floor(math.log10(value) + 1e-9)
        lead = f"{value / 10 ** power:.3g}"
        raised = str(power).translate(str.maketrans("-0123456789", RAISED))
        return ("" if lead == "1" else lead + "×") + "10" + raised
    steps = {"bytes": (" TB", " GB", " MB", " kB"), "count": ("T", "B", "M", "K")}.get(unit, ())
    for size, letter in zip((1e12, 1e9, 1e6, 1e3), steps):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.10g}" + (" B" if unit == "bytes" else "")


# Curves become a picture.


def draw(panels: list[Panel], out, title: str = "", note: str = "") -> Path:
    """Panels side by side under one legend, written to `out`; its ending says the format: .svg, .pdf or
    .png."""
    out = Path(out)
    if out.suffix not in (".svg", ".pdf", ".png"):
        raise ValueError(f"{out}: expected a name that ends in .svg, .pdf or .png")
    try:
        import matplotlib
        # A figure without pyplot: no window, no state, no display needed.
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ValueError(f"{out}: pictures need matplotlib: pip install -r tools/requirements.txt") from e
    width = 0.35 + 3.35 * len(panels)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    columns = legend_columns(names, width)
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, 2.6 + 0.18 * rows + 0.25 * bool(title)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06, wspace=0.06)
        entries = {}
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            entries |= draw_panel(axes, panel)
            # A second panel of the same measure needs its ticks, but not the words again.
            axes.set_ylabel(panel.y_label if panel is panels[0] or panel.y_label != panels[0].y_label else "")
        if len(names) > 1:
            # One legend for all panels, read in rows. Matplotlib fills columns, so the names are handed over
            # by columns.
            order = [name for column in range(columns) for name in names[column::columns]]
            legend = figure.legend(
                [entries[name] for name in order], order, loc="outside upper center", ncols=columns,
                columnspacing=1.8, handlelength=2.8, title=title or None)
            legend.get_title().set(fontsize=10.5, fontweight="bold")
        elif title:
            figure.suptitle(title, fontsize=10.5, fontweight="bold")
        if note:
            figure.supxlabel(note, fontsize=7.5, color=LOOK["xtick.color"])
        with write_whole(out, "wb") as file:
            # No date: the same data make the same file.
            undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[out.suffix]
            figure.savefig(file, format=out.suffix[1:], metadata=undated)
    return out


def legend_columns(names: list[str], width: float) -> int:
    """As few rows as fit into so many inches, and these as even as can be."""
    # Inches: a sample of the line, and letters of 8.5 points.
    entry = 0.66 + 0.075 * max(map(len, names))
    rows = math.ceil(len(names) / max(1, int(width / entry)))
    return math.ceil(len(names) / rows)


def draw_panel(axes, panel: Panel) -> dict:
    """Draw the curves of one panel; hand back {name: what stands for it in the legend}."""
    from matplotlib.transforms import ScaledTranslation

    if panel.log_x:
        lowest = min(min(curve.x) for curve in panel.curves)
        if lowest <= 0:
            raise ValueError(f"{panel.x_label}: {lowest} has no place on a log axis; it must be above 0")
        axes.set_xscale("log")
    with_bars = [curve.name for curve in panel.curves if any(curve.spread)]
    entries = {}
    for curve in panel.curves:
        color = COLORS[curve.color % len(COLORS)]
        # Bars side by side: each curve moves by points of print, which is the same distance on a linear and a
        # log axis.
        aside = 0
        if any(curve.spread):
            from_middle = with_bars.index(curve.name) - (len(with_bars) - 1) / 2
            aside = min(4.2, 30 / len(with_bars)) * from_middle
        place = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
        if curve.faint:
            axes.plot(*curve.faint, color=color, linewidth=0.8, alpha=0.3)
        look = {"color": color, "linestyle": LINES[curve.line % len(LINES)] if len(curve.x) > 1 else "none"}
        if panel.markers:
            look |= {"marker": MARKERS[curve.color % len(MARKERS)], "markeredgewidth": 1.2,
                     "markerfacecolor": "white" if curve.line else color}
        if any(curve.spread):
            # A bar of length 0 would be a dash through the marker.
            lengths = [spread or math.nan for spread in curve.spread]
            axes.errorbar(curve.x, curve.y, lengths, fmt="none", ecolor=color, elinewidth=1.1, capsize=2,
                          transform=place)
        [entries[curve.name]] = axes.plot(curve.x, curve.y, transform=place, **look)
    set_ticks(axes, panel)
    return entries


def set_ticks(axes, panel: Panel):
    """Limits with room for the markers, and labelled ticks on both axes whatever their range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    xs = sorted({x for curve in panel.curves for x in curve.x})
    scale = np.log10 if panel.log_x else np.asarray
    low, high = float(scale(xs[0])), float(scale(xs[-1]))
    if panel.markers:
        # Room for the markers, and for the curves that stand aside.
        pad = 0.09 * (high - low) or (0.3 if panel.log_x else 0.1 * abs(low) or 1)
        low, high = low - pad, high + pad
    elif not panel.log_x:
        # Training starts at step 0, whenever its first line was written.
        low = min(low, 0.0)
    ends = (10 ** low, 10 ** high) if panel.log_x else (low, high)
    axes.set_xlim(*ends)
    axes.set_ylim(*y_limits(panel))

    spots = xs if panel.at_points else MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(*ends)
    if panel.log_x and not panel.at_points:
        # Powers of ten alone where there are many, more round numbers where there are few. A range too narrow
        # for two of them is divided evenly, as above.
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
        if high - low > 0.9:
            subs = (1.0,) if high - low > 2.5 else (1.0, 2.0, 5.0)
        ticks = LogLocator(subs=subs, numticks=8).tick_values(*ends)
        round_numbers = [x for x in ticks if ends[0] <= x <= ends[1]]
        spots = round_numbers if len(round_numbers) > 1 else spots
    spots = [round(x, 12) for x in map(float, spots) if ends[0] <= x <= ends[1]]
    axes.set_xticks(spots, labels_apart(spots, scale, low, high, panel.unit))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(panel.x_label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))


def y_limits(panel: Panel) -> tuple[float, float]:
    if panel.markers:
        spreads = [curve.spread or [0] * len(curve.y) for curve in panel.curves]
        points = [(y, e) for curve, spread in zip(panel.curves, spreads) for y, e in zip(curve.y, spread)]
        low, high = min(y - e for y, e in points), max(y + e for y, e in points)
    else:
        # A long curve: its first steps must not press the rest to the floor.
        drawn = [ys for curve in panel.curves for ys in (curve.y, *curve.faint[1:])]
        low, high = min(np.quantile(ys, 0.005) for ys in drawn), max(np.quantile(ys, 0.97) for ys in drawn)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1
    return low - room, high + room


def labels_apart(spots, scale, low: float, high: float, unit: str) -> list[str]:
    """Labels of the ticks at `spots`; one that would touch the label before it stays away, its tick does
    not."""
    # In points of print: a panel is about 200 wide, and half a digit of 8 points about 2.55.
    labels, end = [], -math.inf
    for spot in spots:
        label = short(spot, unit)
        middle = 200 * (float(scale(spot)) - low) / (high - low)
        half = 2.55 * sum(0.7 if letter in RAISED else 1 for letter in label)
        labels.append(label if middle - half > end + 4 else "")
        end = middle + half if labels[-1] else end
    return labels


def sparkline(values: list, width: int = 40) -> str:
    """Values as bars of text, each the mean of its stretch.

    >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7])
    '▁▂▃▄▅▆▇█'
    """
    parts = np.array_split(np.asarray(values, float), min(width, len(values)))
    means = [float(np.mean(part)) for part in parts]
    low, high = min(means), max(means)
    # What never moves is drawn in the middle.
    heights = [round(7 * (value - low) / (high - low)) if high > low else 3 for value in means]
    return "".join("▁▂▃▄▅▆▇█"[height] for height in heights)


# The three kinds of picture.


def study(rows: list[dict], out=None, x=("size", "flops"), metric: str = "mrr@10", by=("head", "objective"),
          title: str = "", note: str | None = None):
    """Quality against each key of `x`, a panel each. Prints the curves as text, and draws them where `out`
    says."""
    panels = []
    for key in x:
        axis = axis_of(key)
        curves = curves_of(rows, key, metric, by)
        panels.append(Panel(curves, axis.label, pretty(metric), axis.log, axis.unit, axis.chosen))
    if note is None:
        seeds = {row.get("seed") for row in rows if row.get("metric") == metric}
        note = f"mean of {len(seeds)} seeds; bars: one standard deviation" if len(seeds) > 1 else "one seed"
    show(panels, out, title, note)


def loss(folders: list, out=None, key: str = "loss", smooth: float = 0.02, log_x: bool = False,
         title: str = ""):
    """A number of training runs' metrics.jsonl by step: the values pale, their running mean over a share of
    the steps bold."""
    curves = []
    for place, path in enumerate(folders):
        file = Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path)
        rows = [row for row in read_rows(file) if is_number(row.get(key)) and "step" in row]
        points = [(row["step"], row[key]) for row in rows]
        if not points:
            raise ValueError(f"{file}: no line has a number as {key!r}; --key names another")
        x, y = (np.array(column, float) for column in zip(*points))
        # Around each step: a mean of only the past would lag behind the curve.
        half = round(len(y) * smooth / 2)
        places = np.arange(len(y))
        first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(y))
        sums = np.cumsum(np.insert(y, 0, 0))
        smoothed = (sums[last] - sums[first]) / (last - first)
        # More points than pixels only make a big file.
        pieces = np.array_split(places, min(len(y), 400))
        x, y, smoothed = ([float(values[piece].mean()) for piece in pieces] for values in (x, y, smoothed))
        name = file.parent.name if file.name == "metrics.jsonl" else file.stem
        curves.append(Curve(name, x, smoothed, [], place, place // len(COLORS), (x, y) if half else ()))
    note = f"bold: running mean over {smooth:.0%} of the steps" if smooth else ""
    show([Panel(curves, "step", key, log_x, markers=False)], out, title, note)


def costs(report: dict, out=None, x: str = "index_bytes", metric: str = "mrr@10", title: str = ""):
    """Quality against what it costs, a point for each run of a report of tools.compare."""
    axis, curves = axis_of(x), []
    for place, (name, run) in enumerate(report["runs"].items()):
        cost, quality = run["costs"].get(x), run.get(metric)
        if cost is not None and quality is not None:
            curves.append(Curve(name, [cost], [quality], [], place, place // len(COLORS)))
    if not curves:
        raise ValueError(f"no run has both {metric} and {x}; is this what tools.compare --json --costs "
                         "printed?")
    show([Panel(curves, axis.label, pretty(metric), axis.log, axis.unit)], out, title, "")


def show(panels: list[Panel], out, title: str, note: str):
    """The first panel's curves as text, and a picture of all if there is a place for it."""
    width = max(len(curve.name) for curve in panels[0].curves)
    for curve in panels[0].curves:
        first, last = f"{curve.y[0]:.4f}", f"{curve.y[-1]:.4f}"
        line = f"{sparkline(curve.y)}  {first} -> {last}" if len(curve.y) > 1 else first
        print(f"{curve.name:<{width}}  {line}")
    if out:
        print(draw(panels, out, title, note))


def add_arguments(parser):
    kinds = parser.add_subparsers(dest="kind", required=True)
    p = kinds.add_parser("study", help="quality against model size, FLOPs, noise, ...", formatter_class=Help)
    p.add_argument("files", nargs="+",
                   help="jsonl: head, objective, size, flops, seed, metric, value in each line")
    p.add_argument("--x", nargs="+", default=["size", "flops"], help="keys of the rows, a panel each")
    p.add_argument("--by", nargs="+", default=["head", "objective"],
                   help="keys that part the curves; the first one is the line, the others the colour")
    p.add_argument("--metric", default="mrr@10")
    q = kinds.add_parser("loss", help="training runs by step", formatter_class=Help)
    q.add_argument("files", nargs="+", help="run folders, or files like their metrics.jsonl")
    q.add_argument("--key", default="loss", help="which number of metrics.jsonl")
    q.add_argument("--smooth", type=share, default=0.02,
                   help="share of the steps in a running mean; 0 draws the values alone")
    q.add_argument("--log_x", action="store_true")
    r = kinds.add_parser("costs", help="quality against what it costs", formatter_class=Help)
    r.add_argument("files", nargs=1, metavar="report", help="what `tools.compare --json --costs` printed")
    measured = [key for key, axis in AXES.items() if not axis.chosen]
    r.add_argument("--x", default="index_bytes", choices=measured)
    r.add_argument("--metric", default="mrr@10")
    for kind in (p, q, r):
        kind.add_argument("--out", help="picture to write: .svg, .pdf or .png; only text without it")
        kind.add_argument("--title", default="", help="a line above the picture")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    run_command(f"{parser.prog} {args.kind}", partial(draw_kind, args))


def draw_kind(args):
    if args.kind == "study":
        rows = [row for path in args.files for row in read_rows(path)]
        study(rows, args.out, args.x, args.metric, tuple(args.by), args.title)
    elif args.kind == "loss":
        loss(args.files, args.out, args.key, args.smooth, args.log_x, args.title)
    else:
        costs(read_json(args.files[0]), args.out, args.x, args.metric, args.title)


if __name__ == "__main__":
    main()
