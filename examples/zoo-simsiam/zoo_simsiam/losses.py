"""The loss of SimSiam and a measure of its collapse."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def negative_cosine(p: Tensor, z: Tensor, stop_gradient: bool = True) -> Tensor:
    """Negative cosine similarity of predictions and projections (arXiv 2011.10566, Eqs. 1 and 3).

    Args:
        p: Predictions of one view, `[B, D]`.
        z: Projections of the other view, `[B, D]`.
        stop_gradient: Whether `z` is a constant.

    Returns:
        Mean over the batch, a scalar in [-1, 1].
    """
    return -F.cosine_similarity(p, z.detach() if stop_gradient else z, dim=1).mean()


def spread(z: Tensor) -> Tensor:
    """Standard deviation of unit embeddings over the batch, mean over dimensions, times sqrt(D) (Section 4.1).

    Args:
        z: Embeddings `[B, D]`.

    Returns:
        About 1 for directions spread over the sphere, 0 for a collapsed encoder; a scalar.
    """
    return F.normalize(z, dim=1).std(dim=0).mean() * z.shape[1] ** 0.5
