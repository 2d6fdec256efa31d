"""losses.py against plain Python loops, against the authors' own numbers, and one process against four."""
import json
import math
import sys

import pytest
import torch
import torch.distributed as dist

from conftest import TEXTS, read_jsonl, torchrun
import losses
from losses import contrastive, false_negatives, flops, kl, margin_mse, mntp, objective, ramp


def batch(queries=8, passages=3, width=12):
    """A batch in which passages come back: 8 queries, 24 passages drawn from 15 ids, so that false negatives
    and duplicates abound."""
    g = torch.Generator().manual_seed(1)
    q, d = torch.rand(queries, width, generator=g), torch.rand(queries * passages, width, generator=g) - 0.3
    docids = torch.randint(15, (queries * passages,), generator=g) - 7  # hashes may be negative
    positives = torch.stack([docids[::passages], torch.randint(15, (queries,), generator=g) - 7], 1)
    return q, d, torch.randn(queries, passages, generator=g) * 3, docids, positives


def by_loops(name, q, d, teacher, docids=None, positives=None, T=1.0, weights=(0.0, 0.0)):
    """The formulas of the paper, in floats and for loops."""
    q, d, teacher = q.double().tolist(), d.double().tolist(), teacher.double().tolist()
    G = len(d) // len(q)
    s = [[sum(a * b for a, b in zip(x, y)) / T for y in d] for x in q]
    cl = divergence = margin = 0.0
    for i, row in enumerate(s):
        known = set(positives[i].tolist()) if positives is not None else set()
        # Everyone else's passages and our own negatives, apart from what is known to be relevant.
        others = [row[j] for j in range(len(d))
                  if j != i * G and (docids is None or docids[j].item() not in known)]
        cl += math.log(sum(math.exp(x) for x in [row[i * G], *others])) - row[i * G]
        own = row[i * G:(i + 1) * G]
        zs, zt = sum(map(math.exp, own)), sum(map(math.exp, teacher[i]))
        divergence += sum(math.exp(t) / zt * (math.log(math.exp(t) / zt) - math.log(math.exp(x) / zs))
                          for x, t in zip(own, teacher[i]))
        margin += sum(((own[0] - x) - (teacher[i][0] - t)) ** 2
                      for x, t in zip(own[1:], teacher[i][1:])) / (G - 1)
    total = {"cl": cl, "kd": margin, "cl+kd": 0.5 * (cl + divergence)}[name] / len(q)
    for reps, weight in ((q, weights[0]), (d, weights[1])):
        total += weight * sum((sum(abs(row[v]) for row in reps) / len(reps)) ** 2
                              for v in range(len(reps[0])))
    return total


@pytest.mark.parametrize("name", ["cl", "kd", "cl+kd"])
@pytest.mark.parametrize("guarded", [False, True])
def test_objectives_equal_plain_loops(name, guarded):
    q, d, teacher, docids, positives = batch()
    ids = dict(docids=docids, positives=positives) if guarded else {}
    loss, _ = objective(name, q, d, temperature=0.3, teacher=teacher, flops_weights=(0.5, 0.4), **ids)
    assert loss.item() == pytest.approx(by_loops(name, q, d, teacher, T=0.3, weights=(0.5, 0.4), **ids),
                                        rel=1e-5)


def test_false_negatives_by_hand():
    # Two queries of three passages: 1 is the positive of both, 2 a positive known to the second.
    docids = torch.tensor([1, 2, 3, 1, 4, 2])
    ignore = false_negatives(docids, torch.tensor([[1, 1], [1, 2]]))
    assert ignore.tolist() == [[True, False, False, True, False, False],
                               [True, True, False, True, False, True]]
    scores = torch.zeros(2, 6)
    # With equal scores a loss is the logarithm of how many passages are left. The positive itself stays:
    # 1 + 4 passages for the first query, 1 + 2 for the second.
    assert (contrastive(scores, torch.tensor([0, 3]), ignore).item()
            == pytest.approx((math.log(5) + math.log(3)) / 2))
    assert contrastive(scores, torch.tensor([0, 3])).item() == pytest.approx(math.log(6))


def test_ramp_mntp_and_authors_weighting():
    # The ramp is quadratic: half of the way is a quarter of the weight. Without a ramp the weight is whole.
    assert (ramp(15, 30, 0.04) == pytest.approx(0.01) and ramp(30, 30, 0.04) == ramp(999, 30, 0.04) == 0.04
            and ramp(1, 0, 0.04) == 0.04)
    logits, labels = (torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
                      torch.tensor([0, 1, 2, 3, 4, 0, 1]))
    by_hand = -sum(math.log(math.exp(row[y]) / sum(map(math.exp, row)))
                   for row, y in zip(logits.double().tolist(), labels.tolist()))
    assert mntp(logits, labels, 3.5).item() == pytest.approx(by_hand / 3.5, rel=1e-5)
    # In the authors' code these two terms shrink with the number of devices, and KL does not: see losses.py.
    q, d, teacher, *_ = batch()
    _, ours = objective("cl+kd", q, d, teacher=teacher, flops_weights=(1, 1))
    _, theirs = objective("cl+kd", q, d, teacher=teacher, flops_weights=(1, 1), devices=4)
    assert theirs["cl"] * 4 == ours["cl"] and theirs["reg"] * 4 == ours["reg"] and theirs["kl"] == ours["kl"]


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_the_authors_numbers(shared, head):
    from safetensors.torch import load_file

    from model import Retriever
    folder = shared / "reference"
    want = load_file(folder / "expected.safetensors")
    r = Retriever.load(folder / f"{head}_adapter", base=folder / "base", head=head).eval()
    with torch.no_grad():
        q, d = (r(want[k], torch.ones_like(want[k])) for k in ("q_ids", "d_ids"))
    T = 0.01 if head == "dense" else 1.0
    own = torch.einsum("bv,bgv->bg", q, d.view(2, 3, -1)) / T
    close = lambda a, b: torch.testing.assert_close(a.reshape(1), b, rtol=1e-5, atol=1e-5)
    close(contrastive(q @ d.T / T, torch.tensor([0, 3])), want[f"{head}_nce"])
    close(objective("cl", q, d, temperature=T)[0], want[f"{head}_nce"])
    close(kl(own, want["teacher"]), want[f"{head}_kl"])
    close(margin_mse(own[:, :2], want["teacher"][:, :2]), want[f"{head}_marginmse"])
    if head == "sparse":
        close(flops(q), want["sparse_flops_q"])
        close(flops(d), want["sparse_flops_d"])
        torch.testing.assert_close(torch.tensor([ramp(s, 30, 0.05) for s in range(1, 41)]), want["ramp"])


def ranknet(student, teacher):
    """A toy loss: the chance that the student orders the positive and a negative as the teacher does (Burges
    et al. 2005)."""
    margin, wanted = student[:, :1] - student[:, 1:], (teacher[:, :1] > teacher[:, 1:]).float()
    return torch.nn.functional.binary_cross_entropy_with_logits(margin, wanted)


def test_a_new_loss_is_one_function_and_one_row(tmp_path, tiny_model, monkeypatch):
    """RankNet as --objective ranknet, sparse and dense: it trains, is logged by name, and asks for what it
    needs."""
    import train
    row = losses.Objective(losses.KD, own={"ranknet": ranknet}, needs_teacher=True, needs_negatives=True)
    monkeypatch.setitem(losses.OBJECTIVES, "ranknet", row)
    # The second negative has more than the positive: the sign of its margin turns.
    rows = [{"query": text.split()[i % 5], "pos": [text], "neg": ["the dog", "a list of keys"],
             "inline": True, "pos_scores": [3.0], "neg_scores": [1.0, 4.0]}
            for i, text in enumerate(TEXTS * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--model {tiny_model} --lora_rank 0 --objective ranknet --train {tmp_path}/rows.jsonl "
             "--queries_per_step 8 --max_steps 30 --negatives 2 --workers 0 --device cpu --lr 3e-3")
    for head in ("sparse", "dense"):
        train.main(f"{flags} --head {head} --out {tmp_path}/{head}".split())
        log = read_jsonl(tmp_path / head / "metrics.jsonl")
        assert log[-1]["ranknet"] < 0.9 * log[0]["ranknet"]
    q, d, teacher, *_ = batch()
    loss, terms = objective("ranknet", q, d, teacher=teacher)
    # Each query against its own two negatives: log(1 + exp(-margin)), turned where the teacher disagrees.
    by_hand = [math.log(1 + math.exp(-(1 if teacher[i, 0] > teacher[i, j] else -1)
                                     * (q[i] @ (d[3 * i] - d[3 * i + j])).item()))
               for i in range(8) for j in (1, 2)]
    assert loss.item() == terms["ranknet"].item() == pytest.approx(sum(by_hand) / 16, rel=1e-5)
    with pytest.raises(SystemExit):
        train.main(f"{flags} --head sparse --out {tmp_path}/none --negatives 0".split())
    bare = {"query": "a", "pos": ["the cat"], "neg": ["the dog"], "inline": True}
    (tmp_path / "bare.jsonl").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="has no teacher scores"):
        train.main(f"{flags} --head sparse --out {tmp_path}/bare --train {tmp_path}/bare.jsonl".split())


def test_four_processes_equal_one(tmp_path):
    """Losses averaged over processes, and each row's gradient divided by their number (as DDP and FSDP do),
    are those of one process."""
    q, d, teacher, docids, positives = batch()
    torchrun(4, "tests/test_losses.py", tmp_path)
    for name in ("cl", "kd", "cl+kd"):
        q.grad = d.grad = None
        loss, _ = objective(name, q.requires_grad_(), d.requires_grad_(), teacher=teacher, docids=docids,
                            positives=positives, flops_weights=(0.5, 0.4))
        loss.backward()
        parts = [torch.load(tmp_path / f"{rank}.pt")[name] for rank in range(4)]
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).mean(), loss.detach())
        torch.testing.assert_close(torch.cat([p[1] for p in parts]) / 4, q.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]) / 4, d.grad, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":  # one of the four: two queries and their passages
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    q, d, teacher, docids, positives = (x.chunk(4)[rank].clone() for x in batch())
    for name in ("cl", "kd", "cl+kd"):
        q.grad = d.grad = None
        given = {"teacher": teacher, "docids": docids, "positives": positives, "flops_weights": (0.5, 0.4)}
        loss, _ = objective(name, q.requires_grad_(), d.requires_grad_(), **given)
        loss.backward()
        found[name] = loss.detach(), q.grad, d.grad
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
