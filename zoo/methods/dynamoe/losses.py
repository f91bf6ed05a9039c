"""The equations of DynaMoE (arXiv 2502.12325): nested widths, difficulty, choice of an expert, losses and costs.

The paper's own formulas could not be read; what is marked "reconstructed" follows its abstract and public summaries.
`N` stands for any leading dimensions, `E` for experts, `D` for the width of the model, `H` for that of an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: How the output of a narrow expert is compared with that of the full MLP.
SIMILARITIES = ("inner", "cosine", "relerr")
#: Which expert counts as the smallest good one where similarity is not monotone in the width.
MODES = ("first", "stable")


def expert_widths(hidden: int, experts: int) -> list[int]:
    """Hidden neurons of each nested expert: `H_e = floor((e + 1) / E * H)`; the last one is the whole MLP.

    Reconstructed (sizes `(e + 1) / E * H`); the floor is ours.

    Args:
        hidden: Hidden neurons of the MLP.
        experts: Number of experts.

    Raises:
        ValueError: If an expert would have no neuron.
    """
    if not 1 <= experts <= hidden:
        raise ValueError(f"experts: {experts} is not accepted for {hidden} hidden neurons; accepted: 1 to {hidden}")
    return [(e + 1) * hidden // experts for e in range(experts)]


def similarity(outputs: Tensor, kind: str = "inner") -> Tensor:
    """How well each expert reproduces the full MLP, for each token.

    `inner`: `S_e = <Y_e, Y> / <Y, Y>` (reconstructed). `cosine`: `<Y_e, Y> / (|Y_e| |Y|)`, blind to scale. `relerr`:
    `1 - |Y_e - Y| / |Y|`, which bounds the disturbance of the residual stream. With `Y = Y_{E-1}`, so that
    `S_{E-1} = 1` exactly; a zero output is reproduced by every expert.

    Args:
        outputs: `[N, E, D]`, outputs of all experts, narrowest first.
        kind: One of `SIMILARITIES`.

    Returns:
        float32 `[N, E]`; neither bounded by 0 and 1 nor monotone in `e`.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in SIMILARITIES:
        raise ValueError(f"similarity: {kind!r} is unknown; accepted: {', '.join(SIMILARITIES)}")
    y = outputs.float()
    full = y[..., -1:, :]
    square = full.square().sum(-1)
    empty = square == 0
    square = square.masked_fill(empty, 1.0)
    if kind == "relerr":
        scores = 1 - ((y - full).square().sum(-1) / square).sqrt()
    else:
        scores = (y * full).sum(-1) / square
        if kind == "cosine":
            norms = y.square().sum(-1)
            scores = scores * (square / norms.masked_fill(norms == 0, 1.0)).sqrt()
    scores = scores.masked_fill(empty, 1.0)
    return torch.cat([scores[..., :-1], torch.ones_like(scores[..., -1:])], dim=-1)


def difficulty(scores: Tensor, theta: float | Tensor, mode: str = "first") -> Tensor:
    """Difficulty of each token: the smallest expert that is good enough, `min {e : S_e > theta}` (reconstructed).

    Args:
        scores: `[N, E]` from `similarity`.
        theta: Threshold, one number or `[N]`; from 1 on the answer is the full width.
        mode: `first`: as above. `stable`: the smallest `e` from which on all experts are good enough.

    Returns:
        int64 `[N]`, 0 (easy) to `E - 1` (hard).
    """
    return narrowest_above(scores[..., :-1], theta, mode)


def narrowest_above(scores: Tensor, theta: float | Tensor, mode: str = "first") -> Tensor:
    """Choose `min {e : S_e > theta}` from the scores of all experts but the last, which always is good enough.

    For each token the choice never falls when `theta` rises. It is the full width for `theta >= 1`, even where a
    predicted score is above.

    Args:
        scores: `[N, E - 1]`, measured or predicted.
        theta: Threshold, one number or `[N]`.
        mode: `first` or `stable`, see `difficulty`.

    Returns:
        int64 `[N]`.

    Raises:
        ValueError: If `mode` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown; accepted: {', '.join(MODES)}")
    level = torch.as_tensor(theta, device=scores.device, dtype=scores.dtype)[..., None]
    good = (scores > level) & (level < 1)
    if mode == "stable":
        good = good.flip(-1).cumprod(-1).flip(-1).bool()
    return (~good).cumprod(-1).sum(-1)


def narrowest_likely(probabilities: Tensor, tau: float) -> Tensor:
    """Choose `min {e : p_0 + ... + p_e >= tau}` from probabilities over labels; never falls when `tau` rises.

    Args:
        probabilities: `[N, E]`.
        tau: 0 to 1.

    Returns:
        int64 `[N]`.
    """
    # the last sum is 1 up to rounding, and has to be enough
    return (probabilities.cumsum(-1)[..., :-1] < tau).sum(-1)


def score_loss(predicted: Tensor, scores: Tensor) -> Tensor:
    """Router loss of the score head, `sum_e huber(r_e(x) - S_e) / (E - 1)` (ours; the paper has labels).

    Args:
        predicted: `[N, E - 1]`.
        scores: `[N, E]` from `similarity`; clamped to [-1, 2].

    Returns:
        float32 `[N]`.
    """
    targets = scores[..., :-1].clamp(-1.0, 2.0)
    return F.huber_loss(predicted.float(), targets, reduction="none").mean(-1)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Router loss of the label head: cross-entropy with the difficulty labels (reconstructed).

    Args:
        logits: `[N, E]`.
        labels: int64 `[N]` from `difficulty`.

    Returns:
        float32 `[N]`, nats.
    """
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape)


def row_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the sequences of a batch of the mean over each one's tokens that count.

    Unlike a mean over all tokens it is the same however a batch is divided over processes or accumulation steps; for
    packed text of one length the two hardly differ.

    Args:
        values: `[B, T]`.
        counted: bool `[B, T]`.

    Returns:
        Scalar.
    """
    kept = torch.where(counted, values, 0.0)
    return (kept.sum(1) / counted.sum(1).clamp(min=1)).mean()


def importance(hidden: Tensor, down: Tensor) -> Tensor:
    """Sum over tokens of the norm of each hidden neuron's contribution: `sum |h_n| * |W_down[:, n]|` (ours).

    Args:
        hidden: `[N, H]`, activations before the last matrix.
        down: `[D, H]`, the last matrix.

    Returns:
        float32 `[H]`.
    """
    return hidden.float().abs().flatten(0, -2).sum(0) * down.float().norm(dim=0)


def activity(widths: Tensor, sizes: Tensor) -> Tensor:
    """Activity of each token: the mean over layers of the fraction of hidden neurons that it uses.

    Args:
        widths: int64 `[L, N]`, chosen expert in each layer.
        sizes: float `[E]` or `[L, E]`, `H_e / H`.

    Returns:
        float `[N]`, above 0, at most 1.
    """
    per_layer = sizes.expand(len(widths), -1)
    return per_layer.gather(1, widths.flatten(1)).mean(0).reshape(widths.shape[1:])


def active_parameters(
    total: int, routers: int, width: int, hidden: Sequence[int], active: Sequence[float], matrices: int = 3
) -> float:
    """Parameters that a token uses: `P - P_mlp + sum_l matrices * D * H_e(l) + P_router` (our count).

    Args:
        total: Parameters of the dense model.
        routers: Parameters of the routers.
        width: Width `D` of the model.
        hidden: `H` of each layer's MLP.
        active: Hidden neurons in use in each layer, or their mean over tokens.
        matrices: 3 for a gated MLP, 2 for a plain one. Biases count as always in use.
    """
    return total + routers + matrices * width * (sum(active) - sum(hidden))


def activity_penalty(active: Tensor, target: float) -> Tensor:
    """Penalty of the Flextron-like baseline, `(activity - target)^2`.

    Args:
        active: `[B, T]`, activity of each token, with gradient.
        target: Activity aimed at.

    Returns:
        Scalar.
    """
    return (active.mean() - target).square()
