"""model.py against the authors' vectors, Hugging Face's Llama, peft, sentence-transformers, torch's gradcheck
and FLOP counter."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TEXTS
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import model
from tools.explain import origins
from model import Retriever, flops_per_token, longest_first, max_logits


def naive_max(hidden, weight, mask):
    """What the streaming head replaces: every logit, then the maximum over the real positions."""
    return (hidden @ weight.T).masked_fill(~mask.bool()[..., None], float("-inf")).max(1).values


def naive_reps(r, ids, mask):
    """Both heads from Hugging Face's own forward, one text at a time and without padding."""
    out = []
    for row, m in zip(ids, mask.bool()):
        o = r.llama(input_ids=row[m][None], output_hidden_states=True)
        if r.head == "sparse":
            out.append(torch.log1p(torch.relu(o.logits[0] * r.llama.config.hidden_size**-0.25)).amax(0))
        else:
            h = o.hidden_states[-1][0]
            out.append((h / h.norm(dim=-1, keepdim=True)).mean(0))
    return torch.stack(out)


def rows_of(ids, mask):
    return [row[m].tolist() for row, m in zip(ids, mask.bool())]


def with_lora(path, head="sparse", seed=0, **kw):
    """A retriever whose adapter does something: B is zero at first, which would hide every mistake."""
    r = Retriever.load(path, head=head)
    torch.manual_seed(seed)
    r.add_lora(**{"r": 4, "alpha": 8, "dropout": 0.0, **kw})
    for name, p in r.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return r


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# The authors' vectors


@pytest.mark.parametrize("head", ["sparse", "dense"])
@pytest.mark.parametrize("which", ["adapter", "base"])
def test_authors_vectors(shared, head, which):
    expected = load_file(shared / "reference/expected.safetensors")
    ids, mask, want = (expected["input_ids"], expected["attention_mask"],
                       expected[f"{head}_{'base_' * (which == 'base')}reps"])
    r = Retriever.load(shared / "reference" / (f"{head}_adapter" if which == "adapter" else "base"),
                       head=head if which == "base" else None)
    assert r.head == head
    near = dict(rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(r(ids, mask), want, **near)
        for side in ("left", "right"):
            r.settings["padding_side"] = side
            torch.testing.assert_close(r(*r.pad(rows_of(ids, mask))), want, **near)
            # With more padding than needed.
            wide, wide_mask = (F.pad(x, (7, 0) if side == "left" else (0, 7))
                               for x in r.pad(rows_of(ids, mask)))
            torch.testing.assert_close(r(wide, wide_mask), want, **near)
            # Batches of one, without padding, in any order.
            for some in ([0], [4, 1], [3, 3, 2], list(range(4, -1, -1))):
                torch.testing.assert_close(
                    r(*r.pad([rows_of(ids, mask)[i] for i in some])), want[some], **near)
        torch.testing.assert_close(naive_reps(r, ids, mask), want, **near)


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_bf16_is_near(shared, head):
    expected = load_file(shared / "reference/expected.safetensors")
    r = Retriever.load(shared / f"reference/{head}_adapter", dtype=torch.bfloat16)
    got = r(expected["input_ids"], expected["attention_mask"])
    assert got.dtype == torch.float32
    assert torch.equal(got, r(expected["input_ids"], expected["attention_mask"]))
    error = (got - expected[f"{head}_reps"]).norm(dim=1) / expected[f"{head}_reps"].norm(dim=1)
    # The stated tolerance of bf16: 5% of a vector's length, on weights far wilder than a trained model's.
    assert error.max() < 0.05


# The mask


def test_a_causal_model_is_refused(tiny_model, monkeypatch):
    """transformers that ignores the switch, planted: the model builds its masks from a config that says
    causal."""
    ignores = lambda self, *a, forward=transformers.LlamaModel.forward, **kw: forward(
        self, *a, is_causal=True, **kw)
    monkeypatch.setattr(transformers.LlamaModel, "forward", ignores)
    with pytest.raises(ValueError, match="stays causal.*1 text without padding.*1 text padded left.*"
                                         "2 texts without padding.*2 texts padded right"):
        Retriever.load(tiny_model, head="sparse")


@pytest.mark.parametrize("only", [(1, False), (2, False), (1, True)])
def test_a_model_causal_in_one_kind_of_batch_is_refused(tiny_model, monkeypatch, only):
    """The faults that went unnoticed elsewhere: right with padding, causal without, or for a batch of one."""
    def sometimes(self, *a, forward=transformers.LlamaModel.forward, **kw):
        mask = kw["attention_mask"]
        return forward(self, *a, is_causal=(len(mask), not bool(mask.all())) == only, **kw)

    monkeypatch.setattr(transformers.LlamaModel, "forward", sometimes)
    with pytest.raises(ValueError, match="stays causal"):
        Retriever.load(tiny_model, head="sparse")


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral", "Gemma"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_other_decoders(tmp_path, family, attn):
    config = getattr(transformers, family + "Config")(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0)
    torch.manual_seed(1)
    getattr(transformers, family + "ForCausalLM")(config).save_pretrained(tmp_path)
    for head in ("sparse", "dense"):
        r = Retriever.load(tmp_path, head=head, attn=attn)
        ids, mask = r.pad([[5, 6, 7], [8, 9, 10, 11, 12], [13]])
        torch.testing.assert_close(r(ids, mask), naive_reps(r, ids, mask), rtol=1e-5, atol=1e-5)


def test_a_decoder_with_a_capped_head_is_refused(tmp_path):
    config = transformers.Gemma2Config(vocab_size=96, hidden_size=32, intermediate_size=48,
                                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                       head_dim=8, pad_token_id=0)
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        Retriever.load(tmp_path, head="sparse", attn="eager")


# The streaming head


# -1: many maxima are negative, and zero gradients arrive for them.
@pytest.mark.parametrize("sign", [1, -1])
def test_gradcheck(sign):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    # More words than one slice of 256.
    weight = torch.randn(300, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]])
    f = lambda h, w: torch.relu(sign * max_logits(h, w, mask))[:, ::7]
    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("frozen", [False, True])
# At 0 nearly every term is active, at -3 nearly none.
@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("shape", [(6, 30, 64, 3000, torch.float32), (34, 4, 4, 130_000, torch.float64)])
def test_streaming_equals_naive(frozen, shift, shape):
    torch.manual_seed(0)
    # The second has more sequences than backward takes at a time, and more words than forward does.
    B, L, D, V, dtype = shape
    hidden, weight, mask = (torch.randn(B, L, D, dtype=dtype), torch.randn(V, D, dtype=dtype) / D**0.5,
                            (torch.rand(B, L) < 0.7).long())
    mask[:, 0], mask[3] = 1, 1
    upstream = torch.randn(B, V, dtype=dtype)
    grads = []
    for head in (naive_max, max_logits):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        reps = torch.log1p(torch.relu(head(h, w, mask) + shift))
        reps.backward(upstream)
        grads.append((reps, h.grad, w.grad))
    for naive, streaming in zip(*grads):
        if naive is not None:
            torch.testing.assert_close(streaming, naive, rtol=1e-5, atol=1e-5)


def test_ties_have_one_winner():
    hidden = torch.ones(1, 4, 2, requires_grad=True)
    max_logits(hidden, torch.ones(3, 2), torch.ones(1, 4)).sum().backward()
    assert sorted(hidden.grad[0, :, 0].tolist()) == [0, 0, 0, 3]


def test_never_materialises_the_logits():
    """Neither pass makes a tensor near (B, L, V): the largest one that any operation returns is counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.numel())
            return out

    B, L, D, V = 16, 64, 8, 40_000
    hidden, weight, mask = torch.randn(B, L, D, requires_grad=True), torch.randn(V, D), torch.ones(B, L)
    threads = torch.get_num_threads()
    # With more threads the slices are longer.
    torch.set_num_threads(1)
    with Largest() as largest:
        torch.relu(max_logits(hidden, weight, mask) - 1).sum().backward()
    torch.set_num_threads(threads)
    assert largest.size <= max(2**20, 2 * B * V) < B * L * V / 30
    # The ruler can tell: it sees all logits where they are made.
    with Largest() as largest:
        naive_max(hidden, weight, mask)
    assert largest.size == B * L * V


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tiny_model, dtype):
    r = Retriever.load(tiny_model, head="sparse")
    ids, mask = r.pad(r.tokenize(TEXTS, "passage"))
    exact = r(ids, mask)
    exact.sum().backward()
    want = {n: p.grad.clone() for n, p in r.named_parameters()}
    r.zero_grad()
    with torch.autocast("cpu", dtype):
        reps = r(ids, mask)
    reps.sum().backward()
    assert reps.dtype == torch.float32
    assert (reps - exact).abs().max() < 0.05 * exact.max()
    for name, p in r.named_parameters():
        assert F.cosine_similarity(p.grad.flatten(), want[name].flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_of_the_whole_model(tmp_path, tie, lora):
    """Tied and untied, LoRA and full, with gradient checkpointing and without: against autograd through naive
    heads in float64."""
    config = LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie,
                         initializer_range=0.3)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    r = with_lora(tmp_path) if lora else Retriever.load(tmp_path, head="sparse")
    r.double().train()
    ids, mask = r.pad([[1, 2, 3, 4], [5, 6], [7, 8, 9]])
    for checkpointing in (False, True):
        if checkpointing:
            r.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        grads = []
        for reps in (lambda: r(ids, mask), lambda: naive_reps(r, ids, mask)):
            r.zero_grad()
            (reps() ** 2).sum().backward()
            grads.append({n: p.grad.clone() for n, p in r.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys() == {n for n, p in r.named_parameters() if p.requires_grad}
        assert all("lora_" in n for n in grads[0]) == lora
        for name in grads[0]:
            torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-6, atol=1e-8)


def test_fsdp2_and_ddp(tiny_model, tmp_path):
    """Sharded parameters and the reducer's hooks, on one process: the lm_head's weight is read while FSDP has
    it gathered."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for lora in (False, True):
            make = ((lambda: with_lora(tiny_model)) if lora
                    else (lambda: Retriever.load(tiny_model, head="sparse")))
            plain, sharded = make(), make()
            batch = plain.pad(plain.tokenize(TEXTS, "query"))
            for layer in sharded.llama.model.layers:
                fully_shard(layer)
            fully_shard(sharded)
            want = plain(*batch)
            for other in (DistributedDataParallel(make()), sharded):
                got = other(*batch)
                torch.testing.assert_close(got, want)
                got.sum().backward()
            want.sum().backward()
            for (name, p), q in zip(plain.named_parameters(), sharded.parameters()):
                if p.requires_grad:
                    torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-5)
            state = {k: v.full_tensor() for k, v in sharded.state_dict().items()}
            sharded.save(tmp_path / f"sharded{lora}", state)
            torch.testing.assert_close(Retriever.load(tmp_path / f"sharded{lora}")(*batch), want)
    finally:
        dist.destroy_process_group()


# Text


def test_tokenize_policy(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    bos, eos, word = (r.tokenizer.bos_token_id, r.tokenizer.eos_token_id,
                      lambda t: r.tokenizer(t, add_special_tokens=False)["input_ids"])
    text = TEXTS[0]
    # The paper's: BOS, no EOS, no prefix.
    assert r.tokenize([text], "query") == [[bos] + word(text)]
    assert r.tokenize([text], "query", 5) == [[bos] + word(text)[:4]]
    r.settings.update(add_eos=True, query_prefix="query: ", passage_prefix="passage: ", query_length=8)
    # Truncation keeps BOS and EOS.
    assert r.tokenize([text], "query") == [([bos] + word("query: " + text)[:6] + [eos])]
    assert r.tokenize([text], "passage") == [([bos] + word("passage: " + text) + [eos])]
    r.settings.update(add_bos=False)
    assert r.tokenize([""], "query", 3)[0][-1] == eos and len(r.tokenize([text], "query", 3)[0]) == 3
    with pytest.raises(ValueError, match="room"):
        r.tokenize([text], "query", 1)
    with pytest.raises(ValueError, match="'document'"):
        r.tokenize([text], "document")


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_encode_keeps_the_order_and_empty_texts(tiny_model, head):
    r = Retriever.load(tiny_model, head=head).train()
    texts = [TEXTS[0], "", TEXTS[1], *TEXTS, "a " * 500]
    told = []
    reps = r.encode(texts, "passage", tokens_per_batch=40, progress=told.append)
    assert sum(told) == len(texts) and len(told) == 5
    assert reps.layout == (torch.sparse_csr if head == "sparse" else torch.strided)
    assert r.training and reps.shape == (len(texts), r.width) and reps.dtype == torch.float32
    r.eval()
    one_by_one = torch.cat([r(*r.pad(r.tokenize([t], "passage"))) for t in texts]).detach()
    torch.testing.assert_close(reps.to_dense(), one_by_one, rtol=1e-5, atol=1e-5)
    # Then an empty text has no token at all: its vector is zero, and its neighbours' are not disturbed.
    r.settings["add_bos"] = False
    reps = r.encode(["", *TEXTS, ""], "passage").to_dense()
    assert (reps[0] == 0).all() and (reps[-1] == 0).all() and reps.isfinite().all()
    torch.testing.assert_close(reps[1:-1], r.encode(TEXTS, "passage").to_dense(), rtol=1e-5, atol=1e-5)
    out = r(*r.pad(r.tokenize(["", TEXTS[0]], "passage")))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in r.parameters() if p.grad is not None)
    assert r.encode([], "query").shape == (0, r.width)


def test_encode_keeps_the_heaviest_terms(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    whole, cut = r.encode(TEXTS, "passage").to_dense(), r.encode(TEXTS, "passage", top_terms=5)
    assert cut.crow_indices().tolist() == list(range(0, 31, 5))
    for row, kept in zip(whole, cut.to_dense()):
        assert torch.equal(kept[kept > 0].sort().values, row.topk(5).values.sort().values)


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_encode_refuses_nan_with_the_texts_place(tiny_model, head):
    r = Retriever.load(tiny_model, head=head)
    row = r.tokenizer("jamaica", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        r.llama.model.embed_tokens.weight[row] = float("nan")
    texts = ["the dog runs", TEXTS[4], "the dog runs in the park while the children play"]
    # Tied to the embeddings, the head has NaN for that word whatever the text: it gets weights of its own.
    if head == "sparse":
        r.llama.lm_head.weight = torch.nn.Parameter(torch.nan_to_num(r.llama.lm_head.weight.detach()))
    with pytest.raises(ValueError, match="text 1: the model gives NaN"):
        r.encode(texts, "passage")


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_rank_and_top_terms(tiny_model, head):
    r = Retriever.load(tiny_model, head=head)
    query = "hurricane season"
    found = r.rank(query, TEXTS + TEXTS[:1])
    scores = (r.encode([query], "query").to_dense() @ r.encode(TEXTS + TEXTS[:1], "passage").to_dense().T)[0]
    # A tie goes to the earlier text.
    assert [place for place, _ in found] == sorted(range(7), key=lambda i: (-float(scores[i]), i))
    assert [score for _, score in found] == pytest.approx(sorted(scores.tolist(), reverse=True), rel=1e-5)
    reps = r.encode(TEXTS, "passage")
    if head == "dense":
        with pytest.raises(ValueError, match="no terms"):
            r.top_terms(reps[0])
    else:
        terms = r.top_terms(reps[0], 7)
        assert terms == r.top_terms(reps.to_dense()[0], 7) and len(terms) == 7
        best = reps.to_dense()[0].topk(7)
        assert terms == [(r.tokenizer.decode([t]), w)
                         for t, w in zip(best.indices.tolist(), best.values.tolist())]


def test_origins_are_where_the_whole_logits_peak(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    pieces, places = origins(r, TEXTS[4], "query", [5, 70, 200, 399])
    ids, mask = r.pad(r.tokenize([TEXTS[4]], "query"))
    assert "".join(pieces[1:]) == TEXTS[4]
    assert (places
            == r.llama(input_ids=ids, attention_mask=mask).logits[0].argmax(0)[[5, 70, 200, 399]].tolist())


def test_longest_first():
    lengths = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for tokens, most in ((100, None), (1, None), (400, 3)):
        batches = longest_first(lengths, tokens, most)
        order = [i for batch in batches for i in batch]
        assert order == sorted(range(200), key=lambda i: -lengths[i])
        for batch in batches:
            assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= tokens and len(batch) <= (most or 200)


def test_mntp_logits_at_positions(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    ids, mask = r.pad(r.tokenize(TEXTS[:3], "passage"))
    at = torch.zeros_like(mask, dtype=torch.bool)
    at[0, -2] = at[2, -1] = at[2, -3] = True
    torch.testing.assert_close(
        r(ids, mask, at=at), r.llama(ids, attention_mask=mask).logits[at], rtol=1e-4, atol=1e-4)


# LoRA and files


@pytest.mark.parametrize("head", ["sparse", "dense"])
@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_opens_in_peft(tiny_model, tmp_path, head, rslora):
    from peft import PeftModel

    r = with_lora(tiny_model, head, rslora=rslora)
    r.save(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.is_causal = False
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model, config=config), tmp_path).eval()
    batch = r.pad(r.tokenize(TEXTS, "passage"))
    wrapped = Retriever(theirs.base_model.model, r.tokenizer, {"head": head})
    torch.testing.assert_close(wrapped(*batch), r(*batch), rtol=1e-5, atol=1e-5)
    # It is not the base.
    assert (r(*batch) - Retriever.load(tiny_model, head=head)(*batch)).abs().max() > 1e-3
    torch.testing.assert_close(Retriever.load(tmp_path)(*batch), r(*batch))


@pytest.mark.parametrize("headless", [False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear", r".*\.(up|down)_proj"])
def test_pefts_adapter_opens_here(tiny_model, tmp_path, headless, targets):
    from peft import LoraConfig, get_peft_model

    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.is_causal = False
    auto = transformers.AutoModel if headless else AutoModelForCausalLM
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights="gaussian")
    theirs = get_peft_model(auto.from_pretrained(tiny_model, config=config), lora)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.eval().save_pretrained(tmp_path)
    r = Retriever.load(tmp_path, head="dense", base=tiny_model)
    ids, mask = r.pad(r.tokenize(TEXTS, "query"))
    inner = theirs if headless else theirs.base_model.model.model
    want = inner(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(r.hidden(ids, mask)[mask.bool()], want[mask.bool()], rtol=1e-5, atol=1e-4)


def test_merge_and_what_save_writes(tiny_model, tmp_path):
    r = with_lora(tiny_model)
    batch = r.pad(r.tokenize(TEXTS, "query"))
    want = r(*batch)
    r.save(tmp_path / "adapter")
    torch.testing.assert_close(r.merge()(*batch), want, rtol=1e-5, atol=1e-5)
    r.save(tmp_path / "merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    torch.testing.assert_close(Retriever.load(tmp_path / "merged")(*batch), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to fold"):
        r.merge()
    assert not (tmp_path / "adapter/model.safetensors").exists()
    # Fine-tuning goes on with the adapter, and with nothing else.
    again = Retriever.load(tmp_path / "adapter")
    again.train()
    assert ({n for n, p in again.named_parameters() if p.requires_grad}
            == {n for n, _ in again.named_parameters() if "lora_" in n})
    with pytest.raises(ValueError, match="already"):
        again.add_lora()
    torch.testing.assert_close(Retriever.load(tiny_model, adapter=tmp_path / "adapter")(*batch), want)


def test_a_fresh_adapter_changes_nothing_and_drops_out_in_training_only(tiny_model):
    r = Retriever.load(tiny_model, head="dense")
    batch = r.pad(r.tokenize(TEXTS, "query"))
    want = r(*batch)
    r.add_lora(dropout=0.5)
    torch.testing.assert_close(r(*batch), want)
    r = with_lora(tiny_model, "dense", dropout=0.5)
    torch.testing.assert_close(r(*batch), r(*batch))
    assert (r.train()(*batch) - r(*batch)).abs().max() > 1e-4


def test_adapter_as_bin_and_on_a_relative_base(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "base")
    r = with_lora(tmp_path / "base")
    r.save(tmp_path / "adapter")
    folder = tmp_path / "adapter"
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    edit_json(folder / "retriever.json", files={})
    edit_json(folder / "adapter_config.json", base_model_name_or_path="../base")
    batch = r.pad(r.tokenize(TEXTS, "query"))
    torch.testing.assert_close(Retriever.load(folder)(*batch), r(*batch))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ValueError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        Retriever.load(folder)


@pytest.fixture
def adapter(tiny_model, tmp_path):
    with_lora(tiny_model).save(tmp_path / "adapter")
    return tmp_path / "adapter"


OPTIONS = [
    {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"lora_bias": True},
    {"fan_in_fan_out": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}},
    {"layers_to_transform": [0]}, {"init_lora_weights": "pissa"}, {"peft_type": "IA3"},
    {"some_option_of_next_year": 1},
]


@pytest.mark.parametrize("option", OPTIONS)
def test_adapter_options_are_refused_by_name(adapter, option):
    edit_json(adapter / "adapter_config.json", **option)
    with pytest.raises(ValueError, match=next(iter(option))):
        Retriever.load(adapter)


def test_an_adapter_is_no_base(adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    for base in ({"adapter": other}, {"base": other}):
        with pytest.raises(ValueError, match="is an adapter itself, so .* has no base to go on"):
            Retriever.load(adapter, **base)


def test_adapter_mismatches_name_the_keys(adapter, tiny_model, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    a_key = next(iter(weights))
    name = a_key.removeprefix("base_model.model.").removesuffix(".weight")
    for broken, says in (
        ({k: v for k, v in weights.items() if k != a_key}, f"{name} is nothing, where .* needs \\(4, "),
        ({**weights, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)},
         r"model.layers.9.mlp.up_proj.lora_A is \(2, 2\), where .* needs nothing"),
        ({**weights, a_key: weights[a_key][:, :-1].contiguous()}, f"{name} is .*, where .* needs \\(4, ")):
        save_file(broken, adapter / "adapter_model.safetensors")
        edit_json(adapter / "retriever.json", files={})
        with pytest.raises(ValueError, match=says):
            Retriever.load(adapter)
    save_file(weights, adapter / "adapter_model.safetensors")
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(0)
    # The same shapes, as if trained a little further.
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.03 * p.std() * torch.randn_like(p))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another base.*--base"):
        Retriever.load(adapter, base=tmp_path / "other")
    # A rounded base is not another one.
    Retriever.load(adapter, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_bidirectional_in_transformers(tiny_model, tmp_path, dtype):
    Retriever.load(tiny_model, head="sparse", dtype=dtype).save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    r = Retriever(theirs.eval(), None, {"head": "sparse"})
    assert model.causal_batches(r) == []
    ids = torch.tensor([[3, 4, 5, 6]])
    a, b = (theirs(torch.tensor([[3, 4, 5, x]])).logits[0, 0] for x in (6, 7))
    assert not torch.equal(a, b)
    torch.testing.assert_close(Retriever.load(tmp_path, dtype=dtype)(ids, torch.ones_like(ids)),
                               r(ids, torch.ones_like(ids)))


def test_settings_come_from_the_checkpoint(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="--head"):
        Retriever.load(tiny_model)
    r = Retriever.load(tiny_model, head="dense")
    # The paper's.
    assert {k: r.settings[k] for k in ("query_length", "passage_length", "add_bos", "add_eos",
                                       "padding_side")} == {
        "query_length": 64, "passage_length": 192, "add_bos": True, "add_eos": False, "padding_side": "left"}
    r.settings.update(passage_length=33, query_prefix="q ")
    r.save(tmp_path)
    again = Retriever.load(tmp_path)
    assert again.settings == {**r.settings, "base": str(tmp_path)}
    edit_json(tmp_path / "retriever.json", querry_prefix="q ")
    with pytest.raises(ValueError, match="querry_prefix"):
        Retriever.load(tmp_path)
    with pytest.raises((OSError, ValueError), match="no_such_folder"):
        Retriever.load(tmp_path / "no_such_folder", head="sparse")


# FLOPs


def flops_of_addmm(out, a, b, **kw):
    """y.addmm_(a, b), from the shapes."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("lora_r", [0, 8])
def test_flops_against_torchs_counter(tie, lora_r):
    # Eager: the counter does not know the CPU's fused attention.
    config = LlamaConfig(vocab_size=900, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie,
                         attn_implementation="eager")
    config.is_causal = False
    for head in ("sparse", "dense", "mntp"):
        r = Retriever(LlamaForCausalLM(config), None, {"head": "sparse" if head == "mntp" else head})
        if lora_r:
            r.add_lora(lora_r, dropout=0.0)
        r.train()
        ids = torch.randint(900, (4, 40))
        at = (torch.arange(160).view(4, 40) % 5 == 0) if head == "mntp" else None
        for train in (False, True):
            # The counter knows this product by its other name only.
            mapping = {torch.ops.aten.addmm_: flops_of_addmm}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                out = r(ids, torch.ones_like(ids), at=at)
                if train:
                    out.sum().backward()
            ours = 160 * flops_per_token(config, 40, head, train, lora_r)
            assert abs(ours / counter.get_total_flops() - 1) < 0.02, (head, train)


def test_share_of_the_sparse_head():
    llama = lambda **kw: LlamaConfig(vocab_size=128256, num_key_value_heads=8, **kw)
    # Llama's 1B, 3B and 8B: what the sparse head adds to the FLOPs -> the shape.
    shapes = {0.27: dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, head_dim=64),
              0.14: dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                         num_attention_heads=24, head_dim=128),
              0.08: dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, head_dim=128)}
    for share, shape in shapes.items():
        sparse, dense = (flops_per_token(llama(**shape), 1, h) for h in ("sparse", "dense"))
        assert sparse / dense - 1 == pytest.approx(share, abs=0.006)


# The table of heads, and the threshold


def last_token(r, hidden, mask):
    """A toy head: the hidden state of each text's last real token."""
    last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
    return hidden[torch.arange(len(hidden)), last].float()


def test_a_toy_head_is_one_function_and_one_row(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(model.HEADS, "last", model.Head(last_token, False, "hidden_size", 0.05, None))
    r = Retriever.load(tiny_model, head="last")
    assert r.width == 32 and not r.sparse
    reps = r.encode(TEXTS, "passage")
    for text, rep in zip(TEXTS, reps):
        ids = torch.tensor(r.tokenize([text], "passage"))
        torch.testing.assert_close(
            rep, r.llama.model(input_ids=ids).last_hidden_state[0, -1], rtol=1e-5, atol=1e-5)
    assert flops_per_token(r.llama.config, 10, "last") == flops_per_token(r.llama.config, 10, "dense")
    r.save(tmp_path)
    # No class of sentence-transformers computes it.
    assert not (tmp_path / "modules.json").exists()
    torch.testing.assert_close(Retriever.load(tmp_path).encode(TEXTS, "passage"), reps)
    assert (r.rank(TEXTS[0], TEXTS)[0][1]
            == pytest.approx(float((r.encode(TEXTS[:1], "query") @ reps.T).max())))


def test_an_unknown_head_is_refused_with_those_there_are(tiny_model):
    with pytest.raises(ValueError, match="'first'.*sparse.*dense"):
        Retriever.load(tiny_model, head="first")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37])
def test_calibrate_is_the_quantile_of_the_largest_logits(tiny_model, share):
    r = Retriever.load(tiny_model, head="sparse")
    texts = [f"{TEXTS[i % 6]} {TEXTS[(i * 7 + 1) % 6][: i % 40]} {i}" for i in range(120)]
    ids, mask = r.pad(r.tokenize(texts, "passage"))
    largest = naive_max(r.hidden(ids, mask), r.llama.lm_head.weight, mask).detach()
    r.calibrate(texts, share, tokens_per_batch=400)
    torch.testing.assert_close(r.threshold, largest.quantile(1 - share, dim=0), rtol=1e-5, atol=1e-5)
    want = torch.log1p(torch.relu(largest - r.threshold) * 32**-0.25)
    got = r.encode(texts, "passage").to_dense()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got > 1e-5).float().mean() == pytest.approx(share, abs=0.02)


def test_calibrate_refuses_a_share_that_is_none(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    for share in (0, 1, -0.1, 0.01):
        with pytest.raises(ValueError, match="share"):
            r.calibrate(TEXTS, share)


@pytest.mark.parametrize("lora", [False, True])
def test_the_threshold_stays_with_the_checkpoint(tiny_model, tmp_path, lora):
    r = with_lora(tiny_model) if lora else Retriever.load(tiny_model, head="sparse")
    plain = r.encode(TEXTS, "passage").to_dense()
    r.calibrate(TEXTS, 0.4)
    want = r.encode(TEXTS, "passage").to_dense()
    assert (want > 0).sum() < 0.6 * (plain > 0).sum()
    r.save(tmp_path / "one")
    again = Retriever.load(tmp_path / "one", dtype=torch.float32)
    torch.testing.assert_close(again.threshold, r.threshold, rtol=0, atol=0)
    torch.testing.assert_close(again.encode(TEXTS, "passage").to_dense(), want)
    # Merged into one model it stays, too.
    if lora:
        again.merge().save(tmp_path / "merged")
        again = Retriever.load(tmp_path / "merged")
        torch.testing.assert_close(again.encode(TEXTS, "passage").to_dense(), want, rtol=1e-4, atol=1e-4)
    # Files for other libraries are tools.hub's to write.
    assert not (tmp_path / "one/modules.json").exists()
    assert Retriever.load(tmp_path / "one", dtype=torch.bfloat16).threshold.dtype == torch.float32


# What load refuses, with the cure


def small(family, **kw):
    """A random model of another family, of a few kilobytes."""
    config = getattr(transformers, family + "Config")(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
           "eos_token_id": 2, **kw})
    torch.manual_seed(1)
    kind = transformers.AutoModelForSeq2SeqLM if family == "T5" else AutoModelForCausalLM
    return kind.from_config(config)


OTHERS = ["GPTNeoX", "OPT", "GPT2", "Phi", "Starcoder2", "Falcon", "Qwen3Moe", "Bert"]


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_of_another_layout_is_refused_with_those_that_work(tmp_path, family):
    small(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not laid out as Llama's.*Qwen3.*Phi-3"):
        Retriever.load(tmp_path, head="sparse")


def test_an_encoder_and_decoder_is_refused(tmp_path):
    small("T5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model cannot be read.*language model"):
        Retriever.load(tmp_path, head="sparse")


@pytest.mark.parametrize("family", ["Phi3", "Gemma3Text", "Olmo", "Olmo2", "SmolLM3", "Glm4", "Granite"])
def test_families_that_work_and_learn_in_all_their_layers(tmp_path, family):
    kw = {"logits_scaling": 1.0} if family == "Granite" else {}
    small(family, head_dim=8, **kw).save_pretrained(tmp_path)
    r = Retriever.load(tmp_path, head="dense")
    ids, mask = r.pad([[5, 6, 7], [8, 9, 10, 11, 12], [13]])
    torch.testing.assert_close(r(ids, mask), naive_reps(r, ids, mask), rtol=1e-5, atol=1e-5)
    linears = {n for n, m in r.llama.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    # Phi3's are called qkv_proj and gate_up_proj, and half of its layers were left out silently.
    r.add_lora(2)
    adapted = {n.removesuffix(".lora_A") for n, p in r.llama.named_parameters() if n.endswith("lora_A")}
    assert adapted == linears
    r.save(tmp_path / "adapter")
    Retriever.load(tmp_path / "adapter")


def test_gemma2_wants_eager_and_a_dense_head(tmp_path):
    small("Gemma2", head_dim=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--attn eager"):
        Retriever.load(tmp_path, head="dense")
    with pytest.raises(ValueError, match="final_logit_softcapping.*--head dense"):
        Retriever.load(tmp_path, head="sparse", attn="eager")
    r = Retriever.load(tmp_path, head="dense", attn="eager")
    ids, mask = r.pad([[5, 6, 7], [8, 9]])
    torch.testing.assert_close(r(ids, mask), naive_reps(r, ids, mask), rtol=1e-5, atol=1e-5)


@pytest.fixture
def saved(tiny_model, tmp_path):
    Retriever.load(tiny_model, head="sparse").save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_flipped_byte_in_the_weights_is_found(saved, adapter):
    for file in (saved / "model.safetensors", adapter / "adapter_model.safetensors"):
        data = bytearray(file.read_bytes())
        data[-7] ^= 16
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{file.name}: altered.*copy or train"):
            Retriever.load(file.parent)


def test_a_copy_is_not_an_alteration(saved, tmp_path):
    # copyfile, unlike copy2, gives the files the time of now.
    shutil.copytree(saved, tmp_path / "copy", copy_function=shutil.copyfile)
    Retriever.load(tmp_path / "copy")


def test_damaged_files_are_named(saved, tiny_model, adapter):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    # Without checksums, as in a folder that others wrote.
    edit_json(saved / "retriever.json", files={})
    with pytest.raises(ValueError, match=f"{saved}: the model cannot be read.*fetch or copy"):
        Retriever.load(saved)
    tokenizer = saved / "tokenizer.json"
    shutil.copy(f"{tiny_model}/model.safetensors", weights)
    tokenizer.write_text(tokenizer.read_text()[:300])
    with pytest.raises(ValueError, match=f"{saved}: the tokenizer cannot be read.*fetch or copy"):
        Retriever.load(saved)
    for file in (saved / "config.json", saved / "retriever.json", adapter / "adapter_config.json"):
        file.write_text('{"a": ')
        with pytest.raises(ValueError, match=str(file.parent)):
            Retriever.load(file.parent)


def test_a_tokenizer_without_a_padding_token(tiny_model):
    """Nor an end, which would do. Which token pads is of no matter: it is masked."""
    r = Retriever.load(tiny_model, head="sparse")
    before = r.encode(TEXTS, "passage").to_dense()
    r.tokenizer.pad_token = r.tokenizer.eos_token = None
    assert r.tokenizer.pad_token_id is None and torch.equal(r.encode(TEXTS, "passage").to_dense(), before)


def test_places_that_are_not_there_or_not_finished(saved, adapter, tmp_path):
    with pytest.raises(ValueError, match="no/such/folder: no such folder"):
        Retriever.load("no/such/folder")
    with pytest.raises(ValueError, match="config.json: no such folder"):
        Retriever.load(saved / "config.json")
    (saved / "args.json").write_text("{}")  # another trainer's
    Retriever.load(saved)
    (saved / "args.json").write_text('{"arguments": {}}')
    with pytest.raises(ValueError, match="not finished: give its command --resume$"):
        Retriever.load(saved)
    (saved / "best").mkdir()
    with pytest.raises(ValueError, match="not finished.*--resume.*best"):
        Retriever.load(saved)
    (saved / "summary.json").write_text("{}")
    Retriever.load(saved)
    # As the authors' 8B adapters, whose base is a path on their machine.
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/scratch/theirs/Meta-Llama-3-8B")
    with pytest.raises(ValueError, match="/scratch/theirs.*--base meta-llama/Meta-Llama-3-8B"):
        Retriever.load(adapter)


@pytest.mark.parametrize("wrong", [{"padding_side": "middle"}, {"query_length": "x"}, {"passage_length": 0},
                                   {"add_bos": 1}, {"query_prefix": None}, {"passage_length": 1.5}])
def test_settings_have_values_that_they_can_have(saved, wrong):
    edit_json(saved / "retriever.json", **wrong)
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"retriever.json: {name} is {value!r}, expected"):
        Retriever.load(saved)


def test_a_tokenizer_larger_than_the_model(saved):
    edit_json(saved / "config.json", vocab_size=300)
    smaller = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(saved))
    smaller.save_pretrained(saved)
    edit_json(saved / "retriever.json", files={})
    with pytest.raises(ValueError, match="tokenizer has 400 entries, the model 300"):
        Retriever.load(saved)


def test_weights_are_as_readable_as_their_neighbours(saved, adapter):
    for folder in (saved, adapter):
        modes = {file.stat().st_mode for file in folder.iterdir() if file.is_file()}
        assert len(modes) == 1, modes


def test_loaded_on_the_meta_device_it_has_shapes_and_no_memory(adapter, saved):
    for folder in (adapter, saved):
        whole, empty = Retriever.load(folder), Retriever.load(folder, device="meta")
        assert all(p.is_meta for p in empty.parameters())
        shapes = [{n: (p.shape, p.dtype, p.requires_grad) for n, p in r.named_parameters()}
                  for r in (whole, empty)]
        assert shapes[0] == shapes[1] and empty.settings == whole.settings and empty.lora == whole.lora
        assert empty.tokenize(TEXTS, "query") == whole.tokenize(TEXTS, "query")
        assert empty.base_print == whole.base_print
    empty.add_lora(2)
