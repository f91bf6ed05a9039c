"""Sinkhorn-Knopp: soft assignments of a batch to prototypes that use the prototypes equally."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.nn.distributed import is_distributed


def _logsumexp_over_samples(x: Tensor) -> Tensor:
    """Logarithm of the sum of `exp(x)` over the rows of all ranks, `[B, K] -> [1, K]`."""
    local = torch.logsumexp(x, dim=0, keepdim=True)
    if not is_distributed():
        return local
    most = local.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    total = (local - most).exp()
    dist.all_reduce(total)
    return most + total.log()


@torch.no_grad()
def sinkhorn(logits: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assign samples to prototypes, the prototypes being used equally often (arXiv 2306.07483, Eqs. 4-6).

    Approximates `argmax_Y Tr(Y P) + epsilon H(Y)` over the joint distributions with uniform marginals. Each iteration
    normalises over the samples and then over the prototypes, so that rows sum to 1 exactly and the balance of the
    prototypes is approximate after few iterations. It works on logarithms in float32: the same numbers as
    `Q = exp(P / epsilon)`, without overflow for any logits or `epsilon`.

    Args:
        logits: Similarities `[B, K]` of this rank's samples, not divided by a temperature. Gradients stop here.
        epsilon: Weight of the entropy; smaller is sharper.
        iterations: Number of normalisations of both kinds.

    Returns:
        Assignments `[B, K]` in float32, rows sum to 1. Over several ranks: the rows that belong to this rank of the
        solution for the concatenated batch.

    Raises:
        ValueError: If `epsilon` or `iterations` is not positive.
    """
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon and iterations must be positive, got {epsilon} and {iterations}")
    log_q = logits.detach().float() / epsilon
    for _ in range(iterations):
        log_q = log_q - _logsumexp_over_samples(log_q)
        log_q = log_q - torch.logsumexp(log_q, dim=1, keepdim=True)
    return log_q.exp()


def assignment_entropy(assignments: Tensor) -> Tensor:
    """Entropy of the mean assignment divided by `ln K`: 1 for balanced clusters, 0 for a collapse into one.

    Args:
        assignments: Probabilities `[B, K]`.

    Returns:
        A scalar in `[0, 1]`.
    """
    mean = assignments.mean(dim=0)
    return torch.special.entr(mean).sum() / math.log(max(assignments.shape[1], 2))
