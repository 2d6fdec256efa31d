"""One loop for every objective: contrastive learning (CL), distillation (KD), both; masked language modelling
(MNTP), as the paper does first, and causal (CLM), for a model of one's own.

    python train.py --model data/demo/model --lora_rank 0 --head sparse --objective cl \\
        --train data/demo/train.jsonl --corpus data/demo --max_steps 300 --out runs/demo
    torchrun --nproc_per_node=4 train.py --model runs/mntp --head sparse --objective cl+kd \\
        --train T.jsonl --corpus C --out runs/sp-1b
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST --rdzv_backend=c10d \\
        train.py --parallel fsdp ...
    python train.py --plan --model 1b --head sparse --objective cl+kd --max_steps 33250  # what it would take

The same command with --resume goes on where it was stopped, or starts if it never ran. What surprises:

- Flags speak of the whole step: --queries_per_step is split over the processes. Data order, loss and gradient
  do not depend on how many there are, on --accumulation, --parallel or the side of the padding, but for
  rounding and the noise of dropout.
- A step encodes, takes the loss on the vectors alone, then sends their gradients back through the encoder. So
  the loss sees all passages whatever --accumulation is: above 1 the first encoding keeps no graph, and each
  share of the texts is encoded again when its turn comes (GradCache, Gao et al. 2021).
- What is random is drawn from (seed, epoch, row), (seed, block), and for dropout (seed, step, rank, chunk). A
  checkpoint needs no generator's state, only the number of its step.
"""

import argparse
import contextlib
import errno
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

# The loader's workers are the parallelism, and forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import losses
from data import (Corpus, Help, TrainingRows, check_files, digest, discard, fingerprint, leave_with_parent,
                  locked, natural, non_negative, positive, positive_int, read_json, read_queries, run_command,
                  share, stamp, write_whole)
from evaluate import read_qrels
from losses import OBJECTIVES, gather, ramp, world
from model import HEADS, Retriever, flops_per_token, longest_first

# DDP's name for it in torch 2.11 and 2.12. From 2.13 on it is forward_sync_buffers, and the old one warns.
warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)

# Dense bf16 FLOP/s of a device, by a part of its name.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
# Whose content must be the same at --resume, and flags that may differ: others would make it another run.
INPUTS = ("model", "train", "corpus", "queries", "scores", "eval_queries", "eval_qrels", "eval_corpus")
FREE = ("out", "resume", "resume_from", "keep", "save_every", "log_every", "eval_every", "workers", "device",
        "parallel", "accumulation", "tokens_per_chunk", "recompute",
        "compile", "attn")
ON, NEEDED = object(), object()
# What can be set: (name, type or choices, default, help).
FLAGS = {
    "what to train": [
        ("model", str, NEEDED, "HF folder, hub name, or an adapter folder, which then goes on training"),
        ("objective", OBJECTIVES, NEEDED, ""),
        ("head", HEADS, None, "needed unless the model's retriever.json says it"),
        ("lora_rank", natural, 16, "0: all weights. An adapter in --model keeps its alpha and dropout"),
        ("lora_alpha", positive, 32.0, ""),
        ("lora_dropout", share, 0.05, ""),
        ("out", str, NEEDED, "the run's folder; it must be new, or --resume"),
    ],
    "data": [
        ("train", str, None, "training rows, in any of the formats of data.py (not for mntp and clm)"),
        ("corpus", str, None, "collection.tsv, corpus.jsonl or BEIR folder; not needed if rows hold texts"),
        ("queries", str, None, "queries, if the rows hold ids of queries"),
        ("scores", str, None, "teacher scores as JSON {qid: {pid: score}}, if the rows hold none"),
        ("negatives", natural, None, "passages beside the positive (16; kd 1; 0: in-batch only)"),
        ("query_length", positive_int, 64, "tokens, BOS included"),
        ("passage_length", positive_int, 128, "the checkpoint keeps its own length for evaluation"),
        ("query_prefix", str, None, "put before each query, and kept in the checkpoint"),
        ("passage_prefix", str, None, "the same for passages"),
        ("block_length", positive_int, 512, "mntp, clm: tokens a block"),
        ("mask_share", share, 0.2, "mntp: tokens to predict; of these 80% are masked, 10% random, 10% kept"),
        ("workers", natural, 2, "tokenising processes; more if the step line shows a wait"),
    ],
    "horizon (one of them; the paper's 7 epochs, kd 56, mntp and clm 10,000 steps)": [
        ("max_steps", positive_int, None, ""),
        ("epochs", positive, None, ""),
        ("flop_budget", positive, None, "FLOPs, e.g. 1e18: steps follow from what one costs"),
    ],
    "batch and memory": [
        ("queries_per_step", positive_int, None, "over all processes (112; kd 1024; mntp, clm 128 blocks)"),
        (
            "recompute",
            natural,
            None,
            "decoder blocks that backward computes again instead of keeping what they "
            "saved. --plan says how few would do (GPU: all, which costs a third forward; CPU: none)",
        ),
        (
            "accumulation",
            positive_int,
            1,
            "still out of memory? 2, 4, 8: one such share at a time, encoded twice",
        ),
        ("tokens_per_chunk", positive_int, 16384, "padded tokens in one forward"),
    ],
    "loss": [
        ("temperature", positive, None, "divides the scores in every loss (dense 0.01, sparse 1)"),
        ("flops_q", non_negative, 0.05, "FLOPs weight of queries, sparse head"),
        ("flops_d", non_negative, 0.04, "FLOPs weight of passages"),
        ("flops_ramp", share, 1 / 3, "share of the run over which the FLOPs weights grow quadratically"),
        ("keep_false_negatives", ON, False, "known positives of a query count as its in-batch negatives"),
        (
            "authors_weighting",
            positive_int,
            1,
            "divide the contrastive and FLOPs terms by this, as the authors' "
            "gather without gradient did on so many devices (the paper: 4). 1 is the paper's formula",
        ),
        (
            "calibrate",
            share,
            None,
            "sparse: before step 1 set each term's threshold so that it is on in this "
            "share of 1,024 passages of --corpus (0.01). Needed where all weights of a language model train",
        ),
    ],
    "optimizer": [
        ("lr", positive, None, "(1e-4; mntp 5e-5, clm 3e-4)"),
        ("warmup", share, None, "share of the run in which lr grows, before it falls to 0 (0.04; mntp 0)"),
        ("weight_decay", non_negative, 0.0, ""),
        ("clip", positive, 1.0, "largest gradient norm"),
        ("seed", natural, 0, ""),
    ],
    "machines": [
        ("parallel", ["ddp", "fsdp"], "ddp", "fsdp shards weights, gradients and optimizer"),
        ("dtype", ["bf16", "fp32"], None, "compute; trained weights are fp32 (GPU bf16, CPU fp32)"),
        ("device", ["cuda", "cpu"], "cuda" if torch.cuda.is_available() else "cpu", ""),
        ("attn", str, "sdpa", "eager for Gemma 2, flash_attention_2 where it is installed"),
        ("compile", ON, False, "torch.compile each layer"),
    ],
    "saving and watching": [
        ("resume", ON, False, "go on from the newest checkpoint in --out, or start"),
        ("resume_from", positive_int, None, "go on from this step's checkpoint; later ones are removed"),
        ("save_every", positive_int, 500, "steps between checkpoints"),
        ("keep", positive_int, 2, "checkpoints to keep"),
        ("log_every", positive_int, 10, ""),
        ("eval_queries", str, None, "small dev set: MRR@10 by exact search, the best weights in OUT/best"),
        ("eval_qrels", str, None, ""),
        ("eval_corpus", str, None, "the dev pool (--corpus if not given: keep it small)"),
        ("eval_every", positive_int, 500, ""),
    ],
}


class RawHelp(Help, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the defaults."""


def parse_args(argv=None) -> argparse.Namespace:
    p = make_parser()
    args = complete(p.parse_args(argv))
    fault = check_args(args)
    if fault:
        p.error(fault)
    return args


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=RawHelp)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, kind, default, text in flags:
            how = {"choices": kind} if isinstance(kind, (list, dict)) else {"type": kind}
            how = {"action": "store_true"} if kind is ON else {**how, "required": default is NEEDED}
            default = None if default is NEEDED else default
            group.add_argument(f"--{name}", default=default, help=text.replace("%", "%%") or " ", **how)
    return p


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """What was not given: from the objective's settings and the machine."""
    horizon = args.max_steps or args.epochs or args.flop_budget
    for name, value in OBJECTIVES[args.objective].settings.items():
        if getattr(args, name) is None and not (horizon and name in ("max_steps", "epochs")):
            setattr(args, name, value)
    args.resume = args.resume or args.resume_from is not None
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if OBJECTIVES[args.objective].predicts:
        # It decides nothing here but what retriever.json will say.
        args.head = args.head or "sparse"
    return args


def check_args(args) -> str | None:
    """What the types cannot see: flags that need each other, or exclude each other."""
    objective = OBJECTIVES[args.objective]
    if sum(x is not None for x in (args.max_steps, args.epochs, args.flop_budget)) > 1:
        return "--max_steps, --epochs and --flop_budget say the same thing: give one"
    if objective.predicts and args.epochs:
        return "an epoch of packed text has no fixed length: give --max_steps or --flop_budget"
    if objective.needs_negatives and args.negatives < 1:
        return f"--objective {args.objective} compares a query's own passages: --negatives must be at least 1"
    if objective.predicts == "masked" and not args.mask_share:
        return "--mask_share 0 leaves nothing to predict: give a share above 0"
    needed = "corpus" if objective.predicts else "train"
    if not getattr(args, needed):
        return f"--objective {args.objective} needs --{needed}"
    if args.eval_queries and not (args.eval_qrels and (args.eval_corpus or args.corpus)):
        return "--eval_queries needs --eval_qrels, and --eval_corpus or --corpus"
    if args.calibrate is not None and not (0 < args.calibrate < 1 and args.corpus):
        return f"--calibrate {args.calibrate} needs --corpus, and to be a share between 0 and 1"
    return None


# A step's data, as functions of the step's number alone. The loader's workers call them ahead of time.


def places_in(step: int, args, rank: int, W: int) -> range:
    """Which queries (or blocks) this process takes in a step, counted from the run's first."""
    Q = args.queries_per_step
    before = (step - 1) * Q
    return range(before + Q * rank // W, before + Q * (rank + 1) // W)


def tokenizer_of(r: Retriever):
    """r.tokenize without the weights: where workers are not forked, it is pickled."""
    bare = Retriever.__new__(Retriever)
    torch.nn.Module.__init__(bare)
    bare.settings, bare.tokenizer = r.settings, r.tokenizer
    return bare.tokenize


class RetrievalSteps:
    """steps[s], s = 1, 2, ...: this process's queries of step s, then their passages, tokenised."""

    def __init__(self, rows: TrainingRows, tokenize, args, rank: int, W: int):
        self.rows, self.tokenize, self.args, self.rank, self.W = rows, tokenize, args, rank, W
        self.epoch, self.order = None, None

    def row_at(self, place: int) -> tuple[int, int]:
        """(epoch, row). An epoch shows each row once, in its own order; a step may reach into the next."""
        epoch, i = divmod(place, len(self.rows))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.args.seed, epoch)).permutation(len(self.rows))
        return epoch, int(self.order[i])

    def __getitem__(self, step: int) -> dict:
        a, examples, names = self.args, [], []
        for place in places_in(step, a, self.rank, self.W):
            epoch, row = self.row_at(place)
            # Positive and negatives are drawn anew in each epoch.
            rng = np.random.default_rng((a.seed, epoch, row))
            examples.append(self.rows.example(row, a.negatives, rng))
            names.append(self.rows.ids(row))
        tokens = self.tokenize([e.query for e in examples], "query", a.query_length)
        tokens += self.tokenize([text for e in examples for text in e.texts], "passage", a.passage_length)
        for_loss = {}
        if OBJECTIVES[a.objective].needs_teacher:
            for_loss["teacher"] = np.array([e.scores for e in examples], np.float32)
        if not a.keep_false_negatives:
            for_loss["docids"] = np.array([number_of(docid) for e in examples for docid in e.docids])
            known = [[number_of(docid) for docid in (e.docids[0], *e.positives)] for e in examples]
            # A matrix has rows of one length: a query with fewer known positives repeats some.
            most = max(map(len, known))
            for_loss["positives"] = np.array([(numbers * most)[:most] for numbers in known])
        return {"names": names, "tokens": tokens, "for_loss": for_loss}


def number_of(docid: str) -> int:
    """An id as an int64, the same in every process (Python's own hash is not)."""
    return int(digest(docid), 16) - 2**63


class BlockSteps:
    """steps[s]: this process's blocks of step s, filled with random passages; where to predict, and what."""

    def __init__(self, corpus: Corpus, r: Retriever, args, rank: int, W: int):
        self.corpus, self.tokenize, self.args, self.rank, self.W = corpus, tokenizer_of(r), args, rank, W
        self.masked, tokenizer = OBJECTIVES[args.objective].predicts == "masked", r.tokenizer
        self.vocab, self.special = r.llama.config.vocab_size, sorted(set(tokenizer.all_special_ids))
        # Llama has no mask token, and the paper borrows "_".
        self.mask = tokenizer.mask_token_id
        if self.mask is None:
            self.mask = (tokenizer.encode("_", add_special_tokens=False) or [None])[0]
        if self.mask is None and self.masked:
            raise ValueError(
                f"{args.model}: the tokenizer has no mask token and drops _, which would serve; set "
                "mask_token in its tokenizer_config.json"
            )

    def __getitem__(self, step: int) -> dict:
        names, blocks = [], []
        for place in places_in(step, self.args, self.rank, self.W):
            rng = np.random.default_rng((self.args.seed, place))
            tokens, first = self.fill(rng)
            blocks.append((tokens, *self.hide(tokens, rng)))
            names.append(f"block {place} (from {self.corpus.docid(first)} on)")
        tokens, shown, chosen = map(np.stack, zip(*blocks))
        # The token at i is predicted from position i - 1.
        at = np.zeros_like(chosen)
        at[:, :-1] = chosen[:, 1:]
        return {"names": names, "shown": shown, "at": at, "labels": tokens[chosen]}

    def fill(self, rng) -> tuple[np.ndarray, int]:
        """A block's tokens, and the row of its first passage. Passages may come again; the last is cut."""
        L, tokens, rows = self.args.block_length, [], []
        while len(tokens) < L:
            drawn = rng.integers(len(self.corpus), size=8).tolist()
            rows += drawn
            for ids in self.tokenize(self.corpus.texts(drawn), "passage", L):
                tokens += ids
        return np.array(tokens[:L]), rows[0]

    def hide(self, tokens, rng) -> tuple[np.ndarray, np.ndarray]:
        """(what the model is shown, which tokens it is to predict). Other maskings go here."""
        L, shown, chosen = len(tokens), tokens.copy(), np.ones(len(tokens), bool)
        if self.masked:
            chosen = (rng.random(L) < self.args.mask_share) & ~np.isin(tokens, self.special)
        # Nothing stands before the first token from which to predict it.
        chosen[0] = False
        if self.masked:
            fate = rng.random(L)
            shown[chosen & (fate < 0.8)] = self.mask
            swapped = chosen & (fate >= 0.9)
            shown[swapped] = rng.integers(self.vocab, size=swapped.sum())
        return shown, chosen


def loader(steps, args, first: int) -> torch.utils.data.DataLoader:
    """The batches of the steps from `first` on."""
    ahead = {"prefetch_factor": 4} if args.workers else {}
    return torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first, args.max_steps + 1), num_workers=args.workers,
        collate_fn=as_it_is, worker_init_fn=start_worker, **ahead)


def as_it_is(x):
    return x


def start_worker(_) -> None:
    # The step at hand needs it, whatever signal the whole group gets. Without the main process nobody does.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent(always=True)


# One step's gradients.


def agreed_chunks(lengths, args, at_least: int = 1) -> list[np.ndarray]:
    """Places of texts in chunks of at most --tokens_per_chunk padded tokens; as many on every process."""
    chunks = longest_first(lengths, args.tokens_per_chunk)
    # Under FSDP each forward gathers weights from everyone: nobody may skip one.
    agreed = torch.tensor(max(len(chunks), at_least))
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    while len(chunks) < min(agreed, len(lengths)):
        sizes = [len(chunk) for chunk in chunks]
        k = sizes.index(max(sizes))
        chunks[k:k + 1] = np.array_split(chunks[k], 2)
    return chunks


def forward(model, r: Retriever, ids, mask, args, noise: tuple, **kw) -> torch.Tensor:
    """Run the encoder. Dropout follows from `noise` alone, so that a second pass repeats the first."""
    # Python salts the hash of strings, not of numbers: it is the same everywhere.
    torch.manual_seed(hash((args.seed, *noise)))
    device = next(r.parameters()).device
    # FSDP casts the weights itself.
    autocast = args.dtype == "bf16" and args.parallel == "ddp"
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return model(ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), **kw)


def last_only(model, last: bool):
    """DDP averages gradients when they are complete. FSDP in each backward: whole, they would not fit."""
    waits = isinstance(model, DistributedDataParallel) and not last
    return model.no_sync() if waits else contextlib.nullcontext()


def step_flops(r: Retriever, batch: dict, args) -> float:
    """What a step's tokens cost, forward and backward, padding and second passes not counted."""
    lengths, what = [args.block_length] * len(batch["names"]), args.objective
    if "tokens" in batch:
        lengths, what = [len(t) for t in batch["tokens"]], r.head
    lora_r, total = r.lora["r"] if r.lora else 0, 0
    for length, texts in zip(*np.unique(lengths, return_counts=True)):
        a_token = flops_per_token(r.llama.config, int(length), what, train=True, lora_r=lora_r)
        total += texts * (length * a_token)
    return total


def retrieval_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """Gradients of a step into .grad. Returns the loss's terms, counts to be summed, and rows to suspect."""
    rank, names, tokens = world()[0], batch["names"], batch["tokens"]
    B, lengths, device = len(names), [len(t) for t in tokens], next(r.parameters()).device
    chunks = agreed_chunks(lengths, args, args.accumulation)
    padded = sum(len(chunk) * lengths[chunk[0]] for chunk in chunks)
    two_passes = args.accumulation > 1

    def encode(k):
        return forward(model, r, *r.pad([tokens[i] for i in chunks[k]]), args, (step, rank, k))

    # 1. Encode. With accumulation no graph is kept: step 3 encodes each share again (GradCache).
    with torch.set_grad_enabled(not two_passes):
        encoded = [encode(k) for k in range(len(chunks))]

    # 2. The loss on the vectors alone. They are leaves: backward stops here, at their gradients.
    places = [torch.from_numpy(chunk).to(device) for chunk in chunks]
    reps = torch.empty(len(tokens), r.width, device=device)
    for place, vectors in zip(places, encoded):
        reps[place] = vectors.detach().float()
    q, d = reps[:B].requires_grad_(), reps[B:].requires_grad_()
    given = {name: torch.from_numpy(x).to(device) for name, x in batch["for_loss"].items()}
    weight = ramp(step, args.flops_ramp * args.max_steps) if r.sparse else 0.0
    loss, terms = losses.objective(
        args.objective, q, d, temperature=args.temperature, devices=args.authors_weighting,
        flops_weights=(weight * args.flops_q, weight * args.flops_d), **given)
    loss.backward()
    grads = torch.cat([q.grad, d.grad])

    # 3. The vectors' gradients go back through the encoder, one share of the chunks at a time.
    shares = np.array_split(np.arange(len(chunks)), min(args.accumulation, len(chunks)))
    for part in shares:
        with last_only(model, part is shares[-1]):
            outputs = [encode(k) if two_passes else encoded[k] for k in part]
            torch.autograd.backward(outputs, [grads[places[k]] for k in part])

    terms = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
    counts = {"tokens": sum(lengths), "padded": padded, "texts": len(tokens),
              "flops": step_flops(r, batch, args)}
    reps = reps.detach()
    if r.sparse:
        on = (reps > 0).sum(1).double()
        counts |= {"nnz_q": on[:B].sum().item(), "nnz_d": on[B:].sum().item(), "queries": B,
                   "zero": (on == 0).sum().item()}
    # The rows whose query or passages have a vector with NaN or infinity; if none has one, all are suspects.
    broken = (~reps.sum(1).isfinite()).nonzero()[:, 0].tolist()
    G = len(tokens) // B - 1
    suspects = {names[i if i < B else (i - B) // G] for i in broken}
    return terms, counts, sorted(suspects) or names


def block_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """The same for next-token prediction, whose chunks share nothing but the number of tokens to predict."""
    (rank, W), device = world(), next(r.parameters()).device
    shown, at, labels = (torch.from_numpy(batch[name]) for name in ("shown", "at", "labels"))
    predicted = torch.tensor(float(len(labels)))
    dist.all_reduce(predicted)
    size = max(1, min(args.tokens_per_chunk // args.block_length, math.ceil(len(shown) / args.accumulation)))
    labels, total = labels.split([int(a.sum()) for a in at.split(size)]), 0.0
    for k, (ids, where, wanted) in enumerate(zip(shown.split(size), at.split(size), labels)):
        # The decoder asks its config at each forward which way it may look. What is saved looks both ways.
        r.llama.config.is_causal = OBJECTIVES[args.objective].predicts == "all"
        with last_only(model, k == len(labels) - 1):
            logits = forward(model, r, ids, torch.ones_like(ids), args, (step, rank, k), at=where.to(device))
            loss = losses.mntp(logits, wanted.to(device), predicted.item() / W)
            loss.backward()
        r.llama.config.is_causal = False
        total += loss.item()
    counts = {"tokens": shown.numel(), "padded": shown.numel(), "texts": len(shown),
              "flops": step_flops(r, batch, args)}
    return {"loss": total}, counts, batch["names"]


def run_block(block, *inputs, **kw):
    """A decoder block of which only the input is kept: backward runs it again."""
    again = torch.is_grad_enabled()
    return checkpoint(block, *inputs, use_reentrant=False, **kw) if again else block(*inputs, **kw)


# Checkpoints: folders OUT/state/step_000120 that appear by one rename. No pickle in them: it could run code.


def training_state(r: Retriever, optimizer) -> dict[str, torch.Tensor]:
    """All that a step changes, by name: trained weights, and for each AdamW's moments and count of steps."""
    state = {} if r.threshold is None else {"threshold": r.threshold}
    for name, weight in r.named_parameters():
        if weight.requires_grad:
            state[name] = weight.detach()
            state |= {f"{name}.{what}": value for what, value in optimizer.state[weight].items()}
    return state


def gathered(state: dict) -> dict[str, torch.Tensor]:
    """The same on rank 0's CPU, whole where tensors are sharded; the others only give their shards."""
    whole = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world()[0] == 0:
            whole[name] = tensor.detach().cpu().contiguous()
    return whole


def steps_saved(out: Path) -> dict[int, Path]:
    """The whole checkpoints by step, oldest first."""
    folders = (out / "state").glob("step_*[0-9]")
    return dict(sorted((int(folder.name[5:]), folder) for folder in folders))


def save_state(out: Path, step: int, r: Retriever, optimizer, notes: dict, keep: int) -> None:
    """A checkpoint that any number of processes can go on from, sharded or not."""
    state, whole = gathered(training_state(r, optimizer)), out / "state" / f"step_{step:06d}"
    partial = whole.with_name(f"{whole.name}.partial")
    if world()[0] == 0:
        # What a process left that was killed while it saved.
        for left in whole.parent.glob("*.partial"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        file = partial / "state.safetensors"
        with disk(file):
            save_file(state, file)
            notes = {"step": step, **notes, "files": {file.name: stamp(file)}}
            (partial / "notes.json").write_text(json.dumps(notes, indent=1))
        os.rename(partial, whole)
        for old in list(steps_saved(out).values())[:-keep]:
            discard(old)
    dist.barrier()


@contextlib.contextmanager
def disk(place: Path):
    """Safetensors has an error of its own for a full disk."""
    try:
        yield
    except SafetensorError as e:
        cure = "make room, and go on with --resume"
        raise OSError(errno.ENOSPC, f"cannot be written ({e}): {cure}", str(place)) from e


def load_state(out: Path, r: Retriever, optimizer, step: int | None) -> dict:
    """Go on from the newest checkpoint, or that of `step`. Returns its notes; {"step": 0} if there is
    none."""
    saved = steps_saved(out)
    if not saved and step is None:
        return {"step": 0}
    step = step or max(saved)
    if step not in saved:
        raise ValueError(f"--resume_from {step}: {out}/state holds the steps {list(saved)}")
    earlier = [s for s in saved if s < step]
    cure = (
        f"--resume_from {earlier[-1]} takes the one before" if earlier else "it is the only one; start anew"
    )
    try:
        notes = read_json(saved[step] / "notes.json")
        check_files(saved[step], notes["files"], cure, full=True)
        # AdamW makes these at its first step. Here is the room that the checkpoint's are read into.
        for weight in optimizer.param_groups[0]["params"]:
            moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
        read_state(saved[step] / "state.safetensors", training_state(r, optimizer))
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise ValueError(f"{saved[step]} is damaged ({e}); {cure}") from e
    dist.barrier()
    if world()[0] == 0:
        # What the run does from here takes their place.
        for later in [folder for s, folder in saved.items() if s > step]:
            discard(later)
    return notes


def read_state(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Fill each tensor, a sharded one with this process's rows."""
    rank, W = world()
    with safe_open(file, "pt") as tensors:
        for name, tensor in state.items():
            if isinstance(tensor, DTensor):
                # As torch.chunk cuts: all shares are equal but the last ones, which may be short or empty.
                a_share = math.ceil(len(tensor) / W)
                tensor.to_local().copy_(tensors.get_slice(name)[rank * a_share:(rank + 1) * a_share])
            else:
                tensor.copy_(tensors.get_tensor(name))


def save_weights(folder: Path, r: Retriever, args, notes: dict | None = None) -> None:
    """The weights or the adapter in `folder`, whole: what index.py and --model read."""
    state = None
    if args.parallel == "fsdp":
        state = gathered({name: x for name, x in r.state_dict().items() if "lora_" in name or not r.lora})
    if world()[0] == 0:
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        with disk(new):
            r.save(new, state)
        if notes:
            (new / "notes.json").write_text(json.dumps(notes))
            if folder.exists():
                discard(folder)
            os.rename(new, folder)
        else:
            # The run's folder holds other things: file by file. Where retriever.json is, all the others are.
            files = [f for f in new.rglob("*") if f.is_file() and f.name != "retriever.json"]
            for file in [*files, new / "retriever.json"]:
                (folder / file.relative_to(new)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, folder / file.relative_to(new))
            shutil.rmtree(new)
    dist.barrier()


# A dev set, small enough to search exactly.


def read_dev(args) -> dict:
    """Queries, passages, and which passages are relevant to which query."""
    queries, qrels = read_queries(args.eval_queries), read_qrels(args.eval_qrels)
    corpus = Corpus(args.eval_corpus or args.corpus)
    relevant = {}
    for qid, grades in qrels.items():
        relevant[qid] = [docid for docid, grade in grades.items() if grade > 0]
    qids = [qid for qid in qrels if qid in queries and relevant[qid]]
    if not qids:
        raise ValueError(
            f"{args.eval_qrels} judges none of the queries in {args.eval_queries}: were they made "
            "for each other?"
        )
    rows = [corpus.find(relevant[qid]) for qid in qids]
    return {"queries": [queries[qid] for qid in qids], "corpus": corpus,
            "relevant": [known[known >= 0] for known in rows]}


@torch.no_grad()
def mrr_at_10(r: Retriever, dev: dict, args) -> float:
    """Mean reciprocal rank within the first ten of the whole pool. Every process computes all of it."""
    n, scores, total = len(dev["corpus"]), [], 0.0
    q = r.encode(dev["queries"], "query", args.query_length, args.tokens_per_chunk)
    q = q.to_dense() if r.sparse else q
    for first in range(0, n, 4096):
        texts = dev["corpus"].texts(range(first, min(first + 4096, n)))
        scores.append(r.encode(texts, "passage", args.passage_length, args.tokens_per_chunk) @ q.T)
    for row, relevant in zip(torch.cat(scores).T, dev["relevant"]):  # (N,)
        if len(relevant):
            # A passage that ties with the relevant one counts as before it.
            best = row[relevant].max()
            place = 1 + int((row >= best).sum()) - int((row[relevant] >= best).sum())
            total += 1 / place if place <= 10 else 0.0
    return total / len(dev["relevant"])


# The run.


def open_run(out: Path, args) -> None:
    """Make the run's folder with its args.json, or check that --resume goes on with the same run and data."""
    file, now = out / "args.json", vars(args)
    inputs = {name: fingerprint(now[name]) for name in INPUTS if now[name]}
    if file.exists() and args.resume:
        check_same_run(out, read_json(file), now, inputs)
    elif out.exists() and any(f.suffix != ".partial" for f in out.iterdir()):
        # (A process that is killed right at its start leaves half a file.)
        what = "holds another run's results" if file.exists() else "is not empty and no run of ours"
        raise ValueError(f"{out} {what}: give a new --out" + ", or --resume to go on with it" * file.exists())
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                         capture_output=True, text=True)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__}
    with write_whole(file) as f:
        json.dump({"arguments": now, "inputs": inputs, "versions": versions, "processes": world()[1],
                   "git": git.stdout.strip() or None, "command": sys.argv}, f, indent=1)


def check_same_run(out: Path, before: dict, now: dict, inputs: dict) -> None:
    for name in now.keys() - set(FREE):
        then = before["arguments"].get(name)
        if then != now[name]:
            raise ValueError(f"{out} was started with --{name} {then}, not {now[name]}: resume with that, or "
                             "start in another folder")
    for name, content in inputs.items():
        if before.get("inputs", inputs)[name] != content:
            raise ValueError(
                f"--{name} {now[name]} is not what it was when {out} was started: put that back, "
                "or start in another folder"
            )


def load_model(args) -> Retriever:
    # A new adapter starts the same everywhere.
    torch.manual_seed(args.seed)
    dtype = torch.bfloat16 if args.lora_rank and args.dtype == "bf16" else torch.float32
    # An 8B in fp32 is 32 GB. Under FSDP rank 0 alone reads them; `spread` gives the others their shards.
    where = "meta" if args.parallel == "fsdp" and world()[0] > 0 else "cpu"
    r = Retriever.load(args.model, head=args.head, dtype=dtype, attn=args.attn, device=where)
    for kind in ("query_prefix", "passage_prefix"):
        if getattr(args, kind) is not None:
            r.settings[kind] = getattr(args, kind)
    if args.lora_rank and not r.lora:
        r.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    elif args.lora_rank == 0 and r.lora:
        raise ValueError(f"{args.model} is an adapter and --lora_rank 0 trains all weights: merge it first "
                         "(r.merge(); r.save(folder))")
    elif r.lora and r.lora["r"] != args.lora_rank:
        raise ValueError(f"{args.model} is an adapter of rank {r.lora['r']}, which goes on training: "
                         f"give --lora_rank {r.lora['r']}")
    if not r.sparse and not r.llama.config.tie_word_embeddings and not OBJECTIVES[args.objective].predicts:
        # Nothing of it reaches the loss.
        r.llama.lm_head.requires_grad_(False)
    return (r if args.parallel == "fsdp" else r.to(args.device)).train()


def calibrate(r: Retriever, corpus: Corpus, args) -> None:
    """A threshold for each term, the same on every process. A resumed run finds its own in the checkpoint."""
    # The place that a checkpoint is read into.
    r.threshold = torch.zeros(r.width, device=args.device)
    if not steps_saved(Path(args.out)):
        if world()[0] == 0:
            rows = np.random.default_rng(args.seed).choice(len(corpus), min(1024, len(corpus)), replace=False)
            r.threshold = None
            texts = corpus.texts(np.sort(rows))
            r.calibrate(texts, args.calibrate, args.passage_length, args.tokens_per_chunk)
        dist.broadcast(r.threshold, 0)


def parallelise(r: Retriever, args):
    """What the loop calls: r itself, or r in DDP, or r with its layers sharded in place."""
    layers = r.llama.model.layers
    recomputed = args.recompute
    if recomputed is None:
        recomputed = len(layers) if args.device == "cuda" else 0
    for place, layer in enumerate(layers):
        if args.compile:
            # Chunks come in every shape.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if place < recomputed:
            layer.forward = functools.partial(run_block, layer.forward)
    if args.parallel == "fsdp":
        cast = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.dtype == "bf16" else {}
        mesh = dist.init_device_mesh(args.device, (world()[1],))
        whole = r.state_dict() if world()[0] == 0 else {}
        # The last, r, has embeddings, head and final norm, and stays whole between forward and backward.
        for module in (*layers, r):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**cast))
        # The dev set is read without `forward`, which is what gathers the weights.
        register_fsdp_forward_method(r, "encode")
        spread(r, whole, args)
        return r
    if world()[1] == 1:
        return r
    return DistributedDataParallel(r, broadcast_buffers=False, gradient_as_bucket_view=True)


def spread(r: Retriever, whole: dict, args) -> None:
    """Rank 0's weights, tensor after tensor, into everyone's shards."""
    if world()[0] > 0:
        r.to_empty(device=args.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(r, whole, options=options)
    # What is computed and not saved, such as the rotation's frequencies, is in no state dict.
    for buffer in r.buffers():
        dist.broadcast(buffer, 0)


def open_data(args, r: Retriever):
    """(what makes a step's gradients, what makes the steps' data for (rank, processes), training rows)."""
    objective = OBJECTIVES[args.objective]
    if objective.predicts:
        return block_step, functools.partial(BlockSteps, Corpus(args.corpus), r, args), 0
    rows = TrainingRows(args.train, args.corpus, args.queries, need_scores=objective.needs_teacher,
                        need_negatives=args.negatives > 0, scores=args.scores)
    say(f"{args.train}: {rows.report}")
    few = rows.too_few(args.negatives)
    if few:
        say(f"{few:,} rows hold fewer than {args.negatives} negatives: these are shown more than once")
    if args.calibrate and r.sparse:
        calibrate(r, rows.corpus, args)
    return retrieval_step, functools.partial(RetrievalSteps, rows, tokenizer_of(r), args), len(rows)


def horizon(args, n_rows: int, flops_per_step: float) -> int:
    """The number of optimizer steps; the schedule and the ramp follow from it."""
    if args.max_steps:
        return args.max_steps
    if args.flop_budget:
        steps = int(args.flop_budget // flops_per_step)
        flag = f"--flop_budget {args.flop_budget:g} at {flops_per_step:.3g} FLOPs a step"
    else:
        steps = int(args.epochs * n_rows // args.queries_per_step)
        flag = f"--epochs {args.epochs:g} of {n_rows:,} rows, {args.queries_per_step} a step,"
    if steps < 1:
        raise ValueError(f"{flag} buys no whole step: raise it, or reduce --queries_per_step")
    return steps


def lr_at(step: int, args) -> float:
    """Linear up over the warm-up, then linear down: 0 would be reached one step after the last."""
    warm = args.warmup * args.max_steps
    if step < warm:
        return args.lr * (step / warm)
    return args.lr * ((args.max_steps + 1 - step) / max(1.0, args.max_steps + 1 - warm))


def warn(numbers: dict, step: int, r: Retriever, args) -> None:
    for warning in (
        collapse(numbers, step, r, args) if "zero" in numbers and step % args.log_every == 0 else []
    ):
        say(f"WARNING step {step}: {warning}")


def collapse(numbers: dict, step: int, r: Retriever, args) -> list[str]:
    """What a sparse head that is dying, or was never sparse, looks like from outside."""
    zero = numbers["zero"] / numbers["texts"]
    nnz = (numbers["nnz_q"] + numbers["nnz_d"]) / numbers["texts"]
    chance, said = math.log(args.queries_per_step * (1 + args.negatives)), []
    if zero > 0.1:
        said.append(f"{zero:.0%} of the vectors are all zero: lower --lr, --flops_q and --flops_d, or raise "
                    "--flops_ramp")
    elif nnz < 2:
        said.append(f"{nnz:.1f} non-zeros a vector: lower --flops_q and --flops_d")
    elif nnz > 0.25 * r.width and step > args.flops_ramp * args.max_steps:
        said.append(
            f"{nnz:,.0f} non-zeros a vector of {r.width:,} after the ramp: raise --flops_q, --flops_d"
        )
    guessing = abs(numbers.get("cl", 0.0) * args.authors_weighting - chance) < 0.01 * chance
    if guessing and step > args.warmup * args.max_steps:
        said.append(
            f"the contrastive loss is that of guessing, log of {math.exp(chance):.0f} passages: lower "
            "--lr if it stays"
        )
    return said


@contextlib.contextmanager
def processes(args):
    """The process group, and a list that fills when a signal asks us to go."""
    leave_with_parent()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    else:
        # A group of one, so that nothing else asks whether there is a group.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    stop = []

    def ask(number, frame):
        # Slurm's SIGTERM, or Ctrl-C: the loop saves at the end of its step. Who cannot wait presses it again.
        if number == signal.SIGINT and stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        dist.destroy_process_group()


def told_by_all(terms: dict, counts: dict, waited: float, stop: list) -> tuple[dict, float, bool]:
    """A step's numbers over all processes, their mean wait for data, and whether any of them has to go."""
    W = world()[1]
    mine = [*(x / W for x in terms.values()), *counts.values(), waited / W, len(stop)]
    told = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(told)
    *values, waited, leaving = told.tolist()
    return dict(zip([*terms, *counts], values)), waited, leaving > 0


def check_finite(step: int, loss: float, norm: float, suspects: list, out: Path) -> None:
    if math.isfinite(loss + norm):
        return
    parts = [None] * world()[1]
    dist.all_gather_object(parts, suspects)
    names = [f"rank {k}: {', '.join(part[:8])}{' ...' * (len(part) > 8)}" for k, part in enumerate(parts)]
    saved = list(steps_saved(out).values())
    last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}. The batch: {'; '.join(names)}. "
                     f"The weights of step {step - 1} were good; {last}")


class Log:
    """metrics.jsonl with a line a step; for the reader a line after the first step and one every
    --log_every."""

    def __init__(self, out: Path, args, done: int):
        self.name, self.args, self.window, self.seconds = out.name, args, [], 0.0
        file, before = out / "metrics.jsonl", []
        if world()[0] == 0:
            # What a killed run logged after its checkpoint happens again. Its last line may be half a line.
            if file.exists():
                before = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            with write_whole(file) as f:
                f.writelines(line for line in before if json.loads(line)["step"] <= done)
        self.file = open(file if world()[0] == 0 else os.devnull, "a")

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def step(self, record: dict) -> None:
        self.write(record)
        self.window.append(record)
        first, self.seconds = not self.seconds, self.seconds + record["seconds"]
        steps, took = self.args.max_steps, record["seconds"]
        if first or record["step"] % self.args.log_every == 0 or record["step"] == steps:
            say(f"{self.name} {step_line(self.window, self.args)}")
            self.window = []
        if first and steps * took > 3600:
            say(f"{steps:,} steps at {took:.1f} s: {duration(steps * took)}; for a trial --max_steps 100")


def say(text: str) -> None:
    if world()[0] == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(150), duration(4000)
    ('42s', '2m', '1h06m')
    """
    minutes = int(seconds) // 60
    return (
        f"{minutes // 60}h{minutes % 60:02d}m"
        if minutes >= 60
        else f"{minutes}m"
        if minutes
        else f"{seconds:.0f}s"
    )


def step_line(window: list[dict], args) -> str:
    """One greppable line for the steps since the last."""
    last, took = window[-1], sum(record["seconds"] for record in window)
    mean = {name: sum(record[name] for record in window) / len(window) for name in last}
    terms = [f"{name} {mean[name]:.2f}" for name in list(last)[2:list(last).index("lr")]]
    parts = [f"step {last['step']}/{args.max_steps} ({last['step'] / args.max_steps:.1%})",
             f"loss {mean['loss']:.4f}", " ".join(terms)]
    if "nnz_q" in last:
        parts.append(f"nnz q {mean['nnz_q']:.0f} d {mean['nnz_d']:.0f}")
    parts.append(f"lr {last['lr']:.1e} | {mean['tokens'] * len(window) / took:,.0f} tok/s")
    # wait: the share of the time that went by without data.
    parts.append(f"pad {mean['padding']:.0%} wait {mean['wait'] * len(window) / took:.0%}")
    device = torch.cuda.get_device_name() if args.device == "cuda" else ""
    for name, peak in PEAK.items():
        # Of a device that is not in the table, no number is better than a wrong one.
        if name in device:
            parts.append(f"mfu {mean['flops'] * len(window) / took / peak / world()[1]:.1%}")
    total = args.flop_budget or last["spent"] / last["step"] * args.max_steps
    parts.append(f"{last['spent']:.1e}/{total:.1e} FLOPs".replace("e+", "e"))
    parts.append(f"eta {duration((args.max_steps - last['step']) * took / len(window))}")
    return " | ".join(part for part in parts if part)


def check_split(args, W: int) -> None:
    Q = args.queries_per_step
    if Q % W:
        raise ValueError(
            f"--queries_per_step {Q} does not divide over {W} processes: use {Q // W * W or W} or "
            f"{(Q // W + 1) * W}"
        )


def train(args, stop: list) -> None:
    """A run from its first step or newest checkpoint to its last, or to the first after `stop` holds
    something."""
    (rank, W), out = world(), Path(args.out)
    check_split(args, W)
    if rank == 0:
        open_run(out, args)
    dist.barrier()
    if (out / "summary.json").exists():
        return say(f"{out} is finished: {(out / 'summary.json').read_text().strip()}")

    # What there is: a model, data, an optimizer, and the place where the run stands.
    r = load_model(args)
    args.temperature = args.temperature or HEADS[r.head].temperature
    gradients_of, data_of, n_rows = open_data(args, r)
    dev = read_dev(args) if args.eval_queries else None
    per_step = 0.0
    if args.flop_budget:
        # Counted on the first steps, by the function that counts what is spent.
        per_step = sum(step_flops(r, data_of(0, 1)[s], args) for s in (1, 2, 3, 4)) / 4
    args.max_steps = horizon(args, n_rows, per_step)
    model = parallelise(r, args)
    trained = [weight for weight in r.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run = {"step": 0, "flops": 0.0, "best": -1.0}
    run |= load_state(out, r, optimizer, args.resume_from) if args.resume else {}
    log = Log(out, args, run["step"])
    n_trained, n_all = (sum(p.numel() for p in weights) for weights in (trained, r.parameters()))
    where = f"going on after step {run['step']}" if run["step"] else "from the start"
    say(f"{n_trained:,} of {n_all:,} parameters train for {args.max_steps:,} steps, {args.parallel} on "
        f"{W} x {args.device}, {args.dtype}; {where}")

    started = time.perf_counter()
    for batch in loader(data_of(rank, W), args, run["step"] + 1):
        step, waited = run["step"] + 1, time.perf_counter() - started
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args)
        terms, counts, suspects = gradients_of(model, r, batch, step, args)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        numbers, waited, leaving = told_by_all(terms, counts, waited, stop)
        check_finite(step, numbers["loss"], norm, suspects, out)
        optimizer.step()
        optimizer.zero_grad()

        run |= {"step": step, "flops": run["flops"] + numbers["flops"]}
        took, started = time.perf_counter() - started, time.perf_counter()
        record = {
            "step": step,
            **{name: numbers[name] for name in terms},
            "lr": lr_at(step, args),
            "norm": norm,
        }
        log.step(record | cost_of(numbers, run["flops"], took, waited))
        warn(numbers, step, r, args)
        last = step == args.max_steps
        if dev and (step % args.eval_every == 0 or last):
            evaluate(r, dev, run, log, args)
        if step % args.save_every == 0 or last or leaving:
            save_state(out, step, r, optimizer, run, args.keep)
        if leaving and not last:
            return say(f"stopped: saved {out}/state/step_{step:06d}; the same command with --resume goes on")
        started = time.perf_counter()

    save_weights(out, r, args)
    if rank == 0:
        # Last: a run is finished when this file is there.
        summary = {"steps": args.max_steps, "flops": run["flops"], "seconds": log.seconds}
        with write_whole(out / "summary.json") as f:
            json.dump(summary | ({"best_mrr@10": run["best"]} if dev else {}), f)
    say(f"finished: {out}, {run['flops']:.2g} FLOPs")


def cost_of(numbers: dict, spent: float, took: float, waited: float) -> dict:
    """What a step used, and how sparse its vectors were, for the log."""
    cost = {"flops": numbers["flops"], "spent": spent, "tokens": int(numbers["tokens"]),
            "padding": 1 - numbers["tokens"] / numbers["padded"], "seconds": took, "wait": waited}
    if "queries" in numbers:
        passages = numbers["texts"] - numbers["queries"]
        cost |= {"nnz_q": numbers["nnz_q"] / numbers["queries"], "nnz_d": numbers["nnz_d"] / passages}
    return cost


def evaluate(r: Retriever, dev: dict, run: dict, log: Log, args) -> None:
    """The dev set's figure; the best weights so far go to OUT/best."""
    # Encoding is faster with the adapter in the weights. FSDP's are sharded, and it stays beside them.
    with r.merged() if args.parallel == "ddp" else contextlib.nullcontext():
        step, mrr = run["step"], mrr_at_10(r, dev, args)
    say(f"{log.name} step {step}/{args.max_steps} | dev mrr@10 {mrr:.4f}" + " (best)" * (mrr > run["best"]))
    log.write({"step": step, "mrr@10": mrr})
    if mrr > run["best"]:
        run["best"] = mrr
        save_weights(Path(args.out) / "best", r, args, {"step": step, "mrr@10": mrr})


def main(argv=None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if "--plan" in words:
        # What a run would take, before anything is loaded. It is a tool, and so a process, of its own.
        words = [word for word in words if word != "--plan"]
        sys.exit(
            subprocess.run([sys.executable, "-m", "tools.plan", *words], cwd=Path(__file__).parent).returncode
        )
    args = parse_args(argv)
    with processes(args) as stop:
        with locked(args.out) if world()[0] == 0 else contextlib.nullcontext():
            train(args, stop)
    unfinished = not Path(args.out, "summary.json").exists()
    if stop and unfinished:
        # As a shell says that a signal ended it, so that no script takes the run for finished.
        sys.exit(128 + stop[0])


if __name__ == "__main__":
    run_command("train.py", main)
