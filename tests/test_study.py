"""The study: its significance against plain loops, what runs and what is skipped, what is committed."""
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, run
from scipy import stats

import train
from tools import study
from tools.study_report import crossed_test, reciprocal, student_p

COMMITTED = ROOT / "recipes/study"


# The test over seeds and queries.


def crossed_by_loops(d):
    """A textbook's two-way analysis of variance without replication, with Satterthwaite's freedom."""
    S, Q = len(d), len(d[0])
    grand = sum(map(sum, d)) / (S * Q)
    of_seed = [sum(row) / Q for row in d]
    of_query = [sum(d[s][q] for s in range(S)) / S for q in range(Q)]
    seeds = Q * sum((x - grand) ** 2 for x in of_seed) / (S - 1)
    queries = S * sum((x - grand) ** 2 for x in of_query) / (Q - 1)
    rest = sum((d[s][q] - of_seed[s] - of_query[q] + grand) ** 2 for s in range(S) for q in range(Q))
    rest /= (S - 1) * (Q - 1)
    variance = (seeds + queries - rest) / (S * Q)
    freedom = ((seeds + queries - rest) ** 2
               / (seeds**2 / (S - 1) + queries**2 / (Q - 1) + rest**2 / ((S - 1) * (Q - 1))))
    return 2 * stats.t.sf(abs(grand) / math.sqrt(variance), freedom)


def draw(rng, S=3, Q=80, mean=0.0, seeds=0.05, queries=0.2, rest=0.2):
    normal = rng.standard_normal
    return mean + seeds * normal((S, 1)) + queries * normal((1, Q)) + rest * normal((S, Q))


def test_p_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(0)
    for mean in (0.0, 0.03, 0.1):
        d = draw(rng, mean=mean, seeds=0.1, queries=0.3)
        assert crossed_test(d) == pytest.approx(crossed_by_loops(d.tolist()), rel=1e-4)
    one = draw(rng, S=1, mean=0.05)
    assert crossed_test(one) == pytest.approx(stats.ttest_1samp(one[0], 0).pvalue, rel=1e-4)
    # Satterthwaite's freedom need not be whole, and with few seeds it is small, where tails are heavy.
    for t, freedom in ((0.0, 5), (1.0, 1.0), (2.5, 2.3), (4.0, 599.0), (12.0, 40.0)):
        assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(t, freedom), rel=1e-3)
    # Nothing varies: p must not become 0 / 0.
    assert crossed_test(np.zeros((3, 5))) == 1.0
    assert crossed_test(np.full((3, 5), 0.125)) == 0.0


def test_equal_systems_differ_in_one_of_twenty_studies_at_most():
    """With seeds that matter, a test over queries alone would find differences everywhere."""
    rng = np.random.default_rng(1)
    studies = [draw(rng) for _ in range(400)]
    found = np.mean([crossed_test(d) < 0.05 for d in studies])
    naive = np.mean([stats.ttest_1samp(d.mean(0), 0).pvalue < 0.05 for d in studies])
    assert found < 0.085 and naive > 0.15
    # And without any effect of the seeds it keeps its power.
    even = [draw(rng, mean=0.08, seeds=0.0) for _ in range(200)]
    assert np.mean([crossed_test(d) < 0.05 for d in even]) > 0.7


def test_ranks_keep_mrr(tmp_path):
    values = [1 / rank for rank in range(1, 11)] + [0.0]
    lines = ["qid\tx ndcg@10\tx mrr@10"] + [f"q{i}\t0.5\t{value:.6f}" for i, value in enumerate(values)]
    (tmp_path / "test.tsv").write_text("\n".join(lines) + "\n")
    letters = study.ranks_of(tmp_path / "test.tsv")
    assert letters == "123456789a."
    assert reciprocal(letters).tolist() == pytest.approx(values)


# The lines that are printed.


def printed(preset):
    return run("-m", "tools.study", "print", "--preset", preset).stdout


def test_llama3_is_the_papers_grid():
    text = printed("llama3").replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("torchrun")]
    trains = [train.parse_args(words[words.index("train.py") + 1:]) for words in lines if "train.py" in words]
    mntp = [args for args in trains if args.objective == "mntp"]
    cells = [args for args in trains if args.objective != "mntp"]
    assert len(mntp) == 3 and len({(a.model, a.head, a.objective) for a in cells}) == len(cells) == 18
    assert sum("tools.beir" in words for words in lines) == 18
    assert {a.model for a in cells} == {a.out for a in mntp}

    # Parameters x passages encoded: 69 to 88 x 10^15 in every cell of the paper, with the printed epochs.
    parameters = {"1b": 1.236e9, "3b": 3.213e9, "8b": 8.03e9}
    # The training queries: what the 1B's 33,250 steps of 112 queries pass over 7 times.
    rows = 33_250 * 112 / 7
    for a in cells:
        size = re.search(r"mntp-(\w+)", a.model)[1]
        passages = a.epochs * rows * (1 + a.negatives)
        assert 65e15 < parameters[size] * passages < 90e15, (size, a.objective)


@pytest.mark.parametrize("preset", ["pocket", "pocket-dev", "pocket-real", "smollm2", "tiny"])
def test_every_printed_training_is_accepted(preset):
    text = printed(preset).replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if "train.py" in line]
    assert lines
    for words in lines:
        train.parse_args(words[words.index("train.py") + 1:])


def test_every_kind_of_cell_gets_the_same_effort_on_dev():
    jobs = study.PocketJobs(study.POCKET, Path("x")).dev()
    tried = {}
    for job in jobs:
        if job.cell:
            text, kind = " ".join(job.commands), (job.cell["source"], job.cell["head"], job.cell["objective"])
            assert job.cell["split"] == "dev" and "queries.dev" in text and "queries.test" not in text
            tried.setdefault(kind, set()).add(job.cell["setting"])
    assert len(tried) == 6 and {len(settings) for settings in tried.values()} == {len(study.RATES)}
    assert study.CHOSEN.keys() == {(head, objective) for _, head, objective in tried}


@pytest.mark.parametrize("preset", study.PRESETS)
def test_a_recipe_knows_its_needs_and_not_its_place(preset, monkeypatch):
    def recipes(out="x"):
        args = Namespace(preset=preset, out=out, gpus=1, msmarco=f"{out}/m", beir=f"{out}/b")
        return {job.name: job.recipe for job in study.jobs_of(args) if job.cell}

    plain = recipes()
    for out in ("data", ".", "cells", "/", "train", "a b"):
        assert recipes(out) == plain
    size = study.PRESETS[preset]
    if not isinstance(size, study.Pocket):
        return
    # {what is set: the cells that stand on it}. Their own lines do not name it.
    start = {name for name in plain if "lexical" not in name}
    taught = {name for name in plain if size.sources[name.split("/")[0]].taught}
    fewer = {name: of._replace(taught=of.taught and of.taught - 1, data=f"{of.data} --seed 1 ")
             for name, of in size.sources.items()}
    read = set() if size.fetch else start
    for setting, concerned in (({"mntp_steps": 7}, start), ({"teacher_steps": 7}, taught),
                               ({"clm_steps": 7}, read), ({"sources": fewer}, set(plain))):
        monkeypatch.setitem(study.PRESETS, preset, size._replace(**setting))
        now = recipes()
        assert {name for name in plain if now[name] != plain[name]} == concerned, setting


def test_printed_lines_are_ready_for_a_shell(tmp_path, monkeypatch, capsys):
    # A name with a space, in a system that cannot say which cores are ours.
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    folder = tmp_path / "my study"
    study.main(["print", "--preset", "pocket-real", "--out", str(folder)])
    text = capsys.readouterr().out
    lines = text.splitlines()
    (head,) = (i for i, line in enumerate(lines) if line.startswith("head -n"))
    assert lines[head - 1].startswith("mkdir -p")
    queries = folder / "smollm2/data/queries.train.jsonl"
    queries.parent.mkdir(parents=True)
    queries.write_text("a query\n")
    shell = ["bash", "-c", "\n".join(lines[head - 1:head + 1])]
    subprocess.run(shell, check=True)
    written = folder / "smollm2/teacher/queries.jsonl"
    assert written.read_text() == "a query\n"
    # `run` reads the same line in the same way.
    written.unlink()
    study.run_line(lines[head])
    assert written.read_text() == "a query\n"
    trains = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if "train.py" in line]
    outs = [Path(train.parse_args(words[2:]).out) for words in trains]
    assert len(outs) == 8 and all(out.is_relative_to(folder) for out in outs)


# What runs, and what is skipped.


def jobs_in(folder):
    """A preparation, a cell that needs it, a cell that fails, and one that needs a preparation that fails."""
    made, count = folder / "made", folder / "count"
    cell = {"source": "s", "start": "pretrained", "width": 1, "head": "sparse", "objective": "cl",
            "budget": 1.0, "label_noise": 0.0, "teacher_noise": 0.5, "seed": 0, "split": "test"}
    job, inputs = study.Job, {"text": made / "text.tsv"}
    return [
        job("made", made, [f"mkdir {made}", f"sh -c 'date +%s%N >> {made}/text.tsv; echo run >> {count}'"]),
        job("good", folder / "good", [f"sh -c 'echo good >> {count}' --resume"], ("made",), inputs, cell),
        job("bad", folder / "bad", ["sh -c 'echo the cure is this >&2; exit 3'"], (), {}, cell | {"seed": 1}),
        job("broken", folder / "broken", ["false"]),
        job("lost", folder / "lost", ["true"], ("broken",), {}, cell | {"seed": 2}),
    ]


def test_a_base_that_is_made_again_is_the_same_base(tmp_path):
    """retriever.json holds the time of writing: who makes a base anew must not run all cells again."""
    for name, weights, written in (("a", b"w", "1"), ("again", b"w", "2"), ("other", b"x", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "retriever.json").write_text(written)
    prints = study.Prints()
    assert prints[tmp_path / "a"] == prints[tmp_path / "again"] != prints[tmp_path / "other"]
    assert prints[tmp_path / "none"] is None


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """run() over these jobs or others, the scores of a cell being made up."""
    monkeypatch.setattr(study, "measured", lambda job: {"metrics": {"mrr@10": 0.5}, "ranks": "12"})
    args = Namespace(preset="tiny", out=str(tmp_path), results=str(tmp_path / "results.jsonl"),
                     msmarco="msmarco", beir="beir", at_once=2, gpus=0, keep=False)

    def again(jobs=jobs_in):
        monkeypatch.setattr(study, "plain_jobs", lambda args: jobs(Path("$OUT")))
        study.run(args)
        return {row["job"]: row for row in read_jsonl(args.results)}
    return again


def count(folder):
    return (folder / "count").read_text().split()


def test_a_failed_cell_is_a_gap_and_a_finished_one_is_not_run_again(small_study, tmp_path, capsys):
    rows = small_study()
    assert rows["good"]["metrics"] == {"mrr@10": 0.5} and "error" not in rows["good"]
    assert "metrics" not in rows["bad"]
    assert "exit status 3" in rows["bad"]["error"] and "bad.log" in rows["bad"]["error"]
    assert "needs broken" in rows["lost"]["error"]
    said = capsys.readouterr().out
    failed = said.split("failed: ")[-1]
    assert sorted(failed.strip().split(", ")) == ["bad", "broken", "lost"]
    # A cell that failed is none that is done.
    assert re.findall(r"^(\d)/3 cells, .* \| good", said, re.M) == ["1"] and "1 of 3 cells" in said
    assert set(re.findall(r"^(\d)/3 cells", said, re.M)) <= {"0", "1"}
    assert count(tmp_path) == ["run", "good"]

    again = small_study()
    assert again["good"] == rows["good"] and count(tmp_path) == ["run", "good"]

    # Another input is another cell; the same bytes are the same input.
    text = tmp_path / "made/text.tsv"
    os.utime(text)
    small_study()
    assert count(tmp_path) == ["run", "good"]
    text.write_text("other\n")
    assert small_study()["good"]["inputs"] != rows["good"]["inputs"]
    assert count(tmp_path) == ["run", "good", "good"]

    # A clone has only the rows: nothing is run for them. A deleted row brings its preparation back.
    shutil.rmtree(tmp_path / "made")
    small_study()
    assert count(tmp_path) == ["run", "good", "good"]
    results = tmp_path / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(line for line in lines if '"job": "good"' not in line))
    small_study()
    assert count(tmp_path) == ["run", "good", "good", "run", "good"]


def test_an_index_that_a_kill_left_is_not_in_the_way(small_study, tmp_path):
    """As of a cell that was killed while it searched: its index stands, its row does not."""
    index, run_folder = tmp_path / "good/index", tmp_path / "good/run"
    # A first start notes what the folder was begun for.
    rows = small_study()
    for folder, file in ((index, "manifest.json"), (run_folder, "args.json")):
        folder.mkdir(parents=True)
        (folder / file).write_text("{}")
    (tmp_path / "good.seconds.json").unlink()
    write_rows(tmp_path / "results.jsonl", [row for row in rows.values() if row["job"] != "good"])
    assert "error" not in small_study()["good"]
    assert not index.exists() and run_folder.exists()  # training goes on from what it has


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def jobs_that_refuse(documents, rate):
    """As the real ones: data that are made once, and a training that goes on with its own settings only."""
    def jobs(folder):
        made, more, *_ = jobs_in(folder)
        made.commands.append(f"sh -c 'echo {documents} >> {made.folder}/text.tsv'")
        train = (f"sh -c 'mkdir -p {more.folder}/run; cd {more.folder}/run; echo start >> starts; "
                 f"if [ -e rate ]; then grep -x {rate} rate; else echo {rate} > rate; fi' --resume")
        return [made, more._replace(commands=[train])]
    return jobs


def test_a_folder_that_stands_is_in_nobodys_way(small_study, tmp_path):
    results, cell = tmp_path / "results.jsonl", tmp_path / "good"
    first = small_study(jobs_that_refuse("4000", "1e-3"))
    assert not any("error" in row for row in first.values())

    # Another rate: the cell is another one, and its data are the same.
    rows = small_study(jobs_that_refuse("4000", "2e-3"))
    assert "error" not in rows["good"] and rows["good"]["recipe"] != first["good"]["recipe"]
    assert (cell / "run/rate").read_text() == "2e-3\n" and count(tmp_path) == ["run"]
    assert Path(f"{cell}.old/run/rate").read_text() == "1e-3\n"

    # Rows that are gone, as with another --results: data that are finished stay, and have a row again.
    results.unlink()
    again = small_study(jobs_that_refuse("4000", "2e-3"))
    assert count(tmp_path) == ["run"] and not any("error" in row for row in again.values())
    assert again["good"]["inputs"] == rows["good"]["inputs"]
    assert again["made"]["seconds"] == rows["made"]["seconds"]

    # A cell that was killed goes on where it was.
    results.write_text("".join(line for line in results.open() if '"job": "good"' not in line))
    (tmp_path / "good.seconds.json").unlink()
    small_study(jobs_that_refuse("4000", "2e-3"))
    assert (cell / "run/starts").read_text() == "start\n" * 3

    # Data with other settings are made anew, and so is what stands on them: nothing of it is mixed.
    rows = small_study(jobs_that_refuse("8000", "2e-3"))
    assert count(tmp_path) == ["run", "run"] and not any("error" in row for row in rows.values())
    assert (cell / "run/starts").read_text() == "start\n"
    assert rows["good"]["inputs"] != again["good"]["inputs"]

    # A folder of which nothing is known, as one that was made by hand, is not removed.
    results.unlink()
    Path(f"{tmp_path}/made.recipe.json").unlink()
    (tmp_path / "made/mine").write_text("by hand")
    assert not any("error" in row for row in small_study(jobs_that_refuse("8000", "2e-3")).values())
    assert (tmp_path / "made.old/mine").exists() and not (tmp_path / "made/mine").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The miniature study, killed when two cells are there, and started again."""
    folder = tmp_path_factory.mktemp("tiny")
    results = folder / "results.jsonl"
    command = ["-m", "tools.study", "run", "--preset", "tiny", "--out", str(folder / "out")]
    command += ["--results", str(results)]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)

    def cells():
        return [row for row in read_jsonl(results) if "metrics" in row] if results.exists() else []

    # Other cells are at work when two rows are there: the kill falls anywhere within them.
    until = time.time() + 600
    while len(cells()) < 2 and process.poll() is None and time.time() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = cells()
    assert 2 <= len(before) < 20
    return folder, command, before, run(*command).stdout


def test_a_killed_study_goes_on(tiny):
    folder, _, before, text = tiny
    rows = read_jsonl(folder / "results.jsonl")
    cells = {row["job"]: row for row in rows if "head" in row}
    assert len(cells) == 20 and not any("error" in row for row in rows), [row.get("error") for row in rows]
    for row in before:  # what was finished was not measured again
        assert cells[row["job"]] == row
    assert "20 of 20 cells" in text
    for row in cells.values():
        assert len(row["ranks"]) == 30
        assert row["metrics"]["mrr@10"] == pytest.approx(reciprocal(row["ranks"]).mean(), abs=1e-6)
        assert row["flops"] <= row["budget"] * 1.2 and row["size"] > 0
        assert set(row["inputs"]) == {"model", "rows", "corpus", "queries", "qrels"}
    # The x axis of the pictures: parameters, of each width its own.
    sizes = {row["width"]: row["size"] for row in cells.values()}
    assert sizes[32] < sizes[64]


def test_a_deleted_row_is_measured_again_and_alike(tiny):
    folder, command, *_ = tiny
    results = folder / "results.jsonl"
    rows = read_jsonl(results)
    gone = next(row for row in rows if row["job"] == "world/dense-cl-32-seed1")
    results.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not gone))
    shutil.rmtree(folder / "out/cells/world/dense-cl-32-seed1")
    run(*command)
    after = {row["job"]: row for row in read_jsonl(results)}
    assert len(after) == len(rows)
    assert after[gone["job"]]["metrics"] == gone["metrics"] and after[gone["job"]]["inputs"] == gone["inputs"]


def test_rows_that_are_gone_come_back_though_folders_stand(tiny):
    """As after `git checkout` of the results: data and bases are finished, and refuse to be made again."""
    folder, command, *_ = tiny
    results = folder / "results.jsonl"
    before = {row["job"]: row for row in read_jsonl(results)}
    lost = {"world/data", "world/default-32", "world/base-32", "world/dense-cl-32-seed0"}
    write_rows(results, [row for name, row in before.items() if name not in lost])
    run(*command)
    after = {row["job"]: row for row in read_jsonl(results)}
    assert after.keys() == before.keys() and not any("error" in row for row in after.values())
    for key in ("metrics", "inputs", "ranks"):
        assert after["world/dense-cl-32-seed0"][key] == before["world/dense-cl-32-seed0"][key]
    assert after["world/base-32"]["seconds"] == before["world/base-32"]["seconds"]


def test_other_settings_in_the_same_folder(tiny, tmp_path, monkeypatch):
    """train.py refuses to go on with other settings than it was started with."""
    folder, results = tiny[0], tmp_path / "results.jsonl"
    shutil.copy(folder / "results.jsonl", results)
    before = {row["job"]: row for row in read_jsonl(results)}
    rates = dict.fromkeys(study.CHOSEN, "1e-3")
    other = study.TINY._replace(widths=(32,), seeds=(0,), starts=("pretrained",), panels={}, rates=rates,
                                clm_steps=4)
    monkeypatch.setitem(study.PRESETS, "tiny", other)
    study.main(["run", "--preset", "tiny", "--out", str(folder / "out"), "--results", str(results)])
    after = {row["job"]: row for row in read_jsonl(results)}
    for name in ("world/base-32", "world/sparse-cl-32-seed0", "world/dense-cl-32-seed0"):
        assert "error" not in after[name] and after[name]["recipe"] != before[name]["recipe"]
    assert after["world/data"] == before["world/data"]
    assert "--lr 1e-3" in (folder / "out/cells/world/dense-cl-32-seed0.log").read_text()


def test_table_and_pictures(tiny):
    folder, *_ = tiny
    results = folder / "results.jsonl"
    text = run("-m", "tools.study", "table", "--preset", "tiny", "--results", str(results)).stdout
    plain = {"width": 64, "head": "dense", "start": "pretrained", "label_noise": 0.0, "budget": 6e9}
    rows = [row for row in read_jsonl(results) if all(row.get(key) == value for key, value in plain.items())]
    values = [row["metrics"]["mrr@10"] for row in rows]
    assert len(values) == 2 and f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in text
    assert "share of wrong labels" in text and "Two starts" in text and "gap" not in text
    pytest.importorskip("matplotlib")
    run("-m", "tools.study", "plot", "--preset", "tiny", "--results", str(results), "--out", str(folder))
    for name in ("scaling.svg", "noise.svg"):
        assert "</svg>" in (folder / name).read_text()


# What is committed.


def test_results_that_are_no_rows(tmp_path):
    good = '{"preset": "tiny", "job": "a", "recipe": "", "inputs": {}, "when": "", "machine": ""}\n'
    cell = good.replace("}\n", ', "split": "test", "error": "gone"}\n')
    for bad, said in (("<<<<<<< HEAD\n", "not JSON"), ('{"a": 1}\n', "lacks preset, job"), ("[]\n", "object"),
                      (cell, "lacks source, start")):
        (tmp_path / "results.jsonl").write_text(good + bad)
        with pytest.raises(ValueError, match=rf"results.jsonl:2: .*{said}"):
            study.read_all(tmp_path / "results.jsonl")


needs_results = pytest.mark.skipif(not (COMMITTED / "results.jsonl").exists(), reason="nothing is committed")


@needs_results
def test_the_committed_table_is_that_of_the_committed_rows():
    text = run("-m", "tools.study", "table", "--preset", "pocket").stdout
    assert (COMMITTED / "table.md").read_text().strip().endswith(text.strip())


@needs_results
@pytest.mark.parametrize("preset", ["pocket", "pocket-dev", "pocket-real"])
def test_a_clone_has_nothing_to_run(preset, tmp_path):
    args = Namespace(preset=preset, out=str(tmp_path), gpus=0, msmarco="msmarco", beir="beir")
    jobs, rows = study.jobs_of(args), study.read_rows(COMMITTED / "results.jsonl", preset)
    assert jobs and study.to_run(jobs, rows, study.Prints()) == []


@needs_results
@pytest.mark.parametrize("verb", ["table", "plot"])
def test_a_metric_that_no_row_has(verb, tmp_path):
    with pytest.raises(SystemExit, match="--metric ndcg@5: .* they have mrr@10, ndcg@10, recall@100"):
        study.main([verb, "--metric", "ndcg@5", "--out", str(tmp_path)])


@needs_results
def test_the_numbers_of_the_readme_are_the_tables():
    """Between the marks of the study, every number of three decimals stands in the committed table."""
    readme = (ROOT / "README.md").read_text()
    part = re.search(r"<!-- study -->(.*?)<!-- /study -->", readme, re.S)
    if part is None:
        pytest.skip("README says nothing of the study")
    table = (COMMITTED / "table.md").read_text()
    numbers = re.findall(r"[+-]?0\.\d{3}\b", part[1])
    assert numbers and [number for number in numbers if number not in table] == []
