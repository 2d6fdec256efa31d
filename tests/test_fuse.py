"""tools/fuse.py against sums made by hand."""
import pytest

from conftest import run
from data import write_run
from evaluate import read_run
from tools import fuse


def test_fuse(tmp_path):
    a, b = {"q1": {"x": 10.0, "y": 5.0, "z": 0.0}, "q2": {"x": 3.0}}, {"q1": {"y": 0.4, "w": 0.2, "x": 0.1}}
    write_run(tmp_path / "a", a), write_run(tmp_path / "b", b)
    out = run("-m", "tools.fuse", "--runs", tmp_path / "a", tmp_path / "b", "--weights", 1, 0.5,
              "--scale", 10, "--out", tmp_path / "f").stdout
    fused = read_run(tmp_path / "f")
    # q2 is in one run, with one passage: a range of nothing, and so a score of 0.
    assert (fused["q1"] == pytest.approx({"x": 10.0, "y": 5 + 5, "w": 5 / 3, "z": 0.0})
            and fused["q2"] == {"x": 0.0})
    assert "1 of them not in every run" in out
    run("-m", "tools.fuse", "--runs", tmp_path / "a", tmp_path / "b", "--k", 1, "--out", tmp_path / "f")
    assert read_run(tmp_path / "f")["q1"] == {"y": 1.5}


@pytest.mark.parametrize("flag", ["--k=-1", "--k=0", "--scale=nan", "--scale=-1", "--scale=0",
                                  "--weights=inf", "--run=a"])
def test_numbers_out_of_range_are_refused(tmp_path, flag):
    write_run(tmp_path / "a", {"q1": {"x": 10.0}})
    with pytest.raises(SystemExit):
        fuse.main(["--runs", str(tmp_path / "a"), "--out", str(tmp_path / "f"), flag])
    assert not (tmp_path / "f").exists()


def test_one_weight_a_run(tmp_path):
    write_run(tmp_path / "a", {"q1": {"x": 10.0}})
    with pytest.raises(ValueError, match="--weights: 2 numbers for 1 runs"):
        fuse.fuse([tmp_path / "a"], [1.0, 2.0])
