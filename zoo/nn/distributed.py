"""Collectives that gradients pass through; the identity in a run of one process.

Which gradient results under DDP: the backward passes below are the true adjoints (the adjoint of a sum over ranks is a
sum over ranks), so that `backward` on every rank yields, summed over ranks, the gradient of the *sum* of the ranks'
losses. DDP divides by the number of ranks. What is applied is therefore the gradient of the **mean over ranks of the
losses that the ranks return**, and a method gives the single-process result whenever that mean is the single-process
loss. Two ways of getting there, both exact:

* each rank returns the mean over *its own* rows of a loss whose statistics (centre, prototypes' marginals, keys of a
  contrastive loss) come from these functions; the ranks hold equally many rows;
* each rank returns the *same* loss of the global batch, e.g. of `all_gather_rows(x)`. No factor of `world_size()` is
  needed in either case.

Every rank has to call the same functions in the same order, in the forward and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """Number of this process among all; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _AllReduceSum.apply(grads[0])


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.rows = sum(sizes[: rank()]), x.shape[0]
        most = max(sizes)
        padded = x.detach().new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = _AllReduceSum.apply(grads[0])
        return total[ctx.start : ctx.start + ctx.rows], None


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over the ranks, on every rank; any shape, the same on all ranks.

    Backward: the sum over ranks of the incoming gradients.
    """
    return _AllReduceSum.apply(x) if is_distributed() else x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over the ranks, on every rank; any shape, floating point.

    Backward: the mean over ranks of the incoming gradients.
    """
    return all_reduce_sum(x) / world_size() if is_distributed() else x


def all_gather_rows(x: Tensor) -> Tensor:
    """Return the rows of all ranks below one another, in the order of the ranks.

    Args:
        x: Shape `[n_r, ...]`; the number of rows may differ between ranks, the rest of the shape may not.

    Returns:
        Shape `[sum_r n_r, ...]`, the same on every rank; the global batch where a datamodule of the zoo cut it.

    Backward: a rank's rows get the sum over ranks of the gradients of these rows.

    Raises:
        ValueError: If `x` has no dimension to gather along.
    """
    if x.ndim == 0:
        raise ValueError("all_gather_rows needs a tensor with a first dimension, got a scalar")
    if not is_distributed():
        return x
    size = torch.tensor([x.shape[0]], device=x.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    return _AllGatherRows.apply(x, [int(s) for s in sizes])
