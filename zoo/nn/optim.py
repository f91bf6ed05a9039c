"""Optimisers by name, with the exclusions that self-supervised recipes use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

#: Names that `build_optimizer` takes.
OPTIMIZERS = ("sgd", "lars", "adamw")


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters in two groups: matrices and kernels with weight decay, vectors (biases, norms) without."""
    parameters = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    nesterov: bool = False,
    exclude_vectors: bool = False,
) -> Optimizer:
    """Build SGD, LARS or AdamW.

    LARS (arXiv 1708.03888) is timm's, with trust coefficient 0.001 and no clipping. Groups without weight decay are
    updated as in plain SGD, so that `exclude_vectors` also takes biases and norms out of the adaptation.

    Args:
        parameters: What to train; those without `requires_grad` are left out.
        name: One of `OPTIMIZERS`.
        lr: Peak learning rate.
        weight_decay: Weight decay; L2 for SGD and LARS, decoupled for AdamW.
        momentum: Of SGD and LARS.
        nesterov: Nesterov momentum for SGD and LARS.
        exclude_vectors: No weight decay (and no LARS adaptation) for parameters with at most one dimension.

    Raises:
        ValueError: If the name is unknown.
    """
    groups: Any = [p for p in parameters if p.requires_grad]
    if exclude_vectors:
        groups = decay_groups(groups, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    if name == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, trust_coeff=0.001)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
