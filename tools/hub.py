"""Make a checkpoint ready for the hub: a model card, and the files by which sentence-transformers opens it.

    python -m tools.hub runs/sp-1b                              # beside the weights that are there
    python -m tools.hub runs/sp-1b --merge --out hub/sp-1b      # an adapter as one whole model

What surprises:
- An adapter opens here and in PEFT. sentence-transformers wants a whole model: --merge.
- A sparse head whose terms have thresholds (train.py --calibrate) goes there exactly, too: a threshold is a
  bias, so a scaled copy of the vocabulary's matrix is written as a Dense module, which has one.
"""
import argparse
import json
import os
import shlex
from pathlib import Path

import torch
from safetensors.torch import save_file

from data import Help, read_json, run_command
from model import HEADS, Retriever, find_file

LIBRARY = "sentence_transformers"

CARD = '''---
{front}
---

# A {head} retriever on {base}

Hugging Face's {model} with bidirectional attention. A text becomes {what}; a score is a dot product.

With the code that trained it:

```python
from model import Retriever

r = Retriever.load(".")  # this folder
print(r.rank("how do tides work", ["the moon pulls the sea", "a loaf of bread"]))
```
{elsewhere}
## How it was made
{made}
'''

IN_SENTENCE_TRANSFORMERS = '''
In sentence-transformers, the same vectors:

```python
from sentence_transformers import {name}

model = {name}(".")
q = model.encode_query(["how do tides work"])
d = model.encode_document(["the moon pulls the sea", "a loaf of bread"])
print(model.similarity(q, d))
```
'''

IN_PEFT = '''
In PEFT; the mask has to be opened before the model is built, and the head is the reader's:

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.from_pretrained({base!r})
config.is_causal = False
base = AutoModelForCausalLM.from_pretrained({base!r}, config=config)
model = PeftModel.from_pretrained(base, ".")
```
'''


def publish(folder, out=None, merge: bool = False, datasets: list[str] = (), **how) -> Path:
    """Write the card and sentence-transformers' files into `folder`, or into `out` with the weights."""
    if merge and not out:
        raise ValueError("--merge writes another model than the one that is there: give --out")
    out = Path(out or folder)
    if merge and (out / "adapter_config.json").exists():
        raise ValueError(f"--out {out} holds an adapter, beside which no whole model can stand: give another "
                         "folder")
    r = Retriever.load(folder, **how)
    if merge:
        r.merge()
    if out.resolve() != Path(folder).resolve():
        r.save(out)
    if not r.unmerged():
        for_sentence_transformers(r, out)
    # A folder that another program wrote has neither, and a card that says less.
    facts = {name: find_file(name, str(folder)) for name in ("args.json", "summary.json")}
    arguments, summary = (read_json(file) if file else {} for file in facts.values())
    card = model_card(r, arguments.get("arguments", {}), summary, list(datasets))
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


def model_card(r: Retriever, arguments: dict, summary: dict, datasets: list[str]) -> str:
    """README.md, as the hub reads it: what this is, how to use it here and elsewhere, and how it was made."""
    adapted, name = bool(r.unmerged()), HEADS[r.head].exports_to
    # A whole model's own folder says nothing of where it began; an adapter's base is what it needs.
    base = r.settings["base"] if adapted else arguments.get("model", r.settings["base"])
    # The hub finds models by these, and shows how to open one by the library's name.
    tags = [r.llama.config.model_type, "feature-extraction"]
    if name:
        tags += ["sentence-transformers"] + ["sparse-encoder", "sparse"] * r.sparse
    front = {"library_name": "peft" if adapted else "sentence-transformers" if name else "transformers",
             "pipeline_tag": "feature-extraction", "tags": tags, "datasets": datasets}
    # A folder of this machine is no name on the hub.
    if not os.path.isdir(base):
        front["base_model"] = base

    # How others open it. An adapter is PEFT's alone; a head of one's own is nobody else's.
    elsewhere = ""
    if adapted:
        elsewhere = IN_PEFT.format(base=os.path.abspath(base) if os.path.isdir(base) else base)
    elif name:
        elsewhere = IN_SENTENCE_TRANSFORMERS.format(name=name)

    # How it was made: the dev figure, and the command without the flags that were off.
    made = []
    if "best_mrr@10" in summary:
        made += ["", f"Best MRR@10 on the dev set: {summary['best_mrr@10']:.4f}."]
    if arguments:
        flags = [f"--{flag}" if value is True else f"--{flag} {shlex.quote(str(value))}"
                 for flag, value in arguments.items() if value is not None and value is not False]
        made += ["", "```", "train.py " + " ".join(flags), "```"]
    kind = "a weight for some of {:,} terms" if r.sparse else "a vector of {:,} numbers"
    return CARD.format(
        # JSON is YAML, and quotes what needs quotes.
        front="\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items() if value),
        head=r.head, base=base, model=type(r.llama).__name__, what=kind.format(r.width), elsewhere=elsewhere,
        made="\n".join(made or ["", "Not recorded."]))


def for_sentence_transformers(r: Retriever, folder: Path) -> None:
    """A few files, so that `SentenceTransformer(folder)` or `SparseEncoder(folder)` give our vectors."""
    name = HEADS[r.head].exports_to
    if name is None:
        return
    V, D = r.llama.config.vocab_size, r.llama.config.hidden_size
    # The first module is Hugging Face's model: its hidden states, unless a head asks for something else.
    transformer = {"transformer_task": "feature-extraction"}
    if name == "SentenceTransformer":
        modules = dense_modules(D)
    elif r.threshold is None:
        transformer, modules = logits_of_transformer(), [scale_module(V, D), max_module(V)]
    else:
        modules = [dense_layer(r, folder), max_module(V)]

    # Each module has a folder with its settings, and modules.json says in which order they are called.
    listing = [{"idx": 0, "name": "0", "path": "", "type": f"{LIBRARY}.base.modules.transformer.Transformer"}]
    for i, (kind, config) in enumerate(modules, 1):
        place = place_of(i, kind)
        (folder / place).mkdir(exist_ok=True)
        # A vocabulary has 128,256 entries for Llama-3: in one line, not one a line.
        write_json(folder / place / "config.json", config, indent=None if "vocab" in config else 2)
        listing.append({"idx": i, "name": str(i), "path": place, "type": f"{LIBRARY}.{kind}"})
    write_json(folder / "modules.json", listing)
    lengths = {"query_length": r.settings["query_length"], "document_length": r.settings["passage_length"]}
    write_json(folder / "sentence_bert_config.json", transformer | lengths)
    write_json(folder / "config_sentence_transformers.json", {
        "model_type": name, "similarity_fn_name": "dot", "default_prompt_name": None,
        "prompts": {"query": r.settings["query_prefix"], "document": r.settings["passage_prefix"]}})


def write_json(file: Path, value, indent: int | None = 2) -> None:
    file.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def place_of(i: int, kind: str) -> str:
    return f"{i}_{kind.rpartition('.')[2]}"


def dense_modules(D: int) -> list[tuple[str, dict]]:
    """Each token's vector is brought to length one before the mean, not after."""
    return [("base.modules.normalize.Normalize", {"module_input_name": "token_embeddings"}),
            ("sentence_transformer.modules.pooling.Pooling",
             {"embedding_dimension": D, "pooling_mode": "mean"})]


def logits_of_transformer() -> dict:
    """The transformer as a language model, whose logits at every position are what the next module takes."""
    return {"transformer_task": "text-generation", "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            # 0: at every position
            "processing_kwargs": {"text": {"logits_to_keep": 0}}}


def scale_module(V: int, D: int) -> tuple[str, dict]:
    """D^(-1/4), which SpladePooling lacks."""
    # WordWeights, made for idf, multiplies each token's row by that token's weight: with a vocabulary of
    # nothing but unknown words it is one factor.
    return ("sentence_transformer.modules.word_weights.WordWeights",
            {"vocab": [""] * V, "word_weights": {}, "unknown_word_weight": D**-0.25})


def max_module(V: int) -> tuple[str, dict]:
    """log(1 + relu(x)), and the maximum over the tokens."""
    return ("sparse_encoder.modules.splade_pooling.SpladePooling",
            {"pooling_strategy": "max", "embedding_dimension": V})


def dense_layer(r: Retriever, folder: Path) -> tuple[str, dict]:
    """(logit - threshold) * D^(-1/4) as a linear layer of its own."""
    kind = "base.modules.dense.Dense"
    weight = r.llama.lm_head.weight.detach().cpu()
    V, D = weight.shape
    place = folder / place_of(1, kind)
    place.mkdir(exist_ok=True)
    # relu and logarithm come after it, so the factor may go into weight and bias.
    bias = (-r.threshold.cpu() * D**-0.25).to(weight.dtype)
    save_file({"linear.weight": weight * D**-0.25, "linear.bias": bias}, place / "model.safetensors")
    return kind, {"in_features": D, "out_features": V, "bias": True, "module_input_name": "token_embeddings",
                  "activation_function": "torch.nn.modules.linear.Identity"}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    parser.add_argument("folder", help="a finished run, or any checkpoint's folder")
    parser.add_argument("--out", help="write there, with a copy of the weights")
    parser.add_argument("--merge", action="store_true", help="fold the adapter in: a whole model, in --out")
    parser.add_argument("--datasets", nargs="+", default=[], help="their names on the hub")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="in --out")
    args = parser.parse_args(argv)
    out = publish(args.folder, args.out, args.merge, args.datasets, dtype=getattr(torch, args.dtype))
    more = " and the files of sentence-transformers" if (out / "modules.json").exists() else ""
    print(f"{out}: README.md{more}")


if __name__ == "__main__":
    run_command("tools.hub", main)
