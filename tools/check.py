"""The doctor for checkpoints: looks one over for what goes wrong without an error anywhere.

    python -m tools.check runs/sp-1b
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from model import HEADS, Retriever, causal_batches, find_file

SAMPLES = ["what causes the tides in the ocean", "how long is the flight from london to new york", "symptoms of a vitamin d deficiency in adults",
           "The mitochondrion is the part of the cell that turns food and oxygen into energy.",
           "The first railway in the country was opened in 1825 and carried coal from the mines to the river.",
           "To install the package, download the archive, unpack it and run the setup script as administrator."]


@torch.no_grad()
def check(r: Retriever, folder: str | None = None) -> list[tuple[str, str, str]]:
    """(verdict, what, details and cure) for each thing that goes wrong in such checkpoints without an error anywhere."""
    out, device = [], r.llama.lm_head.weight.device

    def verdict(what: str, good: bool, details: str, cure: str, otherwise: str = "FAIL") -> None:
        out.append(("ok" if good else otherwise, what, details if good else f"{details}: {cure}"))

    causal = causal_batches(r)
    verdict("bidirectional", not causal, "the last token moves the first" if not causal else f"causal with {', '.join(causal)}",
            "transformers >= 5.5 and attn='sdpa' honour config.is_causal = False")
    if folder and find_file("config.json", folder):
        says = json.loads(Path(find_file("config.json", folder)).read_text()).get("is_causal")
        verdict("config.json", says is False, f"is_causal is {says}", "other libraries open it causal; r.save() writes the switch", "warn")
    if r.lora:
        verdict("adapter", r.base_known, f"LoRA r={r.lora['r']} on {r.settings['base']}", "it does not record its base's fingerprint, so only "
                "names and shapes were compared; r.save() records it", "warn")

    rows = r.tokenize(SAMPLES, "passage")
    side = r.settings["padding_side"]
    try:
        reps = {}
        for r.settings["padding_side"] in ("left", "right"):
            reps[r.settings["padding_side"]] = r(*(x.to(device) for x in r.pad(rows))).float()
    finally:
        r.settings["padding_side"] = side
    alone = torch.cat([r(*(x.to(device) for x in r.pad([row]))).float() for row in rows])
    off = max(float((x - alone).abs().max()) for x in reps.values()) / max(1e-9, float(alone.abs().max()))
    verdict("padding", off < (1e-4 if r.llama.dtype == torch.float32 else 0.1), f"left, right and none differ by {off:.1e} of the largest value",
            "the attention mask does not reach every layer; try attn='eager' to find out which kernel drops it")

    if not r.sparse:
        unit = F.normalize(alone, dim=-1)
        alike = float((unit @ unit.T).fill_diagonal_(0).sum() / (len(rows) * (len(rows) - 1)))
        verdict("collapse", alike < 0.99, f"unrelated texts have a mean cosine of {alike:.3f}",
                "all texts look the same: lower the learning rate, or train", "warn")
        return out
    active = (alone > 0).float().mean(1)  # (texts,)
    dead, full = float((active == 0).float().mean()), float((active > 0.5).float().mean())
    verdict("dead", dead == 0, f"{dead:.0%} of the vectors are all zero", "lower the learning rate or the FLOPs weights, or lengthen their ramp")
    verdict("saturated", full == 0, f"{active.mean():.1%} of the vocabulary is active, over half of it in {full:.0%} of the texts",
            "every word answers to every text: train, or raise the FLOPs weights", "warn")
    at_bos, winners = 0, 0
    for row, rep in zip(rows, alone):
        ids, mask = (x.to(device) for x in r.pad([row]))
        position = r.llama.lm_head(r.hidden(ids, mask))[0].argmax(0)  # (V,), naively, on one text
        at_bos, winners = at_bos + int((position[rep > 0] == 0).sum()), winners + int((rep > 0).sum())
    share = at_bos / max(1, winners)
    if r.settings["add_bos"]:
        verdict("BOS", share < 0.5, f"BOS wins {share:.1%} of the max-pool", "the words hardly matter: train longer, or set add_bos to false in "
                "retriever.json before training", "warn")
    top = alone[0].topk(8)
    terms = " ".join(f"{r.tokenizer.decode([i])!r} {w:.2f}" for w, i in zip(top.values.tolist(), top.indices.tolist()))
    out.append(("info", "top terms", f"{SAMPLES[0]!r}: {terms}"))
    return out


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="a run folder, an adapter folder, or a hub name")
    parser.add_argument("--head", choices=list(HEADS), help="if the checkpoint does not say")
    parser.add_argument("--base", help="the adapter's base, if it is not where adapter_config.json says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 halves the memory of an 8B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attn", default="sdpa", help="flash_attention_2 where it is installed, eager to look for a kernel's fault")
    args = parser.parse_args(argv)
    try:
        r = Retriever.load(args.path, head=args.head, base=args.base, dtype=getattr(torch, args.dtype), device=args.device, attn=args.attn)
        lines = check(r, args.path)
    except (ValueError, OSError) as e:  # load refuses what check would find: a causal model, an adapter on another base
        lines = [("FAIL", "load", str(e))]
    for verdict, what, details in lines:
        print(f"{verdict:4}  {what:13}  {details}")
    sys.exit(any(verdict == "FAIL" for verdict, _, _ in lines))


if __name__ == "__main__":
    main()
