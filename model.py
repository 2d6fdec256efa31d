"""The retriever: a Llama that looks both ways, with a sparse or a dense head.

    from model import Retriever
    r = Retriever.load("meta-llama/Llama-3.2-1B", head="sparse")  # or a run folder, or an adapter's
    D = r.encode(["the moon pulls the sea", "a loaf of bread"], "passage")  # a weight per vocabulary entry
    r.rank("how do tides work", ["the moon pulls the sea", "a loaf of bread"])  # [(place, score), ...]
    r.top_terms(D[0], 5)  # [(term, weight), ...]

What surprises:
- Hugging Face's decoder is used as it is; one attribute, `config.is_causal = False`, opens its mask.
  transformers before 5.5 ignores it, so `load` probes: the last token is moved, the first is watched.
- The sparse head never holds (batch, length, vocabulary): it takes the maximum over the positions a slice of
  the vocabulary at a time, and backward visits only the entries that count.
- With LoRA on, `save` writes an adapter as PEFT does; after `merge()` the whole model.
"""
import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
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

from data import check_files, read_json, stamp

# To us a CSR tensor is three arrays and a shape: nothing leans on its arithmetic.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

# What retriever.json says, and the paper's values. How texts are read belongs to the checkpoint: RepLLaMA
# adds prefixes and an EOS, LACONIC has no BOS.
SETTINGS = {
    "head": None, "query_length": 64, "passage_length": 192, "query_prefix": "", "passage_prefix": "",
    "add_bos": True, "add_eos": False, "padding_side": "left", "base": None,
}
# The authors' adapters have no retriever.json, but name the class that they were trained on.
AUTHORS_HEADS = {"LlamaBiForMNTP": "sparse", "LlamaBiModel": "dense"}
# Tried with small random weights.
FAMILIES = "Llama, Mistral, Qwen2, Qwen3, Gemma 1 to 3, Phi-3, OLMo 1 to 3, SmolLM3, GLM-4 or Granite"
# Tensor cores and fused attention want multiples of 8; a CPU would only pay for the padding.
PADDED_TO = {"cuda": 8}


# The largest logit of every vocabulary entry over a text's positions.

class MaxLogits(torch.autograd.Function):
    """max over positions of `hidden @ weight.T`: (B * L, D), (V, D) -> (B, V), a slice of V at a time."""

    # Of tied positions one wins and gets the whole gradient; `amax` would split it.
    # `source` (B, L): which row of `hidden` stands at each position, since padding repeats a token.

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, source: Tensor, dtype: torch.dtype, learning: bool):
        (B, L), V = source.shape, len(weight)
        columns = hidden.index_select(0, source.flatten()).to(dtype).T  # (D, B * L)
        top = hidden.new_empty(B, V, dtype=torch.promote_types(dtype, torch.float32))
        # Inference does not pay for knowing who won.
        winner = hidden.new_empty(B, V if learning else 0, dtype=torch.int16 if L < 2**15 else torch.int32)
        # One thread is fastest when a slice (4 MB) stays in its cache. Several wait for the slowest after
        # every product, so theirs are fewer and longer; and a GPU wants few launches.
        at_once = 2**26 if hidden.is_cuda else 2**20 if torch.get_num_threads() == 1 else 2**23
        step = max(256, at_once // (B * L))
        # A GPU leaves the sums in fp32: in bf16 near winners tie, and 16% of the gradient goes astray.
        how = {"out_dtype": torch.float32} if hidden.is_cuda and dtype.itemsize == 2 else {}
        for v in range(0, V, step):
            # (step, B, L): the maximum runs over what lies side by side in memory.
            logits = torch.mm(weight[v : v + step].to(dtype), columns, **how).view(-1, B, L)
            if learning:
                values, positions = logits.max(-1)
                winner[:, v : v + step] = positions.T
            else:
                values = logits.amax(-1)
            top[:, v : v + step] = values.T
        # Under a frozen weight nothing of backward reads the hidden states.
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None, weight, source, winner)
        return top

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # (B, V), zero wherever relu cut: about 2% is left in a trained model
        hidden, weight, source, winner = ctx.saved_tensors
        (B, L), V = source.shape, len(weight)
        d_hidden, d_weight = weight.new_empty(B * L, weight.shape[1]), None
        # Some texts at a time: the lists are long when nearly everything is active.
        some = max(1, 2**22 // V)
        for b in range(0, B, some):
            first, last = b * L, min(b + some, B) * L
            text, term = grad[b : b + some].nonzero(as_tuple=True)
            text += b
            g, token = grad[text, term], source[text, winner[text, term].long()]
            # A token's gradient is a weighted sum of the entries that it won, an entry's one of the tokens
            # that won it: embedding bags, which build no (n, D) in between.
            d_hidden[first:last] = bags(token - first, term, g, weight, last - first)
            if ctx.needs_input_grad[1]:
                part = bags(term, token, g, hidden, V)
                d_weight = part if d_weight is None else d_weight.add_(part)
        return d_hidden, d_weight, None, None, None


def bags(bag: Tensor, row: Tensor, weight: Tensor, table: Tensor, n_bags: int) -> Tensor:
    """out[bag[i]] += weight[i] * table[row[i]]: (n,), (n,), (n,), (rows, D) -> (n_bags, D)."""
    bag, order = bag.sort(stable=True)
    starts = torch.searchsorted(bag, torch.arange(n_bags, device=bag.device))
    scale = weight[order].to(table.dtype)
    return F.embedding_bag(row[order], table, starts, mode="sum", per_sample_weights=scale)


@torch.compiler.disable  # how much backward does depends on the data, which a graph cannot hold
def max_logits(hidden: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """max over the real tokens of `hidden @ weight.T`, in fp32: (B, L, D), (V, D), (B, L) -> (B, V)."""
    # Padding repeats the text's first real token: then the maximum needs no mask, a pass over every logit.
    B, L = mask.shape
    here = torch.arange(L, device=mask.device)
    source = torch.where(mask.bool(), here, mask.int().argmax(1, keepdim=True))
    source += L * torch.arange(B, device=mask.device)[:, None]
    # Inside a Function autocast does nothing and gradients are off: both are asked here.
    autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if autocast else weight.dtype
    return MaxLogits.apply(hidden.flatten(0, 1), weight, source, dtype, torch.is_grad_enabled())


# Heads: from hidden states to a text's vector.

def sparse_vectors(r: "Retriever", hidden: Tensor, mask: Tensor) -> Tensor:
    """log(1 + relu(max over the tokens of logit / D^(1/4))): (B, L, D), (B, L) -> (B, V)."""
    # Logarithm and relu grow with the logit: after the maximum they touch (B, V) only.
    top = max_logits(hidden, r.llama.lm_head.weight, mask)
    if r.threshold is not None:
        top = top - r.threshold
    weights = torch.log1p(torch.relu(top * hidden.shape[-1] ** -0.25))
    return weights.masked_fill(~mask.any(1, keepdim=True), 0.0)


def dense_vectors(r: "Retriever", hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the tokens' unit vectors: (B, L, D), (B, L) -> (B, D)."""
    # Tokens have length one, their mean has not: how well they agree is part of the score.
    unit = F.normalize(hidden.float(), dim=-1) * mask[..., None]
    return unit.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


class Head(NamedTuple):
    """From hidden states to a text's vector. A new head is such a function and a row of HEADS."""

    vectors: Callable  # (retriever, hidden (B, L, D), mask (B, L)) -> (B, width) fp32
    sparse: bool  # a weight per term, mostly zeros, none negative: for inverted indexes and the FLOPs loss
    width: str  # its name in the config
    temperature: float  # divides the scores in training without --temperature
    exports_to: str | None  # the class of sentence-transformers that can compute it


HEADS = {
    "sparse": Head(sparse_vectors, True, "vocab_size", 1.0, "SparseEncoder"),
    "dense": Head(dense_vectors, False, "hidden_size", 0.01, "SentenceTransformer"),
}


class LoRALinear(nn.Linear):
    """x W' + scale * dropout(x) A' B'."""
    merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        # LoRA's cost on a GPU are passes over activations: here they are read once and written once more,
        # only what is r wide is cast, and the scale comes with the product.
        rows = x.reshape(-1, self.in_features)
        y = super().forward(rows)
        low = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.to(x.dtype))  # (rows, r)
        y = y.addmm_(low.to(y.dtype), self.lora_B.T.to(y.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)


# Texts -> batches of tokens.

def tokenize(tokenizer, settings: dict, texts: list[str], kind: str, max_length: int | None = None):
    """Lists of token ids of queries or passages (`kind`): BOS, prefix, text, EOS; the text is cut."""
    if kind not in ("query", "passage"):
        raise ValueError(f"kind is {kind!r}, expected 'query' or 'passage'")
    if tokenizer is None:
        raise ValueError(f"{settings['base']} has no tokenizer: put tokenizer.json beside its config.json")
    bos, eos = [tokenizer.bos_token_id] * settings["add_bos"], [tokenizer.eos_token_id] * settings["add_eos"]
    max_length = settings[f"{kind}_length"] if max_length is None else max_length
    room = max_length - len(bos) - len(eos)
    if room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for a token beside BOS and EOS")
    if not texts:
        return []
    texts = [settings[f"{kind}_prefix"] + text for text in texts]
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
    return [bos + row + eos for row in ids]


def longest_first(lengths, tokens: int, most: int | None = None) -> list[np.ndarray]:
    """Places of texts in batches of at most `most` texts and `tokens` tokens, padded to their own longest.

    >>> longest_first([3, 9, 4, 8], 18)
    [array([1, 3]), array([2, 0])]
    """
    # What does not fit into memory shows at once. Equal lengths meet, so little is padding.
    order, batches = np.argsort(-np.asarray(lengths), kind="stable"), []
    while len(order):
        size = min(most or len(order), max(1, tokens // max(1, lengths[order[0]])))
        batches.append(order[:size])
        order = order[size:]
    return batches


class NotFinite(ValueError):
    def __init__(self, place: int):
        super().__init__(f"text {place}: the model gives NaN or infinity; did its training diverge?")
        self.place = place  # of the text, in the list that was given


class Retriever(nn.Module):
    """`r(input_ids, attention_mask)` -> (B, vocabulary) by the sparse head, (B, hidden) by the dense one."""

    def __init__(self, llama: nn.Module, tokenizer, settings: dict):
        super().__init__()
        self.llama, self.tokenizer, self.settings = llama, tokenizer, {**SETTINGS, **settings}
        self.head = self.settings["head"]
        self.sparse, self.width = HEADS[self.head].sparse, getattr(llama.config, HEADS[self.head].width)
        self.register_buffer("threshold", None)  # (V,), subtracted from the largest logits: see `calibrate`
        self.lora, self.base_print = None, None  # the adapter's settings, what tells its base from others

    @property
    def device(self) -> torch.device:
        return self.llama.lm_head.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, at: Tensor | None = None) -> Tensor:
        """(B, L) ids and mask -> vectors; with `at`, a (B, L) bool mask, the logits (n, V) there."""
        hidden = self.hidden(input_ids, attention_mask)
        if at is not None:
            return self.llama.lm_head(hidden[at])
        return HEADS[self.head].vectors(self, hidden, attention_mask)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states after the final norm, (B, L, D)."""
        # A text without tokens attends to its padding, or its softmax would be over nothing. Positions count
        # real tokens: left and right padding give the same vectors.
        return self.llama.model(
            input_ids=input_ids, attention_mask=attention_mask.bool() | ~attention_mask.any(1, keepdim=True),
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0), use_cache=False).last_hidden_state

    def tokenize(self, texts: list[str], kind: str, max_length: int | None = None) -> list[list[int]]:
        return tokenize(self.tokenizer, self.settings, texts, kind, max_length)

    def pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Lists of ids -> (input_ids, attention_mask), both (B, L) int64, padded on the settings' side."""
        multiple = PADDED_TO.get(self.device.type, 1)
        L = math.ceil(max([1, *map(len, rows)]) / multiple) * multiple
        # Which one is of no matter, and some tokenizers have none.
        ids = torch.full((len(rows), L), getattr(self.tokenizer, "pad_token_id", None) or 0)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(L - len(row), L) if self.settings["padding_side"] == "left" else slice(len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.int64), 1
        return ids, mask

    # Texts in, vectors out.

    def read(self, texts, kind, max_length, tokens_per_batch) -> Iterator[tuple]:
        """(places in `texts`, hidden states, mask) of batch after batch, dropout off."""
        rows, was_training = self.tokenize(texts, kind, max_length), self.training
        # However short they are: 256 sparse vectors of a Llama are 131 MB before their zeros go.
        most = 256 if self.sparse else None
        self.eval()
        try:
            for places in longest_first([len(row) for row in rows], tokens_per_batch, most):
                ids, mask = (x.to(self.device) for x in self.pad([rows[i] for i in places]))
                yield torch.from_numpy(places), self.hidden(ids, mask), mask
        finally:
            self.train(was_training)

    @torch.no_grad()
    def encode(self, texts: list[str], kind: str, max_length: int | None = None,
               tokens_per_batch: int = 16384, top_terms: int | None = None,
               progress: Callable | None = None) -> Tensor:
        """What an index takes, in the order of `texts`, on the CPU: (N, hidden), or (N, V) in CSR."""
        # `tokens_per_batch` counts padding, too. `top_terms` keeps each text's heaviest terms. `progress` (a
        # bar's `update`) is told how many texts each batch held.
        batches, order = [], []
        for places, hidden, mask in self.read(texts, kind, max_length, tokens_per_batch):
            reps = HEADS[self.head].vectors(self, hidden, mask).float()
            finite = torch.isfinite(reps).all(1).cpu()
            if not finite.all():
                raise NotFinite(int(places[~finite][0]))
            if top_terms and self.sparse:
                top = reps.topk(min(top_terms, self.width))
                reps = torch.zeros_like(reps).scatter(1, top.indices, top.values)
            batches.append((reps.to_sparse() if self.sparse else reps).cpu())
            order.append(places)
            if progress:
                progress(len(places))
        if not texts:
            batches, order = [torch.empty(0, self.width)], [torch.empty(0, dtype=torch.int64)]
        # From longest first back to the order of the texts.
        reps = torch.cat(batches).index_select(0, torch.cat(order).argsort())
        return reps.to_sparse_csr() if self.sparse else reps

    def rank(self, query: str, texts: list[str]) -> list[tuple[int, float]]:
        """[(place in `texts`, score), ...], best first; of equals the earlier text comes first."""
        scores = self.encode(texts, "passage") @ self.encode([query], "query").to_dense()[0]
        order = scores.argsort(descending=True, stable=True).tolist()
        return [(i, float(scores[i])) for i in order]

    def top_terms(self, vector: Tensor, k: int = 10) -> list[tuple[str, float]]:
        """The k heaviest terms of a sparse vector, such as a row of what `encode` returns."""
        if not self.sparse:
            raise ValueError(f"this checkpoint's head is {self.head}: its dimensions are no terms")
        top = vector.to_dense().flatten().topk(min(k, self.width))
        found = zip(top.values.tolist(), top.indices.tolist())
        return [(self.tokenizer.decode([term]), weight) for weight, term in found if weight > 0]

    @torch.no_grad()
    def calibrate(self, texts: list[str], share: float, max_length: int | None = None,
                  tokens_per_batch: int = 16384) -> None:
        """Give each term the `threshold` with which it is on in a `share` of these passages."""
        # A language model's logits are nearly all positive, and the same terms are high in every text:
        # contrastive training kills them all within ten steps. With a threshold of its own a term is on
        # where it is unusually high, which is idf for free.
        if not 0 < share < 1 or len(texts) * share < 1:
            raise ValueError(f"share {share} of {len(texts)} texts: expected between 0 and 1, and one text")
        # A quantile lies between two neighbours of the sorted logits: they and what is above are kept.
        place = (len(texts) - 1) * (1 - share)
        keep, weight = len(texts) - int(place), self.llama.lm_head.weight
        highest = torch.empty(0, len(weight), device=self.device)
        for _, hidden, mask in self.read(texts, "passage", max_length, tokens_per_batch):
            highest = torch.cat([highest, max_logits(hidden, weight, mask).float()])
            highest = highest.topk(min(keep, len(highest)), dim=0).values
        self.threshold = torch.lerp(highest[-1], highest[-2], place - int(place))

    # The adapter.

    def add_lora(self, r: int = 16, alpha: float = 32, dropout: float = 0.05, rslora: bool = False,
                 layers: set[str] | None = None) -> None:
        """Freeze the model and put trainable low-rank adapters beside `layers` (None: all in the blocks)."""
        if self.lora:
            raise ValueError("the model has LoRA already, which goes on training; or merge() and save first")
        self.base_print, kinds = base_print(self.llama), set()
        # With lm_head frozen, too, the sparse head's backward is nearly free. It gets no adapter, which would
        # be without effect: the heads read its weight.
        self.requires_grad_(False)
        for name, linear in self.llama.model.layers.named_modules(prefix="model.layers"):
            if not isinstance(linear, nn.Linear) or layers is not None and name not in layers:
                continue
            # In place, so that the base keeps its names and its memory. The adapter is fp32 whatever the
            # base is: it is the master weight. B is zero, so that training starts from the base.
            linear.__class__, where = LoRALinear, {"device": linear.weight.device}
            linear.scale, linear.dropout = alpha / (math.sqrt(r) if rslora else r), dropout
            linear.lora_A = nn.Parameter(torch.empty(r, linear.in_features, **where))
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, **where))
            nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))
            kinds.add(name.rpartition(".")[2])
        self.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(kinds),
                     "use_rslora": rslora}

    def unmerged(self) -> list[LoRALinear]:
        """The layers whose adapter is beside the weight."""
        return [layer for layer in self.modules() if isinstance(layer, LoRALinear) and not layer.merged]

    @torch.no_grad()
    def merge(self) -> "Retriever":
        """Fold the adapter into the weights: encoding is faster, and `save` writes the whole model."""
        layers = self.unmerged()
        if not layers:
            raise ValueError("nothing to fold: the model has no LoRA, or it is merged already")
        for layer in layers:
            # Summed in fp32, rounded once.
            whole = layer.weight.float() + layer.scale * (layer.lora_B @ layer.lora_A)
            layer.weight.data, layer.merged = whole.to(layer.weight.dtype), True
        return self

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """The adapter is in the weights while this lasts; after it they are what they were."""
        # To the bit: they are kept, which takes the blocks' memory once more.
        before = [(layer, layer.weight.data) for layer in self.unmerged()]
        if before:
            self.merge()
        try:
            yield
        finally:
            for layer, weight in before:
                layer.weight.data, layer.merged = weight, False

    # Files.

    @classmethod
    def load(cls, path, adapter=None, head: str | None = None, base=None, dtype: torch.dtype = torch.float32,
             device="cpu", attn: str = "sdpa") -> "Retriever":
        """`path`: an HF folder or hub name, or a PEFT adapter's (its base is named there, or is `base`)."""
        # 1. What is where: a model, or an adapter and its base; and their settings.
        if adapter:
            path, base = adapter, base or path
        path, adapter, lora = find_parts(str(path), base)
        settings, recorded_print = read_settings(path, adapter)
        trained_on = (lora.get("auto_mapping") or {}).get("base_model_class")
        settings["head"] = head or settings.get("head") or AUTHORS_HEADS.get(trained_on)
        settings["base"] = path
        if settings["head"] not in HEADS:
            heads = ", ".join(HEADS)
            raise ValueError(f"{adapter or path}: its head is {settings['head']!r}; give --head, of {heads}")

        # 2. The model; on the meta device without memory, for FSDP's ranks that are sent their shards.
        empty = str(device) == "meta"
        llama = open_llama(path, dtype, attn, empty)
        r = cls(llama, open_tokenizer(path, adapter, settings, llama.config.vocab_size), settings)
        calibrated = find_file("threshold.safetensors", adapter, path)
        if calibrated and r.sparse:
            r.threshold = load_file(calibrated)["threshold"]
        if adapter:
            load_adapter(r, adapter, lora, recorded_print)

        # 3. Is it what it seems?
        r = r.to(device).eval()
        if not empty:
            probe(r, path)
        return r

    def save(self, folder, state: dict | None = None) -> None:
        """Write the adapter in PEFT's layout if LoRA is on and not merged, else the whole model in HF's."""
        # `state`: the gathered parameters, where this Retriever's own are sharded. Who needs all or nothing
        # writes to a folder aside and renames it.
        folder, adapted = Path(folder), bool(self.unmerged())
        folder.mkdir(parents=True, exist_ok=True)
        state = {name.removeprefix("llama."): x for name, x in (state or self.state_dict()).items()}

        # 1. The tokenizer: other libraries are to add the special tokens that we add.
        if self.tokenizer:
            [ours] = tokenize(self.tokenizer, self.settings | {"query_prefix": ""}, ["a"], "query", 64)
            if self.tokenizer("a")["input_ids"] != ours:
                self.tokenizer.add_bos_token = self.settings["add_bos"]
                self.tokenizer.add_eos_token = self.settings["add_eos"]
            self.tokenizer.save_pretrained(folder)

        # 2. The weights.
        if adapted:
            save_adapter(self, folder, state)
        else:
            plain = {name: x for name, x in state.items() if "lora_" not in name and name != "threshold"}
            self.llama.save_pretrained(folder, state_dict=plain)
        if self.threshold is not None:
            save_file({"threshold": self.threshold.cpu()}, folder / "threshold.safetensors")

        # 3. Last the settings: with them the folder is a checkpoint.
        record = self.settings | ({"base_print": self.base_print} if adapted else {}) | {"files": {}}
        for file in sorted(folder.glob("*.safetensors")):
            os.chmod(file, 0o644)  # safetensors writes for the owner's eyes only
            record["files"][file.name] = stamp(file)
        (folder / "retriever.json").write_text(json.dumps(record, indent=2) + "\n")


# A checkpoint's folder: Hugging Face's model, PEFT's adapter, our settings.

def find_file(name: str, *places) -> str | None:
    """The file in the first folder or hub repository that has it; a place may be None."""
    for place in filter(None, places):
        file = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        if file:
            return file


@contextlib.contextmanager
def reading(what: str):
    """Whatever another library's reader stumbles over gets a place and a cure."""
    try:
        yield
    # Any class: OSError, KeyError, SafetensorError, and tokenizers raises plain Exception.
    except Exception as e:
        reason = str(e).strip().partition("\n")[0]
        raise ValueError(f"{what} cannot be read: {reason} ({type(e).__name__}); fetch or copy it again, if "
                         "it is a language model's (Gemma 2 needs --attn eager)") from e


def check_place(path: str, cure: str = "") -> None:
    """A folder that is there and finished, or what may be the name of a model on the hub."""
    if os.path.isdir(path):
        args = find_file("args.json", path)
        # Other trainers have an args.json, too.
        if args and not find_file("summary.json", path) and "arguments" in read_json(args):
            best = f", or load {path}/best" * os.path.exists(f"{path}/best")
            raise ValueError(f"{path}: a run that has not finished: give its command --resume{best}")
    elif os.path.exists(path) or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no such folder{cure}")


def find_parts(path: str, base) -> tuple[str, str | None, dict]:
    """(the model's folder or hub name, the adapter's or None, the adapter's config)."""
    check_place(path)
    file = find_file("adapter_config.json", path)
    if not file:
        if base:
            raise ValueError(f"{path} is no adapter: it has no use for the base {base}")
        return path, None, {}
    lora = read_adapter_config(file)
    if not base:
        base = lora["base_model_name_or_path"]
        # Relative to the adapter, if it is there.
        beside = os.path.normpath(os.path.join(path, base))
        base = beside if os.path.isdir(beside) else base
    check_place(str(base), f", the base of {path}: give --base meta-llama/Meta-Llama-3-8B or the like")
    if os.path.exists(os.path.join(base, "adapter_config.json")):
        raise ValueError(f"{base} is an adapter itself, so {path} has no base to go on: merge and save it")
    return str(base), path, lora


def read_settings(path: str, adapter: str | None) -> tuple[dict, list | None]:
    """(the settings of retriever.json, the base's print): the adapter's, else its base's."""
    settings = {}
    for place in filter(None, (path, adapter)):
        own = find_file("retriever.json", place)
        if own:
            settings, file = read_json(own), own
            stamps = settings.pop("files", {})
            # From a hub come only the files that somebody asked for.
            if os.path.isdir(place):
                check_files(place, stamps, "not the weights that were saved: copy or train them again")
    recorded_print = settings.pop("base_print", None)
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"{file}: unknown setting {name}; known are {', '.join(SETTINGS)}")
        usual = SETTINGS[name]
        fits = value in ("left", "right") if name == "padding_side" else type(value) is type(usual)
        if usual is not None and (not fits or type(value) is int and value < 1):
            raise ValueError(f"{file}: {name} is {value!r}, expected such as {usual!r}")
    return settings, recorded_print


def open_llama(path: str, dtype: torch.dtype, attn: str, empty: bool) -> nn.Module:
    """The language model, its mask open to both sides; `empty`: on the meta device, without weights."""
    with reading(f"{path}: the model"):
        config = AutoConfig.from_pretrained(path)
        # THE MASK: every token sees every real token; padding stays masked.
        config.is_causal = False
        how = {"config": config, "dtype": dtype, "attn_implementation": attn}
        if empty:
            with torch.device("meta"):
                llama = AutoModelForCausalLM.from_config(**how)
        else:
            llama = AutoModelForCausalLM.from_pretrained(path, **how)
    # Adapters, base prints and FLOPs lean on these names.
    linears = {name for name, layer in llama.named_modules() if isinstance(layer, nn.Linear)}
    needed = {"lm_head"} | {f"model.layers.{i}.mlp.down_proj" for i in range(config.num_hidden_layers)}
    if not needed <= linears:
        raise ValueError(f"{path}: {type(llama).__name__} is not laid out as Llama's model.layers, each with "
                         f"mlp.down_proj: take {FAMILIES}")
    return llama


def open_tokenizer(path: str, adapter: str | None, settings: dict, vocab_size: int):
    """The adapter's tokenizer, else the model's, or None, if it has what the settings ask for."""
    files = [find_file(name, adapter, path) for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
    place = next((os.path.dirname(file) for file in files if file), None)
    if not place:
        return None
    with reading(f"{place}: the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{place}: the tokenizer has {len(tokenizer):,} entries, the model {vocab_size:,}")
    settings.setdefault("add_bos", tokenizer.bos_token_id is not None)  # Qwen, for one, has none
    for wanted, token in (("add_bos", tokenizer.bos_token_id), ("add_eos", tokenizer.eos_token_id)):
        if settings.get(wanted) and token is None:
            raise ValueError(f"{place}: retriever.json says {wanted}, but the tokenizer has no such token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = settings.get("padding_side", SETTINGS["padding_side"])
    tokenizer.truncation_side = "right"
    return tokenizer


def read_adapter_config(file: str) -> dict:
    """PEFT's settings. An option that is not known here might change the vectors: refused by name."""
    config = {"use_rslora": False, "lora_dropout": 0.0, **read_json(file)}
    known = ("r lora_alpha lora_dropout target_modules use_rslora base_model_name_or_path auto_mapping "
             "task_type inference_mode revision peft_version").split()
    # What PEFT writes for options that are not used: these, or something empty.
    unused = {"bias": ["none"], "megatron_core": ["megatron.core"], "init_lora_weights": [True, "gaussian"],
              "qalora_group_size": [16], "peft_type": ["LORA"]}
    refused = [f"{k}={v!r}" for k, v in config.items() if k not in known and v and v not in unused.get(k, [])]
    if refused:
        raise ValueError(f"{file}: not supported here: {', '.join(refused)}; merge it with PEFT "
                         "(merge_and_unload, save_pretrained) and load that")
    return config


@torch.no_grad()
def load_adapter(r: Retriever, folder: str, config: dict, recorded_print: list | None) -> None:
    """A PEFT adapter beside the layers that its tensors name, if base, names and shapes are right."""
    file = find_file("adapter_model.safetensors", folder) or find_file("adapter_model.bin", folder)
    if not file:
        raise ValueError(f"{folder} has neither adapter_model.safetensors nor adapter_model.bin")
    with reading(file):
        tensors = torch.load(file, weights_only=True) if file.endswith(".bin") else load_file(file)
    theirs = {}
    for key, value in tensors.items():
        # base_model.model.model.layers.0.mlp.up_proj.lora_A.weight; a headless model has one `model.` less.
        name = key.removeprefix("base_model.model.").removeprefix("model.").removesuffix(".weight")
        theirs["model." + name.removesuffix(".default")] = value
    layers = {name.rpartition(".")[0] for name in theirs}
    r.add_lora(config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"], layers)
    r.lora["target_modules"] = config["target_modules"]

    # Of a base on the meta device there is no print to compare.
    base, r.base_print = r.settings["base"], r.base_print or recorded_print
    if recorded_print and not np.allclose(r.base_print, recorded_print, rtol=0, atol=5e-3):
        raise ValueError(f"{folder} was trained on another base than {base}: give the right one with --base")
    ours = {name: p for name, p in r.llama.named_parameters() if "lora_" in name}
    for name in sorted(ours.keys() | theirs.keys()):
        needed, found = (tuple(side[name].shape) if name in side else "nothing" for side in (ours, theirs))
        if found != needed:
            raise ValueError(f"{file}: {name} is {found}, where {base} needs {needed}: another base? give "
                             "--base")
        ours[name].copy_(theirs[name])


def base_print(llama: nn.Module) -> list[float]:
    """One number a layer, around 1, that tells bases apart."""
    # Rounding to bf16 moves it by 1e-3, a little training by more.
    corners = [layer.mlp.down_proj.weight[:8].detach().float() for layer in llama.model.layers]
    return [] if corners[0].is_meta else [round(float(w.sum() / w.norm()), 6) for w in corners]


def save_adapter(r: Retriever, folder: Path, state: dict) -> None:
    """The adapter as PEFT writes it."""
    base, kind = r.settings["base"], type(r.llama)
    config = {
        **r.lora, "peft_type": "LORA", "task_type": None, "bias": "none", "fan_in_fan_out": False,
        "base_model_name_or_path": os.path.abspath(base) if os.path.isdir(base) else base,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
        "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {f"base_model.model.{name}.weight": value.detach().cpu().contiguous()
               for name, value in state.items() if "lora_" in name}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


# Is it what it seems?

def probe(r: Retriever, name: str) -> None:
    """Refuse a model that is causal in some batch, and a sparse head on logits of another form."""
    config = r.llama.config
    if r.sparse:
        check_logits(r, name, "the sparse head computes", "take --head dense, or another model")
    causal = causal_batches(r)
    if causal:
        raise ValueError(f"{name} stays causal ({'; '.join(causal)}): {type(r.llama).__name__} of "
                         f"transformers {transformers.__version__} with attn={config._attn_implementation!r} "
                         "ignores is_causal = False: use 5.5 or newer, sdpa or eager")


def check_logits(r: Retriever, name: str, what: str, cure: str) -> None:
    """Refuse logits that are more than a product: whoever computes the product alone gets other ones."""
    more = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    extras = [option for option in more if getattr(r.llama.config, option, None) not in (None, 1)]
    extras += ["lm_head.bias"] * (r.llama.lm_head.bias is not None)
    if extras:
        raise ValueError(f"{name}: its logits are more than the product that {what} ({', '.join(extras)}): "
                         f"{cure}")


@torch.no_grad()
def causal_batches(r: Retriever) -> list[str]:
    """The kinds of batch in which the last token does not move the first."""
    # Each takes its own way through the attention code, and each has been the causal one somewhere.
    vocabulary, random, causal = r.llama.config.vocab_size, torch.Generator().manual_seed(0), []
    ends = {"without padding": (0, 7), "padded left": (2, 7), "padded right": (0, 5)}
    for size in (1, 2):
        for how, (first, last) in ends.items():
            ids = torch.randint(vocabulary, (size, 8), generator=random).to(r.device)
            mask = torch.ones_like(ids)
            mask[0, :first], mask[0, last + 1 :] = 0, 0
            before = r.hidden(ids, mask)[0, first]
            ids[0, last] = (ids[0, last] + 1) % vocabulary
            # Exactly: a causal model computes the same numbers from the same numbers.
            if torch.equal(before, r.hidden(ids, mask)[0, first]):
                causal.append(f"{size} text{'s' * (size > 1)} {how}")
    return causal


# What it costs.

def flops_per_token(config, length: int, head: str, train: bool = False, lora_r: int = 0) -> float:
    """Matrix FLOPs (two a multiply-add) of a token in a text of `length`: forward, or the training step."""
    # `head`: one of HEADS, or mntp (logits at a fifth of the positions) or clm (at all). With `lora_r` there
    # are adapters on every linear layer, and the rest is frozen. What --recompute repeats is not counted.
    V, D, n, inner = config.vocab_size, config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or D // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    # A block's layers: q and o, k and v, gate and up and down.
    linear = 2 * n * D * (2 * q + 2 * kv + 3 * inner)
    lora = 2 * n * lora_r * (7 * D + 2 * q + 2 * kv + 3 * inner)
    # Scores and the weighted sum: each token against every token.
    attention = 2 * n * 2 * length * q
    # The share of positions that have logits. The sparse head's add 27, 14 and 8% to 1B, 3B and 8B.
    predicted = {"mntp": 0.2, "clm": 1.0}
    logits = 2 * V * D * (predicted[head] if head in predicted else HEADS[head].sparse)
    forward = linear + lora + attention + logits
    if not train:
        return forward
    # Backward: gradients of the activations and of the adapters; without LoRA also of the weights. The
    # streaming head visits winners only: under 2% of its forward, left out.
    backward = linear + 2 * lora + 2 * attention
    if head in predicted:
        backward += logits * (1 if lora_r else 2)
    # With LoRA nothing before block 0's adapters learns.
    return forward + backward + (-2 * D * (q + 2 * kv) if lora_r else linear)
