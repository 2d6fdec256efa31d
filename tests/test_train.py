"""train.py: the same gradient however the batch is spread, the same losses however often the run is killed.

The oracles are one process with the whole batch in one forward pass (whose losses test_losses.py holds against plain loops), and a
run that nobody interrupted. Run as a script under torchrun, this file is one of the processes that have to agree with them.
"""
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
import torch
import torch.distributed as dist

from conftest import ROOT, read_jsonl, run, torchrun  # puts the project on the path
import train
from losses import objective

# How the same eight queries are spread: processes -> what each tries
SPREADS = {2: ["--parallel ddp --accumulation 1", "--parallel ddp --accumulation 2 --checkpoint_activations", "--parallel fsdp --accumulation 2"],
           4: ["--parallel ddp --accumulation 2", "--parallel fsdp --accumulation 1 --checkpoint_activations"]}
LEARN = ["cl sparse 0", "cl dense 0", "cl+kd sparse 4", "cl+kd dense 4", "kd sparse 4", "kd dense 0", "mntp sparse 0"]  # objective, head, LoRA rank


@pytest.fixture(scope="session")
def world(tiny_model, tmp_path_factory):
    """A folder with a corpus in which each query's words are its passage's, rows in the authors' format, and a dev set."""
    folder, rng = tmp_path_factory.mktemp("world"), random.Random(0)
    words = "cat mat dog park children retrieval words vocabulary dense vectors numbers season june november list keys none sorted empty looked".split()
    docs = [" ".join(rng.choices(words, k=rng.randint(3, 14))) for _ in range(60)]
    (folder / "corpus.tsv").write_text("".join(f"d{i}\t{text}\n" for i, text in enumerate(docs)))
    queries = [" ".join(rng.sample(text.split(), 3)) for text in docs]
    (folder / "queries.tsv").write_text("".join(f"q{i}\t{text}\n" for i, text in enumerate(queries)))
    (folder / "qrels.tsv").write_text("".join(f"q{i} 0 d{i} 1\n" for i in range(20)))
    rows = [{"question": queries[i], "pos_pid": f"d{i}", "neg_pids": rng.sample([f"d{j}" for j in range(60) if j != i], 5), "pos_score": 6.0 + rng.random(),
             "neg_scores": [rng.gauss(0, 2) for _ in range(5)]} for i in range(50)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model, folder / "model")
    return folder


def flags(folder, out="unused", objective="cl", head="sparse", lora="0", more="") -> list[str]:
    return (f"--model {folder}/model --train {folder}/rows.jsonl --corpus {folder}/corpus.tsv --out {out} --objective {objective} --head {head} --lora_rank {lora} "
            f"--lora_alpha 8 --lora_dropout 0 --queries_per_step 8 --negatives 2 --block_length 32 --max_steps 12 --workers 0 --flops_ramp 0 --device cpu {more}").split()


def gradients(argv: list[str], step: int = 5, padding: str = "left") -> tuple[torch.Tensor, dict]:
    """The loss and the whole gradient of one step, as train.py computes them, from inside a process group."""
    args = train.parse_args(argv)
    r = train.load_model(args)
    r.settings["padding_side"] = padding
    g = torch.Generator().manual_seed(0)
    for name, p in r.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=g)  # it starts as zeros, behind which lora_A has no gradient
    args.temperature = 0.1 if r.head == "dense" else 1.0
    rank, W = train.world()
    mntp = args.objective == "mntp"
    steps = train.MntpSteps(train.Corpus(args.corpus), r, args, rank, W) if mntp else \
        train.RetrievalSteps(train.TrainingRows(args.train, args.corpus), r.tokenize, args, rank, W)
    model = train.parallelise(r, args)
    terms, *_ = (train.mntp_step if mntp else train.retrieval_step)(model, r, steps[step], step, args)
    loss = torch.tensor(terms["loss"])
    dist.all_reduce(loss)
    whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g.clone()
    return loss / W, {name: whole(p.grad) for name, p in r.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("W", [2, 4])
def test_the_gradient_does_not_depend_on_the_spread(world, tmp_path, W):
    torchrun(W, "tests/test_train.py", world, tmp_path)
    found = torch.load(tmp_path / "gradients.pt")
    for case in LEARN:
        with train.processes(train.parse_args(flags(world))):
            loss, want = gradients(flags(world, "unused", *case.split()))
        largest = max(g.abs().max() for g in want.values())
        assert largest > 1e-3 and len(want) > 5
        for spread in SPREADS[W]:
            its_loss, grads = found[case, spread]
            torch.testing.assert_close(its_loss, loss, rtol=1e-5, atol=1e-5)
            assert grads.keys() == want.keys()
            worst = max((grads[k] - want[k]).abs().max() / largest for k in want)
            assert worst < 1e-5, f"{case} {spread}: {worst:.1e} of the largest gradient"


if __name__ == "__main__":  # one of the processes
    dist.init_process_group("gloo")
    found = {}
    for case in LEARN:
        for i, spread in enumerate(SPREADS[dist.get_world_size()]):
            # small chunks, so that there are several and processes differ in how many they would need; every other spread pads on the right
            argv = flags(sys.argv[1], "unused", *case.split(), more=f"{spread} --tokens_per_chunk 64")
            found[case, spread] = gradients(argv, padding=["right", "left"][i % 2])
    if dist.get_rank() == 0:
        torch.save(found, Path(sys.argv[2]) / "gradients.pt")
    dist.destroy_process_group()
