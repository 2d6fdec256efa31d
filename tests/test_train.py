"""train.py: the same gradient however the batch is spread, the same losses however often the run is killed.

The oracles are one process with the whole batch in one forward pass (whose losses test_losses.py holds
against plain loops), and a run that nobody interrupted. Run as a script under torchrun, this file is one of
the processes that have to agree with them. """
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist

from conftest import ROOT, read_jsonl, run, torchrun  # puts the project on the path
import train

# How the same eight queries are spread: processes -> what each tries.
SPREADS = {2: ["--parallel ddp --accumulation 1", "--parallel ddp --accumulation 2 --recompute 9",
               "--parallel fsdp --accumulation 2"],
           4: ["--parallel ddp --accumulation 2", "--parallel fsdp --accumulation 1 --recompute 9"]}
# Objective, head, LoRA rank.
LEARN = ["cl sparse 0", "cl dense 0", "cl+kd sparse 4", "cl+kd dense 4", "kd sparse 4", "kd dense 0",
         "mntp sparse 0", "clm sparse 0"]

RUNS, HALVES = {"full": "0", "lora": "4"}, "--save_every 6 --keep 2"


@pytest.fixture(scope="session")
def world(tiny_model, tmp_path_factory):
    """A folder with a corpus in which each query's words are its passage's, rows in the authors' format, and
    a dev set."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    words = ("cat mat dog park children retrieval words vocabulary dense vectors numbers season june list "
             "keys none sorted empty").split()
    docs = [" ".join(rng.choices(words, k=rng.randint(3, 14))) for _ in range(60)]
    (folder / "corpus.tsv").write_text("".join(f"d{i}\t{text}\n" for i, text in enumerate(docs)))
    queries = [" ".join(rng.sample(text.split(), 3)) for text in docs]
    (folder / "queries.tsv").write_text("".join(f"q{i}\t{text}\n" for i, text in enumerate(queries)))
    (folder / "qrels.tsv").write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(20)))
    rows = [{"query": queries[i], "pos": [f"d{i}"],
             "neg": rng.sample([f"d{j}" for j in range(60) if j != i], 5),
             "pos_scores": [6.0 + rng.random()], "neg_scores": [rng.gauss(0, 2) for _ in range(5)]}
            for i in range(50)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model, folder / "model")
    return folder


def flags(folder, out="unused", objective="cl", head="sparse", lora="0", more="") -> list[str]:
    return (f"--model {folder}/model --train {folder}/rows.jsonl --corpus {folder}/corpus.tsv --out {out} "
            f"--objective {objective} --head {head} --lora_rank {lora} --lora_alpha 8 --lora_dropout 0 "
            "--queries_per_step 8 --negatives 2 --block_length 32 --max_steps 12 --workers 0 "
            f"--flops_ramp 0 --device cpu {more}").split()


def gradients(argv: list[str], step: int = 5, padding: str = "left") -> tuple[torch.Tensor, dict]:
    """The loss and the whole gradient of one step, as train.py computes them, from inside a process group."""
    args = train.parse_args(argv)
    r = train.load_model(args)
    r.settings["padding_side"] = padding
    g = torch.Generator().manual_seed(0)
    for name, p in r.named_parameters():
        # It starts as zeros, behind which lora_A has no gradient.
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=g)
    args.temperature = 0.1 if r.head == "dense" else 1.0
    rank, W = train.world()
    data, gradients_of, _ = train.open_data(args, r)
    model = train.parallelise(r, args)
    terms, *_ = gradients_of(model, r, data[train.places_in(step, args, rank, W)], step, args)
    loss = torch.tensor(terms["loss"])
    dist.all_reduce(loss)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g.clone()
    return loss / W, {name: whole(p.grad) for name, p in r.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def spread(world, tmp_path_factory):
    """What two and four processes found: gradients, and runs saved by two under FSDP2 at step 6 and 12 that
    four go on with under DDP."""
    folder = tmp_path_factory.mktemp("spread")
    torchrun(2, "tests/test_train.py", world, folder)
    for run_ in ("full", "lora"):
        # As if killed at the very end.
        (folder / run_ / "summary.json").unlink()
        shutil.copytree(folder / run_, folder / f"{run_}_on_four")
    torchrun(4, "tests/test_train.py", world, folder)
    return folder


@pytest.mark.parametrize("W", [2, 4])
def test_the_gradient_does_not_depend_on_the_spread(world, spread, W):
    found = torch.load(spread / f"gradients_{W}.pt")
    for case in LEARN if W == 2 else LEARN[::2]:
        with train.processes(train.parse_args(flags(world))):
            loss, want = gradients(flags(world, "unused", *case.split()))
        largest = max(g.abs().max() for g in want.values())
        assert largest > 1e-3 and len(want) > 5
        for how in SPREADS[W]:
            its_loss, grads = found[case, how]
            torch.testing.assert_close(its_loss, loss, rtol=1e-5, atol=1e-5)
            assert grads.keys() == want.keys()
            worst = max((grads[k] - want[k]).abs().max() / largest for k in want)
            assert worst < 1e-5, f"{case} {how}: {worst:.1e} of the largest gradient"


def straight(world, tmp_path, **kw) -> tuple[list[str], list[dict]]:
    """A run of 12 steps that nobody interrupts: its flags, and its losses."""
    argv = flags(world, tmp_path / "straight", **{"more": MORE, **kw})
    train.main(argv)
    return argv, read_jsonl(tmp_path / "straight/metrics.jsonl")


MORE = "--lora_dropout 0.1 --save_every 1 --keep 3 --accumulation 2 --tokens_per_chunk 128"
numbers = lambda metrics: [{k: x[k] for k in ("step", "loss", "norm", "lr", "flops")} for x in metrics]


def test_killed_and_resumed_equals_straight_to_the_bit(world, tmp_path):
    argv, want = straight(world, tmp_path, lora="4")
    assert [x["step"] for x in want] == list(range(1, 13)) and len({x["loss"] for x in want}) == 12
    out = tmp_path / "killed"
    argv[argv.index("--out") + 1] = str(out)
    for death in (killed_at_work, dies_before_the_rename, writes_half_a_line, preempted):
        death(argv, out)
        assert not (out / "summary.json").exists()
    train.main([*argv, "--resume"])
    assert numbers(read_jsonl(out / "metrics.jsonl")) == numbers(want)
    adapter = out / "adapter_model.safetensors"
    assert adapter.read_bytes() == (tmp_path / "straight/adapter_model.safetensors").read_bytes()
    assert sorted(f.name for f in (out / "state").iterdir()) == [f"step_0000{k}" for k in (10, 11, 12)]


def killed_at_work(argv, out):
    """SIGKILL wherever it happens to be. (It saves at every step, so most often that is where.)"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not (out / "state/step_000003").exists():
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL


DIES = """
import os, sys
import train

def deadly(rename):
    def die(old, new):
        if str(old).endswith(".partial") and os.path.isdir(old):
            os._exit(99)
        rename(old, new)
    return die

os.rename, os.replace = deadly(os.rename), deadly(os.replace)
train.main(sys.argv[1:])
"""


def dies_before_the_rename(argv, out):
    """A death between writing a checkpoint and giving it its name."""
    assert run("-c", DIES, *argv, "--resume", check=False).returncode == 99
    assert list((out / "state").glob("*.partial"))


def writes_half_a_line(argv, out):
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"step": 7, "lo')


def preempted(argv, out):
    """SIGTERM in the middle of a step: it saves and leaves in peace."""
    real = train.retrieval_step

    def interrupted(model, r, batch, step, args):
        if step == 9:
            signal.raise_signal(signal.SIGTERM)
        return real(model, r, batch, step, args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(train, "retrieval_step", interrupted)
        train.main([*argv, "--resume", "--save_every", "100"])
    assert left.value.code == 128 + signal.SIGTERM
    assert (out / "state/step_000009").exists() and not list((out / "state").glob("*.partial"))


def test_a_damaged_checkpoint_is_refused_by_name(world, tmp_path):
    argv, want = straight(world, tmp_path)
    out = tmp_path / "straight"
    # As if killed at the very end, and then a bit turned in the last checkpoint.
    (out / "summary.json").unlink()
    part = next((out / "state/step_000012").glob("*.safetensors"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"step_000012 is damaged .*--resume_from 11"):
        train.main([*argv, "--resume"])
    (out / "state/step_000012/notes.json").unlink()
    with pytest.raises(ValueError, match=r"notes.json: missing; .*step_000012 is damaged .*--resume_from 11"):
        train.main([*argv, "--resume"])
    with pytest.raises(ValueError, match=r"holds the steps \[10, 11, 12\]"):
        train.main([*argv, "--resume_from", "3"])
    train.main([*argv, "--resume_from", "10"])
    assert numbers(read_jsonl(out / "metrics.jsonl")) == numbers(want)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_on_two_goes_on_on_one_and_on_four(world, tmp_path, spread, name):
    """Saved by two processes under FSDP2, tied embeddings or an adapter; goes on in one process, and in four
    under DDP."""
    from model import Retriever
    _, want = straight(world, tmp_path, lora=RUNS[name], more=HALVES)
    train.main(flags(world, spread / name, lora=RUNS[name], more=f"{HALVES} --resume_from 6"))
    texts = ["the cat", "a list of keys"]
    reps = Retriever.load(tmp_path / "straight", head="sparse").encode(texts, "query").to_dense()
    for folder in (spread / name, spread / f"{name}_on_four"):
        got = read_jsonl(folder / "metrics.jsonl")
        np.testing.assert_allclose([x["loss"] for x in got], [x["loss"] for x in want], rtol=2e-4)
        torch.testing.assert_close(Retriever.load(folder, head="sparse").encode(texts, "query").to_dense(),
                                   reps, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", LEARN)
def test_every_objective_lowers_its_loss(world, tmp_path, case):
    objective_, head, lora = case.split()
    argv = flags(world, tmp_path / "run", objective_, head, lora,
                 more=f"--max_steps 40 --lr {'2e-2' if lora != '0' else '3e-3'} --save_every 40")
    train.main(argv)
    losses = [x["loss"] for x in read_jsonl(tmp_path / "run/metrics.jsonl")]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses


def test_the_adapter_of_mntp_is_the_one_that_goes_on_training(world, tmp_path):
    """Not merged, not added to: after fine-tuning there is still one adapter, of the same layers, started
    where MNTP left it."""
    from safetensors.torch import load_file
    train.main(flags(world, tmp_path / "mntp", "mntp", lora="4", more="--lr 1e-2 --max_steps 3").copy())
    before = load_file(tmp_path / "mntp" / "adapter_model.safetensors")
    argv = flags(world, tmp_path / "cl", lora="4", more="--lr 1e-9 --max_steps 1")
    argv[argv.index("--model") + 1] = str(tmp_path / "mntp")
    train.main(argv)
    after = load_file(tmp_path / "cl" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and any(
        v.abs().sum() > 0 for k, v in before.items() if "lora_B" in k)
    # A learning rate of nothing: what is left is the start.
    assert all(torch.allclose(before[k], after[k], atol=1e-7) for k in before)
    with pytest.raises(ValueError, match="--lora_rank 4"):
        train.main([*argv, "--lora_rank", "8", "--out", str(tmp_path / "other")])


def test_clm_is_the_language_model_loss_and_leaves_a_retriever(world, tmp_path):
    """Against the loss of Hugging Face's own causal model; what is saved looks both ways and goes on in MNTP
    and in CL."""
    from model import Retriever, causal_batches
    from transformers import AutoModelForCausalLM
    argv = flags(world, tmp_path / "clm", "clm", more="--max_steps 3 --accumulation 2 --lr 1e-2")
    train.main(argv)
    args = train.parse_args(argv)
    data, *_ = train.open_data(args, train.load_model(args))
    ids = torch.from_numpy(data[train.places_in(1, args)]["tokens"])
    assert ids.shape == (8, 32)
    theirs = AutoModelForCausalLM.from_pretrained(world / "model")(ids, labels=ids).loss
    assert read_jsonl(tmp_path / "clm/metrics.jsonl")[0]["loss"] == pytest.approx(theirs.item(), rel=1e-5)
    assert json.loads((tmp_path / "clm/config.json").read_text())["is_causal"] is False
    assert causal_batches(Retriever.load(tmp_path / "clm")) == []
    for objective in ("mntp", "cl"):
        train.main([*flags(world, tmp_path / objective, objective, more="--max_steps 1"),
                    "--model", str(tmp_path / "clm")])


def test_calibrated_at_the_start_and_not_again(world, tmp_path):
    """The thresholds of the model that training starts from: in the checkpoint, in what is saved, and not
    made anew by --resume."""
    from model import Retriever
    argv = flags(world, tmp_path / "straight", more="--calibrate 0.1 --save_every 4 --keep 3")
    train.main(argv)
    want = read_jsonl(tmp_path / "straight/metrics.jsonl")
    r = Retriever.load(world / "model", head="sparse")
    r.calibrate(train.Corpus(world / "corpus.tsv").texts(range(60)), 0.1, 128)
    torch.testing.assert_close(
        Retriever.load(tmp_path / "straight").threshold, r.threshold, rtol=1e-5, atol=1e-5)
    assert want[0]["nnz_d"] < 0.2 * r.width
    (tmp_path / "straight/summary.json").unlink()
    train.main([*argv, "--resume_from", "8"])
    assert numbers(read_jsonl(tmp_path / "straight/metrics.jsonl")) == numbers(want)


def test_collapse_is_noticed(world):
    """Each way for a sparse head to die is said, and a healthy one is not."""
    args = train.parse_args(flags(world, more="--warmup 0"))
    r = train.load_model(args)
    healthy = {"queries": 8, "passages": 16, "zero": 0, "nnz_q": 8 * 20.0, "nnz_d": 16 * 40.0, "cl": 0.5}
    said = lambda **numbers: " ".join(train.collapse(healthy | numbers, 10, r, args))
    assert said() == ""
    assert "all zero" in said(zero=12) and "non-zeros" in said(nnz_q=8 * 1.0, nnz_d=16 * 1.0)
    assert "after the ramp" in said(nnz_q=8.0 * r.width, nnz_d=16.0 * r.width)
    assert "guessing" in said(cl=float(np.log(8 * 3)))


def test_the_horizon_by_hand(world, tmp_path, capsys):
    args = train.parse_args(re.sub(r"--max_steps 12", "--epochs 3", " ".join(flags(world))).split())
    assert train.horizon(args, 50, 0) == 3 * 50 // 8 == 18
    args.epochs, args.flop_budget = None, 1e9
    assert train.horizon(args, 50, 3e8) == 3
    with pytest.raises(ValueError, match="buys no whole step"):
        train.horizon(args, 50, 2e9)
    # 40 rows of one length: every step costs the same, and what is spent meets the budget to a step.
    rows = [{"query": "the cat", "pos": ["the dog"], "neg": ["a list", "the mat"], "inline": True}] * 40
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = re.sub("--max_steps 12", "--flop_budget 2e8",
                  " ".join(flags(world, tmp_path / "run", more=f"--train {tmp_path}/same.jsonl")))
    train.main(argv.split())
    done = json.loads((tmp_path / "run/summary.json").read_text())
    assert 2e8 * (1 - 1 / done["steps"]) - 1 < done["flops"] <= 2e8 and done["steps"] > 2
    # Linear up over 10% of 100 steps, linear down to one step above zero.
    args.max_steps, args.warmup, args.lr = 100, 0.1, 1.0
    lrs = [train.lr_at(s, args) for s in range(1, 101)]
    assert (lrs[0] == pytest.approx(0.1) and lrs[9] == max(lrs) and lrs[-1] == pytest.approx(1 / 91)
            and all(np.diff(lrs[10:]) < 0))


def test_a_step_is_a_function_of_its_number(world):
    """Queries partition over processes, an epoch shows each row once, its negatives are drawn anew in the
    next."""
    args = train.parse_args(flags(world))
    data, *_ = train.open_data(args, train.load_model(args))
    rows = train.TrainingRows(args.train, args.corpus)
    whole = {step: data[train.places_in(step, args)] for step in range(1, 26)}
    halves = [{step: data[train.places_in(step, args, k, 2)] for step in (1, 6, 7)} for k in (0, 1)]
    for step in (1, 6, 7):
        assert whole[step]["names"] == halves[0][step]["names"] + halves[1][step]["names"]
        assert (whole[step]["for_loss"]["docids"]
                == np.concatenate([h[step]["for_loss"]["docids"] for h in halves])).all()
    # 200 queries are four epochs of 50 rows, each in an order of its own.
    seen = [name for step in range(1, 26) for name in whole[step]["names"]]
    assert (all(sorted(seen[e * 50:e * 50 + 50]) == sorted(rows.ids(i) for i in range(50)) for e in range(4))
            and seen[:50] != seen[50:100])
    drawn = {}
    for step in range(1, 26):
        for name, ids in zip(whole[step]["names"], whole[step]["for_loss"]["docids"].reshape(8, 3).tolist()):
            drawn.setdefault(name, set()).add(tuple(ids))
    assert sum(len(ways) > 1 for ways in drawn.values()) > 25
    mntp = train.parse_args(flags(world, objective="mntp", more="--block_length 512 --queries_per_step 64"))
    r = train.load_model(mntp)
    b = train.open_data(mntp, r)[0][train.places_in(3, mntp)]
    shown, target = b["tokens"][:, 1:][b["at"][:, :-1]], b["labels"]
    # BOS is never hidden: the share is one of the text's own tokens.
    text = (b["tokens"] != 0).mean()
    assert len(target) / b["tokens"].size == pytest.approx(0.2 * text, rel=0.05)
    mask = r.tokenizer.encode("_", add_special_tokens=False)[0]
    # BERT's rule: of what is to be predicted 80% are hidden, 10% stay, and 10% become another word.
    assert ((shown == mask).mean() == pytest.approx(0.8, abs=0.02)
            and (shown == target).mean() == pytest.approx(0.1, abs=0.02))
    assert 0 not in target


def test_mrr_equals_a_full_sort(world, tmp_path):
    dev = f"--eval_queries {world}/queries.tsv --eval_qrels {world}/qrels.tsv --eval_every 20"
    argv = flags(world, tmp_path / "run", more=f"--max_steps 40 --lr 3e-3 {dev}")
    train.main(argv)
    found = {x["step"]: x["mrr@10"] for x in read_jsonl(tmp_path / "run/metrics.jsonl") if "mrr@10" in x}
    assert set(found) == {20, 40} and json.loads(
        (tmp_path / "run/best/notes.json").read_text())["mrr@10"] == max(found.values())
    from data import Corpus, read_queries
    from model import Retriever
    r = Retriever.load(tmp_path / "run", head="sparse")
    corpus, queries = Corpus(world / "corpus.tsv"), read_queries(world / "queries.tsv")
    q, d = (r.encode([queries[f"q{i}"] for i in range(20)], "query", 64),
            r.encode(corpus.texts(range(60)), "passage", 128))
    scores = q.to_dense() @ d.to_dense().T
    places = [1 + sum(float(s) >= float(row[i]) for j, s in enumerate(row) if j != i)
              for i, row in enumerate(scores)]
    assert (found[40] == pytest.approx(sum(1 / p for p in places if p <= 10) / 20, abs=1e-6)
            and found[40] > 0.2)


def test_the_dev_set_is_read_with_the_adapter_merged_and_leaves_no_trace(world, tmp_path, monkeypatch):
    """The figure is that of the adapter beside the weights. Losses and weights are those of a run without a
    dev set, to the last digit."""
    evaluate, mrr_at_10, beside, unmerged = train.evaluate, train.mrr_at_10, [], []

    def both_ways(r, *given):
        before = {name: value.clone() for name, value in r.state_dict().items()}
        beside.append(mrr_at_10(r, given[0], given[-1]))
        evaluate(r, *given)
        assert all(torch.equal(before[name], value) for name, value in r.state_dict().items())
        assert len(r.unmerged()) == 14

    def counted(r, *given):
        unmerged.append(len(r.unmerged()))
        return mrr_at_10(r, *given)

    monkeypatch.setattr(train, "evaluate", both_ways)
    monkeypatch.setattr(train, "mrr_at_10", counted)
    dev = f"--eval_queries {world}/queries.tsv --eval_qrels {world}/qrels.tsv --eval_every 2"
    more = "--lora_dropout 0.1 --lr 2e-2"
    train.main(flags(world, tmp_path / "with", lora="4", more=f"{more} {dev}"))
    train.main(flags(world, tmp_path / "without", lora="4", more=more))
    lines = read_jsonl(tmp_path / "with/metrics.jsonl")
    assert [x["mrr@10"] for x in lines if "mrr@10" in x] == pytest.approx(beside, abs=1e-6)
    assert unmerged == [0] * 6 and len(set(beside)) > 2
    losses = numbers(x for x in lines if "loss" in x)
    assert losses == numbers(read_jsonl(tmp_path / "without/metrics.jsonl"))
    adapters = [(tmp_path / run_ / "adapter_model.safetensors").read_bytes() for run_ in ("with", "without")]
    assert adapters[0] == adapters[1]


def test_bad_input(world, tmp_path, capsys):
    def refused(match, out="new", more="", **kw):
        with pytest.raises((ValueError, SystemExit)) as e:
            train.main(flags(world, tmp_path / out, more=more, **kw))
        assert re.search(match, str(e.value) + capsys.readouterr().err), str(e.value)

    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    refused("is not empty and no run of ours", out="other")
    (tmp_path / "empty.jsonl").write_text("")
    refused("empty", more=f"--train {tmp_path}/empty.jsonl")
    (tmp_path / "unscored.jsonl").write_text('{"query": "a", "pos": ["d1"], "neg": ["d2", "d3"]}\n')
    refused("unscored.jsonl:1: has no teacher scores", objective="kd", out="b",
            more=f"--train {tmp_path}/unscored.jsonl")
    (tmp_path / "unknown.jsonl").write_text('{"query": "a", "pos": ["nowhere"], "neg": ["d2"]}\n')
    refused("nowhere", out="c", more=f"--train {tmp_path}/unknown.jsonl")
    refused("say the same thing", more="--epochs 3")
    for wrong in ("queries_per_step 0", "max_steps 0", "max_steps -5", "clip -1", "clip nan", "temperature 0",
                  "warmup 2", "flops_ramp -0.1", "mask_share 1.5", "lr inf", "negatives -1", "seed -1",
                  "epochs 0", "flop_budget nan"):
        refused(f"--{wrong.split()[0]}: expected", more=f"--{wrong}")
    train.main(argv := flags(world, tmp_path / "done", more=f"--max_steps 1 --negatives 7"))
    assert "50 rows hold fewer than 7 negatives: these are shown more than once" in capsys.readouterr().out
    refused("holds another run's results", out="done")
    refused("started with --lr 0.0001, not 0.5", out="done",
            more="--max_steps 1 --negatives 7 --resume --lr 0.5")
    train.main([*argv, "--resume"])
    assert "is finished" in capsys.readouterr().out
    refused("--resume_from 7: .* holds the steps .1", out="done",
            more="--max_steps 1 --negatives 7 --resume_from 7")
    assert (tmp_path / "done/summary.json").exists()
    train.main([*argv, "--resume_from", "1"])
    said = capsys.readouterr().out
    assert "1 steps are done" in said and "is finished" not in said
    assert (tmp_path / "done/summary.json").exists()
    refused("thresholds to the terms of a sparse head, not to dense", head="dense", out="d",
            more="--calibrate 0.1")
    refused("of no use to --objective mntp", objective="mntp", more="--calibrate 0.1")
    # Granite divides its logits: the product alone is another language model.
    granite = json.loads((world / "model/config.json").read_text()) | {"logits_scaling": 8.0}
    shutil.copytree(world / "model", tmp_path / "granite")
    (tmp_path / "granite/config.json").write_text(json.dumps(granite))
    refused("more than the product that --objective clm learns from .logits_scaling.", objective="clm",
            head="dense", out="e", more=f"--model {tmp_path}/granite")


def test_a_signal_to_one_process_is_the_status_of_all(world, tmp_path, monkeypatch):
    """A process that was not asked itself leaves with the others, and must not look finished."""
    monkeypatch.setattr(train, "train", lambda args, stop: False)
    with pytest.raises(SystemExit) as e:
        train.main(flags(world, tmp_path / "run"))
    assert e.value.code == 128 + signal.SIGTERM


def test_a_file_beside_the_corpus_changes_nothing(world, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(world / "corpus.tsv", tmp_path / "data/collection.tsv")
    argv = flags(world, tmp_path / "run", more=f"--corpus {tmp_path}/data --max_steps 1")
    train.main(argv)
    (tmp_path / "data/scored.jsonl").write_text("{}")
    train.main([*argv, "--resume"])
    (tmp_path / "data/collection.tsv").write_text("d1\tchanged\n")
    with pytest.raises(ValueError, match="data is not what it was when"):
        train.main([*argv, "--resume"])


def test_a_non_finite_loss_stops_the_run(world, tmp_path, monkeypatch, capsys):
    real = train.losses.objective
    def poisoned(name, q, d, **kw):
        loss, terms = real(name, q, d, **kw)
        return loss * float("nan"), terms

    train.main(argv := flags(world, tmp_path / "run", more="--save_every 4 --max_steps 12")[:-2]
               + ["--max_steps", "12"])
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.setattr(train.losses, "objective", poisoned)
    with pytest.raises(ValueError, match=r"step 9: loss nan.*rank 0: .*rows.jsonl:\d+.*step 8 were good; "
                       r"the last checkpoint is .*step_000008"):
        train.main([*argv, "--resume_from", "8"])
    # A sparse head that dies has a finite loss: only a warning tells of it.
    capsys.readouterr()
    monkeypatch.setattr(train.losses, "objective", real)
    train.main(flags(world, tmp_path / "dead", more="--flops_q 1e4 --flops_d 1e4 --lr 0.1 --max_steps 12"))
    assert re.search(r"WARNING step \d+: \d+% of the vectors are all zero", capsys.readouterr().out)


# What may go wrong around a run.

def start(world, out, more="", **kw):  # noqa: F811
    """train.py as a process of its own, with its lines as they come."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "train.py", *flags(world, out, more=f"--max_steps 500 {more}")]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True, **kw)


def wait_for(process, text: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def test_ctrl_c_saves_and_leaves_nobody_behind(world, tmp_path):
    """SIGINT to the whole group, loader's workers included: the step ends, is saved, and every process
    goes."""
    process = start(world, tmp_path / "run", "--workers 2")
    wait_for(process, "step 10/500")
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode == 128 + signal.SIGINT and "--resume goes on" in said
            and "Traceback" not in said)
    [saved] = train.steps_saved(tmp_path / "run")
    assert saved >= 10
    time.sleep(1)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_two_writers_of_one_place(world, tmp_path):
    first = start(world, tmp_path / "run", "--workers 0")
    wait_for(first, "step 1/500")
    second = start(world, tmp_path / "run", "--workers 0 --resume")
    said, _ = second.communicate(timeout=60)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert (second.returncode == 1 and f"process {first.pid} is writing there" in said
            and "Traceback" not in said)


def test_ranks_leave_when_their_launcher_is_killed(world, tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py",
         *flags(world, tmp_path / "run", more="--max_steps 2000")],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    wait_for(launcher, "step 1/2000")
    # The launcher alone, not its group: the ranks are left to themselves. They hold the other end of the
    # pipe, so it closes when the last of them has gone.
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)


def test_resume_notices_other_data_and_another_base(world, tmp_path):
    folder = tmp_path / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("*.store", "*.rows", "*.lock"))
    argv = flags(folder, tmp_path / "run", more="--max_steps 2 --save_every 1")
    train.main(argv)
    (tmp_path / "run/summary.json").unlink()
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text("".join(rows.splitlines(keepends=True)[:25]))
    with pytest.raises(ValueError, match="--train .*rows.jsonl is not what it was"):
        train.main([*argv, "--resume"])
    (folder / "rows.jsonl").write_text(rows)
    weights = folder / "model/model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ValueError, match="--model .*model is not what it was"):
        train.main([*argv, "--resume"])


class Poison:
    def __reduce__(self):
        return os.system, ("touch poisoned",)


def test_a_poisoned_checkpoint_runs_no_code(world, tmp_path, monkeypatch):
    import pickle
    argv = flags(world, tmp_path / "run", more="--max_steps 2 --save_every 1")
    train.main(argv)
    (tmp_path / "run/summary.json").unlink()
    monkeypatch.chdir(tmp_path)
    for place in ("run/state/step_000002/.metadata", "run/state/step_000002/state.pt", "run/state/.metadata"):
        (tmp_path / place).write_bytes(pickle.dumps(Poison()))
    train.main([*argv, "--resume"])
    # In the place of what is read it is damage, and no code either.
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/state/step_000002/state.safetensors").write_bytes(pickle.dumps(Poison()))
    with pytest.raises(ValueError, match="damaged"):
        train.main([*argv, "--resume"])
    assert not (tmp_path / "poisoned").exists()


def test_checkpoints_sort_as_numbers(tmp_path):
    for step in (999_998, 1_000_004, 20):
        (tmp_path / f"state/step_{step:06d}").mkdir(parents=True)
    (tmp_path / "state/step_2000000.partial").mkdir()
    assert list(train.steps_saved(tmp_path)) == [20, 999_998, 1_000_004]


def test_no_weights_are_half_written(world, tmp_path, monkeypatch):
    """A death while the last weights are written leaves none in the run's folder; --resume finishes it."""
    save, out = train.Retriever.save, tmp_path / "run"

    def dies(r, folder, state=None):
        save(r, folder, state)
        raise KeyboardInterrupt

    argv = flags(world, out, lora="4")
    monkeypatch.setattr(train.Retriever, "save", dies)
    with pytest.raises(SystemExit):
        train.run_command("train.py", lambda: train.main(argv))
    assert not list(out.glob("*.safetensors")) and not (out / "retriever.json").exists()
    monkeypatch.undo()
    train.main([*argv, "--resume"])
    assert {"adapter_model.safetensors", "retriever.json", "summary.json"} <= {f.name for f in out.iterdir()}
    assert not list(out.glob("*.partial"))


def test_a_full_disk_names_the_file_and_the_cure(world, tmp_path):
    """A limit on the size of files stands for the disk: the error comes from the same calls."""
    import resource

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(world, tmp_path / "run", "--workers 0 --save_every 2", preexec_fn=small_files)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said
    assert "state.safetensors" in said and "--resume" in said, said[-500:]
    assert not train.steps_saved(tmp_path / "run")


@pytest.mark.parametrize("bad", ["--max_steps 0", "--max_steps -5", "--clip -1", "--clip nan",
                                 "--temperature 0", "--warmup 1.5", "--flops_ramp -0.1", "--mask_share 2",
                                 "--lr inf", "--lora_rank -1"])
def test_numbers_out_of_range_are_refused(world, capsys, bad):
    with pytest.raises(SystemExit) as error:
        train.parse_args([*flags(world), *bad.split()])
    assert error.value.code == 2 and f"{bad.split()[0]}: expected" in capsys.readouterr().err


def test_workers_need_no_fork(world, tmp_path, monkeypatch):
    """macOS, and Python 3.14 everywhere: a worker is started anew, and is sent what it works on."""
    import functools
    losses = []
    for context in ("fork", "spawn"):
        loader = functools.partial(torch.utils.data.DataLoader, multiprocessing_context=context)
        monkeypatch.setattr(train.torch.utils.data, "DataLoader", loader)
        for objective in ("cl", "mntp"):
            out = tmp_path / f"{context}-{objective}"
            train.main(flags(world, out, objective, more="--workers 1 --max_steps 2"))
            losses.append([line["loss"] for line in read_jsonl(out / "metrics.jsonl")])
    assert losses[:2] == losses[2:]


def test_the_first_line_comes_after_the_first_step(world, tmp_path, capsys):
    train.main(flags(world, tmp_path / "run", more="--log_every 5 --max_steps 6"))
    steps = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines() if " | loss " in line]
    assert steps == ["run step 1/6", "run step 5/6", "run step 6/6"]
    log = train.Log(tmp_path / "run", train.parse_args(flags(world, more="--max_steps 100")), 6)
    log.step({"step": 1, "loss": 1.0, "lr": 1e-3, "tokens": 10, "padding": 0.0, "wait": 0.0, "flops": 1.0,
              "spent": 1.0, "seconds": 400.0})
    assert "100 steps at 400.0 s: 11h06m; for a trial --max_steps 100" in capsys.readouterr().out


def test_fsdp_reads_the_weights_once_and_evaluates_on_shards(world, tmp_path):
    """Two processes, of which one reads the model: losses and dev figures are those of DDP, and so is what
    is saved, tied embeddings once, and AdamW's state of every weight."""
    found = {}
    for parallel in ("ddp", "fsdp"):
        out = tmp_path / parallel
        more = (f"--parallel {parallel} --max_steps 4 --eval_every 2 --eval_queries {world}/queries.tsv "
                f"--eval_qrels {world}/qrels.tsv")
        done = torchrun(2, "tests/test_train.py", "counting", *flags(world, out, more=more))
        found[parallel] = read_jsonl(out / "metrics.jsonl")
        reads = [line for line in done.stdout.splitlines() if line.startswith("read on")]
        assert sorted(reads) == ["read on cpu", "read on cpu" if parallel == "ddp" else "read on meta"]
    for file in ("model.safetensors", "state/step_000004/state.safetensors"):
        names = [safetensors.torch.load_file(tmp_path / kind / file).keys() for kind in found]
        assert names[0] == names[1]
    for ours, theirs in zip(found["fsdp"], found["ddp"], strict=True):
        assert ours["step"] == theirs["step"]
        assert ours.keys() == theirs.keys()
        for name in {"loss", "norm", "mrr@10"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


# train.py, saying where each process loads its model.
if __name__ == "__main__" and sys.argv[1] == "counting":
    load = train.Retriever.load

    def counted(*args, **kw):
        # In one piece and at once: two processes share the pipe.
        os.write(1, f"read on {kw['device']}\n".encode())
        return load(*args, **kw)

    train.Retriever.load = counted
    train.main(sys.argv[2:])
# One of the processes of the fixture `spread`.
elif __name__ == "__main__":
    world_, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    found, W = {}, dist.get_world_size()
    for case in LEARN if W == 2 else LEARN[::2]:
        for i, how in enumerate(SPREADS[W]):
            # Small chunks, so that there are several, and processes differ in how many they would need. Every
            # other spread pads on the right.
            argv = flags(world_, "unused", *case.split(), more=f"{how} --tokens_per_chunk 64")
            found[case, how] = gradients(argv, padding=["right", "left"][i % 2])
    if dist.get_rank() == 0:
        torch.save(found, folder / f"gradients_{W}.pt")
    for name, lora in RUNS.items():
        out, more = ((name, "--parallel fsdp") if W == 2
                     else (f"{name}_on_four", "--resume_from 6 --tokens_per_chunk 100"))
        train.train(train.parse_args(flags(world_, folder / out, lora=lora, more=f"{HALVES} {more}")), [])
    dist.destroy_process_group()
