"""The demo's data is what it says, and the demo runs, is interrupted, goes on."""
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, read_jsonl, run

from data import Corpus, TrainingRows, read_queries
from evaluate import read_qrels

SMALL = "--packages numpy --dev_queries 40 --test_queries 60 --vocab 1024 --hidden 64".split()
WORLD = "--source synthetic --documents 500 --train_queries 1000 --dev_queries 40 --test_queries 60".split()
WORLD += "--vocab 1024 --hidden 64".split()


posix = pytest.mark.skipif(os.name != "posix", reason="bash")


# The data.

@pytest.fixture(scope="module")
def pydocs(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "pydocs"
    run("-m", "tools.demo_data", "--out", out, *SMALL, env={"PYTHONHASHSEED": "1"})
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "world"
    run("-m", "tools.demo_data", "--out", out, *WORLD, "--teacher_noise", 0, "--label_noise", 0.2)
    return out


def checksums(folder):
    return {str(f.relative_to(folder)): hashlib.md5(f.read_bytes()).hexdigest()
            for f in folder.rglob("*") if f.is_file()}


def test_same_seed_same_bytes(pydocs, tmp_path):
    run("-m", "tools.demo_data", "--out", tmp_path / "again", *SMALL, env={"PYTHONHASHSEED": "2"})
    assert checksums(tmp_path / "again") == checksums(pydocs)
    # Never over what stands.
    assert run("-m", "tools.demo_data", "--out", pydocs, *SMALL, check=False).returncode != 0


def test_another_model_for_the_same_data(pydocs, tmp_path):
    """Same settings, same model; other settings, same tokenizer. The data folder stays as it was."""
    before = checksums(pydocs)
    run("-m", "tools.demo_data", "--out", tmp_path / "same", "--model_only", pydocs, *SMALL)
    assert checksums(tmp_path / "same") == checksums(pydocs / "model")
    run("-m", "tools.demo_data", "--out", tmp_path / "wide", "--model_only", pydocs, *SMALL, "--hidden", 96)
    wide = checksums(tmp_path / "wide")
    assert wide["tokenizer.json"] == checksums(pydocs / "model")["tokenizer.json"]
    assert json.loads((tmp_path / "wide/config.json").read_text())["hidden_size"] == 96
    assert checksums(pydocs) == before


def test_no_test_pair_has_a_twin_in_training(pydocs):
    def likeness(a, b):
        apart = [re.sub("([a-z])([A-Z])", r"\1 \2", text).lower() for text in (a, b)]
        a, b = (set(re.findall("[a-z]+|[0-9]+", text)) for text in apart)
        return len(a & b) / len(a | b)

    texts = {row["_id"]: row["text"] for row in read_jsonl(pydocs / "corpus.jsonl")}
    train = [(row["query"], texts[row["pos"][0]]) for row in read_jsonl(pydocs / "train.jsonl")]
    queries = read_queries(pydocs / "queries.test.jsonl")
    groups = json.loads((pydocs / "test.groups.json").read_text())
    qrels = read_qrels(pydocs / "qrels/test.tsv")
    assert len(train) > 300 and len(queries) == len(groups) == len(qrels) == 60
    for qid, judged in qrels.items():
        nearest = max(max(likeness(queries[qid], q), likeness(texts[docid], d))
                      for docid in judged for q, d in train)
        assert nearest < 0.5
        assert groups[qid] == ("far" if nearest < 0.25 else "middle" if nearest < 0.35 else "near")
    held_out = {docid for split in ("dev", "test")
                for judged in read_qrels(pydocs / f"qrels/{split}.tsv").values() for docid in judged}
    assert not held_out & {row["pos"][0] for row in read_jsonl(pydocs / "train.jsonl")}


def test_the_document_does_not_hold_its_query(pydocs):
    corpus, queries = Corpus(pydocs), read_queries(pydocs / "queries.jsonl")
    pairs = [(queries[qid], corpus[corpus.row(docid)])
             for split in ("train", "test")
             for qid, judged in read_qrels(pydocs / f"qrels/{split}.tsv").items() for docid in judged]
    # A docstring may say a thing twice.
    assert sum(query in text for query, text in pairs) < 0.01 * len(pairs)


def test_msmarco_layout_holds_the_same(pydocs, tmp_path):
    run("-m", "tools.demo_data", "--out", tmp_path / "ms", "--layout", "msmarco", *SMALL)
    beir, msmarco = Corpus(pydocs), Corpus(tmp_path / "ms/collection.tsv")
    assert len(beir) == len(msmarco) and all(
        beir[i].split() == msmarco[i].split() and beir.docid(i) == msmarco.docid(i) for i in range(len(beir)))
    for split in ("train", "dev", "test"):
        assert (read_queries(tmp_path / f"ms/queries.{split}.tsv")
                == read_queries(pydocs / f"queries.{split}.jsonl"))
        assert read_qrels(tmp_path / f"ms/qrels.{split}.tsv") == read_qrels(pydocs / f"qrels/{split}.tsv")
    assert (len(TrainingRows(tmp_path / "ms/train.jsonl", corpus=msmarco))
            == len(read_jsonl(pydocs / "train.jsonl")))


def test_the_oracle_ranks_the_right_passage_first_and_wrong_labels_show(world):
    rows, right = read_jsonl(world / "train.jsonl"), {}
    texts, qrels = read_queries(world / "queries.train.jsonl"), read_qrels(world / "qrels/train.tsv")
    for qid, judged in qrels.items():
        right.setdefault(texts[qid], set()).update(judged)
    wrong = 0
    for row in rows:
        scores = dict(zip([*row["pos"], *row["neg"]], [*row["pos_scores"], *row["neg_scores"]]))
        best = max(scores, key=scores.get)
        assert best in right[row["query"]] and scores[best] == 10 and sorted(scores.values())[-2] < 10
        wrong += row["pos"][0] not in right[row["query"]]
    # The share asked for, within four standard deviations of the draw.
    assert abs(wrong / len(rows) - 0.2) < 4 * (0.2 * 0.8 / len(rows)) ** 0.5
    groups = json.loads((world / "test.groups.json").read_text())
    assert Counter(groups.values()) == {"unseen": 30, "seen": 30}


def test_teacher_noise_has_the_deviation_asked_for(world, tmp_path):
    run("-m", "tools.demo_data", "--out", tmp_path / "noisy", *WORLD, "--teacher_noise", 0.7)
    scores = np.array([row["pos_scores"][0] for row in read_jsonl(tmp_path / "noisy/train.jsonl")])
    assert abs(scores.mean() - 10) < 0.1 and abs(scores.std() - 0.7) < 0.1


def test_synthetic_queries_mostly_use_other_words(world):
    corpus, queries, shared = Corpus(world), read_queries(world / "queries.test.jsonl"), Counter()
    for qid, judged in read_qrels(world / "qrels/test.tsv").items():
        for docid in judged:
            shared[len(set(queries[qid].split()) & set(corpus[corpus.row(docid)].split()))] += 1
    total = sum(shared.values())
    assert shared[0] + shared[1] > 0.5 * total and shared[0] < 0.6 * total


def test_lexical_start_matches_words_and_the_default_does_not(pydocs, tmp_path):
    from model import Retriever

    run("-m", "tools.demo_data", "--out", tmp_path / "default", *SMALL, "--init", "default")
    texts = [row["text"] for row in read_jsonl(pydocs / "corpus.jsonl")[:50]]
    own = {}
    for name, folder in (("lexical", pydocs), ("default", tmp_path / "default")):
        r = Retriever.load(folder / "model", head="sparse")
        reps, tokens = r.encode(texts, "passage").to_dense(), r.tokenize(texts, "passage")
        # Weight on the text's own tokens.
        weights = [rep[list(set(ids))].sum().item() for rep, ids in zip(reps, tokens)]
        own[name] = sum(weights) / reps.sum().item()
    assert own["lexical"] > 0.6 > 0.3 > own["default"], own


def test_mntp_runs_on_it(pydocs, tmp_path):
    """It needs a mask token, which a tokenizer that drops punctuation cannot borrow from the text."""
    flags = [*"--objective mntp --lora_rank 0 --block_length 64 --workers 0".split(), "--corpus", pydocs]
    flags += "--queries_per_step 4 --max_steps 2".split()
    done = run("train.py", "--model", pydocs / "model", *flags, "--out", tmp_path / "mntp")
    assert (tmp_path / "mntp" / "summary.json").exists() and "step 2/2" in done.stdout
    maskless = tmp_path / "maskless"
    shutil.copytree(pydocs / "model", maskless)
    config = json.loads((maskless / "tokenizer_config.json").read_text())
    del config["mask_token"]
    (maskless / "tokenizer_config.json").write_text(json.dumps(config))
    done = run("train.py", "--model", maskless, *flags, "--out", tmp_path / "none", check=False)
    assert done.returncode != 0 and "no mask token" in done.stderr and "Traceback" not in done.stderr


# The demo.

# In place of Python: makes what a stage has to make, and takes as long as it is told.
STUB = """#!/bin/sh
trap 'exit 1' TERM
while [ "$1" != "" ]; do
  case $1 in train.py) folder=yes ;; tools.demo_data) data=yes ;; --out) shift; out=$1 ;; esac
  shift
done
if [ "$data" ]; then
  for second in $(seq "$STUB_SECONDS"); do printf 'reading: %s0%%|##  |\\r' "$second" >&2; sleep 1; done
  mkdir -p "$out"
  echo '{"_id": "q1", "text": "a query"}' | tee "$out/queries.train.jsonl" > "$out/queries.test.jsonl"
elif [ "$folder" ]; then
  mkdir -p "$out" && touch "$out/summary.json"
elif [ "$out" ]; then
  touch "$out"
fi
"""


def start_demo(out, *args, python=sys.executable, seconds=0):
    """The demo as a terminal starts it: the leader of a process group."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), "PYTHON": str(python),
           "STUB_SECONDS": str(seconds)}
    return subprocess.Popen([ROOT / "recipes/demo.sh", *args], env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_another_setting_needs_another_place(tmp_path, monkeypatch):
    """What stands was made with other settings: its table would be shown as the new one's."""
    demo = start_demo(tmp_path, "--tiny", python="/bin/false")
    said = demo.communicate()[0]
    assert demo.returncode == 1 and "stopped at: data" in said
    monkeypatch.setenv("SEED", "1")
    demo = start_demo(tmp_path, "--tiny", python="/bin/false")
    said = demo.communicate()[0]
    assert demo.returncode == 2
    assert "was made with SEED=0 MNTP=0, not with SEED=1 MNTP=0: give another OUT" in said
    monkeypatch.setenv("MNTP", "yes")
    demo = start_demo(tmp_path, "--tiny")
    assert "MNTP=yes: expected a number of steps" in demo.communicate()[0] and demo.returncode == 2


def run_until(demo, beginning):
    """Read the demo's lines up to one that begins so."""
    lines = []
    for line in demo.stdout:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    pytest.fail("".join(lines))


def interrupt(demo):
    """Ctrl-C: SIGINT to the whole group. Hand back what is still printed, once everyone of the group is
    gone."""
    os.killpg(demo.pid, signal.SIGINT)
    text = demo.communicate(timeout=120)[0]
    left = members(demo.pid)
    assert not left, f"still running after Ctrl-C: {left}"
    return text


def members(group):
    """The command lines of a process group's living members (Z: a zombie, dead but not yet asked after)."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], text=True, capture_output=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


@posix
def test_the_time_to_go_follows_the_pace_and_a_long_stage_shows_its_progress(tmp_path, stub):
    """Two seconds for what is 25 on the clock: about two minutes and a half remain at first, then 20
    seconds."""
    demo = start_demo(tmp_path, python=stub, seconds=2)
    text = demo.communicate(timeout=120)[0]
    assert demo.returncode == 0, text
    stages = re.findall(r"^-- .* \((\d+)m(\d+)s gone, about (\d+)m(\d+)s to go\)$", text, re.M)
    left = [60 * int(minutes) + int(seconds) for _, _, minutes, seconds in stages]
    assert len(left) == 17 and left[0] == 216 and all(5 <= value < 60 for value in left[1:]), text
    # Nothing was worth a line in two seconds.
    assert "reading" not in text

    demo = start_demo(tmp_path / "slow", python=stub, seconds=12)
    assert "   data: reading: " in "".join(run_until(demo, "-- sparse, CL:"))
    interrupt(demo)


@posix
@pytest.mark.parametrize("stage", ["-- data", "pydocs:"])
def test_ctrl_c_while_the_data_are_read_leaves_no_process(tmp_path, stage):
    """It reads with several processes, of which none may wait for work for ever."""
    demo = start_demo(tmp_path, *(["--tiny"] if stage == "pydocs:" else []))
    run_until(demo, stage)
    time.sleep(1)
    text = interrupt(demo)
    assert demo.returncode == 130 and "-- stopped after" in text and "Traceback" not in text
    assert not list((tmp_path / "data").glob("*/corpus.jsonl"))


@posix
def test_the_demo_goes_on_after_a_kill_and_after_ctrl_c_and_run_again_reuses_everything(tmp_path):
    demo = start_demo(tmp_path, "--tiny")
    run_until(demo, "-- sparse, CL:")
    time.sleep(3)
    os.killpg(demo.pid, signal.SIGKILL)
    demo.communicate()

    # Ctrl-C while both heads train, once one of them has made a step.
    demo = start_demo(tmp_path, "--tiny")
    lines = run_until(demo, ("step ", "sparse-cl step ", "dense-cl step ", "finished"))
    # The data stood already.
    assert lines[0].startswith("-- have ")
    text = interrupt(demo)
    assert demo.returncode == 130 and "Traceback" not in text
    told = [line for line in text.splitlines() if line.startswith("-- stopped")]
    assert (len(told) == 1 and "the same command again" in told[0]
            and f"rm -r {tmp_path}/data/tiny-pydocs " in told[0])

    demo = start_demo(tmp_path, "--tiny")
    done = demo.communicate(timeout=900)[0]
    assert demo.returncode == 0, done[-6000:]
    results = done[done.index("-- results"):]
    for row in ("BM25 ", "dense ", "sparse ", "BM25+sparse "):
        assert re.search(rf"^{re.escape(row)}.*\d\.\d{{4}}", results, re.M), results
    # Results by group, and an explanation that lists three passages.
    assert "near (" in results and re.search(
        r"^   3 +\d", results[results.index("the terms that made"):], re.M)

    demo = start_demo(tmp_path, "--tiny")
    again = demo.communicate(timeout=300)[0]
    assert demo.returncode == 0 and again.count("-- have ") == 17 and " gone" not in again
    assert table(again) == table(done)

    # Its last lines are two commands to try; they are run as they are printed.
    offered = again[again.index("-- now with your own words"):].split("\n", 1)[1]
    tried = subprocess.run(["bash", "-e"], input=offered, text=True, capture_output=True, cwd=ROOT)
    assert tried.returncode == 0 and "score " in tried.stdout and "('" in tried.stdout, (
        tried.stdout + tried.stderr)


def table(text):
    # From here on: train.py's lines begin with the head's name, too.
    results = text[text.index("-- results"):]
    return [line for line in results.splitlines() if line.startswith(("BM25", "sparse ", "dense "))]


def test_clean_removes_what_the_demo_wrote_and_nothing_else():
    listed = subprocess.run(["make", "-n", "clean"], cwd=ROOT, text=True, capture_output=True).stdout
    # Within `make test` another make says where it is, too.
    (line,) = [line for line in listed.splitlines() if "rm -rf" in line]
    place, gone = line.split("rm -rf")
    gone = set(gone.split())
    assert place == "cd . && "
    assert {"data/demo", "runs/demo", "indexes/demo", "runs/synthetic", "runs/tiny-pydocs",
            "runs/demo-mntp"} <= gone
    assert not gone & {"data", "runs", "indexes", "data/", "runs/", "indexes/", "."}
