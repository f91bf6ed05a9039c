"""The quantities of arXiv 2602.14903, as functions of numbers: potential, intervals, events, pass@k.

The paper's own text was not at hand: definitions that only its public reviews or third-party notes state are marked
*reported*, our readings *ours*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Thresholds:
    """When a change of the potential is an event (reported by a public review as those of the paper's Table 1).

    Args:
        insight: Rise over one chunk that is more than a step: 40 points.
        tangent: Fall over one chunk: 30 points.
        guess: Potential before the answer under which a correct answer is a late guess: 5 points.
    """

    insight: float = 0.4
    tangent: float = 0.3
    guess: float = 0.05

    def __post_init__(self) -> None:
        for key in ("insight", "tangent", "guess"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not accepted; accepted: between 0 and 1")


def trace_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of the tokens of traces: mean over rows of the mean over a row's tokens.

    Every row weighs the same, so that the loss of a batch is the mean of those of its parts.

    Args:
        logits: `[B, T, V]`, any float type; computed in float32.
        labels: int64 `[B, T]`: what follows each position; -100 on the prompt and on padding.

    Returns:
        Scalar.
    """
    nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    counted = labels != -100
    return (nll.view_as(labels).sum(dim=1) / counted.sum(dim=1).clamp(min=1)).mean()


def potential(correct: Tensor) -> Tensor:
    """Estimate `pot(c_<t; x) = P[y = y*]` from completions of a prefix (arXiv 2602.14903, Eq. 1, reported).

    Args:
        correct: bool `[..., N]`: whether a completion ends with the right answer; one without an answer does not.

    Returns:
        float64 `[...]`.
    """
    return correct.double().mean(dim=-1)


def wilson_interval(successes: Tensor | float, trials: Tensor | float, z: float = 1.96) -> tuple[Tensor, Tensor]:
    """Wilson's score interval of a proportion; 95 % at the default `z`.

    Args:
        successes: Number of successes, any shape.
        trials: Number of trials, at least 1.
        z: Quantile of the normal distribution.
    """
    c, n = torch.as_tensor(successes, dtype=torch.float64), torch.as_tensor(trials, dtype=torch.float64)
    share = c / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)).sqrt()
    return (middle - half).clamp(min=0.0), (middle + half).clamp(max=1.0)


def difference_se(pot: Tensor, trials: int) -> Tensor:
    """Standard error of the change over each chunk, for independent estimates from `trials` completions each (ours).

    Proportions are shrunk by half a success, so that a curve at 0 or 1 has an error too.

    Args:
        pot: Potentials `[K + 1]`.

    Returns:
        `[K]`.
    """
    shrunk = (pot * trials + 0.5) / (trials + 1)
    variance = shrunk * (1 - shrunk) / trials
    return (variance[1:] + variance[:-1]).sqrt()


@dataclass(frozen=True)
class Events:
    """What happens along a trace.

    Attributes:
        insights: Chunks (numbered from 0) over which the potential jumps; the answer itself does not count.
        tangents: Chunks over which it falls.
        late_guess: Whether a correct answer comes out of nothing.
        monotone: Whether the curve never falls by more than the tolerance, up to the answer's start.
    """

    insights: tuple[int, ...]
    tangents: tuple[int, ...]
    late_guess: bool
    monotone: bool


def find_events(
    pot: Tensor | Sequence[float],
    before_answer: int,
    correct: bool,
    thresholds: Thresholds = Thresholds(),
    tolerance: Tensor | float = 0.0,
) -> Events:
    """Find insights, tangents and late guesses in a curve (thresholds reported; consecutive boundaries: ours).

    Args:
        pot: Potentials at the boundaries, `[K + 1]`.
        before_answer: Index of the last boundary before the answer; changes after it are the answer's.
        correct: Whether the trace has the right answer.
        thresholds: See `Thresholds`.
        tolerance: Fall that still counts as none, one number or one for each chunk `[K]`.

    Raises:
        ValueError: If `before_answer` is not an index of `pot`.
    """
    curve = torch.as_tensor(pot, dtype=torch.float64)
    if not 0 <= before_answer < len(curve):
        raise ValueError(f"before_answer: {before_answer} is no index of a curve of {len(curve)} points")
    change = curve[1 : before_answer + 1] - curve[:before_answer]
    allowed = torch.as_tensor(tolerance, dtype=torch.float64)
    allowed = allowed[:before_answer] if allowed.ndim else allowed
    return Events(
        tuple(torch.nonzero(change > thresholds.insight)[:, 0].tolist()),
        tuple(torch.nonzero(change < -thresholds.tangent)[:, 0].tolist()),
        bool(correct and curve[before_answer] < thresholds.guess),
        bool((change >= -allowed).all()),
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased `pass@k = 1 - C(n - c, k) / C(n, k)` from `c` successes among `n` samples (arXiv 2107.03374, Eq. 1).

    Raises:
        ValueError: If not `0 <= c <= n` and `1 <= k <= n`.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k: n={n}, c={c}, k={k} are not accepted; accepted: 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def corrected_pass_at_k(n: int, c: int, guesses: int, k: int) -> float:
    """pass@k where correct traces that are late guesses count as wrong (the idea reported, the formula ours).

    Raises:
        ValueError: If there are more guesses than successes.
    """
    if not 0 <= guesses <= c:
        raise ValueError(f"guesses: {guesses} is not accepted; accepted: 0 to the {c} correct traces")
    return pass_at_k(n, c - guesses, k)


def transfer_cut(boundaries: Sequence[int], before_answer: int, share: float) -> int:
    """Index of the boundary that gives the first `share` of a trace, rounded up, never the answer.

    Args:
        boundaries: Positions `t_0 = 0 <= .. <= t_K`.
        before_answer: Index of the last boundary before the answer.
        share: Fraction of the trace's tokens.
    """
    wanted = share * boundaries[-1]
    reached = next((i for i, t in enumerate(boundaries) if t >= wanted - 1e-9), before_answer)
    return min(reached, before_answer)


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half; NaN if a side is empty.

    Args:
        scores: `[n]`.
        positive: bool `[n]`.
    """
    first, second = scores[positive].double(), scores[~positive].double()
    if not len(first) or not len(second):
        return float("nan")
    above = (first[:, None] > second).double() + 0.5 * (first[:, None] == second).double()
    return float(above.mean())
