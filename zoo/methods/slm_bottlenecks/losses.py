"""The loss of a language model, whole or in chunks, and how it falls with tokens and dollars (arXiv 2410.19456)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.nn.lm import IGNORE


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropies of the rows in nats, in float32.

    Args:
        hidden: `[N, D]`.
        weight: Output embedding `[V, D]`.
        labels: int64 `[N]`; `IGNORE` does not count.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORE, reduction="sum")


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: int = 0) -> Tensor:
    """Mean cross-entropy of next tokens in nats.

    Args:
        hidden: Last hidden states `[B, T, D]`.
        weight: Output embedding `[V, D]`.
        labels: int64 `[B, T]`, already shifted; `IGNORE` does not count.
        chunks: 0: the logits `[B, T, V]` exist at once. Else they are made for one of so many chunks of the tokens at
            a time, and again in the backward pass.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    count = (labels != IGNORE).sum().clamp(min=1)
    if not chunks:
        return summed_cross_entropy(hidden, weight, labels) / count
    parts = zip(hidden.chunk(chunks), labels.chunk(chunks), strict=True)
    sums = [checkpoint(summed_cross_entropy, h, weight, y, use_reentrant=False) for h, y in parts]
    return torch.stack(sums).sum() / count


@dataclass(frozen=True)
class LossLaw:
    """Loss after `n` tokens: `L(n) = floor + (scale / n) ** exponent` (form of arXiv 2001.08361, Eq. 1.2).

    Attributes:
        floor: Loss that more tokens do not go below, nats.
        scale: Tokens at which the reducible loss is one nat.
        exponent: How fast it falls.
    """

    floor: float
    scale: float
    exponent: float

    def loss(self, tokens: float) -> float:
        """Loss after `tokens`, nats."""
        return float(self.floor + (self.scale / tokens) ** self.exponent)

    def loss_per_token(self, tokens: float) -> float:
        """How much the next token lowers the loss, `-dL/dn`, nats; positive."""
        return float(self.exponent * (self.scale / tokens) ** self.exponent / tokens)

    def tokens_to(self, target: float) -> float:
        """Tokens until the loss is `target`.

        Raises:
            ValueError: If it is never reached.
        """
        if target <= self.floor:
            raise ValueError(f"target: a loss of {target} is not reached; accepted: above the floor {self.floor:.4g}")
        return float(self.scale / (target - self.floor) ** (1 / self.exponent))


def fit_loss_law(tokens: Sequence[float], losses: Sequence[float]) -> LossLaw:
    """Fit a law to a loss curve by least squares of the relative error.

    Args:
        tokens: Tokens seen, ascending, at least four points.
        losses: Losses, nats.

    Raises:
        ValueError: If there are fewer points than a fit needs.
    """
    import numpy as np
    from scipy.optimize import least_squares

    if len(tokens) < 4:
        raise ValueError(f"tokens: {len(tokens)} points are too few for a law; accepted: 4 or more")
    n, y = np.asarray(tokens, float), np.asarray(losses, float)

    def residual(p: np.ndarray) -> np.ndarray:
        return (np.exp(p[0]) + np.exp(p[2] * (p[1] - np.log(n)))) / y - 1

    starts = [(np.log(share * y[-1]), np.log(n[0]), exponent) for share in (0.3, 0.8) for exponent in (0.1, 0.5)]
    bounds = ([-20.0, -50.0, 1e-3], [10.0, 80.0, 5.0])
    best = min((least_squares(residual, start, bounds=bounds) for start in starts), key=lambda found: found.cost)
    return LossLaw(float(np.exp(best.x[0])), float(np.exp(best.x[1])), float(best.x[2]))


def loss_per_dollar(law: LossLaw, tokens: float, tokens_per_dollar: float) -> float:
    """Nats by which the next dollar lowers the loss (arXiv 2410.19456, Eq. 1): `Loss/Token × Token/Dollar`."""
    return law.loss_per_token(tokens) * tokens_per_dollar


def dollars_to_target(law: LossLaw, target: float, tokens_per_dollar: float) -> float:
    """Dollars until the loss is `target`; infinite where no token can be bought."""
    return law.tokens_to(target) / tokens_per_dollar if tokens_per_dollar > 0 else float("inf")
