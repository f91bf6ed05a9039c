"""The equations that Daino adds to Suave's: assignments by a centred and sharpened teacher (arXiv 2306.07483)."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.nn.distributed import all_reduce_sum


@torch.no_grad()
def teacher_assignment(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """`yhat = softmax((p_teacher - gamma) / eps_t)` (arXiv 2306.07483, Eqs. 7-8).

    Args:
        logits: The teacher's logits `[B, K]`.
        centre: Centre gamma `[K]`; it keeps one prototype from winning everywhere.
        temperature: eps_t; towards 0 the assignment becomes one-hot.

    Returns:
        Float32 `[B, K]`, rows sum to 1.
    """
    return torch.softmax((logits.float() - centre) / temperature, dim=1)


@torch.no_grad()
def updated_centre(centre: Tensor, logits: Tensor, momentum: float = 0.9) -> Tensor:
    """`gamma <- mu gamma + (1 - mu) mean_b p_teacher` (arXiv 2306.07483, Eq. 9), the mean over all ranks.

    Args:
        centre: gamma `[K]`.
        logits: The teacher's logits `[n, K]` of this rank.
        momentum: mu.
    """
    total = all_reduce_sum(torch.cat([logits.float().sum(dim=0), centre.new_tensor([len(logits)])]))
    return momentum * centre + (1.0 - momentum) * total[:-1] / total[-1]
