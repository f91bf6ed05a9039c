"""What one trained model says about its routing: its curve, and the same activity spent without the router.

All controls run on the same sequences with the same weights; their difference to the router is paired by sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.methods.dynamoe.losses import activity
from zoo.methods.dynamoe.networks import NestedMLP
from zoo.methods.dynamoe.routes import Control, Fixed, Route, Trace, hashed_uniform
from zoo.nn.lm import IGNORE, token_logprobs

#: Token classes of the datamodule, by number; other data have one class.
CLASSES = ("boilerplate", "copy", "arithmetic", "text", "random")


@dataclass
class Sequences:
    """Held-out text: `N` sequences of `T` tokens."""

    input_ids: Tensor
    """int64 `[N, T]`."""
    labels: Tensor
    """int64 `[N, T]`, shifted; -100 does not count."""
    token_class: Tensor
    """int64 `[N, T]`: class of the label."""
    mask: Tensor
    """bool `[N, T]`: true on tokens, false on padding."""

    @classmethod
    def from_batches(cls, batches: Sequence[Mapping[str, Tensor]]) -> Sequences:
        """Put batches together, in an order that follows from the tokens, whichever process had which."""
        ids = torch.cat([b["input_ids"] for b in batches])
        labels = torch.cat([b["labels"] for b in batches])
        classes = torch.cat([b.get("token_class", torch.zeros_like(b["input_ids"])) for b in batches])
        mask = torch.cat([b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches]).bool()
        order = hashed_uniform(ids, 0, 1)[:, 0].argsort(stable=True)
        return cls(ids[order], labels[order], classes[order], mask[order])

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> Sequences:
        """The first `count` sequences."""
        return Sequences(self.input_ids[:count], self.labels[:count], self.token_class[:count], self.mask[:count])


@dataclass
class Point:
    """What a route costs and how well it predicts.

    Attributes:
        nll: Negative log-likelihood of each sequence, sum over the tokens that count, float64 `[N]`, nats.
        count: Their number `[N]`.
        widths: Experts that were used, uint8 `[L, N, T]`.
        activity: Mean over all tokens.
        correct: How many tokens that count were the most likely ones.
        token_nll: float32 `[N, T]`, 0 where nothing counts.
        trace: What the layers saw, `predictions` or `scores`, where it was asked for.
    """

    nll: Tensor
    count: Tensor
    widths: Tensor
    activity: float
    correct: float
    token_nll: Tensor
    trace: dict[str, Tensor]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nll.sum() / self.count.sum())


class Evaluator:
    """Runs routes over sequences.

    Args:
        model: Causal language model with nested MLPs.
        layers: They.
        control: Theirs.
        sequences: What to predict.
        batch_size: Sequences at a time.
    """

    def __init__(
        self, model: Any, layers: Sequence[NestedMLP], control: Control, sequences: Sequences, batch_size: int = 32
    ) -> None:
        self.model, self.layers, self.control = model, list(layers), control
        self.sequences, self.batch_size = sequences, batch_size
        device = sequences.input_ids.device
        self.sizes = torch.tensor([[w / mlp.hidden_width for w in mlp.widths] for mlp in layers], device=device)

    @torch.no_grad()
    def run(self, route: Route, keep: Sequence[str] = (), on: Sequences | None = None) -> Point:
        """Predict all sequences.

        Args:
            route: Who chooses widths.
            keep: `predictions`, `scores`: what to keep of what the layers saw.
            on: Other sequences.
        """
        s = on or self.sequences
        kept: dict[str, list[Tensor]] = {name: [] for name in ("widths", *keep)}
        token_nll, correct = [], 0.0
        for start in range(0, len(s), self.batch_size):
            rows = slice(start, start + self.batch_size)
            trace = Trace()
            mask = s.mask[rows]
            with self.control.using(route.rows(rows), trace, scored="scores" in keep):
                given = None if bool(mask.all()) else mask.long()
                logits = self.model(input_ids=s.input_ids[rows], attention_mask=given, use_cache=False).logits
            labels = s.labels[rows]
            token_nll.append(-token_logprobs(logits, labels))
            correct += float((logits.argmax(-1) == labels).sum())
            for name in kept:
                seen = trace.stacked(name)
                kept[name].append(seen.to(torch.uint8) if name == "widths" else seen.float())
        nll = torch.cat(token_nll)
        widths = torch.cat(kept.pop("widths"), dim=1)
        return Point(
            nll.double().sum(1),
            (s.labels != IGNORE).sum(1).double(),
            widths,
            float(activity(widths.long(), self.sizes)[s.mask].mean()),
            correct,
            nll,
            {name: torch.cat(parts, dim=1) for name, parts in kept.items()},
        )

    def constant(self, widths: Sequence[int]) -> Fixed:
        """Route with one width for each layer."""
        return Fixed(torch.tensor(list(widths), device=self.sequences.input_ids.device))


# Controls


def shuffled(widths: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange widths between tokens of a group, in each layer by itself: its histogram stays as it is.

    Args:
        widths: `[L, N, T]`.
        groups: int64 `[N, T]`; tokens of a negative group keep their widths.
        generator: Source of randomness, on the CPU.
    """
    out = widths.flatten(1).clone()
    flat = groups.flatten()
    for group in flat[flat >= 0].unique():
        places = (flat == group).nonzero()[:, 0]
        for layer in range(len(out)):
            order = torch.randperm(len(places), generator=generator).to(places.device)
            out[layer, places] = out[layer, places[order]]
    return out.reshape(widths.shape)


def independent(widths: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the width of each token from its layer's histogram; `[L, N, T]`."""
    seen = widths[:, mask]
    draws = torch.randint(seen.shape[1], widths.flatten(1).shape, generator=generator).to(widths.device)
    return seen.gather(1, draws).reshape(widths.shape)


def greedy_constants(run: Callable[[Sequence[int]], float], layers: int, experts: int) -> list[tuple[int, ...]]:
    """Widths per layer from the full model down to the narrowest, one expert narrower in one layer at a time.

    Args:
        run: Loss on calibration data of one choice of widths.
        layers: Number of layers.
        experts: Number of experts.

    Returns:
        `layers * (experts - 1) + 1` choices; each takes the step that costs least.
    """
    chain = [(experts - 1,) * layers]
    while any(chain[-1]):
        last = chain[-1]
        steps = [(*last[:i], last[i] - 1, *last[i + 1 :]) for i in range(layers) if last[i]]
        chain.append(min(steps, key=run) if len(steps) > 1 else steps[0])
    return chain


def token_table(predictions: Tensor, ids: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """Mean prediction of the router for each token of the vocabulary, without its context.

    Args:
        predictions: `[L, N, T, K]`.
        ids: int64 `[N, T]`.
        mask: bool `[N, T]`.
        vocab_size: Number of tokens; those that do not occur get the mean over all.

    Returns:
        `[L, vocab_size, K]`.
    """
    seen, where = predictions[:, mask], ids[mask]
    sums = seen.new_zeros(len(seen), vocab_size, seen.shape[-1]).index_add(1, where, seen)
    counts = torch.bincount(where, minlength=vocab_size)[None, :, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), seen.mean(1, keepdim=True))


# Comparisons


def at_activity(points: Sequence[Point], wanted: float) -> Tensor | None:
    """Loss `[N]` of each sequence at an activity between two points of a curve, mixed linearly from them.

    It is what a random choice between the two for each sequence costs. None outside the curve.
    """
    ordered = sorted(points, key=lambda p: p.activity)
    for low, high in itertools.pairwise(ordered):
        if low.activity <= wanted <= high.activity and high.activity > low.activity:
            share = (wanted - low.activity) / (high.activity - low.activity)
            return low.nll + share * (high.nll - low.nll)
    return None


def paired(control: Tensor, point: Point, resamples: int = 1000) -> tuple[float, float]:
    """Mean of control minus router in nats per token, and its standard error by bootstrap over sequences.

    Args:
        control: Loss of each sequence, `[N]`.
        point: The router's.
        resamples: Of the bootstrap.
    """
    difference, count = (control - point.nll).cpu(), point.count.cpu()
    rows = torch.randint(len(count), (resamples, len(count)), generator=torch.Generator().manual_seed(0))
    spread = difference[rows].sum(1) / count[rows].sum(1)
    return float(difference.sum() / count.sum()), float(spread.std())


def significant(
    gains: Sequence[tuple[float, float, float]], low: float, high: float, errors: float, rank: int
) -> float:
    """The `rank`-th largest gain among those in a band of activity that are above their noise; 0 if there is none.

    Args:
        gains: Activity, gain and its standard error.
        low: Least activity.
        high: Largest.
        errors: How many standard errors a gain must exceed to count.
        rank: 1 for the largest.
    """
    counted = sorted((g if g > errors * se else 0.0 for a, g, se in gains if low <= a <= high), reverse=True)
    return counted[rank - 1] if len(counted) >= rank else 0.0


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two `[N]`; 0 if one is constant."""
    from scipy.stats import spearmanr

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    return float(spearmanr(a.cpu().numpy(), b.cpu().numpy()).statistic)


def quartile_gap(active: Tensor, hardness: Tensor) -> float:
    """Mean activity of the hardest quarter of the tokens minus that of the easiest; both `[N]`."""
    order = hardness.argsort(stable=True)
    quarter = max(len(order) // 4, 1)
    return float(active[order[-quarter:]].mean() - active[order[:quarter]].mean())


def difficulty_metrics(
    point: Point, labels: Tensor, sizes: Tensor, sequences: Sequences, dense_nll: Tensor
) -> dict[str, float]:
    """How the chosen widths go with the true difficulty on the states that the router saw; first tokens are left out.

    Args:
        point: The router's.
        labels: int64 `[L, N, T]`: true labels.
        sizes: `[L, E]`: `H_e / H`.
        sequences: What was predicted.
        dense_nll: `[N, T]`: loss of the full model.
    """
    counted = sequences.mask.clone()
    counted[:, 0] = False
    widths = point.widths.long()
    active, hardness = activity(widths, sizes)[counted], labels.float().mean(0)[counted]
    hit = (widths == labels)[:, counted].float().mean()
    majority = torch.stack([row.bincount().max() / row.numel() for row in labels[:, counted]]).mean()
    predicted = (sequences.labels != IGNORE)[counted]
    return {
        "quartile_gap": quartile_gap(active, hardness),
        "spearman_oracle": spearman(active, hardness),
        "spearman_loss": spearman(active[predicted], dense_nll[counted][predicted]),
        "label_acc": float(hit),
        "majority": float(majority),
    }
