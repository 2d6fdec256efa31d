"""index.py where it is killed, run twice, or given what it cannot take: nothing wrong without a word."""
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest

import index
from conftest import ROOT, run
from data import read_json
from index import build, open_index, search


def command(*words, **kw):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-W", "ignore", *map(str, words)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **kw)


@pytest.fixture
def flags(tiny_model, corpus, tmp_path):
    return ["index.py", "build", "--model", tiny_model, "--corpus", corpus, "--head", "sparse", "--out",
            tmp_path / "ix"]


@pytest.mark.parametrize("tool", ["index", "bm25"])
def test_two_builders_of_one_folder(flags, corpus, tmp_path, tool):
    """The second is told who is at work; the first one's index is whole."""
    bm25s = ["-m", "tools.bm25", "build", "--corpus", corpus, "--out", tmp_path / "ix"]
    words = flags if tool == "index" else bm25s
    builders = [command(*words) for _ in range(4)]
    said = [builder.communicate(timeout=120)[0] for builder in builders]
    codes = [builder.returncode for builder in builders]
    assert codes.count(0) == 1, said
    for code, words_ in zip(codes, said):
        if code != 0:
            assert re.search(r"process \d+ is writing there|exists", words_) and "Traceback" not in words_
    index.read_manifest(tmp_path / "ix", full=True)
    assert open_index(tmp_path / "ix").n_docs == 101


def test_killed_while_its_shards_are_removed(tiny_model, corpus, tmp_path, monkeypatch):
    """The plan must not go before the shards: another model would find them, and take them for its own."""
    out = tmp_path / "ix"

    real = shutil.rmtree

    def killed(path, *args, **kw):
        # Not by the removal of what earlier kills left: there is nothing.
        if os.path.exists(path):
            raise KeyboardInterrupt
        real(path, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build(str(tiny_model), corpus, out, head="sparse", shard_docs=20, device="cpu")
    shutil.rmtree(out, ignore_errors=True)
    # Whatever is left of the shards no longer has their name.
    assert not (tmp_path / "ix.shards").exists() or (tmp_path / "ix.shards/plan.json").exists()
    build(str(tiny_model), corpus, out, head="dense", shard_docs=20, device="cpu")
    assert open_index(out).kind == "dense" and open_index(out).n_docs == 101


def test_shards_of_another_state_of_the_corpus_or_the_model_are_refused(tiny_model, corpus, tmp_path,
                                                                       monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    copy = shutil.copytree(corpus, tmp_path / "corpus", ignore=shutil.ignore_patterns("*.store", "*.lock"))

    def begin(**kw):
        with monkeypatch.context() as patch:
            patch.setattr(index, "put_together", lambda *args: None)
            build(str(folder), copy, tmp_path / "ix", head="sparse", shard_docs=20, device="cpu", **kw)

    begin()
    # What was used, not what was asked for: another machine would take something else.
    assert read_json(tmp_path / "ix.shards" / "plan.json")["encoder"]["compute"] == "fp32"
    weights = folder / "model.safetensors"
    # One bit of one weight: the same files, names and sizes, and yet another model.
    old, changed = weights.read_bytes(), bytearray(weights.read_bytes())
    changed[-3] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ValueError, match="was begun with encoder"):
        begin()
    weights.write_bytes(old)
    with open(copy / "corpus.jsonl", "a") as file:
        file.write(json.dumps({"_id": "new", "text": "a passage"}) + "\n")
    with pytest.raises(ValueError, match="was begun with state of the corpus"):
        begin()


BUILDS = ["--shard_docs -1", "--shard_docs 0", "--top_terms -1", "--tokens_per_batch -1", "--max_length 0"]


@pytest.mark.parametrize("words", BUILDS)
def test_builds_numbers_out_of_range(flags, words):
    done = run(*flags, *words.split(), check=False)
    assert done.returncode == 2 and f"{words.split()[0]}: expected a whole number above 0" in done.stderr


@pytest.mark.parametrize("words", ["--k 0", "--k -5", "--batch -1", "--threads 0"])
def test_searchs_numbers_out_of_range(built, tmp_path, words):
    done = run("index.py", "search", "--index", built / "sparse", "--queries", "x", "--out", tmp_path / "r",
               *words.split(), check=False)
    assert done.returncode == 2 and f"{words.split()[0]}: expected a whole number above 0" in done.stderr


def test_a_search_from_within_the_index_has_a_tag(built, tmp_path, monkeypatch):
    monkeypatch.chdir(built / "sparse")
    search(".", {"q": "the cat"}, 3, tmp_path / "run.trec", device="cpu")
    assert {line.split()[5] for line in (tmp_path / "run.trec").read_text().splitlines()} == {"sparse"}


def test_costs_belong_to_their_run(built, tmp_path, monkeypatch):
    """Killed between a run and its costs: the costs of the run before are gone, not left beside the new
    one."""
    out = tmp_path / "run.trec"
    search(built / "sparse", {"q": "the cat"}, 3, out, device="cpu")
    before = read_json(f"{out}.json")
    monkeypatch.setattr(index, "costs_of", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        search(built / "sparse", {"q": "a dog", "p": "the mat"}, 3, out, device="cpu")
    assert before["run"] and not (tmp_path / "run.trec.json").exists() and out.exists()


def test_a_full_disk_is_an_error_with_the_file(tiny_model, corpus, tmp_path):
    """A limit on the size of files stands for the disk. Written through a map it would be a signal without a
    word."""
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    for words in (["index.py", "build", "--model", tiny_model, "--corpus", corpus, "--head", "dense"],
                  ["-m", "tools.bm25", "build", "--corpus", corpus]):
        builder = command(*words, "--out", tmp_path / "ix", preexec_fn=small_files)
        said, _ = builder.communicate(timeout=120)
        assert builder.returncode == 1 and "Traceback" not in said and str(tmp_path) in said, said[-800:]
        assert not (tmp_path / "ix").exists()
        shutil.rmtree(tmp_path / "ix.shards", ignore_errors=True)


@pytest.mark.parametrize("what", ["missing model", "folder for a file", "damaged manifest", "no rights"])
def test_no_tracebacks(built, tiny_model, corpus, tmp_path, what):
    if what == "missing model":
        words = ["build", "--model", tmp_path / "nobody", "--corpus", corpus, "--out", tmp_path / "ix"]
    elif what == "folder for a file":
        words = ["search", "--index", built / "sparse", "--queries", tmp_path, "--out", tmp_path / "r"]
    elif what == "damaged manifest":
        shutil.copytree(built / "sparse", tmp_path / "ix")
        (tmp_path / "ix/manifest.json").write_text(json.dumps({"a": 1})[:-2])
        words = ["search", "--index", tmp_path / "ix", "--queries", corpus, "--out", tmp_path / "r"]
    else:
        words = ["build", "--model", tiny_model, "--corpus", corpus, "--head", "sparse", "--out", "/proc/ix"]
    done = run("index.py", *words, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("index.py"), done.stderr


def test_ctrl_c_is_one_line(flags, monkeypatch, capsys):
    """While shards are encoded, by a real signal to this process."""
    monkeypatch.setattr(index, "encode_shards", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as error:
        index.main([str(word) for word in flags[1:]])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == 130 and said.endswith("build: interrupted")
