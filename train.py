"""One loop for every objective: contrastive learning (CL), distillation (KD), both; masked language modelling
(MNTP), as the paper does first, and causal (CLM), for a model of one's own.

    python train.py --model data/demo/model --lora_rank 0 --head sparse --objective cl \\
        --train data/demo/train.jsonl --corpus data/demo --max_steps 300 --out runs/demo
    torchrun --nproc_per_node=4 train.py --model runs/mntp --head sparse --objective cl+kd \\
        --train T.jsonl --corpus C --out runs/sp-1b
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST --rdzv_backend=c10d train.py ...
    python train.py --plan --model 1b --head sparse --objective cl+kd --max_steps 33250  # what it would take

With --resume the same command goes on where it stopped, or starts. What surprises:

- Flags speak of the whole step, which the processes share. Data order, loss and gradient depend neither on
  their number nor on --accumulation or --parallel, but for rounding and dropout's noise.
- A step encodes, takes the loss on the vectors alone, and sends their gradients back through the encoder: the
  loss sees all passages whatever --accumulation is. Above 1 the first encoding keeps no graph, and the texts
  are encoded again a share at a time (GradCache, Gao et al. 2021).
- What is random follows from (seed, epoch, row), (seed, block), and for dropout (seed, step, rank, chunk). A
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
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import losses
from data import (Corpus, Help, TrainingRows, check_files, digest, discard, fingerprint, leave_with_parent,
                  locked, natural, new_folder, non_negative, positive, positive_int, rank_and_world,
                  read_json, read_queries, run_command, share, stamp, sync, write_whole)
from evaluate import read_qrels
from losses import OBJECTIVES, ramp, world
from model import HEADS, Retriever, check_logits, flops_per_token, longest_first, tokenize

# The loader's workers are the parallelism, and forked: the tokenizer's own threads would warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# From torch 2.13 on DDP calls it forward_sync_buffers, and warns of the old name.
warnings.filterwarnings("ignore", ".*`broadcast_buffers` is deprecated", FutureWarning)

# Dense bf16 FLOP/s of a device, by a part of its name.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}
# At --resume the contents of the first must be the same, and so must all flags but the second.
INPUTS = ("model", "train", "corpus", "queries", "scores", "eval_queries", "eval_qrels", "eval_corpus")
FREE = ("out", "resume", "resume_from", "keep", "save_every", "log_every", "eval_every", "workers", "device",
        "parallel", "accumulation", "tokens_per_chunk", "recompute", "compile", "attn")
# The flags in their groups: (name, type or choices, default, help). In brackets what None turns into.
FLAGS = [
    "what to train",
    ("model", str, None, "HF folder, hub name, or an adapter's folder, which then goes on training"),
    ("objective", OBJECTIVES, None, ""),
    ("head", HEADS, None, "needed unless retriever.json says it"),
    ("lora_rank", natural, 16, "0: all weights. An adapter in --model keeps its alpha and dropout"),
    ("lora_alpha", positive, 32.0, ""),
    ("lora_dropout", share, 0.05, ""),
    ("out", str, None, "the run's folder: new, or --resume"),
    "data",
    ("train", str, None, "rows of data.py (not for mntp and clm); tools.convert makes them of others"),
    ("corpus", str, None, "collection.tsv, corpus.jsonl or BEIR folder; not needed if rows hold texts"),
    ("queries", str, None, "if rows hold ids of queries"),
    ("scores", str, None, "a teacher's, as JSON {qid: {pid: score}}, if rows hold none"),
    ("negatives", natural, None, "passages beside the positive (16; kd 1); 0: in-batch only"),
    ("query_length", positive_int, 64, "tokens, BOS included"),
    ("passage_length", positive_int, 128, "the checkpoint keeps its own length for evaluation"),
    ("query_prefix", str, None, "put before each query, and kept in the checkpoint"),
    ("passage_prefix", str, None, "and before each passage"),
    ("block_length", positive_int, 512, "mntp, clm: tokens a block"),
    ("mask_share", share, 0.2, "mntp: tokens to predict; 80%% are masked, 10%% random, 10%% kept"),
    ("workers", natural, 2, "tokenising processes; more if the step line shows a wait"),
    "horizon, one of them (the paper's 7 epochs, kd 56; mntp and clm 10,000 steps)",
    ("max_steps", positive_int, None, ""),
    ("epochs", positive, None, ""),
    ("flop_budget", positive, None, "e.g. 1e18: steps follow from what one costs"),
    "batch and memory",
    ("queries_per_step", positive_int, None, "over all processes (112; kd 1024; mntp, clm 128 blocks)"),
    ("recompute", natural, None, "blocks that backward runs again: less memory, a third forward (GPU: all; "
     "CPU: none). --plan shows what fewer take"),
    ("accumulation", positive_int, 1, "still out of memory? 2, 4, 8: a share at a time, encoded twice"),
    ("tokens_per_chunk", positive_int, 16384, "padded tokens in one forward"),
    "loss",
    ("temperature", positive, None, "divides all scores (dense 0.01, sparse 1)"),
    ("flops_q", non_negative, 0.05, "sparse: FLOPs weight of queries"),
    ("flops_d", non_negative, 0.04, "and of passages"),
    ("flops_ramp", share, 1 / 3, "share of the run over which they grow quadratically"),
    ("keep_false_negatives", bool, False, "known positives of a query count as its in-batch negatives"),
    ("authors_weighting", positive_int, 1, "divides the contrastive and FLOPs terms, as the authors' gather "
     "without gradient did on so many devices (the paper: 4)"),
    ("calibrate", share, None, "sparse: start each term with a threshold, above which it is in this share of "
     "1,024 passages of --corpus, such as 0.01; for language models, whose terms are all on"),
    "optimizer",
    ("lr", positive, None, "(1e-4; mntp 5e-5, clm 3e-4)"),
    ("warmup", share, None, "share of the run in which lr grows, before it falls to 0 (0.04; mntp 0)"),
    ("weight_decay", non_negative, 0.0, ""),
    ("clip", positive, 1.0, "largest gradient norm"),
    ("seed", natural, 0, ""),
    "machines",
    ("parallel", ["ddp", "fsdp"], "ddp", "fsdp shards weights, gradients and optimizer"),
    ("dtype", ["bf16", "fp32"], None, "compute; trained weights are fp32 (GPU bf16, CPU fp32)"),
    ("device", ["cuda", "cpu"], "cuda" if torch.cuda.is_available() else "cpu", ""),
    ("attn", str, "sdpa", "eager for Gemma 2, flash_attention_2 where it is installed"),
    ("compile", bool, False, "torch.compile each layer"),
    "saving and watching",
    ("resume", bool, False, "go on from the newest checkpoint in --out, or start"),
    ("resume_from", positive_int, None, "go on from this step's checkpoint; later ones are removed"),
    ("save_every", positive_int, 500, "steps between checkpoints"),
    ("keep", positive_int, 2, "checkpoints to keep"),
    ("log_every", positive_int, 10, ""),
    ("eval_queries", str, None, "small dev set: MRR@10 by exact search, the best weights in OUT/best"),
    ("eval_qrels", str, None, ""),
    ("eval_corpus", str, None, "the dev pool (--corpus): keep it small"),
    ("eval_every", positive_int, 500, ""),
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    for row in FLAGS:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        name, kind, default, text = row
        how = {"choices": kind} if isinstance(kind, (list, dict)) else {"type": kind}
        how = {"action": "store_true"} if kind is bool else how
        needed = name in ("model", "objective", "out")
        # Without a help text argparse would not show the default.
        group.add_argument(f"--{name}", default=default, required=needed, help=text or " ", **how)
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """What was not given: from the objective's settings and the machine."""
    objective, horizon = OBJECTIVES[args.objective], args.max_steps or args.epochs or args.flop_budget
    for name, value in objective.settings.items():
        # Who gave one horizon does not get the paper's beside it.
        if getattr(args, name) is None and not (horizon and name in ("max_steps", "epochs")):
            setattr(args, name, value)
    args.resume = args.resume or args.resume_from is not None
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    # For language modelling it decides nothing but what retriever.json will say.
    args.head = args.head or ("sparse" if objective.predicts else None)
    return args


def parse_args(argv=None) -> argparse.Namespace:
    """The flags, completed, and checked for what their types cannot see."""
    parser = make_parser()
    args = complete(parser.parse_args(argv))
    objective, horizons = OBJECTIVES[args.objective], (args.max_steps, args.epochs, args.flop_budget)
    needed, dev_pool = "corpus" if objective.predicts else "train", args.eval_corpus or args.corpus
    # Each fault with its cure. Files are looked at when they are opened.
    for fault, message in (
        (horizons.count(None) < 2, "--max_steps, --epochs and --flop_budget say the same thing: give one"),
        (objective.predicts and args.epochs, "packed text has no epochs: give --max_steps or --flop_budget"),
        (objective.predicts == "masked" and not args.mask_share, "--mask_share 0 leaves nothing to predict"),
        (objective.needs_negatives and not args.negatives, "this --objective needs --negatives of 1 or more"),
        (not getattr(args, needed), f"--objective {args.objective} needs --{needed}"),
        (args.eval_queries and not (args.eval_qrels and dev_pool),
         "--eval_queries needs --eval_qrels, and --eval_corpus or --corpus"),
        (args.calibrate is not None and not (0 < args.calibrate < 1 and args.corpus),
         f"--calibrate {args.calibrate} needs --corpus, and to be a share between 0 and 1"),
        (args.calibrate and objective.predicts, "--calibrate is of no use to --objective mntp and clm"),
    ):
        if fault:
            parser.error(message)
    return args


# A step's data: data[places] depends on nothing else, and the loader's workers make it ahead of time.

def places_in(step: int, args, rank: int = 0, W: int = 1) -> range:
    """The queries (or blocks) of a process in step 1, 2, ..., counted from the run's first."""
    Q = args.queries_per_step
    return range((step - 1) * Q, step * Q)[Q * rank // W:Q * (rank + 1) // W]


class RetrievalData:
    """data[places]: the queries at these places of the run, then their passages, as tokens."""

    def __init__(self, rows: TrainingRows, tokenize, args):
        self.rows, self.tokenize, self.args, self.epoch = rows, tokenize, args, None

    def __getitem__(self, places: range) -> dict:
        args, rows, examples, names = self.args, self.rows, [], []
        for place in places:
            # A step may reach into the next epoch, which shows each row once, in an order of its own.
            epoch, i = divmod(place, len(rows))
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = np.random.default_rng((args.seed, epoch)).permutation(len(rows))
            # Positive and negatives are drawn anew in each epoch.
            row = int(self.order[i])
            rng = np.random.default_rng((args.seed, epoch, row))
            examples.append(rows.example(row, args.negatives, rng))
            names.append(rows.ids(row))

        # One list: the longest are encoded first, whichever side they are of.
        tokens = self.tokenize([e.query for e in examples], "query", args.query_length)
        tokens += self.tokenize([text for e in examples for text in e.texts], "passage", args.passage_length)

        for_loss = {}
        if OBJECTIVES[args.objective].needs_teacher:
            for_loss["teacher"] = np.array([e.scores for e in examples], np.float32)
        if not args.keep_false_negatives:
            # Ids as numbers, the same in every process, which Python's own hash is not.
            docids = {docid for e in examples for docid in (*e.docids, *e.positives)}
            number = {docid: int(digest(docid), 16) - 2**63 for docid in docids}
            for_loss["docids"] = np.array([number[docid] for e in examples for docid in e.docids])
            # A matrix has rows of one length: a query with fewer known positives repeats some.
            known = [[number[docid] for docid in e.positives] for e in examples]
            for_loss["positives"] = np.array([np.resize(k, max(map(len, known))) for k in known])
        return {"names": names, "tokens": tokens, "for_loss": for_loss}


class BlockData:
    """data[places]: blocks of random passages as the model sees them; where to predict, and what."""

    def __init__(self, corpus: Corpus, tokenize, r: Retriever, args):
        self.corpus, self.tokenize, self.args = corpus, tokenize, args
        self.vocab, self.special = r.llama.config.vocab_size, r.tokenizer.all_special_ids
        self.masked = OBJECTIVES[args.objective].predicts == "masked"
        # Llama has no mask token: the paper borrows "_".
        self.mask = r.tokenizer.encode(r.tokenizer.mask_token or "_", add_special_tokens=False)[:1]
        if self.masked and not self.mask:
            raise ValueError(f"{args.model}: no mask token, nor _: set mask_token in tokenizer_config.json")

    def __getitem__(self, places: range) -> dict:
        names, blocks, L = [], [], self.args.block_length
        for place in places:
            rng, rows, tokens = np.random.default_rng((self.args.seed, place)), [], []
            # A passage may come again; the last one is cut.
            while len(tokens) < L:
                rows += rng.integers(len(self.corpus), size=8).tolist()
                tokens += sum(self.tokenize(self.corpus.texts(rows[-8:]), "passage", L), [])
            names.append(f"block {place} (from {self.corpus.docid(rows[0])} on)")
            # Nothing stands before the first token from which to predict it. Other maskings go here.
            tokens, chosen = np.array(tokens[:L]), np.arange(L) > 0
            shown = tokens.copy()
            if self.masked:
                chosen &= (rng.random(L) < self.args.mask_share) & ~np.isin(tokens, self.special)
                fate = rng.random(L)
                shown[chosen & (fate < 0.8)] = self.mask
                swapped = chosen & (fate >= 0.9)
                shown[swapped] = rng.integers(self.vocab, size=swapped.sum())
            blocks.append((tokens, shown, chosen))
        tokens, shown, chosen = map(np.stack, zip(*blocks))
        # The token at i is predicted from position i - 1.
        at = np.pad(chosen[:, 1:], [(0, 0), (0, 1)])
        return {"names": names, "tokens": shown, "at": at, "labels": tokens[chosen]}


def loader(data, args, done: int) -> torch.utils.data.DataLoader:
    """This process's batches of the steps after `done`."""
    places = [places_in(step, args, *world()) for step in range(done + 1, args.max_steps + 1)]
    # Tokenising stays ahead of the encoder. collate_fn: torch's own would look at every single token.
    return torch.utils.data.DataLoader(
        data, batch_size=None, sampler=places, num_workers=args.workers, collate_fn=dict,
        prefetch_factor=4 if args.workers else None, worker_init_fn=start_worker)


def start_worker(_) -> None:
    # Whatever signal the group gets, the step at hand needs its data. Nobody does without a parent.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    leave_with_parent(always=True)


# One step's gradients.

def agreed_chunks(lengths: list[int], args) -> list[np.ndarray]:
    """Places of texts in chunks of --tokens_per_chunk padded tokens, as many on every process."""
    chunks = longest_first(lengths, args.tokens_per_chunk)
    # Under FSDP each forward gathers weights from everyone: nobody may skip one.
    agreed = torch.tensor(max(len(chunks), args.accumulation))
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    while len(chunks) < min(agreed, len(lengths)):
        largest = int(np.argmax([len(chunk) for chunk in chunks]))
        chunks[largest:largest + 1] = np.array_split(chunks[largest], 2)
    return chunks


def forward(model, r: Retriever, ids, mask, args, noise: tuple, **kw) -> torch.Tensor:
    """Encode. Dropout follows from `noise` alone: a second pass repeats the first."""
    # Python salts the hash of strings, not of numbers.
    torch.manual_seed(hash((args.seed, *noise)))
    # FSDP casts the weights itself.
    autocast = args.dtype == "bf16" and args.parallel == "ddp"
    with torch.autocast(r.device.type, torch.bfloat16, enabled=autocast):
        return model(ids.to(r.device, non_blocking=True), mask.to(r.device, non_blocking=True), **kw)


def step_flops(r: Retriever, tokens, args) -> float:
    """What texts cost, forward and backward; padding and second passes are not counted."""
    what, total = args.objective if OBJECTIVES[args.objective].predicts else r.head, 0
    how = {"train": True, "lora_r": r.lora["r"] if r.lora else 0}
    # Thousands of texts have a few dozen lengths.
    for length, texts in sorted(Counter(map(len, tokens)).items()):
        total += texts * (length * flops_per_token(r.llama.config, length, what, **how))
    return total


def retrieval_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """Gradients into .grad. Returns the loss's terms, counts to be summed, and rows to suspect."""
    names, tokens, two_passes = batch["names"], batch["tokens"], args.accumulation > 1
    B, lengths = len(names), list(map(len, tokens))
    chunks = agreed_chunks(lengths, args)

    def encode(k):
        ids, mask = r.pad([tokens[i] for i in chunks[k]])
        return forward(model, r, ids, mask, args, (step, world()[0], k))

    # 1. Encode. With accumulation no graph is kept: step 3 encodes each share again.
    with torch.set_grad_enabled(not two_passes):
        encoded = [encode(k) for k in range(len(chunks))]

    # 2. The loss on the vectors alone. They are leaves: backward stops here, at their gradients.
    places = [torch.from_numpy(chunk).to(r.device) for chunk in chunks]
    reps = torch.empty(len(tokens), r.width, device=r.device)
    for place, vectors in zip(places, encoded):
        reps[place] = vectors.detach().float()
    q, d = reps[:B].requires_grad_(), reps[B:].requires_grad_()
    given = {name: torch.from_numpy(x).to(r.device) for name, x in batch["for_loss"].items()}
    weight = ramp(step, args.flops_ramp * args.max_steps) if r.sparse else 0.0
    loss, terms = losses.objective(
        args.objective, q, d, temperature=args.temperature, devices=args.authors_weighting,
        flops_weights=(weight * args.flops_q, weight * args.flops_d), **given)
    loss.backward()
    grads = torch.cat([q.grad, d.grad])

    # 3. Their gradients go back through the encoder, a share of the chunks at a time.
    shares = np.array_split(np.arange(len(chunks)), min(args.accumulation, len(chunks)))
    for part in shares:
        # DDP averages gradients when they are complete. FSDP in each backward: whole, they would not fit.
        model.require_backward_grad_sync = part is shares[-1]
        outputs = [encode(k) if two_passes else encoded[k] for k in part]
        torch.autograd.backward(outputs, [grads[places[k]] for k in part])

    # What to tell of it. A chunk's first text is its longest.
    terms = {name: term.item() for name, term in {"loss": loss, **terms}.items()}
    counts = {"tokens": sum(lengths), "padded": sum(len(chunk) * lengths[chunk[0]] for chunk in chunks)}
    if r.sparse:
        on = (reps > 0).sum(1).cpu()
        counts |= {"nnz_q": int(on[:B].sum()), "nnz_d": int(on[B:].sum()), "zero": int((on == 0).sum())}
    # Rows whose query or passages have a vector with NaN or infinity; if none has one, all are suspects.
    broken = ~reps.detach().sum(1).isfinite()
    broken = (broken[:B] | broken[B:].view(B, -1).any(1)).tolist()
    return terms, counts, [name for name, is_broken in zip(names, broken) if is_broken] or names


def block_step(model, r: Retriever, batch: dict, step: int, args) -> tuple[dict, dict, list]:
    """The same for language modelling, whose chunks share nothing but the number of tokens to predict."""
    (rank, W), total = world(), 0.0
    shown, at, labels = (torch.from_numpy(batch[name]) for name in ("tokens", "at", "labels"))
    # Masking leaves each chunk and process another number of tokens: the mean is over all of them.
    predicted = torch.tensor(float(len(labels)))
    dist.all_reduce(predicted)
    size = max(1, min(args.tokens_per_chunk // args.block_length, math.ceil(len(shown) / args.accumulation)))
    labels = labels.split([int(places.sum()) for places in at.split(size)])
    # The decoder asks its config which way it may look. What is saved looks both ways.
    r.llama.config.is_causal = OBJECTIVES[args.objective].predicts == "all"
    for k, (ids, places, wanted) in enumerate(zip(shown.split(size), at.split(size), labels)):
        model.require_backward_grad_sync = k == len(labels) - 1
        logits = forward(model, r, ids, torch.ones_like(ids), args, (step, rank, k), at=places.to(r.device))
        loss = losses.mntp(logits, wanted.to(r.device), predicted.item() / W)
        loss.backward()
        total += loss.item()
    r.llama.config.is_causal = False
    return {"loss": total}, {"tokens": shown.numel(), "padded": shown.numel()}, batch["names"]


# Checkpoints: OUT/state/step_000120, which appears by one rename. notes.json has the step, FLOPs, the best
# figure and a checksum; state.safetensors each trained weight by its NAME, with AdamW's NAME.exp_avg,
# NAME.exp_avg_sq and NAME.step, whole even where a run shards them. No pickle: it could run code.

def steps_saved(out: Path) -> dict[int, Path]:
    """The whole checkpoints by step, oldest first."""
    return dict(sorted((int(folder.name[5:]), folder) for folder in (out / "state").glob("step_*[0-9]")))


def training_state(r: Retriever, optimizer) -> dict[str, torch.Tensor]:
    """All that a step changes, and the thresholds of --calibrate."""
    state = {} if r.threshold is None else {"threshold": r.threshold}
    for name, weight in r.named_parameters():
        if weight.requires_grad:
            state[name] = weight.detach()
            state |= {f"{name}.{what}": value for what, value in optimizer.state[weight].items()}
    return state


def gathered(state: dict) -> dict[str, torch.Tensor]:
    """The same on rank 0's CPU, whole; the others only give their shards."""
    on_cpu = {}
    for name, tensor in state.items():
        tensor = whole(tensor)
        if world()[0] == 0:
            on_cpu[name] = tensor.detach().cpu().contiguous()
    return on_cpu


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_disk(place: Path, save, *given) -> None:
    """save(*given). Safetensors has an error of its own for a full disk, which does not name the place."""
    try:
        save(*given)
    except SafetensorError as e:
        what = f"cannot be written ({e}): make room, and go on with --resume"
        raise OSError(errno.ENOSPC, what, str(place)) from e


def save_state(out: Path, r: Retriever, optimizer, run: dict, keep: int) -> None:
    """A checkpoint that any number of processes can go on from, sharded or not."""
    state = gathered(training_state(r, optimizer))
    if world()[0] == 0:
        with new_folder(out / f"state/step_{run['step']:06d}") as folder:
            file = folder / "state.safetensors"
            to_disk(file, save_file, state, file)
            notes = run | {"files": {file.name: stamp(file)}}
            (folder / "notes.json").write_text(json.dumps(notes, indent=1))
        # Only now that there is a newer one.
        for old in list(steps_saved(out).values())[:-keep]:
            discard(old)
    dist.barrier()


def load_state(out: Path, r: Retriever, optimizer, step: int | None) -> dict:
    """Go on from the newest checkpoint, or that of `step`: its notes, or {} if there is none."""
    saved, (rank, W) = steps_saved(out), world()
    # The same command starts a run and goes on with it.
    if not saved and not step:
        return {}
    step = step or max(saved)
    if step not in saved:
        raise ValueError(f"--resume_from {step}: {out}/state holds the steps {list(saved)}")
    before = [earlier for earlier in saved if earlier < step]
    cure = f"--resume_from {before[-1]} takes the one before" if before else "the only one: start anew"
    cure = f"{saved[step]} is damaged and {cure}"
    file = saved[step] / "notes.json"
    notes = read_json(file, cure) if file.exists() else {}
    # Without its notes a checkpoint is as damaged as without its tensors.
    if "files" not in notes:
        raise ValueError(f"{file}: {'damaged' if file.exists() else 'missing'}; {cure}")
    check_files(saved[step], notes["files"], cure, full=True)
    # AdamW makes these at its first step. Here is the room that the saved ones are read into.
    for weight in optimizer.param_groups[0]["params"]:
        moments = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
    with safe_open(saved[step] / "state.safetensors", "pt") as tensors:
        for name, tensor in training_state(r, optimizer).items():
            if isinstance(tensor, DTensor):
                # This process's rows, as torch.chunk cuts: the last shares may be short or empty.
                rows = math.ceil(len(tensor) / W)
                tensor.to_local().copy_(tensors.get_slice(name)[rank * rows:(rank + 1) * rows])
            else:
                tensor.copy_(tensors.get_tensor(name))
    # Everyone has read it. What the run does from here takes the place of later ones.
    dist.barrier()
    if rank == 0:
        (out / "summary.json").unlink(missing_ok=True)
        for later in [s for s in saved if s > step]:
            discard(saved[later])
    return notes


def save_weights(folder: Path, r: Retriever) -> None:
    """The weights or the adapter: what index.py and --model read. No file is ever half written."""
    # Not its state_dict, which has tied embeddings twice.
    state = gathered({name: x for name, x in r.named_parameters() if "lora_" in name or not r.lora})
    if world()[0] == 0:
        aside = folder / "weights.partial"
        shutil.rmtree(aside, ignore_errors=True)
        to_disk(aside, r.save, aside, state)
        # The folder holds other things, so no rename makes it whole: file by file, and retriever.json, by
        # which it is a checkpoint, comes last.
        files = filter(Path.is_file, aside.rglob("*"))
        for file in sorted(files, key=lambda file: file.name == "retriever.json"):
            place = folder / file.relative_to(aside)
            place.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            os.replace(file, place)
        shutil.rmtree(aside)
    dist.barrier()


# A dev set, small enough to search exactly.

def read_dev(args) -> tuple[list[str], list[str], list[np.ndarray]]:
    """Queries, passages, and for each query the rows of its relevant passages, -1 for unknown ones."""
    queries, corpus, judged = read_queries(args.eval_queries), Corpus(args.eval_corpus or args.corpus), {}
    for qid, grades in read_qrels(args.eval_qrels).items():
        relevant = [docid for docid, grade in grades.items() if grade > 0]
        if qid in queries and relevant:
            judged[qid] = corpus.find(relevant)
    if not judged:
        raise ValueError(f"{args.eval_qrels} judges no query of {args.eval_queries}: are they of one set?")
    return [queries[qid] for qid in judged], corpus.texts(range(len(corpus))), list(judged.values())


@torch.no_grad()
def mrr_at_10(r: Retriever, dev: tuple, args) -> float:
    """Mean reciprocal rank within the first ten of the whole pool; all of it on every process."""
    (queries, passages, relevant), total = dev, 0.0
    q = r.encode(queries, "query", args.query_length, args.tokens_per_chunk)
    d = r.encode(passages, "passage", args.passage_length, args.tokens_per_chunk)
    # All scores stand in memory at once, which is why the pool is to be small.
    for scores, rows in zip((d @ (q.to_dense() if r.sparse else q).T).T, relevant):
        known = scores[rows[rows >= 0]]
        if len(known):
            # What ties counts as before it, not by its id as in evaluate.py: a dead head finds nothing.
            place = 1 + int((scores >= known.max()).sum()) - int((known >= known.max()).sum())
            total += 1 / place if place <= 10 else 0.0
    return total / len(queries)


def evaluate(r: Retriever, dev: tuple, run: dict, log, args) -> None:
    """The dev set's figure; the best weights so far go to OUT/best."""
    # Encoding is faster with the adapter in the weights. FSDP's are sharded, and it stays beside them.
    with r.merged() if args.parallel == "ddp" else contextlib.nullcontext():
        mrr = mrr_at_10(r, dev, args)
    if args.parallel == "fsdp":
        # Embeddings and head would stay gathered, and the optimizer knows its own shards only.
        r.reshard()
    figure, better = {"step": run["step"], "mrr@10": mrr}, mrr > run["best"]
    say(f"{log.name} step {run['step']}/{args.max_steps} | dev mrr@10 {mrr:.4f}" + " (best)" * better)
    print(json.dumps(figure), file=log.file, flush=True)
    if better:
        run["best"], best, new = mrr, Path(args.out, "best"), Path(args.out, "best.new")
        save_weights(new, r)
        if world()[0] == 0:
            (new / "notes.json").write_text(json.dumps(figure))
            # The old one goes when the new one is whole.
            if best.exists():
                discard(best)
            os.rename(new, best)


# The set-up of a run.

def open_run(out: Path, args) -> None:
    """Make the run's folder with its args.json, or check that --resume goes on with the same run."""
    file, now, W, Q = out / "args.json", vars(args), world()[1], args.queries_per_step
    if Q % W:
        raise ValueError(f"--queries_per_step {Q} does not divide over {W} processes: use {-(-Q // W) * W}")
    # Not the names alone: a file may have changed since the run began.
    inputs = {name: fingerprint(now[name]) for name in INPUTS if now[name]}
    if file.exists() and args.resume:
        before, cure = read_json(file), "put that back, or start in another folder"
        for name in now.keys() - set(FREE):
            then = before["arguments"].get(name)
            if then != now[name]:
                raise ValueError(f"{out} was started with --{name} {then}, not {now[name]}: {cure}")
            if before["inputs"].get(name) != inputs.get(name):
                raise ValueError(f"--{name} {then} is not what it was when {out} was started: {cure}")
    elif out.exists() and any(f.suffix != ".partial" for f in out.iterdir()):
        # (A process that is killed at its very start leaves half a file.)
        what = "holds another run's results" if file.exists() else "is not empty and no run of ours"
        raise ValueError(f"{out} {what}: give a new --out" + ", or --resume to go on with it" * file.exists())
    # What a process left that was killed while it saved.
    for left in (out / "state").glob("*.partial"):
        shutil.rmtree(left)
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__}
    with write_whole(file) as f:
        json.dump({"arguments": now, "inputs": inputs, "versions": versions, "processes": W,
                   "git": git or None, "command": sys.argv}, f, indent=1)


def load_model(args) -> Retriever:
    """The model to train, with its adapter."""
    # A new adapter starts the same everywhere.
    torch.manual_seed(args.seed)
    # What trains is fp32. For LoRA's frozen base bf16 will do.
    dtype = torch.bfloat16 if args.lora_rank and args.dtype == "bf16" else torch.float32
    # An 8B in fp32 is 32 GB: under FSDP rank 0 alone reads it, and `parallelise` sends the others theirs.
    where = "meta" if args.parallel == "fsdp" and world()[0] > 0 else "cpu"
    r = Retriever.load(args.model, head=args.head, dtype=dtype, attn=args.attn, device=where)
    if OBJECTIVES[args.objective].predicts:
        check_logits(r, args.model, f"--objective {args.objective} learns from", "take another model")
    args.temperature = args.temperature or HEADS[r.head].temperature
    # Training and whoever loads the checkpoint put the same before a text.
    for kind in ("query_prefix", "passage_prefix"):
        if getattr(args, kind) is not None:
            r.settings[kind] = getattr(args, kind)
    if r.lora and r.lora["r"] != args.lora_rank:
        raise ValueError(f"{args.model} is an adapter, which goes on training: --lora_rank {r.lora['r']}; or "
                         "merge it first (r.merge(); r.save(folder))")
    if args.lora_rank and not r.lora:
        r.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    if not r.sparse and not r.llama.config.tie_word_embeddings and not OBJECTIVES[args.objective].predicts:
        # Nothing of it reaches the loss.
        r.llama.lm_head.requires_grad_(False)
    return (r if args.parallel == "fsdp" else r.to(args.device)).train()


def open_data(args, r: Retriever) -> tuple:
    """(data by places, the function that makes a step's gradients, the number of training rows)."""
    objective = OBJECTIVES[args.objective]
    # Not r.tokenize: where workers are not forked, the weights would be sent along.
    to_tokens = functools.partial(tokenize, r.tokenizer, r.settings)
    if objective.predicts:
        return BlockData(Corpus(args.corpus), to_tokens, r, args), block_step, 0
    rows = TrainingRows(args.train, args.corpus, args.queries, need_scores=objective.needs_teacher,
                        need_negatives=args.negatives > 0, scores=args.scores)
    say(f"{args.train}: {rows.report}")
    few = rows.too_few(args.negatives)
    if few:
        say(f"{few:,} rows hold fewer than {args.negatives} negatives: these are shown more than once")
    if args.calibrate:
        if not r.sparse:
            raise ValueError(f"--calibrate gives thresholds to the terms of a sparse head, not to {r.head}")
        # A resumed run has its thresholds in the checkpoint, the other processes get rank 0's.
        r.threshold, n = torch.zeros(r.width, device=args.device), len(rows.corpus)
        if world()[0] == 0 and not steps_saved(Path(args.out)):
            chosen = np.random.default_rng(args.seed).choice(n, min(1024, n), replace=False)
            texts = rows.corpus.texts(np.sort(chosen))
            r.calibrate(texts, args.calibrate, args.passage_length, args.tokens_per_chunk)
        r.threshold = r.threshold.to(args.device)
        dist.broadcast(r.threshold, 0)
    return RetrievalData(rows, to_tokens, args), retrieval_step, len(rows)


def horizon(args, n_rows: int, flops_per_step: float) -> int:
    """The number of optimizer steps; the schedule and the ramp follow from it."""
    if args.max_steps:
        return args.max_steps
    if args.flop_budget:
        steps = int(args.flop_budget // flops_per_step)
        given = f"--flop_budget {args.flop_budget:g} at {flops_per_step:.3g} FLOPs a step"
    else:
        steps = int(args.epochs * n_rows // args.queries_per_step)
        given = f"--epochs {args.epochs:g} of {n_rows:,} rows, {args.queries_per_step} a step,"
    if steps < 1:
        raise ValueError(f"{given} buys no whole step: raise it, or reduce --queries_per_step")
    return steps


def parallelise(r: Retriever, args):
    """What the loop calls: r itself, or r in DDP, or r with its layers sharded in place."""
    layers, (rank, W) = r.llama.model.layers, world()
    # Unless it is said: all on a GPU, which lacks memory, and none on a CPU, which lacks time.
    recomputed = len(layers) * (args.device == "cuda") if args.recompute is None else args.recompute
    for place, layer in enumerate(layers):
        if args.compile:
            # Chunks come in every shape.
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if place < recomputed:
            # Only the block's input is kept, and backward runs it again.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if args.parallel == "ddp":
        how = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        return torch.nn.parallel.DistributedDataParallel(r, **how) if W > 1 else r

    # Every process gets its part of each layer, and rank 0's weights into it, tensor after tensor.
    weights = r.state_dict() if rank == 0 else {}
    cast = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if args.dtype == "bf16" else {}
    mesh = dist.init_device_mesh(args.device, (W,))
    # The last, r, has embeddings, head and final norm, which stay whole between forward and backward.
    for module in (*layers, r):
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**cast))
    # The dev set is read without `forward`, which is what gathers the weights.
    register_fsdp_forward_method(r, "encode")
    if rank > 0:
        r.to_empty(device=args.device)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(r, weights, options=how)
    # What is computed, such as the rotation's frequencies, is in no state dict.
    for buffer in r.buffers():
        dist.broadcast(buffer, 0)
    return r


# What a run tells.

def say(text: str) -> None:
    if world()[0] == 0:
        print(text, flush=True)


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(150), duration(4000)
    ('42s', '2m', '1h06m')
    """
    hours, minutes = int(seconds) // 3600, int(seconds) // 60
    short = f"{minutes}m" if minutes else f"{seconds:.0f}s"
    return f"{hours}h{minutes % 60:02d}m" if hours else short


class Log:
    """A line a step in metrics.jsonl; for the reader one after the first step and every --log_every."""

    def __init__(self, out: Path, args, done: int):
        self.name, self.args, self.window, self.seconds = out.name, args, [], 0.0
        # The other processes write into nothing.
        file = out / "metrics.jsonl" if world()[0] == 0 else Path(os.devnull)
        if file.is_file():
            # What a killed run logged after its checkpoint happens again. Its last line may be half one.
            lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            with write_whole(file) as f:
                f.writelines(line for line in lines if json.loads(line)["step"] <= done)
        self.file = open(file, "a")

    def step(self, record: dict) -> None:
        # Flushed: others watch the run by this file.
        print(json.dumps(record), file=self.file, flush=True)
        self.window.append(record)
        first, steps, took = not self.seconds, self.args.max_steps, record["seconds"]
        self.seconds += took
        if first or record["step"] % self.args.log_every == 0 or record["step"] == steps:
            say(f"{self.name} {self.line()}")
            self.window = []
        # Said once, while it costs nothing to start again.
        if first and steps * took > 3600:
            say(f"{steps:,} steps at {took:.1f} s: {duration(steps * took)}; for a trial --max_steps 100")

    def line(self) -> str:
        """One greppable line for the steps since the last."""
        last, steps, names = self.window[-1], self.args.max_steps, list(self.window[-1])
        mean = {name: sum(record[name] for record in self.window) / len(self.window) for name in names}
        # Of a device that is not in the table, no number is better than a wrong one.
        device = torch.cuda.get_device_name() if self.args.device == "cuda" else ""
        peaks = [PEAK[name] for name in PEAK if name in device]
        budget = self.args.flop_budget or last["spent"] / last["step"] * steps
        parts = [
            f"step {last['step']}/{steps} ({last['step'] / steps:.1%})", f"loss {mean['loss']:.4f}",
            # The loss's terms stand between it and lr.
            " ".join(f"{name} {mean[name]:.2f}" for name in names[2:names.index("lr")]),
            f"nnz q {mean['nnz_q']:.0f} d {mean['nnz_d']:.0f}" if "nnz_q" in mean else "",
            f"lr {last['lr']:.1e}", f"{mean['tokens'] / mean['seconds']:,.0f} tok/s",
            # wait: the share of the time that went by without data.
            f"pad {mean['padding']:.0%} wait {mean['wait'] / mean['seconds']:.0%}",
            *(f"mfu {mean['flops'] / mean['seconds'] / peak / world()[1]:.1%}" for peak in peaks),
            f"{last['spent']:.1e}/{budget:.1e} FLOPs".replace("e+", "e"),
            f"eta {duration((steps - last['step']) * mean['seconds'])}"]
        return " | ".join(filter(None, parts))


def summed(terms: dict, counts: dict) -> dict:
    """A step's numbers over all processes: the loss and its terms are means, the counts are sums."""
    told = torch.tensor([*(x / world()[1] for x in terms.values()), *counts.values()], dtype=torch.float64)
    dist.all_reduce(told)
    return dict(zip([*terms, *counts], told.tolist()))


def check_finite(step: int, loss: float, norm: float, suspects: list, out: Path) -> None:
    # Both numbers are everyone's, and so all leave, and each names its own part of the batch.
    if not math.isfinite(loss + norm):
        saved, more = list(steps_saved(out).values()), " ..." * (len(suspects) > 8)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}. The batch: rank {world()[0]}: "
                         f"{', '.join(suspects[:8])}{more}. The weights of step {step - 1} were good; {last}")


def record_of(terms: dict, numbers: dict, run: dict, args) -> dict:
    """A step's line in metrics.jsonl: the loss and its terms, the cost, how sparse the vectors were."""
    record = {"step": run["step"], **{name: numbers[name] for name in terms}, "lr": lr_at(run["step"], args),
              "norm": numbers["norm"], "flops": numbers["flops"], "spent": run["flops"],
              "tokens": int(numbers["tokens"]), "padding": 1 - numbers["tokens"] / numbers["padded"],
              "seconds": numbers["seconds"], "wait": numbers["wait"]}
    # Of a sparse head: the mean number of terms of a query and of a passage.
    if "zero" in numbers:
        record["nnz_q"] = numbers["nnz_q"] / args.queries_per_step
        record["nnz_d"] = numbers["nnz_d"] / (args.queries_per_step * (1 + args.negatives))
    return record


def collapse(numbers: dict, step: int, r: Retriever, args):
    """What a sparse head that is dying, or was never sparse, looks like from outside."""
    if "zero" not in numbers or step % args.log_every:
        return
    texts = args.queries_per_step * (2 + args.negatives)
    zero, nnz = numbers["zero"] / texts, (numbers["nnz_q"] + numbers["nnz_d"]) / texts
    if zero > 0.1:
        yield f"{zero:.0%} of the vectors are all zero: lower --lr, --flops_q, --flops_d; raise --flops_ramp"
    elif nnz < 2:
        yield f"{nnz:.1f} non-zeros a vector: lower --flops_q and --flops_d"
    elif nnz > 0.25 * r.width and step > args.flops_ramp * args.max_steps:
        yield f"{nnz:,.0f} non-zeros a vector of {r.width:,} after the ramp: raise --flops_q, --flops_d"
    # Who cannot tell a query's passage from the others has the log of their number as loss.
    chance = math.log(args.queries_per_step * (1 + args.negatives))
    guessing = abs(numbers.get("cl", 0.0) * args.authors_weighting - chance) < 0.01 * chance
    if guessing and step > args.warmup * args.max_steps:
        yield f"the contrastive loss {chance:.2f} is that of guessing: lower --lr if it stays"


# The run.

@contextlib.contextmanager
def processes(args):
    """The process group, and a list that fills when a signal asks us to go."""
    leave_with_parent()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    else:
        # A group of one, so that nothing else asks whether there is a group.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # torchrun says which of the machine's GPUs is this process's.
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


def lr_at(step: int, args) -> float:
    """Linear up over the warm-up, then linear down, to 0 one step after the last."""
    warm, end = args.warmup * args.max_steps, args.max_steps + 1
    # The lower of two lines, which meet at 1.
    return args.lr * min(step / warm if warm else 1.0, (end - step) / (end - warm))


def train(args, stop: list) -> bool:
    """A run from its first step or newest checkpoint to its last; False if `stop` ended it before."""
    (rank, W), out = world(), Path(args.out)
    if rank == 0:
        open_run(out, args)
    dist.barrier()
    if (out / "summary.json").exists() and not args.resume_from:
        say(f"{out} is finished: {(out / 'summary.json').read_text().strip()}")
        return True

    # What there is: a model, data, an optimizer, and the place where the run stands.
    r = load_model(args)
    data, gradients_of, n_rows = open_data(args, r)
    dev = read_dev(args) if args.eval_queries else None
    # A budget is divided by what the first steps cost, counted as what is spent will be.
    first = [data[places_in(step, args)]["tokens"] for step in (1, 2, 3, 4) if args.flop_budget]
    args.max_steps = horizon(args, n_rows, sum(step_flops(r, tokens, args) for tokens in first) / 4)
    model = parallelise(r, args)
    trained = [weight for weight in r.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=args.weight_decay, fused=True)
    run = {"step": 0, "flops": 0.0, "seconds": 0.0, "best": -1.0}
    run |= load_state(out, r, optimizer, args.resume_from) if args.resume else {}
    log = Log(out, args, run["step"])
    n_trained, n_all = (sum(weight.numel() for weight in w) for w in (trained, r.parameters()))
    say(f"{n_trained:,} of {n_all:,} parameters train for {args.max_steps:,} steps, {args.parallel} on "
        f"{W} x {args.device}, {args.dtype}; {run['step']:,} steps are done")

    started = time.perf_counter()
    for batch in loader(data, args, run["step"]):
        step, waited = run["step"] + 1, time.perf_counter() - started
        optimizer.param_groups[0]["lr"] = lr_at(step, args)
        terms, counts, suspects = gradients_of(model, r, batch, step, args)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        # One process that has to go takes all of them along.
        counts |= {"flops": step_flops(r, batch["tokens"], args), "wait": waited / W, "leaving": len(stop)}
        numbers = summed(terms, counts) | {"norm": float(whole(norm))}
        check_finite(step, numbers["loss"], numbers["norm"], suspects, out)
        optimizer.step()
        optimizer.zero_grad()

        numbers["seconds"] = time.perf_counter() - started
        for what in ("flops", "seconds"):
            run[what] += numbers[what]
        run["step"] = step
        log.step(record_of(terms, numbers, run, args))
        for warning in collapse(numbers, step, r, args):
            say(f"WARNING step {step}: {warning}")
        # The dev set comes before the checkpoint, whose notes hold the best figure.
        last, leaving = step == args.max_steps, numbers["leaving"] > 0
        if dev and (step % args.eval_every == 0 or last):
            evaluate(r, dev, run, log, args)
        if step % args.save_every == 0 or last or leaving:
            save_state(out, r, optimizer, run, args.keep)
        if leaving and not last:
            say(f"stopped: saved {out}/state/step_{step:06d}; the same command with --resume goes on")
            return False
        started = time.perf_counter()

    finish(out, r, run, args)
    return True


def finish(out: Path, r: Retriever, run: dict, args) -> None:
    """Write the weights and then the summary: a run is finished when this file is there."""
    save_weights(out, r)
    summary = {"steps": args.max_steps, "flops": run["flops"], "seconds": run["seconds"]}
    summary |= {"best_mrr@10": run["best"]} if args.eval_queries else {}
    if world()[0] == 0:
        with write_whole(out / "summary.json") as f:
            json.dump(summary, f)
    say(f"finished: {out}, {run['flops']:.2g} FLOPs")


def main(argv=None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--plan" in words:
        # What a run would take, before anything is loaded. It is a tool, and so a process, of its own; under
        # torchrun one will do.
        words.remove("--plan")
        if rank_and_world()[0] > 0:
            return
        plan = [sys.executable, "-m", "tools.plan", *words]
        # Not from its own folder: paths are the user's.
        where = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        sys.exit(subprocess.run(plan, env=where).returncode)
    args = parse_args(words)
    with processes(args) as stop, locked(args.out) if world()[0] == 0 else contextlib.nullcontext():
        is_finished = train(args, stop)
    if not is_finished:
        # As a shell says that a signal ended it, so that no script takes the run for finished: on every
        # process, though the signal may have come to one.
        sys.exit(128 + (stop[0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    run_command("train.py", main)
