"""What runs on a GPU, run on a simulated one: the CPU's results, and no more launches or waits than before.

The oracle is the CPU: simulated_cuda.py does its arithmetic there, so equal means to the bit. The bounds on
kernels, waits and uploads are what was counted when they were written; whoever lowers one writes it here.
"""
import json

import pytest
import torch

from conftest import TEXTS  # puts the project on the path
from simulated_cuda import OnGpu, SimulatedCuda
from test_train import flags, world  # noqa: F401  (a fixture)

import losses
import model
import train
from index import DenseIndex, SparseIndex
from model import Retriever
from tools.check import check


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.to_dense() if x.layout == torch.sparse_csr else x for x in (a, b))
    return torch.equal(a.cpu(), b.cpu())


# Kernels, waits and uploads: of one encoding, of a step (fp32, two layers, one chunk), of a search.
BOUNDS = {
    "encode sparse": (150, 3, 3), "encode dense": (140, 3, 3),
    "cl sparse 0": (480, 13, 14), "cl dense 4": (510, 9, 24),
    "kd sparse 4": (560, 13, 24), "kd dense 0": (410, 9, 15),
    "cl+kd sparse 4": (590, 13, 24), "cl+kd dense 0": (450, 9, 15),
    "mntp sparse 0": (340, 5, 12), "clm dense 0": (340, 5, 12),
    # A kernel for each of the 576 lists, and what 40 queries together take to find their best.
    "search": (620, 4, 0), "search streamed": (620, 4, 1152),
    "dense": (55, 6, 1), "dense streamed": (55, 6, 2),
}


def check_counts(gpu: SimulatedCuda, case: str, times: int = 1) -> None:
    """What was counted, divided by `times`, stays within the bounds; a failure shows of what there was too
    much."""
    counted = gpu.kernels / times, gpu.waits / times, gpu.uploads / times
    within = all(count <= bound for count, bound in zip(counted, BOUNDS[case]))
    assert within, f"{case}: {counted} beyond {BOUNDS[case]}\n{gpu.by_kernel}\n{gpu.by_wait}"


# The simulation itself.

def test_it_counts_and_refuses():
    with SimulatedCuda() as gpu:
        x = torch.ones(3, device="cuda")
        assert (x + x).sum().item() == 6
        assert (gpu.kernels, gpu.waits, gpu.uploads) == (3, 1, 0)
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.device.type == "cuda" and x.cpu().device.type == "cpu"
        assert isinstance(torch.tensor(1.0).to("cuda"), OnGpu)
        gpu.reset()
        (x > 0).nonzero()
        x[x > 0]
        assert gpu.by_wait == {"nonzero": 1, "index": 1}
        gpu.reset()
        x[torch.tensor([0, 1]).to("cuda")] = 2.0
        assert x.tolist() == [2, 2, 1] and gpu.uploads == 1


def test_autograd_and_tied_weights_live_there():
    def gradient(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False))
        model[1].weight = model[0].weight
        model.to(device)
        assert model[1].weight is model[0].weight
        model(torch.tensor([1, 2], device=device)).log_softmax(-1)[:, 0].sum().backward()
        return model[0].weight.grad.cpu()

    want = gradient("cpu")
    with SimulatedCuda():
        assert torch.equal(gradient("cuda"), want)


# The model.

@pytest.fixture(autouse=True)
def same_padding(monkeypatch):
    """A GPU's batches are padded to multiples of 8. Here the CPU's are, too: equal shapes, equal bits."""
    monkeypatch.setitem(model.PADDED_TO, "cpu", 8)


@pytest.mark.parametrize("head", ["sparse", "dense"])
def test_forward_and_backward_are_the_cpus(tiny_model, head):
    r = Retriever.load(tiny_model, head=head)
    ids, mask = r.pad(r.tokenize(TEXTS, "passage"))
    wanted = r.encode(TEXTS, "passage")

    def gradients(device):
        r.zero_grad()
        reps = r(ids.to(device), mask.to(device))
        # Each entry's gradient is its own value: an entry in a wrong place would show.
        (reps * reps.detach()).sum().backward()
        return {name: p.grad.cpu().clone() for name, p in r.named_parameters() if p.grad is not None}

    want = gradients("cpu")
    with SimulatedCuda() as gpu:
        r.to("cuda")
        gpu.reset()
        assert same(r.encode(TEXTS, "passage"), wanted)
        check_counts(gpu, f"encode {head}")
        got = gradients("cuda")
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_the_doctor_comes_too(tiny_model):
    r = Retriever.load(tiny_model, head="sparse")
    want = check(r)
    with SimulatedCuda():
        assert check(r.to("cuda")) == want


# Training.

STEPS = ["cl sparse 0", "cl dense 4", "kd sparse 4", "kd dense 0", "cl+kd sparse 4", "cl+kd dense 0",
         "mntp sparse 0", "clm dense 0"]


@pytest.mark.parametrize("case", STEPS)
def test_a_step_is_the_cpus(world, tmp_path, monkeypatch, case):  # noqa: F811
    for saving in ("save_state", "save_weights"):  # torch's checkpoints ask for a real stream
        monkeypatch.setattr(train, saving, lambda *args, **kw: None)
    objective, head, lora = case.split()
    losses_of = {}
    for device in ("cpu", "cuda"):
        more = f"--device {device} --dtype fp32 --recompute 0 --max_steps 3"
        argv = flags(world, tmp_path / device, objective, head, lora, more)
        if device == "cuda":
            with SimulatedCuda() as gpu:
                train.main(argv)
        else:
            train.main(argv)
        lines = [json.loads(line) for line in (tmp_path / device / "metrics.jsonl").read_text().splitlines()]
        losses_of[device] = [(line["loss"], line["norm"]) for line in lines]
    assert losses_of["cpu"] == losses_of["cuda"] and len(losses_of["cpu"]) == 3
    check_counts(gpu, case, times=3)


def test_an_objective_waits_for_nothing():
    """The loss on the vectors: no number is fetched before the whole step has been launched."""
    torch.manual_seed(0)
    q, d = torch.rand(4, 50), torch.rand(12, 50)
    ids, teacher = torch.arange(12), torch.rand(4, 3)
    positives = ids[::3, None]
    for name in ("cl", "kd", "cl+kd"):
        def loss_and_gradient(device):
            a, b, scores, docids, known = (x.clone().to(device) for x in (q, d, teacher, ids, positives))
            a.requires_grad_()
            given = {"teacher": scores, "docids": docids, "positives": known}
            value, _ = losses.objective(name, a, b, flops_weights=(0.1, 0.1), **given)
            value.backward()
            return value.detach(), a.grad

        want = loss_and_gradient("cpu")
        with SimulatedCuda() as gpu:
            got = loss_and_gradient("cuda")
            assert gpu.waits == 0, gpu.by_wait
            assert all(same(a, b) for a, b in zip(got, want))


# Search.

@pytest.fixture(scope="module")
def vectors():
    g = torch.Generator().manual_seed(0)

    def sparse(n):
        dense = torch.rand(n, 300, generator=g) * (torch.rand(n, 300, generator=g) < 0.05)
        csr = dense.to_sparse_csr()
        return csr.crow_indices(), csr.col_indices(), csr.values()
    return sparse(5000), sparse(40), torch.randn(40_000, 32, generator=g), torch.randn(70, 32, generator=g)


@pytest.mark.parametrize("memory, streamed", [(2**36, False), (500_000, True)])
def test_search_is_the_cpus(vectors, memory, streamed):
    documents, queries, matrix, points = vectors
    want = SparseIndex.from_csr(*documents, n_terms=300).search(queries, k=10)
    want_dense = DenseIndex.of(matrix).search(points, k=10)
    with SimulatedCuda(memory=memory) as gpu:
        ix = SparseIndex.from_csr(*documents, n_terms=300, device="cuda")
        dense = DenseIndex.of(matrix, device="cuda")
        assert ix.fits == dense.fits != streamed
        gpu.reset()
        got = ix.search(queries, k=10)
        check_counts(gpu, f"search{' streamed' * streamed}")
        gpu.reset()
        got_dense = dense.search(points, k=10)
        check_counts(gpu, f"dense{' streamed' * streamed}")
    assert all(same(a, b) for a, b in zip(got, want))
    assert all(same(a, b) for a, b in zip(got_dense, want_dense))
