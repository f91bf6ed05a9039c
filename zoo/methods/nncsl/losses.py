"""The equations of NNCSL and of PAWS, on which it builds, as pure functions.

Sources: NNCSL, arXiv 2212.05102, as its official code computes it (the loss names are those of the paper's figures);
PAWS, arXiv 2104.13963, Eqs. 1-3. Letters: `z` embeddings `[n, D]`, `S` supports `[m, D]`, `Y` label matrix `[m, K]`
over `K` support classes, `pi` class distributions `[n, K]`, `tau` temperature, `T` sharpening temperature.
Every function expects float32; the caller leaves autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12


def label_matrix(labels: Tensor, first: int, num_classes: int, smoothing: float = 0.1) -> Tensor:
    """Return smoothed one-hot rows over the classes `first .. first + num_classes - 1`.

    A row is `smoothing / K` everywhere and `1 - smoothing + smoothing / K` at its class.

    Args:
        labels: Class of each support, int64 `[m]`, all inside the range.
        first: The class of column 0.
        num_classes: Number of columns `K`.
        smoothing: Mass spread over all classes.

    Returns:
        Float32 `[m, K]`, rows sum to 1.

    Departures:
        The official code permutes the columns at random in each batch; all losses are invariant under that.
    """
    one_hot = F.one_hot(labels - first, num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def soft_nearest_neighbours(z: Tensor, supports: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """Class distribution of each query from its similarity to labelled supports (arXiv 2104.13963, Eq. 1).

    `pi(z; S, Y) = softmax_j(cos(z, S_j) / tau) @ Y`.

    Args:
        z: Queries `[n, D]`.
        supports: Supports `[m, D]`.
        labels: Label matrix `[m, K]`.
        tau: Temperature.

    Returns:
        `[n, K]`; rows sum to 1 where those of `labels` do.
    """
    similarity = F.normalize(z, dim=1) @ F.normalize(supports, dim=1).T
    return torch.softmax(similarity / tau, dim=1) @ labels


def sharpen(p: Tensor, temperature: float = 0.25) -> Tensor:
    """`rho(p)_k = p_k^(1/T) / sum_j p_j^(1/T)` for each row of `[n, K]` (arXiv 2104.13963, Section 3.2)."""
    powered = p ** (1 / temperature)
    return powered / powered.sum(dim=1, keepdim=True)


def cross_entropy(targets: Tensor, p: Tensor) -> Tensor:
    """Mean over rows of `H(targets, p) = -sum_k targets_k log p_k`; both `[n, K]` probabilities. Scalar."""
    return -(targets * p.clamp_min(_EPS).log()).sum(dim=1).mean()


@torch.no_grad()
def paws_targets(p_a: Tensor, p_b: Tensor, num_small: int, temperature: float = 0.25, floor: float = 1e-4) -> Tensor:
    """Sharpened targets of all views from the predictions of the two global ones; no gradient.

    The global views swap: view a is taught by view b. A small crop is taught by the mean of the two targets.
    Entries below `floor` become 0 and the row is not normalised again, as in the official code.

    Args:
        p_a: Predictions of the first global view `[B, K]`.
        p_b: Predictions of the second global view `[B, K]`.
        num_small: Number of small crops `m`.
        temperature: Sharpening temperature `T`.
        floor: Entries below it are dropped.

    Returns:
        `[(2 + m) B, K]` in the order a, b, small crops.
    """
    q_a, q_b = sharpen(p_b, temperature), sharpen(p_a, temperature)
    targets = torch.cat([q_a, q_b, *[(q_a + q_b) / 2] * num_small])
    return torch.where(targets < floor, 0.0, targets)


def me_max(p: Tensor, temperature: float = 0.25) -> Tensor:
    """L_MEM, minus the entropy of the mean sharpened prediction (arXiv 2104.13963, Eq. 3); scalar in `[-log K, 0]`.

    Args:
        p: Predictions of all anchors of the global batch `[n, K]`, with gradient.
        temperature: Sharpening temperature `T`.
    """
    mean = sharpen(p, temperature).mean(dim=0)
    return (mean * mean.clamp_min(_EPS).log()).sum()


def paws_losses(
    views: list[Tensor],
    supports: Tensor,
    labels: Tensor,
    tau: float = 0.1,
    temperature: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """L_SNN and L_MEM: consistency between views and a spread mean prediction (arXiv 2104.13963, Eqs. 2 and 3).

    NNCSL gives it the supports and columns of the current task alone (the "filter"); PAWS those of all seen classes.

    Args:
        views: Embeddings of the unlabelled batch, each `[B, D]`: the two global views, then the small crops.
        supports: Embeddings of the supports `[m, D]`.
        labels: Their label matrix `[m, K]`.
        tau: Temperature of the neighbours.
        temperature: Sharpening temperature `T`.

    Returns:
        The scalars L_SNN and L_MEM.
    """
    p = soft_nearest_neighbours(torch.cat(views), supports, labels, tau)
    p_a, p_b = p.detach().chunk(len(views))[:2]
    targets = paws_targets(p_a, p_b, len(views) - 2, temperature)
    return cross_entropy(targets, p), me_max(p, temperature)


def nnd_loss(
    z: Tensor, supports: Tensor, z_teacher: Tensor, supports_teacher: Tensor, labels: Tensor, tau: float = 0.1
) -> Tensor:
    """L_NND, nearest-neighbour distillation: the student keeps the teacher's distribution over the OLD classes.

    `mean H(pi(z_o; S_o, Y_old), pi(z; S, Y_old))` over all views of the unlabelled images, the same view on both sides,
    neither side sharpened (arXiv 2212.05102). The gradient reaches the student's queries and supports, not the teacher.

    Args:
        z: The student's embeddings of all views `[n, D]`.
        supports: The student's embeddings of the supports of old classes `[m, D]`.
        z_teacher: The teacher's embeddings of the same views `[n, D]`.
        supports_teacher: The teacher's embeddings of the same supports `[m, D]`.
        labels: Label matrix over the old classes `[m, K]`.
        tau: Temperature.

    Returns:
        A scalar; its minimum is the teacher's mean entropy, not 0.
    """
    with torch.no_grad():
        targets = soft_nearest_neighbours(z_teacher, supports_teacher, labels, tau)
    return cross_entropy(targets, soft_nearest_neighbours(z, supports, labels, tau))


def logit_distillation(logits: Tensor, logits_teacher: Tensor) -> Tensor:
    """Mean `KL(softmax(teacher) || softmax(student))` over rows of old-class logits `[n, K_old]`; teacher detached.

    The arm `csl_logit_kd`: what L_NND is compared with. Scalar, 0 where both agree.
    """
    teacher = logits_teacher.detach().log_softmax(dim=1)
    return F.kl_div(logits.log_softmax(dim=1), teacher, reduction="batchmean", log_target=True)


def replay_loss(logits: Tensor, stored: Tensor, known: Tensor) -> Tensor:
    """DER++'s squared error between logits and those stored with the exemplar (arXiv 2004.07211, Eq. 6); scalar.

    Args:
        logits: Of the supports now, `[m, C]`.
        stored: Of the clean exemplars at the end of their task, `[m, C]`.
        known: Which rows have stored logits, bool `[m]`. None at all gives 0.
    """
    errors = ((logits - stored) ** 2).mean(dim=1)
    return torch.where(known, errors, 0.0).sum() / known.sum().clamp_min(1)
