"""The equations of Suave and of the baselines it is compared with, as pure functions (arXiv 2306.07483).

Letters: `B` unlabelled images, `V` views of each, `K` prototypes, `C` classes. Logits are cosines between embeddings
and prototypes; every cross-entropy divides them by the temperature `tau`, the labelled one too. The assignments of
Eqs. 4-6 are `zoo.nn.sinkhorn.sinkhorn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MixWeight = Literal["paper", "official"]


def cross_entropy(logits: Tensor, targets: Tensor, tau: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Eq. 2: mean over rows of `-sum_k y_k log softmax(logits / tau)_k`; no gradient into the targets.

    Args:
        logits: Cosines `[n, K]`.
        targets: Classes `[n]` (int64) or distributions `[n, K]`.
        tau: Temperature.
        label_smoothing: Share of the target that is spread over all classes.

    Returns:
        A float32 scalar.
    """
    return F.cross_entropy(logits.float() / tau, targets.detach(), label_smoothing=label_smoothing)


def swapped_prediction(logits: Sequence[Tensor], assignments: Sequence[Tensor], tau: float = 0.1) -> Tensor:
    """L_u: each view predicts the assignments of the *other* global views (arXiv 2306.07483, Eq. 3 on D_u).

    `1/G sum_i 1/(V-1) sum_{v != i} l(s^v, q^i)` with the `G` global views first in `logits`.

    Args:
        logits: One `[B, K]` for each of the `V` views.
        assignments: One `[B, K]` for each of the `G` global views, rows sum to 1.
        tau: Temperature of the predictions.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If there is no other view to predict from.
    """
    if len(logits) < 2:
        raise ValueError(f"swapped prediction needs at least two views, got {len(logits)}")
    log_s = torch.stack([view.float() for view in logits]).div(tau).log_softmax(dim=2)  # [V, B, K]
    q = torch.stack(list(assignments)).detach()  # [G, B, K]
    num_views, num_global = log_s.shape[0], q.shape[0]
    # sum over v != i of l(s^v, q^i), as the sum over all v less the view's own term
    others = log_s.sum(dim=0, keepdim=True) - log_s[:num_global]
    return -(q * others).sum(dim=2).mean() / (num_views - 1)


#: Losses of parts that look on without teaching the encoder; their rows are counted elsewhere.
ONLOOKERS = ("probes", "classifier")


def frequency_weights(rows: Mapping[str, int]) -> dict[str, float]:
    """Weight each loss by its share of the rows of the batch ("re-weighted by their frequency in the batch").

    Args:
        rows: Rows behind each loss. `ONLOOKERS` do not count towards the total `N`.

    Returns:
        `{name: n / N}`; without the onlookers the weights sum to 1.
    """
    total = sum(n for name, n in rows.items() if name not in ONLOOKERS)
    return {name: n / max(total, 1) for name, n in rows.items()}


def mixed_rows(batch_size: int, views: int, mix_weight: MixWeight) -> int:
    """n_m, the rows that the mixed unlabelled views count for.

    Args:
        batch_size: Unlabelled images `B`.
        views: Mixed views of each.
        mix_weight: `paper` counts rows, `B * views`. `official` counts views, as the released code does because it
            takes the size of a `[views, B, K]` tensor; it nearly switches the term off.
    """
    return views * batch_size if mix_weight == "paper" else views


def supervised_contrastive(z: Tensor, targets: Tensor, tau: float = 0.1) -> Tensor:
    """Supervised contrastive loss, L_out of arXiv 2004.11362, Eq. 2: rows of one class attract each other.

    Args:
        z: L2-normalised embeddings `[n, m]`.
        targets: Classes `[n]`.
        tau: Temperature.

    Returns:
        The mean over rows that have another row of their class; 0 (with a gradient of zeros) if none has.
    """
    similarity = z.float() @ z.float().T / tau
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_p = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    positive = (targets[:, None] == targets[None, :]) & ~itself
    count = positive.sum(dim=1)
    per_row = -(log_p * positive).sum(dim=1) / count.clamp_min(1)
    return per_row.sum() / (count > 0).sum().clamp_min(1)


def confident_pseudo_labels(
    weak: Tensor, strong: Tensor, tau: float = 0.1, threshold: float = 0.95
) -> tuple[Tensor, Tensor]:
    """FixMatch (arXiv 2001.07685, Eq. 4): a confident prediction on one view is the hard label of another.

    Args:
        weak: Logits of the view that labels, `[B, C]`; no gradient.
        strong: Logits of the view that learns, `[B, C]`.
        tau: Temperature of both.
        threshold: Smallest probability that counts.

    Returns:
        The loss, averaged over all `B` rows, and the share of rows above the threshold.
    """
    confidence, label = torch.softmax(weak.detach().float() / tau, dim=1).max(dim=1)
    kept = (confidence >= threshold).float()
    loss = F.cross_entropy(strong.float() / tau, label, reduction="none")
    return (loss * kept).mean(), kept.mean()
