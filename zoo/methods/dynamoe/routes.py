"""Who chooses the width of each token in a forward pass: nobody, a table, the router, the truth, or a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.methods.dynamoe.losses import narrowest_above, narrowest_likely

#: Kinds of router.
HEADS = ("score", "label")
#: Ways of computing a chosen width.
EXECUTIONS = ("masked", "grouped")


class Route:
    """Chooses widths; this one runs every layer in full.

    Attributes:
        needs_router: Whether `widths` wants the router's prediction.
        needs_scores: Whether it wants the true similarities, which cost about one more MLP.
    """

    needs_router = False
    needs_scores = False

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """Choose the widths of one layer.

        Args:
            layer: Number of the layer.
            prediction: Output of its router, `[B, T, E - 1]` (score) or `[B, T, E]` (label).
            scores: True similarities `[B, T, E]`.

        Returns:
            int64 `[B, T]`: numbers of experts; or float `[B, T, E]`: weights of experts, which gradients pass; or None
            for the full MLP.
        """
        return None

    def rows(self, rows: slice) -> Route:
        """The same choice for some of the sequences."""
        return self


@dataclass
class Fixed(Route):
    """Widths that are known beforehand.

    Args:
        table: int `[L]`, one for each layer, or `[L, B, T]`, one for each token.
    """

    table: Tensor

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """The table's."""
        return self.table[layer].long()

    def rows(self, rows: slice) -> Fixed:
        """The table's rows."""
        return self if self.table.ndim == 1 else Fixed(self.table[:, rows])


@dataclass
class ByRouter(Route):
    """The router's choice.

    Args:
        head: One of `HEADS`.
        knob: `theta` of the score head; `tau` of the label head. None takes the most likely label.
    """

    head: str = "score"
    knob: float | None = None
    needs_router = True

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """Smallest expert whose predicted score is above theta; or whose label is likely enough."""
        assert prediction is not None
        return chosen(prediction, self.head, self.knob)


@dataclass
class Oracle(Route):
    """The true difficulty, which the router is to predict.

    Args:
        theta: Threshold of the similarity.
    """

    theta: float
    needs_scores = True

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """Smallest expert whose similarity is above theta."""
        assert scores is not None
        return narrowest_above(scores[..., :-1], self.theta)


@dataclass
class Mixture(Route):
    """What is executed in training: for each sequence the full MLP, random widths, or the router's choice.

    Args:
        kind: int64 `[B]`: 0 full, 1 random, 2 routed.
        random: int64 `[B, L]`: the random widths.
        experts: Number of experts.
        head: One of `HEADS`.
        knob: Threshold of the routed sequences.
    """

    kind: Tensor
    random: Tensor
    experts: int
    head: str
    knob: float | None
    needs_router = True
    needs_scores = True

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """Each sequence's own."""
        assert prediction is not None
        routed = chosen(prediction.detach(), self.head, self.knob)
        kind = self.kind[:, None]
        fixed = torch.where(kind == 0, self.experts - 1, self.random[:, layer, None])
        return torch.where(kind == 2, routed, fixed)


@dataclass
class Gumbel(Route):
    """Router trained through the language model's loss, as in Flextron: hard Gumbel-softmax samples, soft gradients.

    Args:
        noise: float `[B, T, L, E]`, uniform in (0, 1).
        temperature: Of the softmax.
    """

    noise: Tensor
    temperature: float = 1.0
    needs_router = True

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """One-hot weights of experts `[B, T, E]`."""
        assert prediction is not None
        gumbel = -(-self.noise[:, :, layer].log()).log()
        soft = ((prediction.float() + gumbel) / self.temperature).softmax(-1)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        return hard + soft - soft.detach()


def chosen(prediction: Tensor, head: str, knob: float | None) -> Tensor:
    """Widths that a router's output stands for, see `ByRouter`.

    Raises:
        ValueError: If a score head is given no threshold.
    """
    if head == "score":
        if knob is None:
            raise ValueError("theta: the score head needs a threshold; accepted: a number from 0 to 1")
        return narrowest_above(prediction, knob)
    return prediction.argmax(-1) if knob is None else narrowest_likely(prediction.float().softmax(-1), knob)


@dataclass
class Trace:
    """What the layers of one forward pass saw, by number of the layer."""

    predictions: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    widths: dict[int, Tensor | None] = field(default_factory=dict)

    def stacked(self, what: str) -> Tensor:
        """`predictions`, `scores` or `widths` of all layers, `[L, B, T, ...]`."""
        kept = getattr(self, what)
        return torch.stack([kept[layer] for layer in sorted(kept)])


@dataclass
class Control:
    """What all nested MLPs of a model do at present.

    Attributes:
        route: Who chooses.
        execution: `masked`: compute all, set the rest to zero. `grouped`: only what was chosen, token by token.
        trace: Where they write down what they saw.
        similarity: See `losses.similarity`.
        scored: Whether similarities are computed even if the route does not ask.
    """

    route: Route = field(default_factory=Route)
    execution: str = "masked"
    trace: Trace | None = None
    similarity: str = "inner"
    scored: bool = False

    @contextmanager
    def using(
        self, route: Route, trace: Trace | None = None, scored: bool = False, execution: str | None = None
    ) -> Iterator[Trace | None]:
        """Route for a while."""
        before = (self.route, self.trace, self.scored, self.execution)
        self.route, self.trace, self.scored = route, trace, scored
        self.execution = execution or self.execution
        try:
            yield trace
        finally:
            self.route, self.trace, self.scored, self.execution = before


def hashed_uniform(rows: Tensor, salt: int, count: int) -> Tensor:
    """Numbers in (0, 1) that follow from the tokens of each sequence and a salt alone.

    The choice of a route is then the same for any number of processes and any division of a batch, and needs no state
    of a generator in the checkpoint.

    Args:
        rows: int64 `[B, T]`.
        salt: Another one gives other numbers, e.g. the step.
        count: How many for each row.

    Returns:
        float32 `[B, count]`.
    """
    places = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    key = _mix((_mix(rows + 1) * (2 * places + 1)).sum(1) + _mix(torch.tensor(salt + 1, device=rows.device)))
    draws = _mix(key[:, None] + torch.arange(1, count + 1, device=rows.device) * 0x9E3779B97F4A7C1)
    return ((draws & 0x7FFFFF).float() + 0.5) / 0x800000


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers; products wrap around."""
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = (x ^ (x >> 29)) * multiplier
    return x ^ (x >> 32)
