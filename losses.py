"""The paper's objectives as pure functions of tensors: no modules, no state, the same on one process and on sixty-four.

    contrastive   InfoNCE: the positive against every passage of every query on every device            (CL)
    margin_mse    the student's margins against the teacher's                                           (KD)
    kl            the student's distribution over a query's own passages against the teacher's          (KL, in CL+KD)
    flops, ramp   the sparse head's regulariser and the schedule of its weight
    mntp          next-token prediction: of masked tokens (MNTP), or of all (CLM)
    objective     the one place that knows which of them `cl`, `kd` and `cl+kd` add up

What surprises: nothing here is multiplied or divided by the number of processes. Every process returns the mean over its OWN
queries, and the objective is the mean of these means, which is exactly what DDP and FSDP compute when they average gradients.
It holds only because `gather` carries gradient: a passage hears from the queries of every process, not just its own. (The
authors gather detached copies, so that their contrastive and FLOPs terms shrink with the number of devices and KL does not.)
"""
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

OBJECTIVES = ("clm", "mntp", "cl", "kd", "cl+kd")

# The names that torch 2.11 and 2.12 have; from 2.13 on they are called *_single, and these warn.
warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated", FutureWarning)


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(dist.get_world_size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx, grad):
        # Each process differentiated its own loss with respect to the whole; what a row is due is the SUM of what all of them found.
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out


def gather(x: Tensor) -> Tensor:
    """(B, ...) on each of W processes -> (W * B, ...), in the order of the ranks, and the gradient comes back. B must be the same everywhere."""
    return x if world()[1] == 1 else _Gather.apply(x)


def contrastive(scores: Tensor, positive: Tensor, ignore: Tensor | None = None) -> Tensor:
    """InfoNCE, -log softmax(scores)[positive], mean over queries.

    scores (B, P), positive (B,) columns, ignore (B, P) True where a passage is no negative.

    >>> contrastive(torch.tensor([[2.0, 2.0]]), torch.tensor([0]))    # one positive, one negative, nothing learned: log 2
    tensor(0.6931)
    """
    if ignore is not None:
        ignore = ignore.scatter(1, positive[:, None], False)  # the positive is a copy of itself, too: it must stay
        scores = scores.masked_fill(ignore, float("-inf"))
    return F.cross_entropy(scores, positive)


def false_negatives(docids: Tensor, positives: Tensor) -> Tensor:
    """(P,) passage ids and (B, K) ids of each query's known positives -> (B, P), True where a passage is one of them.

    A row with fewer than K positives repeats one. This also keeps a passage that stands in the batch several times from being its
    own negative, since a query's positive is among its positives.
    """
    ignore = torch.zeros(len(positives), len(docids), dtype=torch.bool, device=docids.device)
    for known in positives.unbind(1):  # K is 1 to a handful; (B, K, P) at once would not be
        ignore |= known[:, None] == docids
    return ignore


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """((s_pos - s_neg) - (t_pos - t_neg))^2, mean over queries and their negatives. (B, G) scores, the positive first.

    The paper's KD draws one negative, G = 2; with more this is the listwise form.
    """
    return F.mse_loss(student[:, :1] - student[:, 1:], (teacher[:, :1] - teacher[:, 1:]).to(student.dtype))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), mean over queries. (B, G) scores of a query's own passages; the teacher's at temperature 1."""
    return F.kl_div(student.log_softmax(-1), teacher.to(student.dtype).log_softmax(-1), log_target=True, reduction="batchmean")


def flops(reps: Tensor) -> Tensor:
    """Sum over the vocabulary of (mean over the batch of |weight|)^2, the batch being that of ALL processes: (B, V) -> scalar.

    Squaring a mean is why the batch matters: the sum of the processes' own FLOPs would punish a term that one of them uses twice as
    much as a term that two of them use once. Gathering W rows of column means is enough, and cheap.
    """
    return gather(reps.abs().mean(0, keepdim=True)).mean(0).square().sum()


def ramp(step: int, end: float, weight: float = 1.0) -> float:
    """The FLOPs weight at optimizer step 1, 2, ...: weight * min(1, step / end)^2. At once the whole weight when end is 0.

    >>> ramp(15, end=30, weight=0.04)
    0.01
    """
    return weight * min(1.0, step / end) ** 2 if end > 0 else weight


def mntp(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Cross entropy of the tokens to predict, (n, V) logits taken one position before each, (n,) labels; summed, then divided by `count`.

    count is the tokens to predict an average process has in this step. A mean over the n at hand would weigh a token by how few others
    were masked in its micro-batch.
    """
    return F.cross_entropy(logits.float(), labels, reduction="sum") / count


def objective(name: str, q: Tensor, d: Tensor, *, temperature: float = 1.0, teacher: Tensor | None = None, docids: Tensor | None = None,
              positives: Tensor | None = None, flops_weights: tuple[float, float] = (0.0, 0.0), devices: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's loss, to be averaged over processes, and its terms by name.

    q (B, V), and d (B * G, V): each query's G passages, the positive first; teacher (B, G) raw scores. With docids (B * G,) and
    positives (B, K), known positives are not counted as negatives. devices: the authors' effective weights, contrastive and FLOPs
    terms divided by the number of devices they had, for those who compare.
    """
    B, G, rank = len(q), len(d) // len(q), world()[0]
    terms = {}
    if name in ("cl", "cl+kd"):
        scores = q @ gather(d).T / temperature  # (B, W * B * G): local queries against everyone's passages
        positive = (rank * B + torch.arange(B, device=q.device)) * G
        ignore = None if docids is None else false_negatives(gather(docids), positives)
        terms["cl"] = contrastive(scores, positive, ignore) / devices
        loss = terms["cl"]
    if name in ("kd", "cl+kd"):
        own = torch.bmm(d.view(B, G, -1), q[:, :, None])[:, :, 0] / temperature  # (B, G)
    if name == "cl+kd":
        terms["kl"] = kl(own, teacher)
        loss = 0.5 * (loss + terms["kl"])
    if name == "kd":
        loss = terms["margin"] = margin_mse(own, teacher)
    if any(flops_weights):
        terms["reg"] = (flops_weights[0] * flops(q) + flops_weights[1] * flops(d)) / devices
        loss = loss + terms["reg"]
    return loss, terms
