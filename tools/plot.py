"""Pictures as SVG, and the same curves as a line of text in the terminal.

    python -m tools.plot scaling results.jsonl --out scaling.svg     # or: loss RUN..., tradeoff
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import read_lines, write_whole
from evaluate import Help

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


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.plot", description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=Help)
    plot_arguments(parser)
    args = parser.parse_args(argv)
    try:
        plot(args)
    except BrokenPipeError:  # `| head` has seen enough; Python's own last flush would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as e:  # a fault in what was given, not in the program: the message is the cure, the traceback is noise
        sys.exit(f"{parser.prog}: {e}")


if __name__ == "__main__":
    main()
