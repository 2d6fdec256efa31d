"""The paper's objectives as pure functions of tensors: no modules, no state, on one process or on many.

    contrastive   InfoNCE: the positive against every passage of every query on every device            (CL)
    margin_mse    the student's margins against the teacher's                                           (KD)
    kl            the student's distribution over a query's own passages against the teacher's   (in CL+KD)
    flops, ramp   the sparse head's regulariser and the schedule of its weight
    mntp          next-token prediction: of the masked tokens (MNTP), or of every token (CLM)
    OBJECTIVES    what each --objective is made of; `objective` computes a step's loss by it

What surprises: nothing here depends on the number of processes. Each returns the mean over its OWN queries;
DDP and FSDP average gradients, so the objective is the mean of these means. It holds because `gather` carries
gradient: a passage hears from everyone's queries. The authors gather detached copies, so their contrastive
and FLOPs terms shrink with the number of devices, and KL does not. To compare with them give `devices`.
"""
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# The names below are those of torch 2.11 and 2.12. From 2.13 on they end in _single, and the old ones warn.
OLD_NAMES = ".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated"
warnings.filterwarnings("ignore", OLD_NAMES, FutureWarning)


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
        # Each process differentiated its own loss by all rows. A row is due the SUM of what they found.
        out = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out


def gather(x: Tensor) -> Tensor:
    """(B, ...), B alike on each of W processes -> (W * B, ...) in the order of the ranks, with gradient."""
    return x if world()[1] == 1 else _Gather.apply(x)


# The terms.


def contrastive(scores: Tensor, positive: Tensor, ignore: Tensor | None = None) -> Tensor:
    """InfoNCE, -log softmax(scores)[positive], mean over queries.

    scores (B, P), positive (B,) columns, ignore (B, P) True where a passage is no negative.

    >>> contrastive(torch.tensor([[2.0, 2.0]]), torch.tensor([0]))  # one negative, nothing learned: log 2
    tensor(0.6931)
    """
    if ignore is not None:
        # The positive is itself a known positive, and must stay.
        ignore = ignore.scatter(1, positive[:, None], False)
        scores = scores.masked_fill(ignore, float("-inf"))
    return F.cross_entropy(scores, positive)


def false_negatives(docids: Tensor, positives: Tensor) -> Tensor:
    """(P,) passage ids, (B, K) ids of each query's known positives -> (B, P), True where a passage is one."""
    # A query's own positive is among them: a passage that stands in the batch twice is not its own negative.
    # Who knows fewer than K positives repeats one. All of (B, K, P) at once would not fit.
    ignore = torch.zeros(len(positives), len(docids), dtype=torch.bool, device=docids.device)
    for known in positives.unbind(1):
        ignore |= known[:, None] == docids
    return ignore


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """((s_pos - s_neg) - (t_pos - t_neg))^2, mean over queries and negatives. (B, G), the positive first."""
    # The paper's KD draws one negative, G = 2. With more this is the listwise form.
    return F.mse_loss(student[:, :1] - student[:, 1:], (teacher[:, :1] - teacher[:, 1:]).to(student.dtype))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), mean over queries. (B, G), scores of their own passages."""
    # The teacher's raw scores: the paper softens them by no temperature.
    target = teacher.to(student.dtype).log_softmax(-1)
    return F.kl_div(student.log_softmax(-1), target, log_target=True, reduction="batchmean")


def mntp(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Cross entropy of (n,) labels under (n, V) logits, taken one position before each: sum / count."""
    # count is how many tokens an average process predicts in this step. A mean over the n at hand would weigh
    # a token by how few others were masked in its micro-batch.
    return F.cross_entropy(logits.float(), labels, reduction="sum") / count


def flops(reps: Tensor) -> Tensor:
    """Sum over the vocabulary of (mean over the batch of all processes of |weight|)^2: (B, V) -> scalar."""
    # Why the mean is over all: the sum of the processes' own FLOPs would punish a term that one of them uses
    # twice as much as a term that two of them use once. W rows of column means are cheap to gather.
    return gather(reps.abs().mean(0, keepdim=True)).mean(0).square().sum()


def ramp(step: int, end: float, weight: float = 1.0) -> float:
    """The FLOPs weight at step 1, 2, ...: weight * min(1, step / end)^2. The whole weight when end is 0.

    >>> ramp(15, end=30, weight=0.04)
    0.01
    """
    return weight * min(1.0, step / end) ** 2 if end > 0 else weight


# The objectives.


class Objective(NamedTuple):
    """A row of OBJECTIVES. The loss is the mean of the terms, which are logged under their names here."""

    # What a flag of train.py is when it is not given.
    settings: dict
    # f(scores against everyone's passages, column of the positive, what to ignore)
    in_batch: dict[str, Callable] = {}
    # f(scores of a query's own passages, the teacher's scores of them)
    own: dict[str, Callable] = {}
    # Whether rows must hold scores, and queries need passages of their own beside the positive.
    needs_teacher: bool = False
    needs_negatives: bool = False
    # Language modelling: the tokens that are "masked", or "all" with a model that looks to the left only.
    predicts: str | None = None


# The paper's settings for the 1B model on four devices. CLM's are ours, for the paper starts from Llamas.
CL = {"lr": 1e-4, "warmup": 0.04, "queries_per_step": 112, "epochs": 7, "negatives": 16}
KD = {"lr": 1e-4, "warmup": 0.04, "queries_per_step": 1024, "epochs": 56, "negatives": 1}
MNTP = {"lr": 5e-5, "warmup": 0.0, "queries_per_step": 128, "max_steps": 10_000, "negatives": 0}
CLM = {"lr": 3e-4, "warmup": 0.04, "queries_per_step": 128, "max_steps": 10_000, "negatives": 0}

OBJECTIVES = {
    "clm": Objective(CLM, predicts="all"),
    "mntp": Objective(MNTP, predicts="masked"),
    "cl": Objective(CL, {"cl": contrastive}),
    "kd": Objective(KD, {}, {"margin": margin_mse}, needs_teacher=True, needs_negatives=True),
    "cl+kd": Objective(CL, {"cl": contrastive}, {"kl": kl}, needs_teacher=True, needs_negatives=True),
}


def objective(name: str, q: Tensor, d: Tensor, *, temperature: float = 1.0, teacher: Tensor | None = None,
              docids: Tensor | None = None, positives: Tensor | None = None,
              flops_weights: tuple[float, float] = (0.0, 0.0),
              devices: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """This process's loss, to be averaged over processes, and its terms by name.

    q (B, V), and d (B * G, V): each query's G passages, the positive first; teacher (B, G) raw scores. With
    docids (B * G,) and positives (B, K), known positives are not counted as negatives.
    """
    chosen, terms = OBJECTIVES[name], {}
    B, G = len(q), len(d) // len(q)
    if chosen.in_batch:
        # Our queries against everyone's passages. A query's positive is the first of its own G.
        scores = q @ gather(d).T / temperature  # (B, W * B * G)
        positive = (world()[0] * B + torch.arange(B, device=q.device)) * G
        ignore = None if docids is None else false_negatives(gather(docids), positives)
        for term, function in chosen.in_batch.items():
            terms[term] = function(scores, positive, ignore) / devices
    if chosen.own:
        # A query against its own passages, which are the ones that the teacher has scored.
        own = torch.bmm(d.view(B, G, -1), q[:, :, None])[:, :, 0] / temperature  # (B, G)
        for term, function in chosen.own.items():
            terms[term] = function(own, teacher)
    loss = sum(terms.values()) / len(terms)
    if any(flops_weights):
        # Beside the mean, not in it: the paper weighs it against the whole loss.
        terms["reg"] = (flops_weights[0] * flops(q) + flops_weights[1] * flops(d)) / devices
        loss = loss + terms["reg"]
    return loss, terms
