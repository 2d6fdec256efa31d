"""The doctor for checkpoints: looks one over for what goes wrong without an error anywhere.

    python -m tools.check runs/sp-1b
    python -m tools.check adapters/8b --base meta-llama/Meta-Llama-3-8B --dtype bfloat16
    python -m tools.check msmarco/collection.tsv.store    # a store of data.py, or an index, byte for byte

Each line is a verdict (ok, warn, FAIL, or info), what was looked at, and what was found, with the cure. The
exit status is 1 if anything is a FAIL.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import Help, printable, read_json, run_command
from model import Retriever, causal_batches, find_file

# Ordinary queries and passages: a checkpoint that cannot tell these apart can tell nothing apart.
SAMPLES = [
    "what causes the tides in the ocean",
    "how long is the flight from london to new york",
    "symptoms of a vitamin d deficiency in adults",
    "The mitochondrion is the part of the cell that turns food and oxygen into energy.",
    "The first railway in the country was opened in 1825 and carried coal from the mines to the river.",
    "To install the package, download the archive, unpack it and run the setup script as administrator.",
]


class Verdict(NamedTuple):
    """A line of the report."""

    # ok, warn, FAIL or info.
    verdict: str
    what: str
    details: str


def judge(what: str, good: bool, details: str, cure: str, otherwise: str = "FAIL") -> Verdict:
    """ok, or `otherwise` with the cure."""
    return Verdict("ok" if good else otherwise, what, details if good else f"{details}: {cure}")


@torch.no_grad()
def check(r: Retriever, folder: str | None = None) -> list[Verdict]:
    """One verdict for each thing that goes wrong in checkpoints in silence; `folder` is where it was loaded
    from."""
    rows = r.tokenize(SAMPLES, "passage")
    # One text at a time there is no padding: these vectors are what all others are held against.
    alone = torch.cat([vectors(r, [row]) for row in rows])  # (texts, width)
    return [*check_model(r, folder), check_padding(r, rows, alone),
            *(check_sparse(r, rows, alone) if r.sparse else [check_dense(alone)])]


def vectors(r: Retriever, rows: list[list[int]]) -> Tensor:
    ids, mask = r.pad(rows)
    return r(ids.to(r.device), mask.to(r.device)).float()


def check_model(r: Retriever, folder: str | None) -> list[Verdict]:
    """The mask, the switch in config.json that other libraries read, and whose adapter this is."""
    causal = causal_batches(r)
    found = [judge("bidirectional", not causal,
                   f"causal with {', '.join(causal)}" if causal else "the last token moves the first",
                   "transformers >= 5.5 and attn='sdpa' honour config.is_causal = False")]
    config = find_file("config.json", folder)
    if config:
        says = read_json(config).get("is_causal")
        found.append(judge("config.json", says is False, f"is_causal is {says}",
                           "other libraries open it causal; r.save() writes the switch", "warn"))
    if r.lora:
        settings = find_file("retriever.json", folder)
        recorded = settings and read_json(settings).get("base_print")
        found.append(judge("adapter", bool(recorded), f"LoRA r={r.lora['r']} on {r.settings['base']}",
                           "it does not record its base's fingerprint, so only names and shapes were "
                           "compared; r.save() records it", "warn"))
    return found


def check_padding(r: Retriever, rows: list[list[int]], alone: Tensor) -> Verdict:
    """A text's vector is the same with padding on either side and without."""
    side, furthest = r.settings["padding_side"], 0.0
    # The setting is the reader's: it is put back whatever happens.
    try:
        for r.settings["padding_side"] in ("left", "right"):
            furthest = max(furthest, float((vectors(r, rows) - alone).abs().max()))
    finally:
        r.settings["padding_side"] = side
    # Half precision rounds otherwise in every shape: 10% of the largest value is still no fault.
    off, bound = (furthest / max(1e-9, float(alone.abs().max())),
                  1e-4 if r.llama.dtype == torch.float32 else 0.1)
    return judge("padding", off < bound, f"left, right and none differ by {off:.1e} of the largest value",
                 "the attention mask does not reach every layer; try attn='eager' to find out which kernel "
                 "drops it")


def check_dense(alone: Tensor) -> Verdict:
    """Unrelated texts point in different directions."""
    # The mean over all pairs of two texts: a text's cosine with itself, always 1, is left out.
    unit, n = F.normalize(alone, dim=-1), len(alone)
    alike = float((unit @ unit.T).fill_diagonal_(0).sum() / (n * (n - 1)))
    return judge("collapse", alike < 0.99, f"unrelated texts have a mean cosine of {alike:.3f}",
                 "all texts look the same: lower the learning rate, or train", "warn")


def check_sparse(r: Retriever, rows: list[list[int]], alone: Tensor) -> list[Verdict]:
    """Some terms are on, not all of them, and they come from the words."""
    active = (alone > 0).float().mean(1)  # (texts,)
    dead, full = float((active == 0).float().mean()), float((active > 0.5).float().mean())
    # Saturated is a warning: an untrained model is, and training may still mend it.
    found = [
        judge("dead", dead == 0, f"{dead:.0%} of the vectors are all zero",
              "lower the learning rate or the FLOPs weights, or lengthen their ramp"),
        judge("saturated", full == 0,
              f"{active.mean():.1%} of the vocabulary is active, over half of it in {full:.0%} of the texts",
              "every word answers to every text: train with --calibrate, or raise the FLOPs weights", "warn")]
    # BOS stands before every text: terms that it wins say nothing of this one.
    if r.settings["add_bos"]:
        share = share_of_bos(r, rows, alone)
        found.append(judge("BOS", share < 0.5, f"BOS wins {share:.1%} of the max-pool",
                           "the words hardly matter: train longer, or set add_bos to false in retriever.json "
                           "before training", "warn"))
    terms = " ".join(f"{term!r} {weight:.2f}" for term, weight in r.top_terms(alone[0], 8))
    return [*found, Verdict("info", "top terms", f"{SAMPLES[0]!r}: {terms}")]


def share_of_bos(r: Retriever, rows: list[list[int]], alone: Tensor) -> float:
    """The share of active terms whose largest logit is at the first position."""
    at_bos, total = 0, 0
    for row, rep in zip(rows, alone):
        ids = torch.tensor([row], device=r.device)
        # Naively, on one text: every logit.
        position = r.llama.lm_head(r.hidden(ids, torch.ones_like(ids)))[0].argmax(0)  # (V,)
        at_bos += int((position[rep > 0] == 0).sum())
        total += int((rep > 0).sum())
    return at_bos / max(1, total)


# A folder with one of these notes holds data, and was written whole: by data.py or by index.py.
NOTES = {"store.json": "remove the folder, and it will be made anew",
         "manifest.json": "build the index again"}


def check_data(note: Path, cure: str) -> None:
    """Raises where a file that the note names is not what was written."""
    stamps = read_json(note)["files"]
    data.check_files(note.parent, stamps, cure, full=True)
    print(f"{'ok':4}  {'files':13}  {len(stamps)} as they were written")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("path", help="a run folder, an adapter folder, a hub name; an index, or a store")
    parser.add_argument("--head", help="if the checkpoint does not say: sparse, dense")
    parser.add_argument("--base", help="the adapter's base, if it is not where adapter_config.json says")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="bfloat16 for an 8B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attn", default="sdpa",
                        help="eager to look for a kernel's fault; flash_attention_2")
    args = parser.parse_args(argv)
    # Load refuses what check would find: a causal model, an adapter on another base. That is a verdict, too.
    try:
        for name, cure in NOTES.items():
            if Path(args.path, name).exists():
                return check_data(Path(args.path, name), cure)
        r = Retriever.load(args.path, head=args.head, base=args.base, dtype=getattr(torch, args.dtype),
                           device=args.device, attn=args.attn)
        lines = check(r, args.path)
    except (ValueError, OSError) as e:
        lines = [Verdict("FAIL", "load", str(e))]
    for verdict, what, details in lines:
        print(f"{verdict:4}  {what:13}  {printable(details)}")
    sys.exit(any(line.verdict == "FAIL" for line in lines))


if __name__ == "__main__":
    run_command("tools.check", main)
