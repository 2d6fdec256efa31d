"""The retriever: a Llama that looks both ways, with a sparse or a dense head.

    from model import Retriever
    r = Retriever.load("meta-llama/Llama-3.2-1B", head="sparse")     # also: a run folder, an adapter folder, a hub name
    reps = r(*r.pad(r.tokenize(["how do tides work"], "query")))     # (1, 128256), one weight per vocabulary entry
    python -m tools.check runs/sp-1b                                 # the doctor: is this checkpoint what it claims to be?

What surprises:
- Hugging Face's decoder is used as it is; one attribute, `config.is_causal = False`, makes it bidirectional. transformers
  before 5.5 accepts the attribute and ignores it, so `load` never trusts it: a probe moves the last token and watches the first.
- The sparse head never holds (batch, length, vocabulary). Only the maximum over the positions survives, so it is taken a
  slice of the vocabulary at a time, and backward visits only the entries that something upstream still cares about.
- With LoRA on, `save` writes PEFT's adapter layout; after `merge()` it writes the whole model. Both carry `retriever.json`.
"""
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # we use it as a container: three arrays and a shape

# retriever.json and its defaults, which are the paper's. Other families differ (RepLLaMA adds prefixes and an EOS, LACONIC has
# no BOS), so tokenisation belongs to the checkpoint and is read from there.
SETTINGS = {"head": None, "query_length": 64, "passage_length": 192, "query_prefix": "", "passage_prefix": "",
            "add_bos": True, "add_eos": False, "padding_side": "left", "base": None}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class MaxLogits(torch.autograd.Function):
    """max over positions of `hidden @ weight.T`: (B, L, D), (V, D) -> (B, V), holding one slice of the vocabulary at a time.

    Where positions tie, one of them wins and gets the whole gradient, as in `Tensor.max(dim)` (`amax` would split it).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, dtype: torch.dtype, learning: bool) -> Tensor:
        (B, L, D), V = hidden.shape, len(weight)
        columns = hidden.reshape(B * L, D).to(dtype).T
        top = hidden.new_empty(B, V, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        # inference does not pay for knowing who won
        winner = hidden.new_empty(B, V if learning else 0, dtype=torch.int16 if L < 2**15 else torch.int32)
        # About 4 MB of logits at a time stay in a CPU's cache between the product and the maximum; a GPU wants bigger bites.
        step = max(256, 2 ** (26 if hidden.is_cuda else 20) // (B * L))
        for v in range(0, V, step):
            logits = (weight[v : v + step].to(dtype) @ columns).view(-1, B, L)  # (step, B, L): the maximum runs over adjacent memory
            if learning:
                values, positions = logits.max(-1)
                winner[:, v : v + step] = positions.T
            else:
                values = logits.amax(-1)
            top[:, v : v + step] = values.T
        ctx.save_for_backward(hidden, weight, winner)
        return top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # (B, V), zero wherever relu cut: about 2% is left in a trained model
        hidden, weight, winner = ctx.saved_tensors
        (B, L, D), V = hidden.shape, len(weight)
        d_hidden, d_weight = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None, None
        step = max(1, 2**22 // V)  # sequences at a time: bounds the memory of the lists below when nearly everything is active
        for b in range(0, B, step):
            g, h = grad[b : b + step], hidden[b : b + step]
            seq, term = g.nonzero(as_tuple=True)
            token, g = seq * L + winner[b : b + step][seq, term].long(), g[seq, term]
            # Each token's gradient is a weighted bag of the vocabulary entries that it won, and each entry's is a weighted bag of
            # the tokens that won it: two embedding bags, which read every row they need once and build no (n, D) in between.
            if d_hidden is not None:
                d_hidden[b : b + step] = _bags(token, term, g, weight, h.shape[0] * L).view_as(h)
            if ctx.needs_input_grad[1]:
                part = _bags(term, token, g, h.reshape(-1, D), V)
                d_weight = part if d_weight is None else d_weight.add_(part)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _bags(bag: Tensor, row: Tensor, weight: Tensor, table: Tensor, n_bags: int) -> Tensor:
    """out[bag[i]] += weight[i] * table[row[i]]."""
    bag, order = bag.sort(stable=True)
    starts = torch.searchsorted(bag, torch.arange(n_bags, device=bag.device))
    return F.embedding_bag(row[order], table, starts, mode="sum", per_sample_weights=weight[order].to(table.dtype))


@torch.compiler.disable  # how much backward does depends on the data, which a graph cannot hold; the model around it compiles
def max_logits(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """max over the real tokens of `hidden @ weight.T`, in fp32: (B, L, D), (V, D), (B, L) -> (B, V)."""
    # Padding repeats the sequence's first real token, so the maximum needs no mask (one would be a pass over every logit).
    here = torch.arange(mask.shape[1], device=mask.device)
    source = torch.where(mask.bool(), here, mask.int().argmax(1, keepdim=True))
    hidden = hidden.gather(1, source[..., None].expand(hidden.shape))
    autocast = torch.is_autocast_enabled(hidden.device.type)  # inside a Function nobody casts for us
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
    return MaxLogits.apply(hidden, weight, dtype, torch.is_grad_enabled())  # asked out here: within a Function it is always off


class LoRALinear(nn.Linear):
    """x W' + scale * dropout(x) A' B'. A linear layer becomes one in place, so the base keeps its names and its memory."""

    @classmethod
    def convert(cls, linear: nn.Linear, r: int, scale: float, dropout: float) -> None:
        linear.__class__ = cls
        linear.scale, linear.dropout, linear.merged = scale, dropout, False
        # fp32 whatever the base is: the adapter is the master weight, the base is only read.
        linear.lora_A = nn.Parameter(torch.empty(r, linear.in_features, device=linear.weight.device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))  # zero: starts as the base
        nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged:
            return y
        x = F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype)
        return y + (F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale).to(y.dtype)

    @torch.no_grad()
    def fold(self, sign: int) -> None:
        """Add the adapter to the weight (sign +1) or take it out again (-1)."""
        self.weight.copy_(self.weight.float() + sign * self.scale * (self.lora_B @ self.lora_A))  # summed in fp32, rounded once
        self.merged = sign > 0


def sparse_vectors(r: "Retriever", hidden: Tensor, mask: Tensor) -> Tensor:
    """log(1 + relu(max over the tokens of the logits / D^(1/4))), one weight per vocabulary entry: (B, L, D), (B, L) -> (B, V)."""
    # All three functions are monotone, so the maximum goes first and the rest touches (B, V) instead of (B, L, V).
    # The weight is read here, inside forward, where FSDP has it gathered.
    top = max_logits(hidden, r.llama.lm_head.weight, mask)
    if r.threshold is not None:
        top = top - r.threshold
    return torch.log1p(torch.relu(top * hidden.shape[-1] ** -0.25)).masked_fill(~mask.any(1, keepdim=True), 0.0)


def dense_vectors(r: "Retriever", hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens' unit vectors: (B, L, D), (B, L) -> (B, D)."""
    # Each token has length one, their mean has not: agreement between the tokens is part of the score.
    unit = F.normalize(hidden.float(), dim=-1) * mask[..., None]
    return unit.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Head(NamedTuple):
    """What makes a vector of a text's hidden states. A new head is such a function and a row of HEADS."""

    vectors: Callable  # (retriever, hidden (B, L, D), mask (B, L)) -> (B, width) fp32
    sparse: bool  # mostly zeros, none negative, a dimension a term: for an inverted index and the FLOPs regulariser
    width: str  # which number of the config it is
    temperature: float  # divides the scores in training, if no other is asked for
    exports_to: str | None  # the class of sentence-transformers that can compute it, for `save`


HEADS = {
    "sparse": Head(sparse_vectors, True, "vocab_size", 1.0, "SparseEncoder"),
    "dense": Head(dense_vectors, False, "hidden_size", 0.01, "SentenceTransformer"),
}


class NotFinite(ValueError):
    """A text whose vector has a NaN or an infinity; `place` is its place in the list."""

    def __init__(self, place: int):
        super().__init__(f"text {place}: the model gives NaN or infinity; did its training diverge?")
        self.place = place


def longest_first(lengths, tokens: int, most: int | None = None) -> list[np.ndarray]:
    """Places of texts in batches of at most `tokens` tokens when padded to their own longest, and of at most `most` texts.

    Longest first: what does not fit into memory shows at once, and equal lengths meet, so little is padding.

    >>> longest_first([3, 9, 4, 8], 18)
    [array([1, 3]), array([2, 0])]
    """
    order, batches = np.argsort(-np.asarray(lengths), kind="stable"), []
    while len(order):
        size = max(1, tokens // max(1, lengths[order[0]]))
        size = min(size, most or size)
        batches.append(order[:size])
        order = order[size:]
    return batches


class Retriever(nn.Module):
    """`r(input_ids, attention_mask)` -> (B, vocabulary) for the sparse head, (B, hidden) for the dense one, fp32."""

    def __init__(self, llama: nn.Module, tokenizer, settings: dict):
        super().__init__()
        self.llama, self.tokenizer = llama, tokenizer
        self.settings = {**SETTINGS, **settings}
        self.register_buffer("threshold", None)  # (V,), subtracted from a term's largest logit: see `calibrate`
        self.lora: dict | None = None
        # Which base this is, and whether the adapter that was loaded on it recorded the same.
        self.base_print, self.base_known = _base_print(llama), True

    @property
    def head(self) -> str:
        return self.settings["head"]

    @property
    def sparse(self) -> bool:
        return HEADS[self.head].sparse

    @property
    def width(self) -> int:
        return getattr(self.llama.config, HEADS[self.head].width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, at: Tensor | None = None) -> Tensor:
        """(B, L) ids and mask -> reps; with `at`, a (B, L) bool mask, the language model's logits (n, V) at those positions."""
        hidden = self.hidden(input_ids, attention_mask)  # (B, L, D)
        if at is not None:
            return self.llama.lm_head(hidden[at])
        return HEADS[self.head].vectors(self, hidden, attention_mask)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states after the final norm, (B, L, D)."""
        return self.llama.model(
            input_ids=input_ids,
            # A text without a token attends to its padding, or its softmax would be over nothing. Pooling still sees no token.
            attention_mask=attention_mask.bool() | ~attention_mask.any(1, keepdim=True),
            # Positions count real tokens, so that left and right padding give the same vectors.
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state

    def tokenize(self, texts: list[str], kind: str, max_length: int | None = None) -> list[list[int]]:
        """Token ids of queries or passages (`kind`): prefix, BOS, text, EOS as the settings say; the text is cut, they are not."""
        if kind not in ("query", "passage"):
            raise ValueError(f"kind is {kind!r}, expected 'query' or 'passage'")
        s, tok = self.settings, self.tokenizer
        if tok is None:
            raise ValueError(f"{s['base']} came without a tokenizer, so it takes token ids only; put tokenizer.json beside its config.json")
        bos, eos = self._bos_eos()
        max_length = s[f"{kind}_length"] if max_length is None else max_length
        room = max_length - len(bos) - len(eos)
        if room < 1:
            raise ValueError(f"max_length {max_length} leaves no room for a token beside BOS and EOS")
        if not texts:
            return []
        ids = tok([s[f"{kind}_prefix"] + t for t in texts], add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
        return [bos + x + eos for x in ids]

    def _bos_eos(self) -> tuple[list[int], list[int]]:
        return [self.tokenizer.bos_token_id] * self.settings["add_bos"], [self.tokenizer.eos_token_id] * self.settings["add_eos"]

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids -> (input_ids, attention_mask), both (B, L) int64, padded on the settings' side."""
        L = max([1, *map(len, rows)])
        ids = torch.full((len(rows), L), self.tokenizer.pad_token_id if self.tokenizer else 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(L - len(row), L) if self.settings["padding_side"] == "left" else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
        return ids, mask

    @torch.no_grad()
    def encode(self, texts: list[str], kind: str, max_length: int | None = None, tokens_per_batch: int = 16384,
               top_terms: int | None = None, progress=None) -> Tensor:
        """What an index takes, in the order of `texts`: (N, hidden) fp32, or a (N, vocabulary) torch sparse CSR tensor, on the CPU.

        A batch holds at most `tokens_per_batch` tokens, padding included. `top_terms` keeps each text's heaviest terms only.
        `progress`, such as a bar's `update`, is told how many texts each batch held.
        """
        was_training = self.training
        self.eval()
        rows = self.tokenize(texts, kind, max_length)
        device = self.llama.lm_head.weight.device
        vectors = torch.empty(len(rows), 0 if self.sparse else self.width)
        entries = [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))]
        # 256 sparse vectors of a Llama's vocabulary are 131 MB before their zeros go, however short the texts are
        for batch in longest_first([len(row) for row in rows], tokens_per_batch, most=256 if self.sparse else None):
            ids, mask = self.pad([rows[i] for i in batch])
            reps = self(ids.to(device), mask.to(device)).float()
            finite = torch.isfinite(reps).all(1).tolist()
            if not all(finite):
                raise NotFinite(int(batch[finite.index(False)]))
            batch = torch.from_numpy(batch)
            if not self.sparse:
                vectors[batch] = reps.cpu()
            else:
                if top_terms and top_terms < self.width:
                    reps = torch.zeros_like(reps).scatter(1, *reversed(reps.topk(top_terms)))
                text, term = reps.nonzero(as_tuple=True)
                entries.append((batch[text.cpu()], term.cpu(), reps[text, term].cpu()))
            if progress:
                progress(len(batch))
        self.train(was_training)
        if not self.sparse:
            return vectors
        text, term, weight = (torch.cat(parts) for parts in zip(*entries))
        text, order = text.sort(stable=True)
        starts = torch.searchsorted(text, torch.arange(len(rows) + 1))
        return torch.sparse_csr_tensor(starts, term[order], weight[order], (len(rows), self.width), check_invariants=False)

    @torch.no_grad()
    def calibrate(self, texts: list[str], share: float, max_length: int | None = None, tokens_per_batch: int = 16384) -> None:
        """Set `threshold`, so that each term is on in a `share` of these passages: its (1 - share) quantile of the largest logits.

        The logits of a language model are nearly all positive, the same junk in every text. After this a term is on where it is
        unusually high for that term, which is what idf does; without it contrastive training kills the head within ten steps.
        """
        if not 0 < share < 1 or len(texts) * share < 1:
            raise ValueError(f"share {share} of {len(texts)} texts: expected a share between 0 and 1 that is at least one text")
        rows, was_training = self.tokenize(texts, "passage", max_length), self.training
        self.eval()
        # The quantile lies between two values of a term's sorted logits; of the sorted list only the end from there on is kept.
        place = (len(rows) - 1) * (1 - share)
        keep = len(rows) - int(place)
        weight = self.llama.lm_head.weight
        highest = torch.empty(0, len(weight), device=weight.device)
        for batch in longest_first([len(row) for row in rows], tokens_per_batch, most=256):
            ids, mask = (x.to(weight.device) for x in self.pad([rows[i] for i in batch]))
            highest = torch.cat([highest, max_logits(self.hidden(ids, mask), weight, mask).float()])
            highest = highest.topk(min(keep, len(highest)), dim=0).values
        below, above = highest[-1], highest[max(0, keep - 2)]
        self.threshold = torch.lerp(below, above, place - int(place))
        self.train(was_training)

    def rank(self, query: str, texts: list[str]) -> list[tuple[int, float]]:
        """[(place in `texts`, score), ...], best first; of equal scores the earlier text comes first."""
        q, d = self.encode([query], "query"), self.encode(texts, "passage")
        scores = d @ (q.to_dense()[0] if self.sparse else q[0])
        order = scores.argsort(descending=True, stable=True).tolist()
        return [(i, float(scores[i])) for i in order]

    def top_terms(self, vector: Tensor, k: int = 10) -> list[tuple[str, float]]:
        """The k heaviest terms of one sparse vector, such as a row of what `encode` returns, with their weights."""
        if not self.sparse:
            raise ValueError("this checkpoint's head is dense: its dimensions are no terms")
        vector = vector.to_dense() if vector.layout != torch.strided else vector
        top = vector.reshape(-1).topk(min(k, self.width))
        found = zip(top.values.tolist(), top.indices.tolist())
        return [(self.tokenizer.decode([term]), weight) for weight, term in found if weight > 0]

    @torch.no_grad()
    def origins(self, text: str, kind: str, terms: list[int], max_length: int | None = None) -> tuple[list[str], list[int]]:
        """The pieces of a text, and for each of `terms` the place of the piece at which its logit was largest: where its weight is from."""
        ids, mask = self.pad(self.tokenize([text], kind, max_length))
        weight = self.llama.lm_head.weight
        logits = self.hidden(ids.to(weight.device), mask.to(weight.device))[0] @ weight[torch.tensor(terms, device=weight.device)].T  # (L, terms)
        pieces = [self.tokenizer.convert_tokens_to_string([t]) for t in self.tokenizer.convert_ids_to_tokens(ids[0].tolist())]
        return pieces, logits.argmax(0).tolist()

    def add_lora(self, r: int = 16, alpha: float = 32, dropout: float = 0.05, targets=TARGETS, rslora: bool = False) -> None:
        """Freeze the model and put trainable low-rank adapters beside the target layers, as the paper does."""
        if self.lora:
            raise ValueError("this model has LoRA already (fine-tuning goes on with the adapter that it loaded); merge() and save first")
        self.requires_grad_(False)  # embeddings and lm_head stay frozen, which also makes the sparse head's backward nearly free
        chosen = _linears(self.llama, targets)
        if not chosen:
            raise ValueError(f"no linear layer of the model is named by targets={targets}")
        for linear in chosen.values():
            LoRALinear.convert(linear, r, alpha / (math.sqrt(r) if rslora else r), dropout)
        self.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora,
                     "target_modules": targets if isinstance(targets, str) else sorted(targets)}

    def merge(self) -> "Retriever":
        """Fold the adapter into the weights: encoding is faster, and `save` writes the whole model."""
        return self._fold(+1)

    def unmerge(self) -> "Retriever":
        """Take the adapter out of the weights again (exact up to rounding of the weights' dtype)."""
        return self._fold(-1)

    def _fold(self, sign: int) -> "Retriever":
        layers = [m for m in self.modules() if isinstance(m, LoRALinear)]
        if not layers or layers[0].merged == (sign > 0):
            raise ValueError("nothing to fold: the model has no LoRA, or it is already folded that way")
        for layer in layers:
            layer.fold(sign)
        return self

    @classmethod
    def load(cls, path, adapter=None, head: str | None = None, base=None, dtype: torch.dtype = torch.float32,
             device="cpu", attn: str = "sdpa") -> "Retriever":
        """`path`: an HF folder or hub name, or a PEFT adapter's (its base is then found from adapter_config.json, or is `base`)."""
        path, lora = str(path), {}
        if find_file(path, "adapter_config.json"):
            if adapter:
                raise ValueError(f"{path} is an adapter itself, so adapter={adapter} has no base to go on; merge and save it first")
            adapter = path
        if adapter:
            adapter = str(adapter)
            lora = _adapter_config(adapter)
            path = str(base or (path if path != adapter else _relative(lora["base_model_name_or_path"], adapter)))
        found = find_file(adapter or path, "retriever.json") or find_file(path, "retriever.json")
        settings = json.loads(Path(found).read_text()) if found else {}
        expected_print = settings.pop("base_print", None)
        if unknown := set(settings) - set(SETTINGS) - {"pooling"}:
            raise ValueError(f"{found}: unknown settings {sorted(unknown)}; known are {sorted(SETTINGS)}")
        # The authors' adapters have no retriever.json, but name the class that they were trained on.
        authors = {"LlamaBiForMNTP": "sparse", "LlamaBiModel": "dense"}.get((lora.get("auto_mapping") or {}).get("base_model_class"))
        settings["head"] = head or settings.get("head") or authors
        settings.pop("pooling", None)  # older folders repeat what the head's name says
        if settings["head"] not in HEADS:
            raise ValueError(f"{adapter or path} does not say which head it has (got {settings['head']!r}): give --head {' or --head '.join(HEADS)}")
        settings["base"] = path

        own = [p for p in (adapter, path) if p and any(find_file(p, f) for f in ("tokenizer.json", "tokenizer.model", "vocab.json"))]
        tokenizer = AutoTokenizer.from_pretrained(own[0]) if own else None  # a test's random model may have none: ids still work
        config = AutoConfig.from_pretrained(path)
        config.is_causal = False  # THE MASK: every token sees every real token, before it and after it; padding stays masked
        llama = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, attn_implementation=attn)
        if tokenizer:
            if not found:
                settings["add_bos"] = tokenizer.bos_token_id is not None  # Qwen, for one, has none
            for wanted, token in (("add_bos", tokenizer.bos_token_id), ("add_eos", tokenizer.eos_token_id)):
                if settings.get(wanted) and token is None:
                    raise ValueError(f"{found}: {wanted} is true, but the tokenizer of {path} has no such token")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer.padding_side = settings.get("padding_side", SETTINGS["padding_side"])
            tokenizer.truncation_side = "right"

        r = cls(llama, tokenizer, settings)
        if adapter:
            r.base_known = expected_print is not None
            if expected_print and len(expected_print) == len(r.base_print) and max(abs(a - b) for a, b in zip(r.base_print, expected_print)) > 5e-3:
                raise ValueError(f"{adapter} was trained on another base than {path}: same shapes, other weights. Give the right one with --base")
            r._load_adapter(adapter, lora)
        calibrated = (adapter and find_file(adapter, "threshold.safetensors")) or find_file(path, "threshold.safetensors")
        if calibrated:
            r.threshold = load_file(calibrated)["threshold"]
        r = r.to(device).eval()
        probe(r, path)
        return r

    def _load_adapter(self, folder: str, config: dict) -> None:
        self.add_lora(config["r"], config["lora_alpha"], config["lora_dropout"], config["target_modules"], config["use_rslora"])
        if file := find_file(folder, "adapter_model.safetensors"):
            saved = load_file(file)
        elif file := find_file(folder, "adapter_model.bin"):
            saved = torch.load(file, map_location="cpu", weights_only=True)
        else:
            raise ValueError(f"{folder} has adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin")
        ours = {name: p for name, p in self.llama.named_parameters() if "lora_" in name}
        theirs = {}
        for key, value in saved.items():
            # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, or without the second `model.` (headless wrapper)
            name = re.sub(r"(\.default)?\.weight$", "", key.removeprefix("base_model.model."))
            theirs[name if name.startswith("model.") else "model." + name] = value
        problems = [f"missing {n}" for n in ours.keys() - theirs.keys()] + [f"unexpected {n}" for n in theirs.keys() - ours.keys()]
        problems += [f"{n} is {tuple(theirs[n].shape)}, the base needs {tuple(p.shape)}" for n, p in ours.items()
                     if n in theirs and theirs[n].shape != p.shape]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise ValueError(f"{file} does not fit {self.settings['base']} (another base? give --base): {'; '.join(sorted(problems)[:6])}{more}")
        with torch.no_grad():
            for name, p in ours.items():
                p.copy_(theirs[name])

    def save(self, folder, state: dict | None = None) -> None:
        """Write the adapter in PEFT's layout if LoRA is on and not merged, else the whole model in HF's, with retriever.json.

        `state` is a gathered state dict of this Retriever where its own parameters are sharded. Files are written straight
        into `folder`: who needs all or nothing writes to a folder aside and renames it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k.removeprefix("llama."): v for k, v in (state if state is not None else self.state_dict()).items()}
        on = self.lora and not any(getattr(m, "merged", False) for m in self.modules())
        settings = {**self.settings, **({"base_print": self.base_print} if on else {})}
        (folder / "retriever.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.tokenizer:
            bare, full = (self.tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
            bos, eos = self._bos_eos()
            if full != bos + bare + eos:  # other libraries are to add what we add
                self.tokenizer.add_bos_token, self.tokenizer.add_eos_token = bool(bos), bool(eos)
            self.tokenizer.save_pretrained(folder)
        if self.threshold is not None:
            save_file({"threshold": self.threshold.cpu()}, folder / "threshold.safetensors")
        if on:
            base = self.settings["base"]
            mapping = {"base_model_class": type(self.llama).__name__, "parent_library": type(self.llama).__module__}
            config = {"peft_type": "LORA", "task_type": None, "auto_mapping": mapping, "bias": "none", "fan_in_fan_out": False,
                      "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base, "inference_mode": True, **self.lora}
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
            weights = {f"base_model.model.{k}.weight": v.detach().cpu().contiguous() for k, v in state.items() if "lora_" in k}
            save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            self.llama.save_pretrained(folder, state_dict={k: v for k, v in state.items() if "lora_" not in k and k != "threshold"})
            self._save_for_sentence_transformers(folder)

    def _save_for_sentence_transformers(self, folder: Path) -> None:
        """A few json files, so that `SentenceTransformer(folder)` or `SparseEncoder(folder)` give these very vectors."""
        if HEADS[self.head].exports_to is None or self.threshold is not None:
            return  # nothing over there subtracts a number from a logit
        s, V, D, lib = self.settings, self.llama.config.vocab_size, self.llama.config.hidden_size, "sentence_transformers"
        lengths = {"query_length": s["query_length"], "document_length": s["passage_length"]}
        if self.head == "dense":
            transformer = {"transformer_task": "feature-extraction", **lengths}
            modules = [(f"{lib}.base.modules.normalize.Normalize", {"module_input_name": "token_embeddings"}),  # before the mean, not after
                       (f"{lib}.sentence_transformer.modules.pooling.Pooling", {"embedding_dimension": D, "pooling_mode": "mean"})]
        else:
            # SpladePooling has no scale. WordWeights, made for idf, multiplies each token's row by that token's weight, so a
            # vocabulary of nothing but unknown words is a constant factor: the head needs no code of ours over there.
            text = {"method": "forward", "method_output_name": "logits"}
            transformer = {"transformer_task": "text-generation", "modality_config": {"text": text}, "module_output_name": "token_embeddings",
                           "processing_kwargs": {"text": {"logits_to_keep": 0}}, **lengths}  # 0: at every position
            modules = [(f"{lib}.sentence_transformer.modules.word_weights.WordWeights",
                        {"vocab": [""] * V, "word_weights": {}, "unknown_word_weight": D**-0.25}),
                       (f"{lib}.sparse_encoder.modules.splade_pooling.SpladePooling", {"pooling_strategy": "max", "embedding_dimension": V})]
        write = lambda name, value: (folder / name).write_text(json.dumps(value, indent=None if "vocab" in value else 2) + "\n")
        listing = [{"idx": 0, "name": "0", "path": "", "type": f"{lib}.base.modules.transformer.Transformer"}]
        for i, (kind, config) in enumerate(modules, 1):
            where = f"{i}_{kind.rsplit('.', 1)[-1]}"
            (folder / where).mkdir(exist_ok=True)
            write(f"{where}/config.json", config)
            listing.append({"idx": i, "name": str(i), "path": where, "type": kind})
        write("modules.json", listing)
        write("sentence_bert_config.json", transformer)
        write("config_sentence_transformers.json", {
            "model_type": HEADS[self.head].exports_to, "similarity_fn_name": "dot",
            "prompts": {"query": s["query_prefix"], "document": s["passage_prefix"]}, "default_prompt_name": None})


def find_file(where: str, name: str) -> str | None:
    """The file `name` of a folder or of a hub repository, or None."""
    if os.path.isdir(where):
        file = os.path.join(where, name)
        return file if os.path.exists(file) else None
    return cached_file(where, name, _raise_exceptions_for_missing_entries=False)


def _relative(base: str, adapter: str) -> str:
    """An adapter's base: a path relative to the adapter if there is one, else a path or hub name as it stands."""
    beside = os.path.normpath(os.path.join(adapter, base))
    return beside if os.path.isdir(beside) else base


def _adapter_config(folder: str) -> dict:
    """adapter_config.json, with every option that would change the vectors and is not implemented here refused by name."""
    config = {"use_rslora": False, "lora_dropout": 0.0, **json.loads(Path(find_file(folder, "adapter_config.json")).read_text())}
    understood = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "base_model_name_or_path", "auto_mapping",
                  "peft_type", "task_type", "inference_mode", "revision", "peft_version"}
    neutral = {"bias": ["none"], "megatron_core": ["megatron.core"], "init_lora_weights": [True, "gaussian"],
               "qalora_group_size": [16]}  # PEFT's defaults that are not empty
    refused = [f"{k}={v!r}" for k, v in config.items() if k not in understood and v and v not in neutral.get(k, [])]
    if config.get("peft_type") != "LORA":
        refused.append(f"peft_type={config.get('peft_type')!r}")
    if refused:
        raise ValueError(f"{folder}/adapter_config.json asks for what is not supported here: {', '.join(refused)}. "
                         "Merge it with PEFT (merge_and_unload, save_pretrained) and load the merged model")
    return config


def _linears(llama: nn.Module, targets) -> dict[str, nn.Linear]:
    """The layers that `targets` names, in PEFT's sense: a list of name endings, or one regular expression for the whole name."""
    if isinstance(targets, str):
        chosen = lambda name: bool(re.fullmatch(targets, name)) or (targets == "all-linear" and name != "lm_head")
    else:
        chosen = lambda name: any(name == t or name.endswith("." + t) for t in targets)
    found = {name: m for name, m in llama.named_modules() if chosen(name) and isinstance(m, nn.Linear)}
    if "lm_head" in found:  # the sparse head reads lm_head.weight, so an adapter beside it would be silently without effect
        raise ValueError("LoRA on lm_head is not supported: leave it out of the target modules")
    return found


def _base_print(llama: nn.Module) -> list[float]:
    """One number a layer, around 1 in size, that tells bases apart: rounding to bf16 moves it by 1e-3, training by more."""
    corners = (layer.mlp.down_proj.weight[:8].detach().float() for layer in llama.model.layers)
    return [round(float(w.sum() / w.norm()), 6) for w in corners]


@torch.no_grad()
def probe(r: Retriever, name: str) -> None:
    """Refuse a model that is not what this file takes it for: causal in some batch, or with a head that is more than a matrix."""
    extras = [a for a in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
              if getattr(r.llama.config, a, None) not in (None, 1)] + (["lm_head.bias"] if r.llama.lm_head.bias is not None else [])
    if extras:
        raise ValueError(f"{name}: its language-model head is more than one matrix ({', '.join(extras)}), which the heads here do not compute")
    if causal := causal_batches(r):
        raise ValueError(
            f"{name} stays causal ({'; '.join(causal)}): transformers {transformers.__version__} ignores config.is_causal = False for "
            f"{type(r.llama).__name__} with attn={r.llama.config._attn_implementation!r}. Use transformers >= 5.5 and attn='sdpa'")


@torch.no_grad()
def causal_batches(r: Retriever) -> list[str]:
    """The kinds of batch in which the last token does not move the first. Each has its own path through the attention code."""
    device, V = r.llama.lm_head.weight.device, r.llama.config.vocab_size
    a = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[:, -1] = (b[:, -1] + 1) % V
    causal = []
    paddings = {"without padding": (0, 0), "padded left": (2, 0), "padded right": (0, 2)}
    for size, (what, (left, right)) in itertools.product((1, 2), paddings.items()):
        mask = F.pad(torch.ones(size, 6, dtype=torch.int64), (left, right))
        mask[1:] = 1  # only the first row is padded
        before, after = (r.hidden(F.pad(x[:size], (left, right)).to(device), mask.to(device))[0, left] for x in (a, b))
        if torch.equal(before, after):  # exactly: a causal model computes the same numbers from the same numbers
            causal.append(f"{size} text{'s' * (size > 1)} {what}")
    return causal


def sizes(config) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer in one decoder block."""
    D, I, hd = config.hidden_size, config.intermediate_size, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    return {"q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D), "gate_proj": (D, I), "up_proj": (D, I), "down_proj": (I, D)}


def n_parameters(config) -> dict[str, int]:
    """Parameters by place: embeddings, linear layers of the blocks, norms, and an lm_head of its own (0 when tied)."""
    V, D, n = config.vocab_size, config.hidden_size, config.num_hidden_layers
    return {"embed_tokens": V * D, "linear": n * sum(i * o for i, o in sizes(config).values()), "norm": (2 * n + 1) * D,
            "lm_head": 0 if config.tie_word_embeddings else V * D}


def flops_per_token(config, length: int, head: str, train: bool = False, lora_r: int = 0, checkpointing: bool = False) -> float:
    """Matrix FLOPs (two a multiply-add) that one token of a text of `length` tokens costs: forward, or the whole training step.

    `head` is one of HEADS, or mntp (logits at a fifth of the positions) or clm (at all). `lora_r` > 0: adapters on every linear layer, the rest
    frozen. The streaming head's backward visits only the winners, under 2% of its forward, and counts as nothing.
    """
    V, D, n, layer = config.vocab_size, config.hidden_size, config.num_hidden_layers, sizes(config)
    linear = 2 * n * sum(i * o for i, o in layer.values())
    lora = 2 * n * lora_r * sum(i + o for i, o in layer.values())
    attention = 2 * n * 2 * length * layer["q_proj"][1]  # scores and the weighted sum: each token against every token
    share = {"mntp": 0.2, "clm": 1.0}.get(head)  # of the positions that have logits
    positions = float(HEADS[head].sparse) if share is None else share
    logits = positions * 2 * V * D  # adds 27, 14 and 8% to 1B, 3B and 8B
    total = linear + lora + attention + logits
    if train:
        total += linear + 2 * lora + 2 * attention  # gradients of the activations, and of the adapters' weights
        if not lora_r:
            total += linear  # gradients of the weights, which LoRA does not need: two thirds of a full step
        elif not checkpointing:
            total -= 2 * sum(layer[k][0] * layer[k][1] for k in ("q_proj", "k_proj", "v_proj"))  # nothing before block 0 learns
        if head in ("mntp", "clm"):
            total += logits * (1 if lora_r else 2)
        if checkpointing:
            total += linear + lora + attention  # the blocks once more, up to the last tensor that backward asks for:
            total -= 0 if lora_r else 2 * n * layer["down_proj"][0] * layer["down_proj"][1]  # the last product's input
    return total
