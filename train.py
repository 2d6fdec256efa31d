"""One loop for every objective of the paper: MNTP, contrastive learning (CL), distillation (KD) and both, sparse and dense heads;
and for pre-training a model of one's own (CLM).

    python train.py --model data/demo/model --lora_rank 0 --head sparse --objective cl --train data/demo/train.jsonl \\
        --corpus data/demo --max_steps 300 --out runs/demo
    torchrun --nproc_per_node=4 train.py --model meta-llama/Llama-3.2-1B --objective mntp --corpus C --out runs/mntp
    torchrun --nproc_per_node=4 train.py --model runs/mntp --head sparse --objective cl+kd --train T.jsonl --corpus C --out runs/sp-1b
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST train.py --parallel fsdp ...  # --out on a shared disk

The same command with --resume goes on where it was killed, or starts if it never ran. What surprises:

- Flags speak of the whole step: --queries_per_step is split over the processes there are. Data order, loss and gradient do not depend on
  how many there are, on --accumulation, on --parallel or on the side of the padding; only rounding does, and the noise of dropout.
- A step first encodes, then takes the loss on the vectors alone, then sends the vectors' gradients back through the encoder. The loss
  therefore always sees all passages, and accumulation does not shrink the set of negatives: with --accumulation above 1 the first
  encoding keeps no graph, and each share of the texts is encoded a second time when its turn comes (GradCache, Gao et al. 2021).
- Everything random is a function of (seed, step) or (seed, epoch, row). A checkpoint needs no generator's state, only the step.
- MNTP and CLM fill each 512-token block with passages drawn at random (with replacement over the run), and cut the last.
- CLM is the one objective whose model looks to the left only. The switch is config.is_causal, and only while it trains: what it saves looks
  both ways, like every model here.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism, and they are forked
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# The name that torch 2.11 and 2.12 have; from 2.13 on it is forward_sync_buffers, and this one warns.
warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)
import losses
from data import Corpus, TrainingRows, read_queries, write_whole
from evaluate import read_qrels
from losses import gather, ramp, world
from model import HEADS, Retriever, flops_per_token

# The paper's settings for the 1B model (4 devices): what a flag means when it is not given.
PAPER = {
    "clm": dict(lr=3e-4, warmup=0.04, queries_per_step=128, max_steps=10_000, negatives=0),  # ours: the paper starts from Llamas
    "mntp": dict(lr=5e-5, warmup=0.0, queries_per_step=128, max_steps=10_000, negatives=0),
    "cl": dict(lr=1e-4, warmup=0.04, queries_per_step=112, epochs=7, negatives=16),
    "cl+kd": dict(lr=1e-4, warmup=0.04, queries_per_step=112, epochs=7, negatives=16),
    "kd": dict(lr=1e-4, warmup=0.04, queries_per_step=1024, epochs=56, negatives=1),
}
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}  # dense bf16 FLOP/s, by a part of the device's name
# What may differ between a run and its --resume. Everything else would make it another run.
FREE = {"resume", "resume_from", "keep", "save_every", "log_every", "eval_every", "workers", "device", "parallel", "accumulation", "tokens_per_chunk",
        "checkpoint_activations", "compile", "warn_zero_share", "warn_nnz_low", "warn_nnz_high"}


def parse_args(argv=None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what to train")
    g.add_argument("--model", required=True, help="HF folder or hub name; or an adapter folder, whose adapter then goes on training")
    g.add_argument("--objective", required=True, choices=losses.OBJECTIVES)
    g.add_argument("--head", choices=list(HEADS), help="needed unless the model's retriever.json says it; MNTP trains before there is a head")
    g.add_argument("--lora_rank", type=int, default=16, help="0: train all weights. An adapter in --model keeps its alpha and dropout (%(default)s)")
    g.add_argument("--lora_alpha", type=float, default=32)
    g.add_argument("--lora_dropout", type=float, default=0.05)
    g.add_argument("--out", required=True, help="the run's folder; it must be new, or --resume")
    g = p.add_argument_group("data")
    g.add_argument("--train", help="training rows, in any of the formats of data.py (not for mntp and clm)")
    g.add_argument("--corpus", help="collection.tsv, corpus.jsonl or a BEIR folder; not needed if the rows hold texts")
    g.add_argument("--queries", help="queries, if the rows hold ids of queries")
    g.add_argument("--scores", help="teacher scores as JSON {qid: {pid: score}}, if the rows hold none")
    g.add_argument("--negatives", type=int, help="a query's passages beside its positive (16; kd 1, more: listwise MarginMSE; 0: in-batch only)")
    g.add_argument("--query_length", type=int, default=64, help="tokens, BOS included (default %(default)s)")
    g.add_argument("--passage_length", type=int, default=128, help="(default %(default)s; checkpoints keep their own length for evaluation)")
    g.add_argument("--block_length", type=int, default=512, help="mntp, clm: tokens a block")
    g.add_argument("--mask_share", type=float, default=0.2, help="mntp: tokens to predict; of these 80%% are masked, 10%% random, 10%% kept")
    g.add_argument("--workers", type=int, default=2, help="tokenising processes; raise it if the step line shows a wait (default %(default)s)")
    g = p.add_argument_group("horizon (one of them; the paper's 7 epochs, kd 56, mntp 10,000 steps)")
    g.add_argument("--max_steps", type=int)
    g.add_argument("--epochs", type=float)
    g.add_argument("--flop_budget", type=float, help="train for so many FLOPs, e.g. 1e18: steps follow from model, lengths and passages a step")
    g = p.add_argument_group("batch and memory")
    g.add_argument("--queries_per_step", type=int, help="over all processes (112; kd 1024; mntp 128, blocks)")
    g.add_argument("--accumulation", type=int, default=1, help="out of memory? 2, 4, 8: one such share's graph is held at a time, for a second forward")
    g.add_argument("--tokens_per_chunk", type=int, default=16384, help="padded tokens in one forward; reduce it if pass one runs out of memory")
    g.add_argument("--checkpoint_activations", action="store_true", help="recompute activations in backward; the other way to save memory")
    g = p.add_argument_group("loss")
    g.add_argument("--temperature", type=float, help="divides the scores in every loss (dense 0.01, sparse 1)")
    g.add_argument("--flops_q", type=float, default=0.05, help="FLOPs weight of queries, sparse head (default %(default)s)")
    g.add_argument("--flops_d", type=float, default=0.04, help="FLOPs weight of passages (default %(default)s)")
    g.add_argument("--flops_ramp", type=float, default=1 / 3, help="share of the run over which the FLOPs weights grow quadratically (1/3)")
    g.add_argument("--keep_false_negatives", action="store_true", help="let passages known to be relevant to a query count as its in-batch negatives")
    g.add_argument("--authors_weighting", type=int, default=1, metavar="DEVICES",
                   help="divide the contrastive and FLOPs terms by DEVICES, which is what the authors' gather without gradient did on that many "
                   "(the paper: 4). Only to compare with their numbers; 1 is the paper's formula")
    g.add_argument("--calibrate", type=float, metavar="SHARE", help="sparse: at the start set each term's threshold so that it is on in this share of 1,024 "
                   "passages of --corpus (0.01); needed where all weights of a language model train, which is on everywhere")
    g = p.add_argument_group("optimizer")
    g.add_argument("--lr", type=float, help="(1e-4; mntp 5e-5)")
    g.add_argument("--warmup", type=float, help="share of the run in which lr grows linearly, before it falls linearly to 0 (0.04; mntp 0)")
    g.add_argument("--weight_decay", type=float, default=0.0)
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("machines")
    g.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="fsdp shards weights, gradients and optimizer, layer by layer")
    g.add_argument("--dtype", choices=["bf16", "fp32"], help="compute; trained weights stay fp32 (bf16 on a GPU, fp32 on a CPU)")
    g.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--compile", action="store_true", help="torch.compile each layer")
    g = p.add_argument_group("saving and watching")
    g.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, or start if there is none")
    g.add_argument("--resume_from", type=int, metavar="STEP", help="go on from this checkpoint, if the newest is damaged; later ones are removed")
    g.add_argument("--save_every", type=int, default=500, help="steps between checkpoints (default %(default)s)")
    g.add_argument("--keep", type=int, default=2, help="checkpoints to keep (default %(default)s)")
    g.add_argument("--log_every", type=int, default=10)
    g.add_argument("--eval_queries", help="queries of a small dev set: MRR@10 by exact search, and the best weights kept in OUT/best")
    g.add_argument("--eval_qrels")
    g.add_argument("--eval_corpus", help="the dev pool (--corpus if not given: keep it small)")
    g.add_argument("--eval_every", type=int, default=500)
    g.add_argument("--warn_zero_share", type=float, default=0.1, help="sparse: warn when so many vectors of a step are all zero")
    g.add_argument("--warn_nnz_low", type=float, default=2, help="sparse: warn when vectors have fewer non-zeros on average")
    g.add_argument("--warn_nnz_high", type=float, default=0.25, help="sparse: warn when, after the ramp, more than this share of the vocabulary is on")
    args = p.parse_args(argv)

    if sum(x is not None for x in (args.max_steps, args.epochs, args.flop_budget)) > 1:
        p.error("--max_steps, --epochs and --flop_budget say the same thing: give one")
    given_horizon = args.max_steps or args.epochs or args.flop_budget
    for name, value in PAPER[args.objective].items():
        if getattr(args, name) is None and not (name in ("max_steps", "epochs") and given_horizon):
            setattr(args, name, value)
    args.resume = args.resume or args.resume_from is not None
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if args.objective in ("mntp", "clm"):
        if args.epochs:
            p.error("an epoch of packed text has no fixed number of steps: give --max_steps or --flop_budget")
        if not args.corpus:
            p.error(f"--objective {args.objective} trains on --corpus")
        args.head = args.head or "sparse"  # it decides nothing here but what retriever.json will say
    elif not args.train:
        p.error(f"--objective {args.objective} needs --train")
    if args.objective in ("kd", "cl+kd") and args.negatives < 1:
        p.error(f"--objective {args.objective} compares a query's own passages: --negatives must be at least 1")
    if args.eval_queries and not (args.eval_qrels and (args.eval_corpus or args.corpus)):
        p.error("--eval_queries needs --eval_qrels, and --eval_corpus or --corpus")
    if args.calibrate is not None and not (0 < args.calibrate < 1 and args.corpus):
        p.error(f"--calibrate {args.calibrate} needs --corpus, and to be a share between 0 and 1")
    for name in ("queries_per_step", "accumulation", "tokens_per_chunk", "save_every", "keep", "log_every", "eval_every", "authors_weighting"):
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


# A step's data, as functions of the step's number alone. DataLoader workers call them ahead of time.

def hash64(docid: str) -> int:
    """An id that fits in a tensor, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(docid.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True)


class RetrievalSteps:
    """steps[s], s = 1, 2, ...: this process's queries of step s, then their passages, tokenised; negatives drawn anew each epoch."""

    def __init__(self, rows: TrainingRows, tokenize, args, rank: int, W: int):
        self.rows, self.tokenize, self.args, self.rank, self.W = rows, tokenize, args, rank, W
        self.order = functools.lru_cache(2)(lambda epoch: np.random.default_rng((args.seed, epoch)).permutation(len(rows)))

    def __getitem__(self, step: int) -> dict:
        a, Q = self.args, self.args.queries_per_step
        mine = range((step - 1) * Q + Q * self.rank // self.W, (step - 1) * Q + Q * (self.rank + 1) // self.W)
        examples, names = [], []
        for epoch, at in (divmod(position, len(self.rows)) for position in mine):  # a step may reach into the next epoch: no row is ever left out
            row = int(self.order(epoch)[at])
            examples.append(self.rows.example(row, a.negatives, np.random.default_rng((a.seed, epoch, row))))
            names.append(self.rows.ids(row))
        known = [[hash64(docid) for docid in (e.docids[0], *e.positives)] for e in examples]
        K = max(map(len, known))
        return {
            "names": names,
            "tokens": self.tokenize([e.query for e in examples], "query", a.query_length)
            + self.tokenize([text for e in examples for text in e.texts], "passage", a.passage_length),
            "docids": np.array([hash64(docid) for e in examples for docid in e.docids]),
            "positives": np.array([(ids * K)[:K] for ids in known]),
            "teacher": np.array([e.scores for e in examples], np.float32) if a.objective in ("kd", "cl+kd") else None,
        }


class BlockSteps:
    """steps[s]: this process's blocks of step s, where to predict, and what: MNTP hides 20% of the tokens, CLM predicts every one."""

    def __init__(self, corpus: Corpus, r: Retriever, args, rank: int, W: int):
        self.corpus, self.tokenize, self.args, self.rank, self.W = corpus, r.tokenize, args, rank, W
        tokenizer = r.tokenizer
        self.vocab, self.special = r.llama.config.vocab_size, sorted(set(tokenizer.all_special_ids))
        # Llama has no mask token, and the paper borrows "_"
        masks = [tokenizer.mask_token_id] if tokenizer.mask_token_id is not None else tokenizer.encode("_", add_special_tokens=False)
        if not masks and args.objective == "mntp":
            raise ValueError(f"{args.model}: the tokenizer has no mask token and drops \"_\", which would serve; set mask_token in its tokenizer_config.json")
        self.mask = masks[0] if masks else None

    def __getitem__(self, step: int) -> dict:
        a, L, Q = self.args, self.args.block_length, self.args.queries_per_step
        mine = range((step - 1) * Q + Q * self.rank // self.W, (step - 1) * Q + Q * (self.rank + 1) // self.W)
        clean, hidden, names = np.empty((len(mine), L), np.int64), np.empty((len(mine), L), np.int64), []
        chosen = np.zeros((len(mine), L), bool)
        for b, block in enumerate(mine):
            rng, tokens, rows = np.random.default_rng((a.seed, block)), [], []
            while len(tokens) < L:
                rows += (drawn := rng.integers(len(self.corpus), size=8).tolist())
                tokens += [t for ids in self.tokenize(self.corpus.texts(drawn), "passage", L) for t in ids]
            clean[b] = hidden[b] = tokens[:L]
            if a.objective == "clm":
                chosen[b, 1:] = True
                names.append(f"block {block} (from {self.corpus.docid(rows[0])} on)")
                continue
            chosen[b] = (rng.random(L) < a.mask_share) & ~np.isin(clean[b], self.special)
            chosen[b, 0] = False  # nothing stands before the first token from which to predict it
            fate = rng.random(L)
            hidden[b][chosen[b] & (fate < 0.8)] = self.mask
            swap = chosen[b] & (fate >= 0.9)
            hidden[b][swap] = rng.integers(self.vocab, size=swap.sum())
            names.append(f"block {block} (from {self.corpus.docid(rows[0])} on)")
        at = np.zeros_like(chosen)
        at[:, :-1] = chosen[:, 1:]  # the token at i is predicted from position i - 1
        return {"names": names, "hidden": hidden, "at": at, "labels": clean[chosen]}


# Encoding in chunks.

def cut(lengths, budget: int, at_least: int = 1) -> list[np.ndarray]:
    """Texts by length, longest first, in chunks of at most `budget` tokens when padded to their own longest; equally many on every process.

    >>> cut([3, 9, 4, 8], 18)
    [array([1, 3]), array([2, 0])]
    """
    order, chunks = np.argsort(-np.asarray(lengths), kind="stable"), []
    while len(order):
        size = max(1, budget // max(1, lengths[order[0]]))
        chunks.append(order[:size])
        order = order[size:]
    agreed = torch.tensor(max(len(chunks), at_least))
    dist.all_reduce(agreed, dist.ReduceOp.MAX)  # under FSDP each forward gathers weights from everyone: nobody may skip one
    while len(chunks) < min(agreed, len(lengths)):
        k = max(range(len(chunks)), key=lambda k: len(chunks[k]))
        chunks[k:k + 1] = np.array_split(chunks[k], 2)
    return chunks


def forward(model, r: Retriever, ids, mask, args, noise: tuple, **kw) -> torch.Tensor:
    """Run the encoder with dropout's noise a function of `noise`: the second pass repeats the first, and a resumed run the one before."""
    torch.manual_seed(hash((args.seed, *noise)))  # Python salts the hash of strings, not of numbers: it is the same everywhere
    device = next(r.parameters()).device
    # FSDP casts the weights itself
    cast = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bf16" and args.parallel == "ddp" else contextlib.nullcontext()
    with cast:
        return model(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), **kw)


def last_only(model, last: bool):
    """DDP averages gradients in the backward after which they are whole. (FSDP reduces after each: whole gradients would not fit.)"""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


def step_flops(r: Retriever, batch: dict, args) -> float:
    """What a step's tokens cost, forward and backward, padding and second passes not counted."""
    lengths = [len(t) for t in batch["tokens"]] if "tokens" in batch else [args.block_length] * len(batch["names"])
    head, rank = args.objective if args.objective in ("mntp", "clm") else r.head, r.lora["r"] if r.lora else 0
    of = lambda L: L * flops_per_token(r.llama.config, int(L), head, train=True, lora_r=rank)
    return sum(n * of(L) for L, n in zip(*np.unique(lengths, return_counts=True)))


def retrieval_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """Gradients of one step into .grad. Returns the loss terms (means over processes are the step's), counts to be summed, and suspects."""
    rank, W = world()
    tokens, B = batch["tokens"], len(batch["names"])
    device = next(r.parameters()).device
    lengths = [len(t) for t in tokens]
    chunks = cut(lengths, args.tokens_per_chunk, args.accumulation)
    encode = lambda k: forward(model, r, *r.pad([tokens[i] for i in chunks[k]]), args, (step, rank, k))
    two_passes = args.accumulation > 1
    with torch.set_grad_enabled(not two_passes):
        outs = [encode(k) for k in range(len(chunks))]

    # The vectors as leaves, in the order of the texts: backward stops here, and what they are due goes back through the encoder below.
    order = torch.from_numpy(np.concatenate(chunks)).to(device)
    reps = torch.empty(len(tokens), r.width, device=device)
    for c, out in zip(chunks, outs):
        reps[torch.from_numpy(c).to(device)] = out.detach().float()
    q, d = (x.requires_grad_() for x in reps.split([B, len(tokens) - B]))
    put = lambda name: torch.from_numpy(batch[name]).to(device)
    weight = ramp(step, args.flops_ramp * args.max_steps) if r.sparse else 0.0
    guards = {} if args.keep_false_negatives else {"docids": put("docids"), "positives": put("positives")}
    loss, terms = losses.objective(args.objective, q, d, temperature=args.temperature, flops_weights=(weight * args.flops_q, weight * args.flops_d),
                                   teacher=put("teacher") if batch["teacher"] is not None else None, devices=args.authors_weighting, **guards)
    loss.backward()
    due = torch.cat([q.grad, d.grad])[order].split([len(c) for c in chunks])

    shares = np.array_split(np.arange(len(chunks)), min(args.accumulation, len(chunks)))
    for share in shares:
        with last_only(model, share is shares[-1]):
            torch.autograd.backward([encode(k) if two_passes else outs[k] for k in share], [due[k] for k in share])

    counts = {"tokens": sum(lengths), "padded": sum(len(c) * max(lengths[i] for i in c) for c in chunks), "texts": len(tokens),
              "flops": step_flops(r, batch, args)}
    if r.sparse:
        nnz = (reps.detach() > 0).sum(1).double()
        counts |= {"nnz_q": nnz[:B].sum().item(), "nnz_d": nnz[B:].sum().item(), "queries": B, "zero": (nnz == 0).sum().item()}
    broken = (~reps.detach().sum(1).isfinite()).nonzero()[:, 0].tolist()
    G = (len(tokens) - B) // B
    suspects = sorted({batch["names"][i if i < B else (i - B) // G] for i in broken}) or batch["names"]
    return {"loss": loss.item(), **{k: v.item() for k, v in terms.items()}}, counts, suspects


def block_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """The same for next-token prediction, where chunks are independent but for the number of tokens to predict."""
    rank, W = world()
    hidden, at, labels = (torch.from_numpy(batch[k]) for k in ("hidden", "at", "labels"))
    predicted = torch.tensor(float(len(labels)))
    dist.all_reduce(predicted)
    size = max(1, min(args.tokens_per_chunk // args.block_length, math.ceil(len(hidden) / args.accumulation)))
    labels, total = labels.split([int(a.sum()) for a in at.split(size)]), 0.0
    for k, (ids, where, y) in enumerate(zip(hidden.split(size), at.split(size), labels)):
        with last_only(model, k == len(labels) - 1):
            r.llama.config.is_causal = args.objective == "clm"  # read by each forward
            logits = forward(model, r, ids, torch.ones_like(ids), args, (step, rank, k), at=where.to(next(r.parameters()).device))
            loss = losses.mntp(logits, y.to(logits.device), predicted.item() / W)
            r.llama.config.is_causal = False
            loss.backward()
        total += loss.item()
    counts = {"tokens": hidden.numel(), "padded": hidden.numel(), "texts": len(hidden), "flops": step_flops(r, batch, args)}
    return {"loss": total}, counts, batch["names"]


# Checkpoints: a folder each, OUT/state/step_000120, that appears by one rename.

def save_state(out: Path, step: int, r: Retriever, optimizer, notes: dict, keep: int) -> None:
    """Model, optimizer and what else a resumed run must know, readable on any number of processes, sharded or not."""
    rank, W = world()
    whole = out / "state" / f"step_{step:06d}"
    partial = whole.with_name(whole.name + ".partial")
    if rank == 0:
        for left in whole.parent.glob("*.partial"):  # by a process that was killed while saving
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    model_state, optimizer_state = get_state_dict(r, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    mine = sorted(f for f in partial.iterdir() if f.name.startswith(f"__{rank}_") or rank == 0 and f.name == ".metadata")
    sums = [None] * W
    dist.all_gather_object(sums, {f.name: checksum(f) for f in mine})
    if rank == 0:
        notes = {"step": step, **notes, "files": {name: s for part in sums for name, s in part.items()}}
        (partial / "notes.json").write_text(json.dumps(notes, indent=1))
        os.rename(partial, whole)
        for old in sorted(whole.parent.glob("step_*[0-9]"))[:-keep]:
            discard(old)
    dist.barrier()


def discard(folder: Path) -> None:
    """Remove a checkpoint so that a process killed meanwhile leaves nothing that looks whole."""
    shutil.rmtree(gone := folder.with_name(folder.name + ".partial"), ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def checksum(file: Path) -> list[int]:
    """[bytes, crc32], a few GB a second."""
    crc = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [file.stat().st_size, crc]


def load_state(out: Path, r: Retriever, optimizer, step: int | None) -> dict:
    """Into r and the optimizer, from the newest checkpoint or from the one of `step`. Returns its notes, {"step": 0} when there is none."""
    rank, W = world()
    there = sorted((out / "state").glob("step_*[0-9]"))
    if not there and step is None:
        return {"step": 0}
    steps = [int(f.name[5:]) for f in there]
    if step is not None and step not in steps:
        raise ValueError(f"--resume_from {step}: {out}/state holds the steps {steps}")
    at = steps.index(step) if step is not None else len(steps) - 1
    cure = f"use --resume_from {steps[at - 1]} to take the one before" if at else "it is the only one; start again in a new folder"
    try:
        notes = json.loads((there[at] / "notes.json").read_text())
        for name, expected in list(notes["files"].items())[rank::W]:  # each process reads its share of the files
            if not (there[at] / name).exists() or checksum(there[at] / name) != expected:
                raise ValueError(f"{name} is not what was written")
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{there[at]} is damaged ({e}); {cure}") from e
    model_state, optimizer_state = get_state_dict(r, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    dcp.load(state := {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=there[at])
    set_state_dict(r, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=StateDictOptions(ignore_frozen_params=True, strict=False))
    dist.barrier()
    if rank == 0:
        for later in there[at + 1:]:  # what the run does from here replaces them
            discard(later)
    return notes


def save_weights(folder: Path, r: Retriever, args, notes: dict | None = None) -> None:
    """The weights or the adapter in `folder`, whole: what index.py and --model read."""
    state = None
    if args.parallel == "fsdp":
        state = get_model_state_dict(r, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(r.lora)))
    if world()[0] == 0:
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        r.save(new, state)
        if notes:
            (new / "notes.json").write_text(json.dumps(notes))
            if folder.exists():
                discard(folder)
            os.rename(new, folder)
        else:  # the run's own folder holds other things: file by file, and its summary.json says when all are there
            for file in (f for f in new.rglob("*") if f.is_file()):
                (folder / file.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, folder / file.relative_to(new))
            shutil.rmtree(new)
    dist.barrier()


# A dev set, small enough to search exactly.

def read_dev(args, r: Retriever) -> dict:
    """Tokenised queries and passages, and which passages are relevant to which query."""
    corpus, queries, qrels = Corpus(args.eval_corpus or args.corpus), read_queries(args.eval_queries), read_qrels(args.eval_qrels)
    qids = [qid for qid in qrels if qid in queries and any(grade > 0 for grade in qrels[qid].values())]
    if not qids:
        raise ValueError(f"{args.eval_qrels} judges none of the queries in {args.eval_queries}: were they made for each other?")
    relevant = [corpus.find([docid for docid, grade in qrels[qid].items() if grade > 0]) for qid in qids]
    return {"queries": r.tokenize([queries[qid] for qid in qids], "query", args.query_length), "corpus": corpus,
            "relevant": [rows[rows >= 0] for rows in relevant]}


@torch.no_grad()
def mrr_at_10(model, r: Retriever, dev: dict, args) -> float:
    """Mean reciprocal rank within the first ten of the whole pool. A passage that ties with the relevant one counts as before it."""
    rank, W = world()
    model.eval()

    def encode(tokens):
        chunks = cut([len(t) for t in tokens], args.tokens_per_chunk)
        reps = torch.cat([forward(model, r, *r.pad([tokens[i] for i in c]), args, (0, 0, 0)) for c in chunks])
        return reps[torch.from_numpy(np.argsort(np.concatenate(chunks)))]

    q, pool = encode(dev["queries"]), np.argsort(dev["corpus"].n_bytes, kind="stable")
    mine = np.resize(pool, math.ceil(len(pool) / W) * W)[rank::W]  # filled up by repeating some: shares are equal, and what is double falls out below
    scores = torch.cat([encode(r.tokenize(dev["corpus"].texts(rows), "passage", args.passage_length)) @ q.T
                        for rows in np.split(mine, range(512, len(mine), 512))])  # (share, Q)
    scores = gather(scores).view(W, len(mine), -1).transpose(0, 1).reshape(-1, len(q))[:len(pool)]
    scores = scores[torch.from_numpy(np.argsort(pool))].T.cpu()  # (Q, N), by row of the corpus
    total = 0.0
    for row, relevant in zip(scores, dev["relevant"]):
        if len(relevant):
            best = row[relevant].max()
            place = 1 + int((row >= best).sum()) - int((row[relevant] >= best).sum())
            total += 1 / place if place <= 10 else 0.0
    model.train()
    return total / len(dev["relevant"])


# The run.

def open_run(out: Path, args) -> None:
    """Make the run's folder with its args.json, or check that --resume continues the run that is there."""
    file, now = out / "args.json", vars(args)
    if file.exists() and args.resume:
        before = json.loads(file.read_text())["arguments"]
        for name in now.keys() - FREE - {"out"}:
            if before.get(name) != now[name]:
                raise ValueError(f"{out} was started with --{name} {before.get(name)}, not {now[name]}: resume with that, or start in another folder")
    elif out.exists() and any(f.suffix != ".partial" for f in out.iterdir()):  # a process killed right at its start leaves half a file
        raise ValueError(f"{out} holds another run's results: give a new --out, or --resume to go on with that run" if file.exists() else
                         f"{out} is not empty and no run of ours: give a new --out")
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True)
    import transformers
    with write_whole(file) as f:
        json.dump({"arguments": now, "processes": world()[1], "git": git.stdout.strip() or None, "command": sys.argv,
                   "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}}, f, indent=1)


def load_model(args) -> Retriever:
    torch.manual_seed(args.seed)  # a new adapter starts the same everywhere
    r = Retriever.load(args.model, head=args.head, dtype=torch.bfloat16 if args.lora_rank and args.dtype == "bf16" else torch.float32)
    if args.lora_rank and not r.lora:
        r.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    elif args.lora_rank == 0 and r.lora:
        raise ValueError(f"{args.model} is an adapter and --lora_rank 0 trains all weights: merge it first (r.merge(); r.save(folder))")
    elif r.lora and r.lora["r"] != args.lora_rank:
        raise ValueError(f"{args.model} is an adapter of rank {r.lora['r']}, which goes on training: give --lora_rank {r.lora['r']}")
    if not r.sparse and not r.llama.config.tie_word_embeddings and args.objective not in ("mntp", "clm"):
        r.llama.lm_head.requires_grad_(False)  # nothing of it reaches the loss
    return r.to(args.device).train()


def calibrate(r: Retriever, corpus: Corpus, args) -> None:
    """A threshold for each term, the same on every process. A resumed run finds its own in the checkpoint."""
    r.threshold = torch.zeros(r.width, device=args.device)  # the place that a checkpoint is read into
    if not any((Path(args.out) / "state").glob("step_*[0-9]")):
        if world()[0] == 0:
            rows = np.random.default_rng(args.seed).choice(len(corpus), min(1024, len(corpus)), replace=False)
            r.threshold = None
            r.calibrate(corpus.texts(np.sort(rows)), args.calibrate, args.passage_length, args.tokens_per_chunk)
        dist.broadcast(r.threshold, 0)


def parallelise(r: Retriever, args):
    """What the loop calls: r itself, or r in DDP, or r with its layers sharded in place."""
    if args.checkpoint_activations:
        for layer in r.llama.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if args.compile:
        for layer in r.llama.model.layers:
            layer.compile(dynamic=True)  # chunks come in every shape
    if args.parallel == "fsdp":
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if args.dtype == "bf16" else MixedPrecisionPolicy()
        mesh = init_device_mesh(args.device, (world()[1],))
        for layer in r.llama.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=bf16)
        return fully_shard(r, mesh=mesh, mp_policy=bf16)  # embeddings, head and final norm; it stays whole between forward and backward
    return DistributedDataParallel(r, broadcast_buffers=False, gradient_as_bucket_view=True) if world()[1] > 1 else r


def horizon(args, n_rows: int, flops_per_step: float) -> int:
    """The number of optimizer steps; the schedule and the ramp follow from it."""
    if args.flop_budget:
        steps, flag = int(args.flop_budget // flops_per_step), f"--flop_budget {args.flop_budget:g} at {flops_per_step:.3g} FLOPs a step"
    elif args.epochs:
        steps = int(args.epochs * n_rows // args.queries_per_step)
        flag = f"--epochs {args.epochs:g} of {n_rows:,} rows, {args.queries_per_step} a step,"
    else:
        return args.max_steps
    if steps < 1:
        raise ValueError(f"{flag} buys no whole step: raise it, or reduce --queries_per_step")
    return steps


def lr_at(step: int, args) -> float:
    """Linear up over the warm-up, then linear down: 0 would be reached one step after the last."""
    warm = args.warmup * args.max_steps
    return args.lr * (step / warm if step < warm else (args.max_steps + 1 - step) / max(1.0, args.max_steps + 1 - warm))


def collapse(numbers: dict, step: int, r: Retriever, args) -> list[str]:
    """What a sparse head that is dying, or was never sparse, looks like from outside."""
    zero, nnz = numbers["zero"] / numbers["texts"], (numbers["nnz_q"] + numbers["nnz_d"]) / numbers["texts"]
    chance, said = math.log(args.queries_per_step * (1 + args.negatives)), []
    if zero > args.warn_zero_share:
        said.append(f"{zero:.0%} of the vectors are all zero: lower --lr, --flops_q and --flops_d, or lengthen --flops_ramp")
    elif nnz < args.warn_nnz_low:
        said.append(f"{nnz:.1f} non-zeros a vector: lower --flops_q and --flops_d")
    elif nnz > args.warn_nnz_high * r.width and step > args.flops_ramp * args.max_steps:
        said.append(f"{nnz:,.0f} non-zeros a vector of {r.width:,} after the ramp: raise --flops_q and --flops_d")
    if "cl" in numbers and step > args.warmup * args.max_steps and abs(numbers["cl"] * args.authors_weighting - chance) < 0.01 * chance:
        said.append(f"the contrastive loss is that of guessing, log of {math.exp(chance):.0f} passages: if it stays, lower --lr")
    return said


@contextlib.contextmanager
def processes(args):
    """The process group, and SIGTERM turned into a list that fills: (rank, number of processes, list)."""
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    else:  # plain `python`: a group of one, so that nothing below asks whether there is a group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    stop = []
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))  # Slurm's notice: the loop saves at the end of its step
    try:
        yield *world(), stop
    finally:
        signal.signal(signal.SIGTERM, before)
        dist.destroy_process_group()


def train(args, rank: int, W: int, stop: list) -> None:
    """A run from its first step, or from its newest checkpoint, to its last or to the first step after `stop` holds something."""
    say = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    if args.queries_per_step % W:
        raise ValueError(f"--queries_per_step {args.queries_per_step} does not divide over {W} processes: "
                         f"use {args.queries_per_step // W * W or W} or {(args.queries_per_step // W + 1) * W}")
    out = Path(args.out)
    if rank == 0:
        open_run(out, args)
    dist.barrier()
    if (out / "summary.json").exists():
        return say(f"{out} is finished: {(out / 'summary.json').read_text().strip()}")

    r = load_model(args)
    if args.temperature is None:
        args.temperature = HEADS[r.head].temperature
    if args.objective in ("mntp", "clm"):
        step_fn, rows, steps_of = block_step, (), functools.partial(BlockSteps, Corpus(args.corpus), r, args)
    else:
        rows = TrainingRows(args.train, args.corpus, args.queries, need_scores=args.objective != "cl", need_negatives=args.negatives > 0,
                            scores=args.scores)
        step_fn, steps_of = retrieval_step, functools.partial(RetrievalSteps, rows, r.tokenize, args)
        say(f"{args.train}: {rows.report}")
        if few := rows.too_few(args.negatives):
            say(f"{few:,} rows hold fewer than {args.negatives} negatives: these are shown more than once")
    if args.calibrate and r.sparse and rows:
        calibrate(r, rows.corpus, args)
    dev = read_dev(args, r) if args.eval_queries else None
    if args.flop_budget:  # counted on the first steps, with the function that counts what is spent
        sample = [steps_of(0, 1)[s] for s in (1, 2, 3, 4)]
        per_step = sum(step_flops(r, b, args) for b in sample) / 4
    args.max_steps = horizon(args, len(rows), per_step if args.flop_budget else 0)

    model = parallelise(r, args)
    trained = [p for p in r.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=args.weight_decay, fused=True)
    notes = load_state(out, r, optimizer, args.resume_from) if args.resume else {"step": 0}
    done, spent, best = notes["step"], notes.get("flops", 0.0), notes.get("best", -1.0)
    if rank == 0:
        before = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        with write_whole(out / "metrics.jsonl") as f:  # what a killed run logged after its checkpoint happens again
            f.writelines(line + "\n" for line in before if is_until(line, done))
    metrics = open(out / "metrics.jsonl", "a") if rank == 0 else open(os.devnull, "w")
    say(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in r.parameters()):,} parameters train for {args.max_steps:,} steps, "
        f"{args.parallel} on {W} x {args.device}, {args.dtype}; " + (f"going on after step {done}" if done else "from the start"))

    loader = torch.utils.data.DataLoader(
        steps_of(rank, W), batch_size=None, sampler=range(done + 1, args.max_steps + 1), num_workers=args.workers, collate_fn=lambda batch: batch,
        worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN), **({"prefetch_factor": 4} if args.workers else {}))
    edge, seconds, window, saved = time.perf_counter(), 0.0, [], done
    for step, batch in enumerate(loader, done + 1):
        waited = time.perf_counter() - edge
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        terms, counts, suspects = step_fn(model, r, batch, step, args)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

        # One message tells everyone the step's numbers, whether all is well, and whether anyone has to go.
        told = torch.tensor([*(x / W for x in terms.values()), *counts.values(), waited / W, len(stop)], dtype=torch.float64)
        dist.all_reduce(told)
        *values, waited, leaving = told.tolist()
        numbers = dict(zip([*terms, *counts], values))
        if not math.isfinite(numbers["loss"] + norm):
            parts = [None] * W
            dist.all_gather_object(parts, suspects)
            where = "; ".join(f"rank {k}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" for k, names in enumerate(parts))
            raise ValueError(f"step {step}: loss {numbers['loss']}, gradient norm {norm}. The batch: {where}. "
                             f"The weights of step {step - 1} were good; "
                             + (f"the last checkpoint is {out}/state/step_{saved:06d}" if saved else "there is no checkpoint yet"))
        optimizer.step()
        optimizer.zero_grad()

        spent += numbers["flops"]
        took, edge = time.perf_counter() - edge, time.perf_counter()
        seconds += took
        record = {"step": step, **{k: numbers[k] for k in terms}, "lr": lr_at(step, args), "norm": norm, "flops": numbers["flops"], "spent": spent,
                  "tokens": int(numbers["tokens"]), "padding": 1 - numbers["tokens"] / numbers["padded"], "seconds": took, "wait": waited}
        if "queries" in numbers:
            record |= {"nnz_q": numbers["nnz_q"] / numbers["queries"], "nnz_d": numbers["nnz_d"] / (numbers["texts"] - numbers["queries"])}
        metrics.write(json.dumps(record) + "\n")
        metrics.flush()
        window.append(record)
        if step % args.log_every == 0 or step == args.max_steps:
            say(step_line(window, args))
            for warning in collapse(numbers, step, r, args) if "zero" in numbers else []:
                say(f"WARNING step {step}: {warning}")
            window = []
        if dev and (step % args.eval_every == 0 or step == args.max_steps):
            mrr = mrr_at_10(model, r, dev, args)
            say(f"step {step}/{args.max_steps} | dev mrr@10 {mrr:.4f}" + (" (best)" if mrr > best else ""))
            metrics.write(json.dumps({"step": step, "mrr@10": mrr}) + "\n")
            metrics.flush()
            if mrr > best:
                best = mrr
                save_weights(out / "best", r, args, {"step": step, "mrr@10": mrr})
        if step % args.save_every == 0 or step == args.max_steps or leaving:
            save_state(out, step, r, optimizer, {"flops": spent, "best": best}, args.keep)
            saved = step
        if leaving and step < args.max_steps:
            say(f"SIGTERM: saved {out}/state/step_{step:06d}; the same command with --resume goes on")
            return
        edge = time.perf_counter()

    save_weights(out, r, args)
    if rank == 0:
        with write_whole(out / "summary.json") as f:  # last: a run is finished when this file is there
            json.dump({"steps": args.max_steps, "flops": spent, "seconds": seconds, **({"best_mrr@10": best} if dev else {})}, f)
    say(f"finished: {out}, {spent:.2g} FLOPs")


def is_until(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole (a killed process may leave half of one) and of no later step."""
    return line.endswith("}") and int(re.match(r'\{"step": (\d+)', line)[1]) <= step


def step_line(window: list[dict], args) -> str:
    """One greppable line for the steps since the last."""
    last, W = window[-1], world()[1]
    mean = lambda name: sum(x[name] for x in window) / len(window)
    took = sum(x["seconds"] for x in window)
    parts = [f"step {last['step']}/{args.max_steps} ({last['step'] / args.max_steps:.1%})", f"loss {mean('loss'):.4f}",
             " ".join(f"{k} {mean(k):.2f}" for k in ("cl", "kl", "margin", "reg") if k in last)]
    if "nnz_q" in last:
        parts.append(f"nnz q {mean('nnz_q'):.0f} d {mean('nnz_d'):.0f}")
    parts += [f"lr {last['lr']:.1e}", f"{sum(x['tokens'] for x in window) / took:,.0f} tok/s",
              f"pad {mean('padding'):.0%} wait {sum(x['wait'] for x in window) / took:.0%}"]  # wait: the share of the time spent waiting for data
    peak = next((v for k, v in PEAK.items() if args.device == "cuda" and k in torch.cuda.get_device_name()), None)
    if peak:  # of a device that is not in the table, and of a CPU, no number is better than a wrong one
        parts.append(f"mfu {sum(x['flops'] for x in window) / took / peak / W:.1%}")
    total = args.flop_budget or last["spent"] / last["step"] * args.max_steps
    left = round((args.max_steps - last["step"]) * took / len(window))
    parts.append(f"{last['spent']:.1e}/{total:.1e} FLOPs".replace("e+", "e"))
    parts.append(f"eta {left // 3600}h{left // 60 % 60:02d}m" if left >= 3600 else f"eta {left // 60}m" if left >= 60 else f"eta {left}s")
    return " | ".join(p for p in parts if p)


def main(argv=None) -> None:
    args = parse_args(argv)
    with processes(args) as (rank, W, stop):
        train(args, rank, W, stop)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"train.py: {e}")
