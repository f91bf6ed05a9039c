"""Equations of KV Prediction: the loss of training, the maps from base to auxiliary layers, recovery."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Label of a position that does not count.
IGNORE = -100
#: How the consistency loss puts layers together.
REDUCTIONS = ("mean", "sum")


def canonical_map(auxiliary_depth: int, base_depth: int) -> list[int]:
    """Auxiliary layer of each base layer where both are models of one family (KVP-C, arXiv 2410.08391, Table 1).

    With `q, r = divmod(base_depth, auxiliary_depth)` the first `r` auxiliary layers feed `q + 1` base layers each, the
    others `q`. The rule is inferred; it gives every such row of the table.

    Raises:
        ValueError: If the auxiliary model is deeper than the base, or has no layer.
    """
    if not 0 < auxiliary_depth <= base_depth:
        raise ValueError(
            f"an auxiliary model of {auxiliary_depth} layers cannot feed a base of {base_depth}; accepted: 1 to "
            f"{base_depth} layers"
        )
    each, more = divmod(base_depth, auxiliary_depth)
    return [layer for layer in range(auxiliary_depth) for _ in range(each + (layer < more))]


def pruned_map(kept: Sequence[int], base_depth: int) -> list[int]:
    """Auxiliary layer of each base layer where the auxiliary is the base without some layers (KVP-LP, Table 1).

    It is the position in `kept` of the last kept layer that is not after the base layer.

    Raises:
        ValueError: If `kept` does not rise from 0 within the base.
    """
    if list(kept) != sorted(set(kept)) or not kept or kept[0] != 0 or kept[-1] >= base_depth:
        raise ValueError(f"layers: {list(kept)} are not accepted; accepted: rising from 0, less than {base_depth}")
    return [sum(layer <= i for layer in kept) - 1 for i in range(base_depth)]


def cache_loss(
    predicted: Sequence[tuple[Tensor, Tensor]],
    target: Sequence[tuple[Tensor, Tensor]],
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Consistency loss: L1 distance of predicted from true keys and values (arXiv 2410.08391, Eq. 3).

    `reduce_i mean|K^_i - K_i| + reduce_i mean|V^_i - V_i|`, means over positions that count, heads and dimensions. Keys
    are compared after the base's normalisation and before the rotary embedding.

    Args:
        predicted: Keys and values of each base layer, `[B, h, S, d]` each.
        target: The true ones.
        mask: `[B, S]`, true where a position counts; None for all.
        reduction: `mean` over layers, as the paper says (1 / n_B), or `sum`, as its released configurations do.

    Raises:
        ValueError: If the numbers of layers differ or the reduction is unknown.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"consistency_reduction: {reduction!r} is not accepted; accepted: {', '.join(REDUCTIONS)}")
    if len(predicted) != len(target):
        raise ValueError(f"{len(predicted)} predicted layers do not fit {len(target)} true ones")
    total = predicted[0][0].new_zeros(())
    for guess, truth in zip(predicted, target, strict=True):
        for a, b in zip(guess, truth, strict=True):
            error = (a - b).abs().mean(dim=(1, 3))
            total = total + (error.mean() if mask is None else (error * mask).sum() / mask.sum().clamp(min=1))
    return total / len(predicted) if reduction == "mean" else total


def token_loss(logits: Tensor, labels: Tensor, z_weight: float = 0.0) -> Tensor:
    """Cross-entropy of the next token plus `z_weight * mean(logsumexp²)`, over the labels that count.

    Args:
        logits: `[B, T, V]`; computed in float32.
        labels: int64 `[B, T]`, already shifted; -100 does not count.
        z_weight: Weight of the z-loss.

    Departures:
        The official code's z-loss adds `(log V)²` for a position that does not count; here it adds nothing.
    """
    flat, wanted = logits.float().flatten(0, -2), labels.flatten()
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORE)
    if z_weight:
        counts = wanted != IGNORE
        loss = loss + z_weight * (flat.logsumexp(dim=-1).square() * counts).sum() / counts.sum().clamp(min=1)
    return loss


def total_loss(
    base: Tensor,
    auxiliary: Tensor,
    consistency: Tensor,
    base_weight: float = 1.0,
    auxiliary_weight: float = 1.0,
    consistency_weight: float = 1.0,
) -> Tensor:
    """`L = λ_B L_B + λ_A L_A + λ_C L_C` (arXiv 2410.08391, Eq. 4)."""
    return base_weight * base + auxiliary_weight * auxiliary + consistency_weight * consistency


def recovery(nll: float, nll_base: float, nll_no_prompt: float) -> float:
    """Part of what the prompt is worth to the base that a method keeps: 1 for the base, 0 for no prompt at all.

    Not in the paper. It tells what the cache is worth, as a base that decodes is good without any prompt.
    """
    worth = nll_no_prompt - nll_base
    return (nll_no_prompt - nll) / worth if worth else float("nan")


def lazy_retention(depth: float, first: float, last: float) -> float:
    """Fraction of tokens that LazyLLM keeps at a relative depth: 1, from 0.3 a line `first` to `last`, then `last`."""
    if depth < 0.3:
        return 1.0
    return last if depth >= 0.9 else first + (last - first) * (depth - 0.3) / 0.6


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last dimension, first half against second half; all `[..., S, d]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
