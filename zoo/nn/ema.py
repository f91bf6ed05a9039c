"""Teachers that are an exponential moving average of the student."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_copy(module: ModuleT) -> ModuleT:
    """Return a deep copy of `module` whose parameters take no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """`phi <- momentum * phi + (1 - momentum) * theta` for all parameters (arXiv 2306.07483, Section 3).

    Buffers are left alone: a teacher with batch normalisation keeps the statistics of its own forward passes.

    Args:
        teacher: Updated in place; `student`'s architecture.
        student: The parameters that are averaged.
        momentum: 1 leaves the teacher as it is, 0 copies the student.

    Raises:
        ValueError: If `momentum` is outside `[0, 1]`.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    averaged: list[Tensor] = list(teacher.parameters())
    new: list[Tensor] = list(student.parameters())
    torch._foreach_lerp_(averaged, new, 1.0 - momentum)
