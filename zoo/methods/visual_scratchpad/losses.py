"""Losses of a network that draws the next frame and says whether it has finished and what the answer is.

The body of the paper (arXiv 2410.08165) was not at hand; the equations follow its abstract and the reviewers'
description of it, the weights are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.distributed import all_reduce_sum, world_size


def change_weights(now: Tensor, target: Tensor, patch_size: int, weight: float) -> Tensor:
    """Weights of the pixels: `weight` in patches where the true frames differ, 1 elsewhere.

    Args:
        now: Palette indices of the true frame `s_t`, `[B, H, W]`.
        target: Palette indices of the true frame to be drawn, `[B, H, W]`.
        patch_size: Side of a patch in pixels; divides H and W.
        weight: `w_ch`.

    Returns:
        float32 `[B, 1, H, W]`.
    """
    changed = (now != target).float()[:, None]
    patches = F.max_pool2d(changed, patch_size)
    return 1 + (weight - 1) * patches.repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)


def frame_loss(frame: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over all pixels and colours of weight times squared error, `mean(w (f - s)^2)`, not renormalised; scalar.

    Args:
        frame: Drawn frame `[B, 3, H, W]`.
        target: True frame `[B, 3, H, W]`.
        weights: `[B, 1, H, W]`.
    """
    return (weights * (frame - target).square()).mean()


def masked_bce(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over the entries of `mask`; zero with zero gradient when there are none.

    The average is over the global batch: the ranks' results average to it.

    Args:
        logits: Any shape.
        labels: 0 or 1, same shape.
        mask: bool, same shape: where the answer is asked for.
    """
    losses = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    return masked_mean(losses, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` over the entries of `mask` in the global batch; zero when there are none."""
    count = all_reduce_sum(mask.sum().to(values.dtype))
    return torch.where(mask, values, 0).sum() * world_size() / count.clamp(min=1)


def inductive_loss(
    frame: Tensor, halt: Tensor, label: Tensor, target: Tensor, weights: Tensor, terminal: Tensor, answer: Tensor
) -> dict[str, Tensor]:
    """Parts of the loss of one step: `mean(w (f - s_{t+1})^2)`, `BCE(h, t >= T)` and, where `t >= T`, `BCE(y', y)`.

    Args:
        frame: Drawn frame `[B, 3, H, W]`.
        halt: Logit of having finished, `[B]`.
        label: Logit of the answer, `[B]`.
        target: True next frame `[B, 3, H, W]`; the last frame where `t = T`.
        weights: Weights of the pixels `[B, 1, H, W]`.
        terminal: `t >= T`, bool `[B]`.
        answer: 0 or 1, `[B]`.

    Returns:
        Scalars `frame`, `halt` and `label`, unweighted.
    """
    return {
        "frame": frame_loss(frame, target, weights),
        "halt": F.binary_cross_entropy_with_logits(halt, terminal.to(halt.dtype)),
        "label": masked_bce(label, answer, terminal),
    }
