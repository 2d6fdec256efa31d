"""tools/plot.py: what stands in its pictures, read back from SVG by an XML parser and from matplotlib's own
objects."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from conftest import run
from tools import plot


def words(path) -> list:
    """Every text of an SVG."""
    found = ET.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()).strip() for element in found]


def figure_of(panels):
    """The panels as matplotlib's objects, laid out: [(axes, {name: line})]."""
    figure_module = pytest.importorskip("matplotlib.figure")
    figure = figure_module.Figure(figsize=(0.35 + 3.35 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    drawn = [(a, plot.draw_panel(a, panel)) for a, panel in zip(axes, panels)]
    figure.draw_without_rendering()
    return drawn


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("plots") / "results.jsonl", np.random.default_rng(7)
    with open(path, "w") as file:
        for head in ("dense", "sparse"):
            for objective in ("cl", "kd", "cl+kd"):
                for size in (8e9, 1.2e9, 3.2e9):
                    for seed in range(2):
                        value = 0.3 + 0.02 * math.log(size / 1e9) + 0.005 * rng.normal()
                        row = {"head": head, "objective": objective, "size": size,
                               "flops": size * (6e9 + seed), "seed": seed}
                        file.write(json.dumps({**row, "metric": "mrr@10", "value": value}) + "\n")
    return path


def test_study_picture(results, tmp_path):
    text = run("-m", "tools.plot", "study", results, "--out", tmp_path / "s.svg").stdout
    assert sum("▁" in line or "█" in line for line in text.splitlines()) == 6
    found = words(tmp_path / "s.svg")
    names = [f"{head} {objective}" for head in ("sparse", "dense") for objective in ("CL", "KD", "CL+KD")]
    # Two panels, one legend.
    assert all(found.count(name) == 1 for name in names)
    # Both panels have one y axis, and its label stands once.
    assert ({"1.2B", "3.2B", "8B", "parameters", "training FLOPs", "MRR@10"} <= set(found)
            and found.count("MRR@10") == 1)
    assert "mean of 2 seeds; bars: one standard deviation" in found
    # No title when asked for none: every word is a name, a label, a tick or the note.
    others = set(found) - {*names, "parameters", "training FLOPs", "MRR@10",
                           "mean of 2 seeds; bars: one standard deviation"}
    assert all(word[0].isdigit() for word in others), others


def test_title_and_formats(results, tmp_path):
    rows = plot.read_rows(results)
    plot.study(rows, tmp_path / "t.svg", title="A < B & C")
    assert "A < B & C" in words(tmp_path / "t.svg")
    for name, start in (("a.pdf", b"%PDF"), ("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        plot.study(rows, tmp_path / name)
        plot.study(rows, tmp_path / f"again_{name}")
        assert (tmp_path / name).read_bytes().startswith(start)
        # No date and no random ids in it: the same picture is the same file.
        assert (tmp_path / name).read_bytes() == (tmp_path / f"again_{name}").read_bytes()
    assert all((tmp_path / name).stat().st_size < 150_000 for name in ("a.pdf", "a.png", "a.svg"))
    with pytest.raises(ValueError, match="ends in .svg, .pdf or .png"):
        plot.study(rows, tmp_path / "a.bmp")


def test_points_stand_where_the_numbers_say(results):
    curves = plot.curves_of(plot.read_rows(results), "size", "mrr@10")
    values = [json.loads(line) for line in open(results)]
    first = [row["value"] for row in values
             if (row["head"], row["objective"], row["size"]) == ("sparse", "cl", 1.2e9)]
    assert curves[0].name == "sparse CL" and curves[0].x == [1.2e9, 3.2e9, 8e9]
    assert (curves[0].y[0] == pytest.approx(np.mean(first))
            and curves[0].spread[0] == pytest.approx(np.std(first, ddof=1)))
    # Heads differ in line, objectives in colour.
    assert [(c.line, c.color) for c in curves] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]

    [(axes, lines)] = figure_of(
        [plot.Panel([plot.Curve("a", [1, 10, 100], [0.0, 1.0, 2.0])], "x", "y", log_x=True)])
    seen = lines["a"].get_transform().transform(lines["a"].get_xydata())
    # Equal factors on a log axis, and equal differences on a linear one, are equal steps on the paper.
    assert (np.allclose(np.diff(seen[:, 0])[0], np.diff(seen[:, 0])[1])
            and np.allclose(np.diff(seen[:, 1])[0], np.diff(seen[:, 1])[1]))
    with pytest.raises(ValueError, match="log axis"):
        figure_of([plot.Panel([plot.Curve("a", [0, 1], [1, 2])], "x", "y", log_x=True)])


def test_a_name_has_one_look_in_every_panel():
    """Panels of a study hold different curves: a panel without KD must not give KD's colour to CL+KD."""
    whole = [{"head": head, "objective": objective, "size": size, "metric": "mrr@10", "value": 0.3}
             for head in ("sparse", "dense") for objective in ("cl", "kd", "cl+kd") for size in (1e9, 3e9)]
    part = [row for row in whole if row["head"] == "dense" and row["objective"] != "kd"]
    curves = [plot.curves_of(rows, "size", "mrr@10", among=whole) for rows in (whole, part)]
    looks = [{curve.name: (curve.color, curve.line) for curve in panel} for panel in curves]
    assert len(set(looks[0].values())) == 6
    assert looks[1] == {name: looks[0][name] for name in ("dense CL", "dense CL+KD")}


@pytest.mark.parametrize("log", [False, True])
def test_error_bars_do_not_hide_each_other(log):
    """Six curves with the same numbers: the worst case. Their bars must stand apart by more than their caps
    are wide."""
    curves = [plot.Curve(str(i), [1, 2, 4], [0.5, 0.6, 0.7], [0.01] * 3, i) for i in range(6)]
    [(axes, lines)] = figure_of([plot.Panel(curves, "x", "y", log_x=log, at_points=True)])
    # (curves, points) in printer's points, 72 an inch.
    places = (np.array([line.get_transform().transform(line.get_xydata())[:, 0] for line in lines.values()])
              * 72 / axes.figure.dpi)
    # Apart from one another, and in the middle where the number is.
    assert (np.diff(places, axis=0) > 4).all() and np.allclose(
        places.mean(axis=0) * axes.figure.dpi / 72,
        axes.transData.transform([(x, 0.5) for x in (1, 2, 4)])[:, 0])
    left, right = axes.get_window_extent().x0, axes.get_window_extent().x1
    assert (places * axes.figure.dpi / 72 > left).all() and (places * axes.figure.dpi / 72 < right).all()


def test_ticks_on_every_axis():
    """Whatever the range, each axis has at least two labelled ticks, and no label touches its neighbour."""
    rng = np.random.default_rng(9)
    for trial in range(60):
        log, at_points = bool(trial % 2), trial % 3 == 0
        low = 10.0 ** rng.uniform(-3, 18) if log else rng.normal() * 10.0 ** rng.integers(-3, 4)
        high = low * 10.0 ** rng.uniform(0.02, 8) if log else low + 10.0 ** rng.uniform(-3, 4)
        y = rng.normal() * 10.0 ** rng.integers(-3, 3)
        curve = plot.Curve("a", [low, high], [y, y + 10.0 ** rng.uniform(-3, 2)], [])
        unit = ["", "flops", "bytes", "count"][trial % 4]
        [(axes, _)] = figure_of([plot.Panel([curve], "x", "y", log, unit, at_points)])
        frame = axes.get_window_extent()
        for axis, first, last in ((axes.xaxis, frame.x0, frame.x1), (axes.yaxis, frame.y0, frame.y1)):
            boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
            spans = sorted((box.x0, box.x1) if axis is axes.xaxis else (box.y0, box.y1) for box in boxes)
            assert sum(first - 1 < (a + b) / 2 < last + 1 for a, b in spans) >= 2, (trial, low, high)
            assert all(one[1] < two[0] for one, two in zip(spans, spans[1:])), (trial, low, high, unit)


def test_quality_against_noise(tmp_path):
    rows = [{"head": head, "objective": "cl", "noise": noise, "seed": seed, "metric": "mrr@10",
             "value": 0.6 - noise + 0.01 * seed, "size": 1e6}
            for head in ("sparse", "dense") for noise in (0, 0.2, 0.4) for seed in range(3)]
    plot.study(rows, tmp_path / "n.svg", x=("noise",))
    assert {"share of wrong labels", "0.2", "0.4", "sparse CL", "dense CL"} <= set(words(tmp_path / "n.svg"))
    # Against size, three degrees of noise would be averaged as though they were seeds.
    with pytest.raises(ValueError,
                       match="two rows of seed 0 fall on one point.*--by head objective: one of noise"):
        plot.curves_of(rows, "size", "mrr@10")
    curves = plot.curves_of(rows, "size", "mrr@10", by=("head", "objective", "noise"))
    assert [curve.name for curve in curves[:3]] == ["sparse CL 0", "sparse CL 0.2", "sparse CL 0.4"]


def test_loss_and_cost_pictures(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "loss": 5 / i}) for i in range(1, 1001)]
        # Killed while it wrote a line.
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')
    done = run("-m", "tools.plot", "loss", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "l.svg")
    assert "left out" in done.stderr and "one" in done.stdout
    assert ({"one", "two", "step", "loss"} <= set(words(tmp_path / "l.svg"))
            and (tmp_path / "l.svg").stat().st_size < 100_000)
    report = {"runs": {name: {"mrr@10": 0.3 + i, "costs": {"nnz_docs": 100 * 2**i}}
                       for i, name in enumerate(("base", "better"))}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    run("-m", "tools.plot", "costs", tmp_path / "report.json", "--x", "nnz_docs", "--out", tmp_path / "r.svg")
    assert {"base", "better", "non-zeros a document"} <= set(words(tmp_path / "r.svg"))
    done = run("-m", "tools.plot", "costs", tmp_path / "report.json", check=False)
    assert done.returncode == 1 and "no run has both mrr@10 and index_bytes" in done.stderr


def test_faults_say_the_cure(results, tmp_path):
    done = run("-m", "tools.plot", "study", results, "--metric", "ndcg@10", check=False)
    assert done.returncode == 1 and "no row has metric 'ndcg@10' with numbers" in done.stderr
    # Where matplotlib is missing, the terminal's version still comes.
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no such library')")
    without = {"PYTHONPATH": str(tmp_path)}
    assert "█" in run("-m", "tools.plot", "study", results, env=without).stdout
    done = run("-m", "tools.plot", "study", results, "--out", tmp_path / "s.svg", env=without, check=False)
    assert (done.returncode == 1 and "pip install -r tools/requirements.txt" in done.stderr
            and "Traceback" not in done.stderr)
