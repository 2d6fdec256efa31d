"""One step of contrastive training beside sentence-transformers and a plain step: speed and memory.

    python benchmarks/train_step.py                            # a small Llama with Llama-3's vocabulary
    python benchmarks/train_step.py --lora_rank 0 --queries 8 --negatives 7 --rounds 5
    python benchmarks/train_step.py --model models/smollm2-135m --dtype bf16 --queries 8 --negatives 7
    python benchmarks/train_step.py --device cuda --shape 1b --queries 28 --negatives 16 --largest

ours        train.retrieval_step: chunks by length, streaming head, one pass
ours-cached the same with --accumulation 4: two passes
naive       logits (passages, length, vocabulary), maximum, relu, log1p, all padded to the longest, one
            backward
st          sentence-transformers: SparseEncoder with SpladeLoss over its ranking loss
            (dense: MultipleNegativesRankingLoss)
st-cached   CachedSpladeLoss, mini-batches of --mini_batch (dense: CachedMultipleNegativesRankingLoss)

All of them load the same folder (tools.hub makes it one that sentence-transformers opens, which has the
causal switch, the scale and the maximum, and so computes the same loss), train the same LoRA adapters or all
weights, with AdamW, on the same token ids, whose lengths follow MS MARCO's. `--active` of the vocabulary is
on, as after training: of the small Llama, whose random head has half of it on, by a shift of the head; of
--model by a threshold for each term, as train.py --calibrate sets them, on words of this project's files.

Each contender lives in a process of its own and they take steps in turn. Throughput counts real tokens only.
Memory is the process's high-water mark over what stood before the first step (weights and imports), on CUDA
the allocator's.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Hidden, layers, heads, intermediate.
SHAPES = {"tiny": (128, 2, 2, 256), "small": (256, 4, 4, 768), "1b": (2048, 16, 32, 8192)}
VOCAB = 128_256
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# What is trained, and on what.

def lengths_of(queries: int, negatives: int, rng) -> list[int]:
    """Tokens of queries, about 8, and of passages, about 75; at most 64 and 128, as in MS MARCO."""
    passages = queries * (1 + negatives)
    return [*np.clip(rng.normal(8, 3, queries), 4, 64).astype(int),
            *np.clip(rng.lognormal(4.25, 0.4, passages), 12, 128).astype(int)]


def make_batch(words: np.ndarray, queries: int, negatives: int, seed: int = 0) -> dict:
    """Pieces of `words`, which are token ids, each behind the first of them, the BOS."""
    rng = np.random.default_rng(seed)
    lengths = lengths_of(queries, negatives, rng)
    starts = rng.integers(1, len(words) - 128, len(lengths))
    docids = np.arange(queries * (1 + negatives))
    return {"names": [f"query {i}" for i in range(queries)],
            "tokens": [[int(words[0]), *words[a:a + L - 1].tolist()] for a, L in zip(starts, lengths)],
            "for_loss": {"docids": docids, "positives": docids[::1 + negatives, None]}}


def make_folder(folder: str, args) -> None:
    """The model that all load, `--active` of its vocabulary on, and the words of the batches."""
    from tools.hub import for_sentence_transformers

    r, words = pretrained(args) if args.model else random_llama(args)
    r.save(folder)
    for_sentence_transformers(r, Path(folder))
    np.save(f"{folder}/words.npy", words)


def random_llama(args):
    """A Llama of random weights, whose head is shifted, and random words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from model import Retriever, max_logits

    torch.manual_seed(0)
    hidden, layers, heads, inner = SHAPES[args.shape]
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), intermediate_size=inner, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False))
    # One dimension that every token shares: a bias for the head, which has none.
    llama.model.embed_tokens.weight.data[:, 0] = 1.0
    vocabulary = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    words = np.append(0, np.random.default_rng(0).integers(2, VOCAB, 100_000))
    r = Retriever(llama, tokenizer, {"head": args.head})
    llama.config.is_causal = False
    ids, mask = r.pad(make_batch(words, 4, 3)["tokens"])
    with torch.no_grad():
        states = llama.model(input_ids=ids, attention_mask=mask.bool(), use_cache=False).last_hidden_state
        # Through that dimension all logits move down until only `--active` of the maxima are above 0.
        top = max_logits(states, llama.lm_head.weight, mask)
        shift = torch.quantile(top.flatten()[::97], 1 - args.active) / states[mask.bool()][:, 0].mean()
        llama.lm_head.weight[:, 0] -= shift
    return r, words


def pretrained(args):
    """The language model of --model, its terms calibrated, and the words of this project's files."""
    from model import Retriever

    r = Retriever.load(args.model, head=args.head, dtype=dtype_of(args))
    text = "\n".join(file.read_text() for file in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*.md")))
    words = r.tokenizer(text, add_special_tokens=False)["input_ids"]
    if r.sparse:
        texts = [r.tokenizer.decode(words[i:i + 75]) for i in range(0, len(words) - 75, len(words) // 64)]
        r.calibrate(texts, args.active)
    return r, np.array([r.tokenizer.bos_token_id, *words])


def dtype_of(args) -> torch.dtype:
    """Of the frozen weights; all that train are fp32, as in train.py."""
    return torch.bfloat16 if args.dtype == "bf16" and args.lora_rank else torch.float32


# The contenders: (module, function of a batch that leaves gradients and returns the loss).

def ours(folder, args, accumulation: int = 1):
    import train

    flags = (f"--model {folder} --head {args.head} --objective cl --train - --out - --max_steps 1000 "
             f"--lora_rank {args.lora_rank} --lora_dropout 0 --device {args.device} --dtype {args.dtype} "
             f"--negatives {args.negatives} --accumulation {accumulation} "
             f"--tokens_per_chunk {args.tokens_per_chunk} --flops_ramp 0")
    flags = train.parse_args(flags.split())
    flags.temperature = 0.01 if args.head == "dense" else 1.0
    train.dist.init_process_group("gloo", store=train.dist.HashStore(), rank=0, world_size=1)
    r = train.load_model(flags)
    return r, lambda batch: train.retrieval_step(r, r, batch, 1, flags)[0]["loss"]


def naive(folder, args):
    import losses
    from model import Retriever

    r = Retriever.load(folder, head=args.head, dtype=dtype_of(args))
    if args.lora_rank:
        r.add_lora(args.lora_rank, dropout=0.0)
    r.to(args.device).train()
    scale = r.llama.config.hidden_size ** -0.25

    def encode(rows):
        ids, mask = (x.to(args.device) for x in r.pad(rows))
        if args.head == "dense":
            return r(ids, mask)
        logits = r.llama(input_ids=ids, attention_mask=mask, use_cache=False).logits * scale
        top = logits.masked_fill(~mask.bool()[..., None], float("-inf")).amax(1).float()
        return torch.log1p(torch.relu(top if r.threshold is None else top - scale * r.threshold))

    def step(batch):
        B = len(batch["names"])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            q, d = encode(batch["tokens"][:B]), encode(batch["tokens"][B:])
        how = {"temperature": 0.01} if args.head == "dense" else {"flops_weights": (0.05, 0.04)}
        loss, _ = losses.objective("cl", q, d, **how)
        loss.backward()
        return loss.item()

    return r, step


def sentence_transformers(folder, args, cached: bool = False):
    from peft import LoraConfig, inject_adapter_in_model
    from sentence_transformers import SentenceTransformer, SparseEncoder

    from model import Retriever

    pad = Retriever.load(folder, head=args.head).pad
    opens = SparseEncoder if args.head == "sparse" else SentenceTransformer
    # To all modules: thresholds are one of their own, and it is not asked for model_kwargs.
    model = opens(folder, device=args.device, model_kwargs={"dtype": dtype_of(args)}).to(dtype_of(args))
    if args.lora_rank:
        model.requires_grad_(False)
        lora = LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules=LORA)
        inject_adapter_in_model(lora, model[0].auto_model)
    loss_of = their_loss(model, args, {"mini_batch_size": args.mini_batch} if cached else {})
    model.train()

    def step(batch):
        B = len(batch["names"])
        G = len(batch["tokens"][B:]) // B
        # As its collator does: a column for queries, one a passage.
        columns = [batch["tokens"][:B], *(batch["tokens"][B + g::G] for g in range(G))]
        padded = [[x.to(args.device) for x in pad(rows)] for rows in columns]
        features = [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = loss_of(features, torch.zeros(B, device=args.device))
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        return loss.item()

    return model, step


def their_loss(model, args, mini_batches: dict):
    from sentence_transformers.sentence_transformer import losses as dense
    from sentence_transformers.sparse_encoder import losses as sparse
    from sentence_transformers.util import dot_score

    if args.head == "dense":
        plain, cached = dense.MultipleNegativesRankingLoss, dense.CachedMultipleNegativesRankingLoss
        return (cached if mini_batches else plain)(model, scale=100, similarity_fct=dot_score, **mini_batches)
    ranking = sparse.SparseMultipleNegativesRankingLoss(model)
    wrap = sparse.CachedSpladeLoss if mini_batches else sparse.SpladeLoss
    weights = {"document_regularizer_weight": 0.04, "query_regularizer_weight": 0.05}
    return wrap(model, ranking, **weights, **mini_batches)


CONTENDERS = {"ours": ours, "ours-cached": partial(ours, accumulation=4), "naive": naive,
              "st": sentence_transformers, "st-cached": partial(sentence_transformers, cached=True)}


# A process for each.

def memory(device: str, now: bool) -> int:
    """Bytes held now, or at the worst so far."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if now else torch.cuda.max_memory_allocated()
    mark = "VmRSS" if now else "VmHWM"
    [line] = [line for line in open("/proc/self/status") if line.startswith(mark)]
    return int(line.split()[1]) * 1024


def work(args) -> None:
    """A contender: one step for every line on stdin, {seconds, loss, bytes} on stdout."""
    torch.set_num_threads(args.threads)
    module, step = CONTENDERS[args.contender](args.folder, args)
    words = np.load(f"{args.folder}/words.npy")
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    # One thread: this process's own seconds, whatever the neighbours do.
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    if args.device == "cpu":
        # The high-water mark starts here, after loading.
        Path("/proc/self/clear_refs").write_text("5")
    start = memory(args.device, now=True)
    for line in sys.stdin:
        batch = make_batch(words, int(line), args.negatives)
        try:
            began = clock()
            loss = step(batch)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if args.device == "cuda":
                torch.cuda.synchronize()
            peak = memory(args.device, now=False) - start
            answer = {"seconds": clock() - began, "loss": loss, "bytes": peak}
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            answer = None
        print("@" + json.dumps(answer), flush=True)


def ask(worker, queries: int) -> dict | None:
    worker.stdin.write(f"{queries}\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("@"):
            return json.loads(line[1:])
    raise SystemExit(f"a contender died: {worker.args}")


def measure(folder: str, tokens: int, args) -> None:
    passed_on = "head negatives lora_rank tokens_per_chunk mini_batch threads device dtype".split()
    flags = [x for name in passed_on for x in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *flags, "--folder", folder, "--contender"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True,
             "stderr": None if args.verbose else subprocess.DEVNULL}
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in args.contenders}
    try:
        report(workers, tokens, args)
        if args.device == "cuda" and "ours" in workers and args.largest:
            largest(workers, args)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()


def report(workers: dict, tokens: int, args) -> None:
    # The first warms up, and its loss is that of one and the same model.
    first, *rounds = [{name: ask(worker, args.queries) for name, worker in workers.items()}
                      for _ in range(args.rounds + 1)]
    fit = [name for name in workers if all(done[name] for done in rounds)]
    seconds = {name: statistics.median(done[name]["seconds"] for done in rounds) for name in fit}
    peak = {name: max(done[name]["bytes"] for done in rounds) for name in fit}
    print(f"\n{args.head:12} {'s/step':>8} {'tok/s':>9} {'peak MB':>9} {'loss':>9}   ours against it: "
          "faster, memory")
    for name in fit:
        versus = ""
        if "ours" in fit:
            versus = f"{seconds[name] / seconds['ours']:18.2f}x {peak['ours'] / peak[name]:12.3f}"
        print(f"{name:12} {seconds[name]:8.3f} {tokens / seconds[name]:9,.0f} {peak[name] / 2**20:9,.0f} "
              f"{first[name]['loss']:9.4f}{versus}")
    if "ours" in fit:
        targets(seconds, peak, args)


def targets(seconds: dict, peak: dict, args) -> None:
    """Sparse: twice as fast as each, in a fifth of the memory of all but the cached; dense: no slower."""
    wanted, most = (2.0, 0.2) if args.head == "sparse" else (1.0, None)
    others = ["naive", "st", "st-cached"] if args.head == "sparse" else ["st", "st-cached"]
    for name in filter(seconds.get, others):
        faster, smaller = seconds[name] / seconds["ours"], peak["ours"] / peak[name]
        line = f"target: {args.head} >= {wanted:g}x {name}: {faster:.2f}x {verdict(faster >= wanted)}"
        if most and name != "st-cached":
            line += f"; memory <= {most:g} of its: {smaller:.3f} {verdict(smaller <= most)}"
        print(line)
    if args.device == "cuda":
        import train
        from transformers import AutoConfig

        device, config = torch.cuda.get_device_name(), AutoConfig.from_pretrained(args.folder)
        spent = sum(L * train.flops_per_token(config, int(L), args.head, train=True, lora_r=args.lora_rank)
                    for L in lengths_of(args.queries, args.negatives, np.random.default_rng(0)))
        for peak_flops in [train.PEAK[name] for name in train.PEAK if name in device]:
            print(f"ours: {spent:.3g} FLOPs a step, mfu {spent / seconds['ours'] / peak_flops:.1%} (target: "
                  "45% with LoRA)")


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def largest(workers: dict, args) -> None:
    """The largest number of queries that fits, by doubling."""
    for name in [name for name in ("ours", "ours-cached", "naive") if name in workers]:
        fits, queries = 0, args.queries
        while ask(workers[name], queries):
            fits, queries = queries, queries * 2
        print(f"{name}: {fits} queries x {1 + args.negatives} passages fit in one step, {queries} do not")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="small", help="of a Llama with random weights")
    p.add_argument("--model", help="instead: folder or hub name of a language model")
    p.add_argument("--heads", nargs="+", choices=["sparse", "dense"], default=["sparse", "dense"])
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    p.add_argument("--queries", type=int, default=2)
    p.add_argument("--negatives", type=int, default=3)
    p.add_argument("--lora_rank", type=int, default=16, help="0 trains all weights")
    p.add_argument("--active", type=float, default=0.02,
                   help="share of the vocabulary that is on in a passage's vector")
    p.add_argument("--tokens_per_chunk", type=int, default=512, help="ours; on a GPU use 16384")
    p.add_argument("--mini_batch", type=int, default=4, help="st-cached")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--dtype", choices=["bf16", "fp32"], help="bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--largest", action="store_true",
                   help="also: the largest number of queries that fits, by doubling (cuda)")
    p.add_argument("--verbose", action="store_true", help="show what the contenders say on stderr")
    for internal in ("--head", "--contender", "--folder"):
        p.add_argument(internal, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if args.contender:
        return work(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("skipped: no GPU here")
    tokens = sum(lengths_of(args.queries, args.negatives, np.random.default_rng(0)))
    print(f"{args.model or args.shape + ' Llama'}, {args.queries} queries x {1 + args.negatives} passages, "
          f"{tokens:,} real tokens, LoRA rank {args.lora_rank}, {args.device}, {args.dtype}, {args.threads} "
          f"thread(s), median of {args.rounds}")
    for args.head in args.heads:
        with tempfile.TemporaryDirectory() as args.folder:
            make_folder(args.folder, args)
            measure(args.folder, tokens, args)


if __name__ == "__main__":
    main()
