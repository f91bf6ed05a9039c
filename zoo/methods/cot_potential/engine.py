"""Sampling completions of many prefixes of one trace: one prefill, from which all rows go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache

from zoo.methods.cot_potential.caches import (
    Layers,
    SharedPrefixes,
    can_share,
    copied_layers,
    read_layers,
    shared_attention,
)
from zoo.methods.cot_potential.flops import Cost, cost_of
from zoo.methods.cot_potential.streams import Policy, pick, row_keys, uniforms

#: Ways of sampling that this machine offers: each row runs its prefix; one run for each boundary; one run for all.
SCHEMES = ("naive", "prefix", "fork")
#: Ended rows are dropped, which copies the cache, when fewer than this share of a batch goes on.
_SPARSE = 0.7


@dataclass
class Opened:
    """A trace whose prefixes are to be completed.

    Attributes:
        key: Name of the trace; part of the seed.
        prompt: Token ids of the question, or text for a server.
        trace: Token ids or text of the trace.
        layers: Keys and values `[1, H, P + T, D]` of each layer; empty where nothing was run.
        logits: Logits after each position that was asked for, by length of the prefix.
    """

    key: str
    prompt: Any
    trace: Any
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Completions that are wanted.

    Attributes:
        opened: The trace.
        cut: Tokens of the trace that are given.
        boundary: Number of the boundary; part of the seed.
        rows: Numbers of the completions; part of the seed.
    """

    opened: Opened
    cut: int
    boundary: int
    rows: Sequence[int]


#: Takes completions as soon as they are there: the job, the rows, the completions.
Sink = Callable[[Job, Sequence[int], Sequence[Any]], None]


class Sampler(Protocol):
    """What draws completions: `LocalEngine`, or `ServerEngine`."""

    policy: Policy
    reuses: bool

    def open(self, key: str, prompt: Any, trace: Any, cuts: Sequence[int]) -> Opened:
        """Prepare a trace."""

    def room(self, prompt: Any, given: Any) -> int:
        """Tokens that the budget leaves after what is given of a trace."""

    def complete(
        self, jobs: Sequence[Job], most: int = 0, stop: Sequence[Any] = (), sink: Sink | None = None
    ) -> list[list[Any]]:
        """Draw completions; one list for each job, a completion for each of its rows.

        Args:
            jobs: What is wanted.
            most: Most tokens of a completion; 0 for what the budget leaves.
            stop: Tokens that end a completion besides those that end a text.
            sink: Is handed completions as soon as they are there.
        """


@dataclass
class Meter:
    """Work that was done.

    Attributes:
        flops: Operations for prefixes and tokens, without those spent on rows that have ended.
        decoded: Tokens of completions.
        prefilled: Tokens of prefixes that went through the model.
        forwards: Calls of the model.
    """

    flops: int = 0
    decoded: int = 0
    prefilled: int = 0
    forwards: int = 0


@dataclass
class _Batch:
    """Rows that are decoded together.

    Attributes:
        logits: For the first token, `[N, V]`.
        keys: Names of their random numbers, `[N]`.
        lengths: Tokens of prompt and prefix, `[N]`.
        room: Most tokens of each, `[N]`.
        prefixes: What they share; None where each has a copy.
        mask: Of the copies, `[N, L + step]`; None where all are equally long.
    """

    logits: Tensor
    keys: NDArray[np.uint64]
    lengths: Tensor
    room: NDArray[np.int64]
    prefixes: SharedPrefixes | None = None
    mask: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows of what goes through the model."""
        self.lengths = self.lengths[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        if self.prefixes is not None:
            self.prefixes.keep(rows)


class LocalEngine:
    """Draws completions from a model of `transformers` in this process.

    Args:
        model: Causal language model in evaluation mode; with full attention in every layer for `prefix` and `fork`.
        eos_ids: Tokens that end a text.
        policy: How completions are drawn.
        scheme: One of `SCHEMES`; the numbers are the same, the cost is not.
        max_rows: Most rows in one batch.

    Raises:
        ValueError: If the scheme is unknown.
    """

    reuses = True

    def __init__(
        self,
        model: Any,
        eos_ids: Sequence[int],
        policy: Policy,
        scheme: str = "fork",
        max_rows: int = 1024,
    ) -> None:
        if scheme not in SCHEMES:
            raise ValueError(f"engine: {scheme!r} is not accepted; accepted: {', '.join(SCHEMES)}")
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows} is not accepted; accepted: 1 or more")
        self.model, self.policy, self.scheme, self.max_rows = model, policy, scheme, max_rows
        self.eos_ids = sorted(set(eos_ids))
        self.meter = Meter()
        #: Whether rows read their prefix from one place; else each has a copy.
        self.shares = can_share(model)
        self.cost: Cost | None = cost_of(model) if hasattr(model, "get_output_embeddings") else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def room(self, prompt: Sequence[int], given: Sequence[int]) -> int:
        """Tokens that the budget leaves after what is given of a trace."""
        return self.policy.budget - len(given)

    @torch.no_grad()
    def open(self, key: str, prompt: Sequence[int], trace: Sequence[int], cuts: Sequence[int]) -> Opened:
        """Run prompt and trace once, up to the last of `cuts`, with logits at the cuts alone.

        Raises:
            ValueError: If the prompt is empty, or the budget leaves nothing to write after the last cut.
        """
        if not len(prompt):
            raise ValueError(f"trace {key!r}: the prompt is empty")
        if max(cuts, default=0) >= self.policy.budget:
            raise ValueError(
                f"trace {key!r}: a prefix of {max(cuts)} tokens with budget: {self.policy.budget}; accepted: a budget "
                "above the longest prefix"
            )
        opened = Opened(key, list(prompt), list(trace))
        if self.scheme == "fork":
            self._prefill(opened, sorted(set(cuts)))
        return opened

    def _prefill(self, opened: Opened, cuts: Sequence[int]) -> None:
        length = len(opened.prompt)
        ids = torch.tensor([opened.prompt + opened.trace[: cuts[-1]]], device=self.device)
        where = torch.tensor([length + cut - 1 for cut in cuts], device=self.device)
        output = self.model(input_ids=ids, use_cache=True, logits_to_keep=where)
        opened.layers = read_layers(output.past_key_values)
        opened.logits = {length + cut: logits for cut, logits in zip(cuts, output.logits[0], strict=True)}
        self._count(0, ids.shape[1], heads=len(cuts))
        self.meter.prefilled += ids.shape[1]

    def _count(self, start: int, stop: int, heads: int = 1, rows: int = 1) -> None:
        self.meter.forwards += 1
        if self.cost is not None:
            self.meter.flops += rows * (self.cost.span(start, stop) + heads * self.cost.head)

    def complete(
        self, jobs: Sequence[Job], most: int = 0, stop: Sequence[int] = (), sink: Sink | None = None
    ) -> list[list[list[int]]]:
        """Draw completions; see `Sampler`. Each ends with an end token, or where the budget does."""
        out: list[list[list[int]]] = [[[] for _ in job.rows] for job in jobs]
        # similar lengths together: less padding
        order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].opened.prompt) + jobs[i].cut)
        flat = [(i, j) for i in order for j in range(len(jobs[i].rows))]
        for start in range(0, len(flat), self.max_rows):
            part = flat[start : start + self.max_rows]
            for (i, j), tokens in zip(part, self._rows(jobs, part, most, stop), strict=True):
                out[i][j] = tokens
            if sink is not None:
                for i in dict.fromkeys(i for i, _ in part):
                    places = [j for n, j in part if n == i]
                    sink(jobs[i], [jobs[i].rows[j] for j in places], [out[i][j] for j in places])
        self.meter.decoded += sum(len(tokens) for rows in out for tokens in rows)
        return out

    @torch.no_grad()
    def _rows(
        self, jobs: Sequence[Job], part: Sequence[tuple[int, int]], most: int, stop: Sequence[int]
    ) -> list[list[int]]:
        """Decode one batch of rows (number of the job, place in it); rows of a job lie together."""
        counts = Counter(i for i, _ in part)
        starts = [self._start(jobs[i], count) for i, count in counts.items()]
        sizes = [*counts.values()]
        prefixes = [length for length, _, _ in starts]
        keys = []
        for i in counts:
            job = jobs[i]
            rows = [job.rows[place] for n, place in part if n == i]
            keys.append(row_keys(self.policy.seed, job.opened.key, job.boundary, rows))
        room = np.array([self.policy.budget - jobs[i].cut for i, _ in part])
        batch = _Batch(
            logits=torch.cat([logits.expand(n, -1) for (_, _, logits), n in zip(starts, sizes, strict=True)]),
            keys=np.concatenate(keys),
            lengths=torch.tensor(prefixes).repeat_interleave(torch.tensor(sizes)).to(self.device),
            room=room.clip(max=most) if most else room,
        )
        parents = [layers for _, layers, _ in starts]
        sharing: AbstractContextManager[None] = nullcontext()
        if self.shares and self.scheme != "naive":
            batch.prefixes = SharedPrefixes(parents, prefixes, sizes)
            forks, sharing = batch.prefixes.own(), shared_attention(self.model)
        else:
            forks = copied_layers(parents, prefixes, sizes)
            if min(prefixes) < max(prefixes):
                places = torch.arange(max(prefixes), device=self.device)
                batch.mask = (places >= max(prefixes) - batch.lengths[:, None]).long()
        ends = np.array(sorted({*self.eos_ids, *stop}))
        with sharing:
            return self._decode(Cache(layers=forks), batch, ends)  # type: ignore[arg-type]

    def _decode(self, cache: Cache, batch: _Batch, ends: NDArray[np.int64]) -> list[list[int]]:
        """Draw tokens of all rows until each has ended or has no room."""
        keys, room, logits = batch.keys, batch.room, batch.logits
        out: list[list[int]] = [[] for _ in keys]
        held = np.arange(len(keys))  # rows in the batch, ended ones among them
        going = np.ones(len(keys), dtype=bool)
        step = 0
        while True:
            tokens = pick(logits, uniforms(keys[held], step), self.policy)
            drawn = tokens.cpu().numpy()
            for row, token in zip(held[going].tolist(), drawn[going].tolist(), strict=True):
                out[row].append(token)
            step += 1
            going = going & ~np.isin(drawn, ends) & (room[held] > step)
            if not going.any():
                return out
            if going.mean() < _SPARSE:
                rows = torch.from_numpy(np.flatnonzero(going)).to(self.device)
                held, tokens, going = held[going], tokens[rows], going[going]
                batch.keep(rows)
                for layer in cache.layers:
                    layer.keep(rows)  # type: ignore[union-attr, operator]
            if batch.mask is not None:
                batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=batch.mask,
                position_ids=(batch.lengths + step - 1)[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **({} if batch.prefixes is None else {"prefixes": batch.prefixes}),
            )
            logits = output.logits[:, -1]
            self.meter.forwards += 1
            if self.cost is not None:
                given = batch.lengths.cpu().numpy()[going]
                for length, count in zip(*np.unique(given, return_counts=True), strict=True):
                    at = int(length) + step - 1
                    self.meter.flops += int(count) * (self.cost.span(at, at + 1) + self.cost.head)

    def _start(self, job: Job, rows: int) -> tuple[int, Layers, Tensor]:
        """Length of the prefix, its keys and values, and the logits after it, `[1, V]`, or of each row (`naive`)."""
        opened, length = job.opened, len(job.opened.prompt) + job.cut
        if self.scheme == "fork":
            return length, opened.layers, opened.logits[length][None]
        ids = torch.tensor([opened.prompt + opened.trace[: job.cut]], device=self.device)
        copies = rows if self.scheme == "naive" else 1
        output = self.model(input_ids=ids.expand(copies, -1), use_cache=True, logits_to_keep=1)
        self._count(0, length, rows=copies)
        self.meter.prefilled += copies * length
        return length, read_layers(output.past_key_values), output.logits[:, -1]
