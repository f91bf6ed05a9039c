"""Potential curves of traces: completions of every prefix, with the reuse of those that survive a chunk."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from zoo.methods.cot_potential.chunking import cut_trace
from zoo.methods.cot_potential.engine import Job, Opened, Sampler
from zoo.methods.cot_potential.losses import wilson_interval
from zoo.methods.cot_potential.store import SampleStore

#: Completions that sequential stopping draws at once.
_BLOCK = 32


class Problem(Protocol):
    """What a datamodule gives for a problem; traces are token ids, or text for a server."""

    key: str
    #: What stands between chunks where they are read: nothing in texts, a space where tokens are words.
    joint: ClassVar[str]

    @property
    def prompt(self) -> Any:
        """The question, as the model reads it."""

    def judge(self, trace: Any) -> bool:
        """Whether the whole of a trace ends with the right answer."""

    def ended(self, trace: Any) -> bool:
        """Whether the model has ended the trace itself."""

    def pieces(self, trace: Any) -> list[str]:
        """Text of each token."""

    def text(self, tokens: Any) -> str:
        """A trace to be read."""

    def answer_start(self, trace: Any) -> int:
        """Position of the answer's first token; the length of the trace if there is none."""

    def annotate(self, trace: Any, boundaries: Sequence[int]) -> tuple[list[str], list[float]]:
        """Kinds of the chunks and exact potentials at the boundaries; empty and NaN where nobody knows."""


@dataclass(frozen=True)
class Chunker:
    """How traces are cut, see `cut_trace`.

    Args:
        kind: Name.
        size: Number or size of chunks.
        token: Token that ends a chunk.
    """

    kind: str = "equal_k"
    size: int = 20
    token: str = ""

    def __post_init__(self) -> None:
        cut_trace([], 0, self.kind, self.size, self.token)

    def __call__(self, problem: Problem, trace: Any) -> list[int]:
        """Boundaries of a trace."""
        return cut_trace(problem.pieces(trace), problem.answer_start(trace), self.kind, self.size, self.token)


@dataclass(frozen=True)
class Trace:
    """A trace, cut.

    Attributes:
        problem: What it answers.
        tokens: Token ids or text.
        boundaries: `t_0 = 0 < .. < t_K = T`.
        key: Name; part of the seed of completions.
    """

    problem: Problem
    tokens: Any
    boundaries: tuple[int, ...]
    key: str

    @cached_property
    def correct(self) -> bool:
        """Whether its answer is right."""
        return self.problem.judge(self.tokens)

    @cached_property
    def before_answer(self) -> int:
        """Index of the last boundary that the answer is not yet written at."""
        start = self.problem.answer_start(self.tokens)
        return max(i for i, t in enumerate(self.boundaries) if t <= start and (i == 0 or t < len(self.tokens)))


def trace_key(problem: Problem, tokens: Any, name: str) -> str:
    """Name of a trace, made of question and tokens too: completions of another one are never taken for its own."""
    return f"{problem.key}/{name}-{zlib.crc32(repr((problem.prompt, tokens)).encode()):08x}"


def make_trace(problem: Problem, tokens: Any, chunker: Chunker, name: str) -> Trace:
    """Cut a trace."""
    return Trace(problem, tokens, tuple(chunker(problem, tokens)), trace_key(problem, tokens, name))


@dataclass(frozen=True)
class Curve:
    """Estimated potentials of a trace.

    Attributes:
        trace: The trace.
        pot: Potential at each boundary, float64 `[K + 1]`; NaN where it was not asked for.
        trials: Completions behind each, `[K + 1]`; 0 at the end of the trace, which is known.
    """

    trace: Trace
    pot: Tensor
    trials: list[int]

    def interval(self) -> tuple[Tensor, Tensor]:
        """Wilson's 95 % interval at each boundary; the point itself at the end."""
        trials = torch.tensor(self.trials, dtype=torch.float64)
        low, high = wilson_interval(self.pot * trials, trials.clamp(min=1))
        known = trials == 0
        return torch.where(known, self.pot, low), torch.where(known, self.pot, high)


def survivors(completions: Sequence[Any], chunk: Any) -> list[Any]:
    """Rests of the completions that reproduce a chunk: samples from the prefix with the chunk, exact and unbiased.

    Given that a completion of `c` starts with `d`, its rest is distributed as a completion of `c + d`.
    """
    size = len(chunk)
    return [c[size:] for c in completions if len(c) > size and c[:size] == chunk]


def sample_curves(
    engine: Sampler,
    traces: Sequence[Trace],
    count: int,
    store: SampleStore,
    reuse: bool = True,
    points: Sequence[Sequence[int]] | None = None,
    stop_width: float = 0.0,
) -> list[Curve]:
    """Estimate the potential at the boundaries of traces.

    Args:
        engine: Draws completions.
        traces: The traces; with names that differ.
        count: Completions `N` behind each potential.
        store: Keeps completions, and has those of an analysis that was killed.
        reuse: Whether completions that reproduce a chunk count for its end too. It saves tokens; estimates of
            neighbours are then correlated.
        points: Boundaries of each trace that are asked for, by index; all but the last one by default.
        stop_width: Draw no more at a boundary once Wilson's interval is narrower; 0 for never. Classifying such
            estimates against a threshold is biased.

    Raises:
        ValueError: If a trace does not leave room for a completion.
    """
    wanted = [list(p) for p in points] if points is not None else [list(range(len(t.boundaries) - 1)) for t in traces]
    opened = [
        engine.open(t.key, t.problem.prompt, t.tokens, [t.boundaries[k] for k in own])
        for t, own in zip(traces, wanted, strict=True)
    ]
    pots = [torch.full((len(t.boundaries),), float("nan"), dtype=torch.float64) for t in traces]
    trials = [[0] * len(t.boundaries) for t in traces]
    pools: list[list[Any]] = [[] for _ in traces]
    for place in range(max(map(len, wanted), default=0)):
        live = [i for i, own in enumerate(wanted) if place < len(own)]
        for i in live:
            t, k = traces[i], wanted[i][place]
            previous = t.boundaries[wanted[i][place - 1]] if place else 0
            chunk = t.tokens[previous : t.boundaries[k]]
            pools[i] = survivors(pools[i], chunk)[:count] if reuse and engine.reuses and place else []
        correct = {i: [_judge(traces[i], wanted[i][place], c) for c in pools[i]] for i in live}
        going = live
        while going:
            todo = {}
            for i in going:
                have = len(pools[i])
                enough = stop_width and have and _width(sum(correct[i]), have) < stop_width
                target = count if not stop_width else min(count, have + _BLOCK)
                if not enough and have < target:
                    todo[i] = range(have, target)
            drawn = _draw(engine, store, {i: (opened[i], traces[i], wanted[i][place], r) for i, r in todo.items()})
            for i, new in drawn.items():
                pools[i] = pools[i] + new
                correct[i] += [_judge(traces[i], wanted[i][place], c) for c in new]
            going = list(todo)
        for i in live:
            k = wanted[i][place]
            pots[i][k] = sum(correct[i]) / len(correct[i])
            trials[i][k] = len(correct[i])
    for t, pot in zip(traces, pots, strict=True):
        pot[-1] = float(t.correct)
    return [Curve(t, pot, n) for t, pot, n in zip(traces, pots, trials, strict=True)]


def _judge(trace: Trace, boundary: int, completion: Any) -> bool:
    return trace.problem.judge(trace.tokens[: trace.boundaries[boundary]] + completion)


def _width(successes: int, trials: int) -> float:
    low, high = wilson_interval(float(successes), float(trials))
    return float(high - low)


def _draw(
    engine: Sampler, store: SampleStore, wanted: dict[int, tuple[Opened, Trace, int, range]]
) -> dict[int, list[Any]]:
    """Take completions from the store, and draw the others; in the order of their rows."""
    jobs, owners = [], []
    for i, (opened, trace, k, rows) in wanted.items():
        known = store.get(trace.key, trace.boundaries[k], k)
        missing = [row for row in rows if row not in known]
        if missing:
            jobs.append(Job(opened, trace.boundaries[k], k, missing))
            owners.append(i)
    if jobs:
        engine.complete(jobs, sink=store.take)
    return {
        i: [store.get(trace.key, trace.boundaries[k], k)[row] for row in rows]
        for i, (_, trace, k, rows) in wanted.items()
    }


def write_traces(
    engine: Sampler, problems: Sequence[Problem], count: int, store: SampleStore, name: str = "write"
) -> list[list[Any]]:
    """Let the model answer each problem `count` times.

    Args:
        engine: Draws completions of the empty prefix.
        problems: The problems.
        count: Traces of each.
        store: Keeps them.
        name: Part of the seed.

    Returns:
        Tokens of the traces, `count` for each problem.
    """
    asked = [Trace(p, p.prompt[:0], (0,), trace_key(p, p.prompt[:0], name)) for p in problems]
    opened = [engine.open(t.key, t.problem.prompt, t.tokens, [0]) for t in asked]
    drawn = _draw(
        engine, store, {i: (o, t, 0, range(count)) for i, (o, t) in enumerate(zip(opened, asked, strict=True))}
    )
    return [drawn[i] for i in range(len(problems))]
