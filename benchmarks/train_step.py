"""One step of contrastive training beside sentence-transformers and a plain step: speed and memory.

    python benchmarks/train_step.py                            # a small Llama with Llama-3's vocabulary
    python benchmarks/train_step.py --lora_rank 0 --queries 8 --negatives 7 --rounds 5
    python benchmarks/train_step.py --device cuda --shape 1b --queries 28 --negatives 16 --largest

ours        train.retrieval_step: chunks by length, streaming head, one pass
ours-cached the same with --accumulation 4: two passes
naive       logits (passages, length, vocabulary), maximum, relu, log1p, all padded to the longest, one
backward st          sentence-transformers: SparseEncoder with SpladeLoss over its ranking loss
            (dense: MultipleNegativesRankingLoss)
st-cached   CachedSpladeLoss, mini-batches of --mini_batch (dense: CachedMultipleNegativesRankingLoss)

All of them load the same folder (model.py's checkpoints open in sentence-transformers, which has the causal
switch, the scale and the maximum, and so computes the same loss), train the same LoRA adapters or all
weights, with AdamW, on the same token ids, whose lengths follow MS MARCO's. The head is shifted so that
`--active` of the vocabulary is on, as after training; a random one has half of it on. Each contender lives in
a process of its own and they take steps in turn. Throughput counts real tokens only. Memory is the process's
high-water mark over what stood before the first step (weights and imports), on CUDA the allocator's."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Hidden, layers, heads, intermediate.
SHAPES = {"tiny": (128, 2, 2, 256), "small": (256, 4, 4, 768), "1b": (2048, 16, 32, 8192)}
VOCAB = 128_256
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_batch(queries: int, negatives: int, seed: int = 0) -> dict:
    """Random ids; queries of about 8 tokens, passages of about 75, at most 64 and 128, as in MS MARCO."""
    rng, n = np.random.default_rng(seed), queries * (1 + negatives)
    lengths = [
        *np.clip(rng.normal(8, 3, queries), 4, 64).astype(int),
        *np.clip(rng.lognormal(4.25, 0.4, n), 12, 128).astype(int),
    ]
    return {
        "names": [f"query {i}" for i in range(queries)],
        "tokens": [[0, *rng.integers(2, VOCAB, L - 1).tolist()] for L in lengths],
        "for_loss": {"docids": np.arange(n), "positives": np.arange(0, n, 1 + negatives)[:, None]},
    }


def llama_config(shape: str):
    from transformers import LlamaConfig
    hidden, layers, heads, inner = SHAPES[shape]
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=inner,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def make_model(folder, args) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from model import Retriever, max_logits
    from tools.hub import for_sentence_transformers
    torch.manual_seed(0)
    llama = LlamaForCausalLM(llama_config(args.shape))
    # One dimension that every token shares: a bias for the head, which has none.
    llama.model.embed_tokens.weight.data[:, 0] = 1.0
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="</s>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    r = Retriever(llama, tokenizer, {"head": args.head})
    llama.config.is_causal = False
    ids, mask = r.pad(make_batch(4, 3)["tokens"])
    with torch.no_grad():
        states = llama.model(input_ids=ids, attention_mask=mask.bool(), use_cache=False).last_hidden_state
        top = max_logits(states, llama.lm_head.weight, mask)
        shift = torch.quantile(top.flatten()[::97], 1 - args.active) / states[mask.bool()][:, 0].mean()
        llama.lm_head.weight[:, 0] -= shift
    r.save(folder)
    for_sentence_transformers(r, Path(folder))


def ours(folder, args, accumulation=1):
    import train

    flags = (
        f"--model {folder} --head {args.head} --objective cl --train - --out - "
        f"--lora_rank {args.lora_rank} --lora_dropout 0 --device {args.device} --max_steps 1000 "
        f"--negatives {args.negatives} --accumulation {accumulation} "
        f"--tokens_per_chunk {args.tokens_per_chunk} --flops_ramp 0"
    )
    flags = train.parse_args(flags.split())
    flags.temperature = 0.01 if args.head == "dense" else 1.0
    train.dist.init_process_group("gloo", store=train.dist.HashStore(), rank=0, world_size=1)
    r = train.load_model(flags)
    return r, lambda batch: train.retrieval_step(r, r, batch, 1, flags)[0]["loss"]


def naive(folder, args):
    import losses
    import train
    from model import Retriever

    r = Retriever.load(
        folder,
        head=args.head,
        dtype=torch.bfloat16 if args.device == "cuda" and args.lora_rank else torch.float32,
    )
    if args.lora_rank:
        r.add_lora(args.lora_rank, dropout=0.0)
    r.to(args.device).train()

    def encode(rows):
        ids, mask = (x.to(args.device) for x in r.pad(rows))
        if args.head == "dense":
            return r(ids, mask)
        logits = (
            r.llama(input_ids=ids, attention_mask=mask, use_cache=False).logits
            * r.llama.config.hidden_size**-0.25
        )
        return torch.log1p(
            torch.relu(logits.masked_fill(~mask.bool()[..., None], float("-inf")).amax(1).float())
        )

    def step(batch):
        B = len(batch["names"])
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            q, d = encode(batch["tokens"][:B]), encode(batch["tokens"][B:])
        kw = {"temperature": 0.01} if args.head == "dense" else {"flops_weights": (0.05, 0.04)}
        loss, _ = losses.objective("cl", q, d, **kw)
        loss.backward()
        return loss.item()
    return r, step


def st(folder, args, cached=False):
    from peft import LoraConfig, inject_adapter_in_model
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer import losses as dense_losses
    from sentence_transformers.sparse_encoder import losses as sparse_losses

    from model import Retriever
    pad = Retriever.load(folder, head=args.head).pad
    kw = {
        "model_kwargs": {
            "torch_dtype": torch.bfloat16 if args.device == "cuda" and args.lora_rank else torch.float32
        }
    }
    model = (SparseEncoder if args.head == "sparse" else SentenceTransformer)(
        str(folder), device=args.device, **kw
    )
    if args.lora_rank:
        model.requires_grad_(False)
        inject_adapter_in_model(
            LoraConfig(r=args.lora_rank, lora_alpha=32, target_modules=LORA), model[0].auto_model
        )
    size = {"mini_batch_size": args.mini_batch} if cached else {}
    if args.head == "sparse":
        ranking = sparse_losses.SparseMultipleNegativesRankingLoss(model)
        wrap = sparse_losses.CachedSpladeLoss if cached else sparse_losses.SpladeLoss
        loss_fn = wrap(
            model, ranking, document_regularizer_weight=0.04, query_regularizer_weight=0.05, **size
        )
    else:
        from sentence_transformers.util import dot_score

        kind = (
            dense_losses.CachedMultipleNegativesRankingLoss
            if cached
            else dense_losses.MultipleNegativesRankingLoss
        )
        loss_fn = kind(model, scale=100, similarity_fct=dot_score, **size)
    model.train()

    def step(batch):
        B = len(batch["names"])
        G = len(batch["tokens"][B:]) // B
        # As its collator does: a column for queries, one a passage.
        columns = [batch["tokens"][:B], *(batch["tokens"][B + g::G] for g in range(G))]
        features = [
            dict(zip(("input_ids", "attention_mask"), (x.to(args.device) for x in pad(rows))))
            for rows in columns
        ]
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = loss_fn(features, torch.zeros(B, device=args.device))
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        loss.backward()
        return loss.item()
    return model, step


CONTENDERS = {
    "ours": ours,
    "ours-cached": lambda f, a: ours(f, a, 4),
    "naive": naive,
    "st": st,
    "st-cached": lambda f, a: st(f, a, True),
}


def memory(device: str, now: bool) -> int:
    """Bytes held now, or at the worst so far."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if now else torch.cuda.max_memory_allocated()
    return next(
        int(line.split()[1]) * 1024
        for line in open("/proc/self/status")
        if line.startswith("VmRSS" if now else "VmHWM")
    )


def work(args) -> None:
    """A contender: one step for every line on stdin, {seconds, loss, bytes} on stdout."""
    torch.set_num_threads(args.threads)
    module, step = CONTENDERS[args.contender](args.folder, args)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    # one thread: this process's own seconds, whatever the neighbours do
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    if args.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here, after loading
    start = memory(args.device, now=True)
    for line in sys.stdin:
        queries = int(line)
        batch = make_batch(queries, args.negatives)
        try:
            began = clock()
            loss = step(batch)
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if args.device == "cuda":
                torch.cuda.synchronize()
            answer = {
                "seconds": clock() - began,
                "loss": loss,
                "bytes": memory(args.device, now=False) - start,
            }
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


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--heads", nargs="+", choices=["sparse", "dense"], default=["sparse", "dense"])
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    p.add_argument("--queries", type=int, default=2)
    p.add_argument("--negatives", type=int, default=3)
    p.add_argument("--lora_rank", type=int, default=16, help="0 trains all weights")
    p.add_argument(
        "--active", type=float, default=0.02, help="share of the vocabulary that is on in a passage's vector"
    )
    p.add_argument("--tokens_per_chunk", type=int, default=512, help="ours; on a GPU use 16384")
    p.add_argument("--mini_batch", type=int, default=4, help="st-cached")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument(
        "--largest",
        action="store_true",
        help="also: the largest number of queries that fits, by doubling (cuda)",
    )
    p.add_argument("--head", help=argparse.SUPPRESS)
    p.add_argument("--contender", help=argparse.SUPPRESS)
    p.add_argument("--folder", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.contender:
        return work(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("skipped: no GPU here")
    tokens = sum(map(len, make_batch(args.queries, args.negatives)["tokens"]))
    print(
        f"{args.shape} Llama, vocabulary {VOCAB:,}, {args.queries} queries x {1 + args.negatives} "
        f"passages, {tokens:,} real tokens, "
        f"LoRA rank {args.lora_rank}, {args.device}, {args.threads} thread(s), median of {args.rounds}"
    )
    for args.head in args.heads:
        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, args)
            passed_on = "shape head negatives lora_rank tokens_per_chunk mini_batch threads device".split()
            mine = [x for name in passed_on for x in (f"--{name}", str(getattr(args, name)))]
            workers = {
                name: subprocess.Popen(
                    [sys.executable, __file__, *mine, "--contender", name, "--folder", folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
                for name in args.contenders
            }
            try:
                report(workers, tokens, args)
            finally:
                for worker in workers.values():
                    worker.kill()
                    worker.wait()


def report(workers: dict, tokens: int, args) -> None:
    # The first warms up.
    rounds = [
        {name: ask(worker, args.queries) for name, worker in workers.items()} for _ in range(args.rounds + 1)
    ][1:]
    median = {
        name: statistics.median(r[name]["seconds"] for r in rounds)
        for name in workers
        if all(r[name] for r in rounds)
    }
    peak = {name: max(r[name]["bytes"] for r in rounds) for name in median}
    print(
        f"\n{args.head:12} {'s/step':>8} {'tok/s':>9} {'peak MB':>9} {'loss':>9}   ours against it: "
        "faster, memory"
    )
    for name in median:
        versus = (
            f"{median[name] / median['ours']:18.2f}x {peak['ours'] / peak[name]:12.3f}"
            if "ours" in median
            else ""
        )
        print(
            f"{name:12} {median[name]:8.3f} {tokens / median[name]:9,.0f} {peak[name] / 2**20:9,.0f} "
            f"{rounds[0][name]['loss']:9.4f}{versus}"
        )
    if "ours" in median:
        speed, size = (2.0, 0.2) if args.head == "sparse" else (1.0, None)
        for name in [
            n for n in median if n in ("st", "st-cached", *(["naive"] if args.head == "sparse" else []))
        ]:
            faster, smaller = median[name] / median["ours"], peak["ours"] / peak[name]
            print(
                f"target: {args.head} >= {speed:g}x {name}: {faster:.2f}x "
                f"{'met' if faster >= speed else 'MISSED'}"
                + (
                    f"; memory <= {size:g} of its: {smaller:.3f} {'met' if smaller <= size else 'MISSED'}"
                    if size and name != "st-cached"
                    else ""
                )
            )
    if args.device == "cuda" and "ours" in median:
        import train

        config = llama_config(args.shape)

        def of(L):
            return L * train.flops_per_token(config, L, args.head, train=True, lora_r=args.lora_rank)

        flops = sum(of(len(t)) for t in make_batch(args.queries, args.negatives)["tokens"])
        peak_flops = next((v for k, v in train.PEAK.items() if k in torch.cuda.get_device_name()), None)
        if peak_flops:
            print(
                f"ours: {flops:.3g} FLOPs a step, mfu {flops / median['ours'] / peak_flops:.1%} (target: "
                "45% with LoRA)"
            )
        for name in [n for n in ("ours", "ours-cached", "naive") if args.largest and n in workers]:
            fits, queries = 0, args.queries
            while ask(workers[name], queries):
                fits, queries = queries, queries * 2
            print(f"{name}: {fits} queries x {1 + args.negatives} passages fit in one step, {queries} do not")


if __name__ == "__main__":
    main()
