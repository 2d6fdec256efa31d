"""Encoding passages, beside sentence-transformers with the very same weights in the same precision.

    python benchmarks/encode.py --model models/smollm2-135m                 # both heads
    python benchmarks/encode.py --model models/smollm2-135m --heads sparse --device cuda --passages 4096

The model is saved once by `Retriever.save`; then `Retriever.encode` and `SparseEncoder.encode`, or
`SentenceTransformer.encode`, take the same passages in turns. Their vectors are compared before the clock
runs. Passages are pieces of this project's own files, of 16 to 64 tokens. On one thread of a CPU the clock is
that of the process, so that a neighbour on the machine does not count.
"""
import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from model import Retriever


def passages(r: Retriever, count: int) -> list[str]:
    """Pieces of the project's files, 16 to 64 tokens long, lengths in no order."""
    text = "\n".join(file.read_text() for file in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*.md")))
    ids = r.tokenizer(text, add_special_tokens=False)["input_ids"]
    lengths = torch.randint(16, 65, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    pieces, place = [], 0
    for length in lengths:
        # From the start again when the files are used up.
        place = 0 if place + length > len(ids) else place
        pieces.append(r.tokenizer.decode(ids[place:place + length]))
        place += length
    return pieces


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def contenders(folder: str, head: str, args) -> dict:
    """Two functions of a list of texts, each with the model that it calls."""
    from sentence_transformers import SentenceTransformer, SparseEncoder

    dtype = getattr(torch, args.dtype)
    ours = Retriever.load(folder, dtype=dtype, device=args.device)
    opens = SparseEncoder if head == "sparse" else SentenceTransformer
    theirs = opens(folder, device=args.device, model_kwargs={"dtype": dtype})

    def here(texts):
        return ours.encode(texts, "passage", max_length=64, tokens_per_batch=args.tokens_per_batch)

    def there(texts):
        silent = {"convert_to_tensor": True, "show_progress_bar": False}
        return theirs.encode(texts, batch_size=args.batch_size, **silent)

    return {"here": here, "sentence-transformers": there}


def measure(head: str, args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        r = Retriever.load(args.model, head=head, dtype=getattr(torch, args.dtype))
        r.settings["passage_length"] = 64
        r.save(folder)
        texts = passages(r, args.passages)
        del r
        encoders = contenders(folder, head, args)
        here, there = (encode(texts[:32]).to_dense().float().cpu() for encode in encoders.values())
        off = float((here - there).abs().mean() / there.abs().mean())
        if off > (0.05 if args.dtype == "bfloat16" else 1e-4):
            sys.exit(f"{head}: the vectors differ by {off:.1e} of their mean value: nothing to compare")
        seconds = {name: [] for name in encoders}
        for _ in range(args.rounds):
            for name, encode in encoders.items():
                start = clock(args.device)
                encode(texts)
                seconds[name].append(clock(args.device) - start)
        middle = {name: statistics.median(taken) for name, taken in seconds.items()}
        ratios = sorted(b / a for a, b in zip(*seconds.values()))
        rates = ", ".join(f"{name} {len(texts) / taken:.1f}" for name, taken in middle.items())
        print(f"{head}, passages a second: {rates}; {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to "
              f"{ratios[-1]:.2f}), vectors within {off:.0e} of their mean", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a language model")
    parser.add_argument("--heads", nargs="+", choices=["sparse", "dense"], default=["sparse", "dense"])
    parser.add_argument("--passages", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=32, help="theirs (their default)")
    parser.add_argument("--tokens_per_batch", type=int, default=2048, help="ours: 32 passages of 64 tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for head in args.heads:
        measure(head, args)


if __name__ == "__main__":
    main()
