"""tools/check.py on healthy checkpoints and on planted faults."""
import pytest
import torch
from conftest import run
from test_model import adapter, edit_json  # noqa: F401 (a fixture)

from model import Retriever
from tools.check import check, main


def verdicts(r, folder=None):
    return {what: verdict for verdict, what, _ in check(r, folder)}


def trained_looking(path):
    """A sparse retriever with about a tenth of the vocabulary active: the other words' rows are zero."""
    r = Retriever.load(path, head="sparse")
    torch.manual_seed(0)
    weight = torch.randn_like(r.llama.lm_head.weight) * 0.2
    weight[torch.rand(len(weight)) < 0.9] = 0
    r.llama.lm_head.weight = torch.nn.Parameter(weight)
    return r


def test_check_passes_the_healthy(tiny_model, tmp_path):
    got = verdicts(trained_looking(tiny_model))
    assert (set(got.values()) == {"ok", "info"}
            and {"bidirectional", "padding", "dead", "saturated", "BOS", "top terms"} <= got.keys())
    assert set(verdicts(Retriever.load(tiny_model, head="dense")).values()) == {"ok"}


def test_check_catches_planted_faults(tiny_model, tmp_path, adapter):
    r = trained_looking(tiny_model)
    r.llama.config.is_causal = True
    assert verdicts(r)["bidirectional"] == "FAIL"

    r = trained_looking(tiny_model)
    plain = r.hidden
    # A mask of ones: attention sees the padding.
    r.hidden = lambda ids, mask: plain(ids, torch.ones_like(mask))
    assert verdicts(r)["padding"] == "FAIL"

    r = trained_looking(tiny_model)
    with torch.no_grad():
        r.llama.lm_head.weight.zero_()
    assert verdicts(r)["dead"] == "FAIL"

    # Untrained: everything is active.
    assert verdicts(Retriever.load(tiny_model, head="sparse"))["saturated"] == "warn"

    r = trained_looking(tiny_model)
    shouts, usual = torch.full((r.llama.config.hidden_size,), 10.0), r.hidden
    # Every term is loudest at the first real token, BOS, wherever the padding stands.
    r.hidden = lambda ids, mask: torch.where(
        (mask.cumsum(1) * mask == 1)[..., None], shouts, usual(ids, mask))
    r.llama.lm_head.weight.data.abs_()
    assert verdicts(r)["BOS"] == "warn"

    r = Retriever.load(tiny_model, head="dense")
    # All words are one word, and so all texts alike.
    with torch.no_grad():
        r.llama.model.embed_tokens.weight[:] = r.llama.model.embed_tokens.weight[5]
    assert verdicts(r)["collapse"] == "warn"

    assert verdicts(Retriever.load(adapter), adapter)["adapter"] == "ok"
    edit_json(adapter / "retriever.json", base_print=None)
    assert verdicts(Retriever.load(adapter), adapter)["adapter"] == "warn"

    Retriever.load(tiny_model, head="sparse").save(tmp_path / "full")
    assert verdicts(Retriever.load(tmp_path / "full"), tmp_path / "full")["config.json"] == "ok"
    edit_json(tmp_path / "full/config.json", is_causal=True)
    assert verdicts(Retriever.load(tmp_path / "full"), tmp_path / "full")["config.json"] == "warn"


def test_check_on_the_command_line(adapter, capsys):
    done = run("-m", "tools.check", adapter)
    assert ("ok    bidirectional" in done.stdout and "ok    adapter" in done.stdout
            and "top terms" in done.stdout)
    edit_json(adapter / "retriever.json", base_print=[1.0, 2.0])
    with pytest.raises(SystemExit, match="True"):
        main([str(adapter)])
    assert "FAIL  load" in (out := capsys.readouterr().out) and "another base" in out


def test_a_store_is_read_through(corpus, tmp_path, capsys):
    """A flipped byte that keeps size and time passes at opening, and is found here."""
    import os
    import shutil

    from data import Corpus

    folder = shutil.copytree(corpus, tmp_path / "c", ignore=shutil.ignore_patterns("*.store", "*.lock"))
    store = Corpus(folder).store.place
    main([str(store)])
    text, times = store / "text", os.stat(store / "text")
    content = bytearray(text.read_bytes())
    content[50] ^= 1
    text.write_bytes(content)
    # The time of before: size and time are all that opening looks at.
    os.utime(text, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(store)])
    assert error.value.code == 1 and "altered since it was written" in capsys.readouterr().out
