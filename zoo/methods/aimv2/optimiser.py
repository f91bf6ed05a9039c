"""The optimiser of AIMv2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

#: Ends of names of parameters that are matrices without being weights of a product.
EXCLUDED = ("positions", "start", "query", "log_scale")


def adam_lh(
    parameters: Iterable[tuple[str, nn.Parameter]], lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Adam with fully decoupled weight decay: `p <- p (1 - weight_decay * lr_t / lr)`, then the step with `lr_t`.

    AdamW takes `lr_t * decay` away: with `decay = weight_decay / lr`, `lr` being the peak, that is the same.
    Biases, norms, positions, start token, query and logit scale do not decay.

    Args:
        parameters: Names and parameters; those without `requires_grad` are left out.
        lr: Peak learning rate.
        weight_decay: Fraction of a weight that a step at the peak takes away.
        betas: Decay rates of Adam.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and not name.endswith(EXCLUDED)]
    rest = [p for name, p in trained if p.ndim <= 1 or name.endswith(EXCLUDED)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay / lr},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8)
