"""tools/plan.py: what it says of memory against what autograd really keeps, and of steps against the
paper's."""
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from model import HEADS, Retriever
from tools import plan

WORDS = ["--model", "1b", "--objective", "cl", "--queries_per_step", "8", "--negatives", "3",
         "--max_steps", "10", "--dtype", "fp32", "--device", "cpu"]


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_activations_are_those_that_autograd_keeps(head, lora_rank):
    """The oracle: saved-tensor hooks around a real forward of three blocks and the head, on the CPU."""
    config = LlamaConfig(vocab_size=3000, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    config.is_causal = False
    args = plan.parse([*WORDS, "--head", head, "--lora_rank", str(lora_rank), "--lora_dropout", "0.1"])
    texts, length = 6, 48
    said = plan.activations(config, args, texts, length)

    r = Retriever(LlamaForCausalLM(config), None, {"head": head}).train()
    if lora_rank:
        r.add_lora(lora_rank, args.lora_alpha, args.lora_dropout)
    ids = torch.randint(3000, (texts, length))
    with plan.Saved(r) as saved:
        reps = r(ids, torch.ones_like(ids))
    reps.sum().backward()
    expected = said["block"] * texts * length * 3 + said["head"] * texts
    # What lies around the blocks, embeddings and the last norm, is not counted; attention without its fused
    # kernel keeps a little more.
    assert expected == pytest.approx(saved.bytes, rel=0.2)
    # The width, in fp32.
    assert said["input"] == 64 * 4


def test_an_adapter_is_planned_by_its_base(tiny_model, tmp_path):
    r = Retriever.load(tiny_model, head="sparse")
    r.add_lora()
    r.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter/config.json").exists()
    assert plan.config_of(str(tmp_path / "adapter")).hidden_size == 32


@pytest.mark.parametrize("family", ["MistralConfig", "Qwen3Config", "Gemma2Config", "GraniteConfig"])
def test_other_families_are_planned_by_their_shape(family, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, vocab_size=500)
    getattr(transformers, family)(**sizes).save_pretrained(tmp_path)
    config = plan.config_of(str(tmp_path))
    assert {name: getattr(config, name) for name in sizes} == sizes
    words = ["--model", str(tmp_path), "--head", "dense", "--objective", "cl", "--max_steps", "1"]
    assert sum(plan.memory(config, plan.parse(words), 1).values()) > 0


def test_paths_are_those_of_the_folder_that_it_is_typed_in(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "here")
    words = "--plan --model here --head dense --objective cl --max_steps 1".split()
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "here dense cl: 1 steps" in done.stdout


def test_the_papers_steps_and_budget():
    """33,250 steps of the 1B's CL; parameters x passages are 69 to 88 x 10^15 in every cell (paper.md)."""
    for size, (queries, epochs, kd_queries, kd_epochs) in plan.PAPER.items():
        config = plan.config_of(size)
        with torch.device("meta"):
            n = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
        for objective, per_step, e, passages in (("cl", queries, epochs, 17),
                                                 ("kd", kd_queries, kd_epochs, 2)):
            words = ["--model", size, "--head", "sparse", "--objective", objective,
                     "--queries_per_step", per_step, "--epochs", e]
            steps = plan.steps_of(plan.parse(words), 0.0)
            assert 69e15 * 0.9 < n * steps * int(per_step) * passages < 88e15 * 1.1
            if (size, objective) == ("1b", "cl"):
                assert steps == 33_250


def test_the_default_step_of_the_1b_fits_80_gb_and_without_recomputing_it_does_not():
    words = ["--model", "1b", "--head", "sparse", "--objective", "cl", "--max_steps", "1"]
    config = plan.config_of("1b")
    fits, kept = (sum(plan.memory(config, plan.parse(more), 4).values()) for more in
                  (words, [*words, "--recompute", "0"]))
    assert fits < 0.5 * 80e9 < 80e9 < kept


def test_the_command_loads_nothing_and_says_it_all(capsys):
    plan.main(["--model", "8b", "--head", "dense", "--objective", "kd", "--rows", "491000",
               "--parallel", "fsdp"])
    said = capsys.readouterr().out
    assert "steps of 512 queries" in said.replace(",", "") or "steps of 1,024 queries" in said
    assert all(part in said
               for part in ("weights", "activations", "head", "together", "1 devices", "8 devices"))
    assert HEADS["dense"].width == "hidden_size"
