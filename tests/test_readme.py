"""README and docstrings keep their word: every command they print is accepted."""
import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run

import evaluate

README = ROOT / "README.md"
# Not ours to run: what makes the environment.
SETUP = ("pip", "git", "cd", ".", "source", "export", "anserini")


def blocks(text, language):
    """The code blocks of a language in Markdown."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text):
    """The shell commands of a text, as words: lines joined, comments dropped, chains taken apart.

    >>> list(commands("A=1 python x.py --to \\\\\\n  y  # a comment\\ncd z && make demo"))
    [['python', 'x.py', '--to', 'y'], ['cd', 'z'], ['make', 'demo']]
    """
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r" > \S+", "", line)  # where the output goes
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if word in ("&&", ";", "|", "||"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):  # VAR=x before a command
                command.append(word)


def printed():
    """(where, command) of every ```sh block of README and of every command in the docstrings of scripts."""
    for block in blocks(README.read_text(), "sh"):
        yield from (("README.md", command) for command in commands(block))
    for script in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]:
        doc = re.match(r'"""(.*?)"""|', script.read_text(), re.S)[0].replace("\\\\\n", "\\\n")
        for block in re.findall(r"^    (?:python|torchrun) (?:.*\\\n)*.*", doc, re.M):
            found = [(script.name, command) for command in commands(block) if "..." not in command]
            yield from found


def script_of(command):
    """(its place in the command, path, module): `train.py`, or `-m tools.mine`."""
    for place, word in enumerate(command):
        if word.endswith(".py"):
            return place, word, os.path.basename(word)[:-3]
        if word.startswith("tools."):
            return place, word.replace(".", "/") + ".py", word


class Accepted(Exception):
    pass


@pytest.mark.parametrize(
    "where, command", [pytest.param(*pair, id=f"{pair[0]}: {' '.join(pair[1])[:70]}") for pair in printed()])
def test_printed_commands_are_accepted(where, command, monkeypatch, capsys):
    if command[0] in SETUP or command[:3] == ["python", "-m", "venv"]:
        return
    if command[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in command[1:] if "=" not in word} <= set(targets)
        return
    if command[0].endswith(".sh") or command[0] == "bash":
        script = next(word for word in command if word.endswith(".sh"))
        assert os.access(ROOT / script, os.X_OK), f"{script} is not there or cannot be executed"
        return
    assert command[0] in ("python", "torchrun"), f"{where}: what kind of command is this? {command}"
    place, path, module = script_of(command)
    assert (ROOT / path).exists(), f"{where} prints {' '.join(command)}, but there is no {path}"
    monkeypatch.syspath_prepend(ROOT if module.startswith("tools.") else (ROOT / path).parent)
    module = importlib.import_module(module)
    parse = argparse.ArgumentParser.parse_args

    def stop_when_parsed(self, args=None, namespace=None):
        parse(self, args, namespace)  # exits with 2 on anything it does not know
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_when_parsed)
    monkeypatch.setattr(sys, "argv", command[place:])
    try:
        module.main()
    except Accepted:
        return
    except SystemExit as end:
        # Zero: `train.py --plan` has run and printed its plan.
        if end.code:
            pytest.fail(f"{where}: {' '.join(command)}\n{capsys.readouterr().err[-500:]}")
        return
    pytest.fail(f"{path} took no arguments")


def test_a_wrong_flag_is_seen(monkeypatch, capsys):
    command = "python -m tools.demo_data --out x --nonsense 1".split()
    with pytest.raises(pytest.fail.Exception):
        test_printed_commands_are_accepted("here", command, monkeypatch, capsys)


# "How to fork it": the toy loss, head and row format stand in test_losses, test_model and test_data.

def test_a_toy_measure_is_a_function_and_a_row_of_the_table(monkeypatch):
    """The rank of the first relevant result, 0 without one."""
    def first_rank(top):
        first = np.full(len(top.found), np.inf)
        np.minimum.at(first, top.query, top.rank + 1)
        return np.where(np.isinf(first), 0, first)

    monkeypatch.setitem(evaluate.METRICS, "first_rank", first_rank)
    qrels = {"q1": {"d2": 1}, "q2": {"d1": 1, "d3": 1}, "q3": {"d9": 1}, "q4": {"d3": 1}}
    run = {qid: {"d1": 3.0, "d2": 2.0, "d3": 1.0} for qid in qrels}
    found = evaluate.evaluate(qrels, run, ["first_rank@2", "first_rank"])
    assert found == {"first_rank@2": {"q1": 2, "q2": 1, "q3": 0, "q4": 0},
                     "first_rank": {"q1": 2, "q2": 1, "q3": 0, "q4": 3}}


# The steps are run as they are printed, in miniature: from MNTP to an export, and the ten lines of Python.

# Added to what README prints, so that a step of training is small and two are enough.
MINIATURE = "--max_steps 2 --queries_per_step 8 --block_length 64 --passage_length 64 --workers 0".split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the scripts, and with what README asks for under the names that it prints."""
    folder = tmp_path_factory.mktemp("readme")
    for name in [*ROOT.glob("*.py"), ROOT / "tools", ROOT / "recipes"]:
        (folder / name.name).symlink_to(name)
    small = "--packages numpy --dev_queries 40 --test_queries 60 --vocab 1024 --hidden 64".split()
    run("-m", "tools.demo_data", "--out", folder / "msmarco", "--layout", "msmarco", *small)
    run("-m", "tools.demo_data", "--out", folder / "beir/scifact", *small)
    for kind in ("queries", "qrels"):
        (folder / f"msmarco/{kind}.dev.tsv").rename(folder / f"msmarco/{kind}.dev.small.tsv")

    # Folders of these names are found before the hub is asked.
    (folder / "meta-llama").mkdir()
    (folder / "msmarco/model").rename(folder / "meta-llama/Llama-3.2-1B")
    save_cross_encoder(folder / "cross-encoder/ms-marco-MiniLM-L-6-v2", folder / "beir/scifact/model")
    return folder


def save_cross_encoder(folder, tokenizer):
    """A BERT of random weights that scores a pair of texts."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    tokenizer.save_pretrained(folder)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2, num_labels=1, pad_token_id=1)
    BertForSequenceClassification(config).save_pretrained(folder)


def in_miniature(command):
    """A command of README as this test runs it: two processes instead of four, two steps of training."""
    launcher = {"python": [sys.executable, "-W", "ignore"],
                "torchrun": [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]}
    words = [word.replace("--nproc_per_node=4", "--nproc_per_node=2") for word in command[1:]]
    return [*launcher[command[0]], *words, *(MINIATURE if "train.py" in words else [])]


def test_readmes_steps_run_as_they_are_printed(workplace):
    readme = README.read_text()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    steps = readme[readme.index("**1. MNTP.**"):]
    printed = ""
    for command in [command for block in blocks(steps, "sh") for command in commands(block)]:
        done = subprocess.run(in_miniature(command), cwd=workplace, env=env, text=True, capture_output=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        printed += done.stdout

    # Two runs that are both named dev: the table names them by their folders.
    for name in ("bm25", "sp-1b"):
        assert re.search(rf"^runs/{name}/dev\.trec +\d\.\d{{4}}", printed, re.M), printed
    for output in ("runs/sp-1b/summary.json", "indexes/sp-1b", "tides.html", "export/sp-1b"):
        assert (workplace / output).exists(), output
    assert (workplace / "runs/sp-1b/README.md").exists()  # the model card

    # The ten lines on the first screen, with this checkpoint in the place of the demo's.
    (workplace / "runs/demo").mkdir()
    (workplace / "runs/demo/sparse").symlink_to(workplace / "runs/sp-1b")
    (program,) = blocks(readme, "python")
    program = [sys.executable, "-c", program]
    done = subprocess.run(program, cwd=workplace, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and ".py'" in done.stdout, done.stdout + done.stderr
