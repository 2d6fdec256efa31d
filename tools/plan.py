"""What a run of train.py would take: steps, tokens, FLOPs, memory by part, hours. Nothing is loaded.

    python train.py --plan --model 1b --head sparse --objective cl+kd --max_steps 33250
    python train.py --plan --model 8b --head dense --objective kd --rows 491000 --devices 8 --parallel fsdp
    python -m tools.plan --table    # the paper's 18 cells

All of train.py's flags are understood. `--model` is a folder, a hub name, or 1b, 3b, 8b for Llama-3's shapes.
Activations are not guessed: one decoder block and the head run on torch's meta device, which holds no
numbers, and what they save for backward is added up.
"""
import argparse
import itertools
import math
import sys
from functools import partial

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import train
from data import positive, positive_int, read_lines, run_command
from losses import OBJECTIVES
from model import HEADS, Retriever, find_parts, flops_per_token

# What the three sizes share is in config_of: 8 key-value heads and a vocabulary of 128,256.
SHAPES = {
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
    "3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
}
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "tie_word_embeddings")
# What the paper's epochs and steps come to: 33,250 steps of 112 queries are 7 epochs.
MSMARCO_ROWS = 532_000
# The paper's queries a step and epochs, of CL and CL+KD and then of KD.
PAPER = {"1b": ("112", "7", "1024", "56"), "3b": ("128", "3", "512", "24"), "8b": ("128", "1", "512", "8")}
# Mean tokens of MS MARCO's queries and passages under Llama's tokenizer, BOS included; cut at what flags say.
TYPICAL = {"query": 9, "passage": 80}


def config_of(name: str):
    """The shape of a model: built in, or read from its config.json, which an adapter's base has."""
    if name not in SHAPES:
        theirs = AutoConfig.from_pretrained(find_parts(name, None)[0])
        # Other families are counted as a Llama of their shape: what their blocks have more is small.
        shape = {field: getattr(theirs, field, None) for field in SHAPE}
        return LlamaConfig(**{field: value for field, value in shape.items() if value is not None})
    # The 8B has a head of its own, the smaller ones use their embeddings for it.
    tied = name != "8b"
    return LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=tied, **SHAPES[name])


class Saved:
    """Bytes that autograd keeps for backward while this is entered, each memory counted once."""

    def __init__(self, module: torch.nn.Module):
        # Weights are saved for backward, too, but lie in memory anyway.
        self.known = {id_of(p) for p in itertools.chain(module.parameters(), module.buffers())}
        self.bytes = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def keep(self, tensor):
        if id_of(tensor) not in self.known:
            self.known.add(id_of(tensor))
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


def id_of(tensor: torch.Tensor) -> int:
    # A view has its tensor's memory: it is the same bytes, and counts as the same.
    return tensor.untyped_storage()._cdata


def activations(config, args, texts: int, length: int) -> dict[str, float]:
    """Bytes kept for backward: by a whole block and by its input, a token; by the head, a text."""
    # All blocks are alike: one is measured.
    small = type(config)(**{**config.to_dict(), "num_hidden_layers": 1, "use_cache": False})
    small._attn_implementation = "sdpa"
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        llama = LlamaForCausalLM(small).to(dtype)
    r = Retriever(llama, None, {"head": args.head}).train()
    if args.lora_rank:
        r.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    hidden = torch.empty(texts, length, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    places = torch.arange(length, device="meta")[None]
    rotation = llama.model.rotary_emb(hidden, places)
    with Saved(r) as block:
        llama.model.layers[0](hidden, position_ids=places, position_embeddings=rotation)
    tokens = texts * length
    head = 0 if OBJECTIVES[args.objective].predicts else saved_by_head(config, args.head, length)
    return {"block": block.bytes / tokens, "input": hidden.nbytes / tokens, "head": head}


def saved_by_head(config, head: str, length: int) -> int:
    """Bytes that the head keeps for one text."""
    # For real: it asks whether to cast, which the meta device cannot answer. The sparse head keeps what is as
    # wide as the vocabulary, and a narrow model keeps the same.
    width = 8 if HEADS[head].sparse else config.hidden_size
    llama = torch.nn.Module()
    llama.config, llama.lm_head = config, torch.nn.Linear(width, config.vocab_size, bias=False)
    llama.lm_head.requires_grad_(False)
    r = Retriever(llama, None, {"head": head})
    hidden = torch.zeros(1, length, width, requires_grad=True)
    with Saved(r) as saved:
        HEADS[head].vectors(r, hidden * 1.0, torch.ones(1, length, dtype=torch.int64))
    return saved.bytes


def batch_of(args, devices: int) -> tuple[int, int, int]:
    """(texts, their largest tokens, their typical tokens) on one device in one step."""
    queries = math.ceil(args.queries_per_step / devices)
    if OBJECTIVES[args.objective].predicts:
        return queries, queries * args.block_length, queries * args.block_length
    # Each query brings its positive and its negatives.
    passages = queries * (1 + args.negatives)
    typical = [min(TYPICAL["query"], args.query_length), min(TYPICAL["passage"], args.passage_length)]
    return (queries + passages, queries * args.query_length + passages * args.passage_length,
            queries * typical[0] + passages * typical[1])


def memory(config, args, devices: int) -> dict[str, float]:
    """Peak bytes by part on each of `devices`, in the worst case: every text as long as it may be."""
    with torch.device("meta"):
        r = Retriever(LlamaForCausalLM(config), None, {"head": args.head})
    if args.lora_rank:
        r.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    # What FSDP shards, and DDP has on every device.
    trained = sum(p.numel() for p in r.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in r.parameters()) - trained
    shards = devices if args.parallel == "fsdp" else 1
    texts, tokens, _ = batch_of(args, devices)
    length = args.block_length if OBJECTIVES[args.objective].predicts else args.passage_length
    # With accumulation the graph of one share is kept at a time, in whole chunks.
    chunk = min(tokens, args.tokens_per_chunk)
    share = min(1.0, max(1 / args.accumulation, chunk / tokens))
    saved = activations(config, args, max(1, chunk // length), length)
    layers = config.num_hidden_layers
    recomputed = min(layers, layers if args.recompute is None else args.recompute)
    kept = saved["block"] * (layers - recomputed) + saved["input"] * recomputed
    # A recomputed block has its whole graph back while backward is in it, a chunk at a time.
    again = saved["block"] * chunk if recomputed else 0
    # The sparse head walks over the vocabulary in slices: these are its fp32 logits in hand at a time.
    logits = 4 * 2**26 if HEADS[args.head].sparse else 0
    if OBJECTIVES[args.objective].predicts:
        # fp32 logits and their gradient at the positions to predict, of a chunk.
        positions = args.mask_share if OBJECTIVES[args.objective].predicts == "masked" else 1.0
        logits = 2 * 4 * config.vocab_size * chunk * positions
    # Trained weights are kept in fp32, with a gradient and AdamW's two moments of 4 bytes each.
    return {"weights": (frozen * (2 if args.dtype == "bf16" else 4) + trained * 4) / shards,
            "gradients and optimizer": trained * 12 / shards, "activations": kept * tokens * share + again,
            "head": saved["head"] * texts * share + logits,
            "vectors": 4 * texts * getattr(config, HEADS[args.head].width) * 3}


def flops_of_a_step(config, args) -> tuple[float, float]:
    """(FLOPs, tokens) of a step over all devices, for texts of typical lengths."""
    texts, _, tokens = batch_of(args, 1)
    length, what = args.block_length, args.objective
    if not OBJECTIVES[args.objective].predicts:
        length, what = tokens / texts, args.head
    return tokens * flops_per_token(config, length, what, train=True, lora_r=args.lora_rank), tokens


def steps_of(args, per_step: float) -> int:
    rows = args.rows
    if args.epochs and rows is None:
        rows = sum(1 for _ in read_lines(args.train)) if args.train else MSMARCO_ROWS
    return train.horizon(args, rows or 0, per_step)


def show(args) -> None:
    config = config_of(args.model)
    per_step, tokens = flops_of_a_step(config, args)
    steps = steps_of(args, per_step)
    print(f"{args.model} {args.head} {args.objective}: {steps:,} steps of {args.queries_per_step:,} "
          f"{'blocks' if OBJECTIVES[args.objective].predicts else 'queries'}, {tokens:,.0f} tokens and "
          f"{per_step:.2e} FLOPs a step, {steps * per_step:.2e} in all")
    parts = memory(config, args, args.devices)
    print(f"\npeak memory a device, {args.devices} devices, {args.parallel}, every text as long as it may be")
    for part, size in parts.items():
        print(f"  {part:<26}{size / 1e9:>8.1f} GB")
    total = sum(parts.values())
    print(f"  {'together':<26}{total / 1e9:>8.1f} GB" + cure(total, args))
    print(f"\nhours at {args.mfu:.0%} of {args.peak:.0f} TFLOP/s")
    for devices in (1, 4, 8):
        print(f"  {devices} devices{hours(steps * per_step, devices, args):>10.1f}")


def hours(flops: float, devices: int, args) -> float:
    return flops / (devices * args.mfu * args.peak * 1e12) / 3600


def cure(total: float, args) -> str:
    # 8% are left for what is not counted here, such as the allocator's gaps and the kernels' own memory.
    if total < 0.92e9 * args.memory:
        return f" of {args.memory:.0f}: fits"
    return f" of {args.memory:.0f}: too much; --accumulation {2 * args.accumulation}, or --parallel fsdp"


def show_table() -> None:
    """The paper's cells as train.py runs them by default, on four devices."""
    print("| model | head | objective | steps | FLOPs | memory, GB | hours on 4 |\n"
          "|---|---|---|---:|---:|---:|---:|")
    for size, head, objective in itertools.product(PAPER, ("sparse", "dense"), ("cl", "kd", "cl+kd")):
        a, b, c, d = PAPER[size]
        queries, epochs = (c, d) if objective == "kd" else (a, b)
        cell = parse(f"--model {size} --head {head} --objective {objective} --device cuda --dtype bf16 "
                     f"--queries_per_step {queries} --epochs {epochs}".split())
        config = config_of(size)
        per_step, _ = flops_of_a_step(config, cell)
        steps = steps_of(cell, per_step)
        total = sum(memory(config, cell, 4).values())
        print(f"| {size} | {head} | {objective} | {steps:,} | {steps * per_step:.1e} | {total / 1e9:.0f} "
              f"| {hours(steps * per_step, 4, cell):.0f} |")


def parse(argv=None) -> argparse.Namespace:
    parser = train.make_parser()
    parser.prog, parser.description = "train.py --plan", __doc__
    # A plan needs neither data nor a place for the run.
    for action in parser._actions:
        action.required = action.dest in ("model", "objective")
    group = parser.add_argument_group("plan")
    group.add_argument("--rows", type=positive_int,
                       help="training rows, if --train is not there to be counted")
    group.add_argument("--devices", type=positive_int, default=4)
    group.add_argument("--mfu", type=positive, default=0.4, help="share of the peak that is reached")
    group.add_argument("--peak", type=positive, default=989.0, help="TFLOP/s of a device in bf16 (H100)")
    group.add_argument("--memory", type=positive, default=80.0, help="GB of a device")
    args = parser.parse_args(argv)
    if not OBJECTIVES[args.objective].predicts and not args.head:
        parser.error("--plan needs --head")
    args.device, args.dtype = "cuda", args.dtype or "bf16"
    return train.complete(args)


def main(argv=None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if "--table" in words:
        run_command("tools.plan", show_table)
    else:
        run_command("train.py --plan", partial(show, parse(words)))


if __name__ == "__main__":
    main()
