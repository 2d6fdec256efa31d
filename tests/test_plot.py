"""tools/plot.py: its pictures against an XML parser."""
import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from conftest import run
from test_evaluate import command, three_runs  # noqa: F401 (a fixture)
from tools import plot


def elements(svg, tag):
    return list(ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}" + tag))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("plots") / "results.jsonl", np.random.default_rng(7)
    with open(path, "w") as file:
        for head in ("sparse", "dense"):
            for objective in ("cl", "kd", "cl+kd"):
                for size in (1.2e9, 3.2e9, 8e9):
                    for seed in range(2):
                        file.write(json.dumps({"head": head, "objective": objective, "size": size, "flops": size * 6e9, "seed": seed, "metric": "mrr@10",
                                               "value": 0.3 + 0.02 * math.log(size / 1e9) + 0.005 * rng.normal(), "index_bytes": size}) + "\n")
    return path


def test_scaling_picture(results, tmp_path):
    text = run("-m", "tools.plot", "scaling", results, "--out", tmp_path / "s.svg", "--title", "A < B & C").stdout
    assert sum("▁" in line or "█" in line for line in text.splitlines()) == 6
    svg = (tmp_path / "s.svg").read_text()
    words = [element.text for element in elements(svg, "text")]
    assert len(elements(svg, "clipPath")) == 2 and words.count("sparse cl+kd") == 2 and "A < B & C" in words
    assert len(elements(svg, "polyline")) == 2 * 6 * 2       # two panels of six curves, each with its sample in the legend
    assert len(elements(svg, "circle")) == 2 * 6 * (3 + 1)   # a marker a point, and one in the legend
    bars = [line for line in elements(svg, "line") if line.get("stroke-width") == "1.3"]
    assert len(bars) == 2 * 6 * 3 * 3                        # each error bar is a line and two caps
    assert {"1.2B", "3.2B", "8B", "parameters", "training FLOPs", "MRR@10"} <= set(words)
    for label in elements(svg, "text"):
        assert 0 <= float(label.get("x")) <= float(ET.fromstring(svg).get("width")) and 0 <= float(label.get("y")) <= float(ET.fromstring(svg).get("height"))


def test_points_stand_where_the_numbers_say(results):
    curves = plot.by_cell(plot.read_rows(results), "size", "mrr@10", results)
    values = [json.loads(line)["value"] for line in open(results)]
    assert curves[0].name == "sparse cl" and curves[0].y[0] == pytest.approx(np.mean(values[:2])) and curves[0].spread[0] == pytest.approx(np.std(values[:2], ddof=1))
    svg = plot.chart([plot.Panel([plot.Curve("a", [1, 10, 100], [0.0, 1.0, 2.0], [0, 0, 0], 0)], "x", "y", log_x=True)], "t")
    xs, ys = zip(*((float(c.get("cx")), float(c.get("cy"))) for c in elements(svg, "circle")[:3]))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2) and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2) and ys[0] > ys[2]
    with pytest.raises(ValueError, match="log axis"):
        plot.chart([plot.Panel([plot.Curve("a", [0, 1], [1, 2], [0, 0], 0)], "x", "y", log_x=True)], "t")


def test_loss_and_tradeoff_pictures(results, three_runs, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "loss": 5 / i}) for i in range(1, 1001)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 10')  # killed while it wrote
    done = run("-m", "tools.plot", "loss", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "l.svg")
    assert "left out" in done.stderr and "one" in done.stdout
    svg = (tmp_path / "l.svg").read_text()
    assert len(elements(svg, "polyline")) == 2 * 3 and len(svg) < 100_000  # each curve pale and bold, and its sample
    assert run("-m", "tools.plot", "tradeoff", results, "--out", tmp_path / "t.svg").returncode == 0
    (tmp_path / "report.json").write_text(command(three_runs, "--json", "--costs"))
    run("-m", "tools.plot", "tradeoff", tmp_path / "report.json", "--x", "nnz_docs", "--out", tmp_path / "r.svg")
    assert "better" in [element.text for element in elements((tmp_path / "r.svg").read_text(), "text")]
    done = run("-m", "tools.plot", "scaling", results, "--metric", "ndcg@10", check=False)
    assert done.returncode == 1 and "no row has metric 'ndcg@10' with numbers" in done.stderr


def test_labels_keep_apart():
    rng = np.random.default_rng(8)
    for _ in range(100):
        spots = rng.uniform(0, 270, int(rng.integers(1, 16))).tolist()
        moved = plot.apart(spots, 16, 0, 270)
        assert np.diff(sorted(moved)).min(initial=99) > 15.9 and min(moved) >= -1e-9 and max(moved) <= 270 + 1e-9
        assert np.argsort(moved).tolist() == np.argsort(spots).tolist()


def test_ticks_are_round_and_inside():
    rng = np.random.default_rng(9)
    for _ in range(500):
        low = rng.normal() * 10.0 ** rng.integers(-3, 4)
        high = low + 10.0 ** rng.uniform(-3, 4)
        spots = plot.ticks(low, high)
        assert 2 <= len(spots) <= 7 and low - 1e-6 * (high - low) <= spots[0] and spots[-1] <= high + 1e-6 * (high - low)
        low = 10.0 ** rng.uniform(-3, 18)
        spots = plot.ticks(low, low * 10.0 ** rng.uniform(0.3, 12), log=True)
        assert 2 <= len(spots) <= 9
