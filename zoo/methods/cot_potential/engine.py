"""Sampling completions of many prefixes of one trace: one prefill, and caches forked from it.

The random number of token `i` of a completion is a function of the seed and of (trace, boundary, row, i): it does not
matter what else is in a batch, in which order work is done, or whether a killed analysis goes on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from zoo.methods.cot_potential.flops import Cost, cost_of
from zoo.nn.sampling import check_sampling, filter_logits

#: Ways of sampling that this machine offers: each row runs its prefix; one run for each boundary; one run for all.
SCHEMES = ("naive", "prefix", "fork")
#: Tokens by which the buffers of a fork grow.
_BLOCK = 16
#: Ended rows are dropped, which copies the cache, when fewer than this share of a batch goes on.
_SPARSE = 0.7


@dataclass(frozen=True)
class Policy:
    """How completions are drawn.

    Args:
        temperature: Divides the logits, before `top_p`; 0 is greedy.
        top_p: Mass of the most likely tokens that are kept.
        budget: Most tokens of trace and completion together, so that a long prefix gives no longer text.
        seed: Seed of all draws.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    budget: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, 0, self.top_p)
        if self.budget < 1:
            raise ValueError(f"budget: {self.budget} is not accepted; accepted: 1 token or more")


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


def row_keys(seed: int, key: str, boundary: int, rows: Sequence[int]) -> NDArray[np.uint64]:
    """Return a 64-bit key for each completion, `[N]`."""
    name = np.uint64(zlib.crc32(key.encode()) | (zlib.adler32(key.encode()) << 32))
    with np.errstate(over="ignore"):
        out = _mix(np.asarray(rows, dtype=np.uint64) + _mix(np.uint64(boundary) + _mix(name + _mix(np.uint64(seed)))))
    return out


def uniforms(keys: NDArray[np.uint64], step: int) -> NDArray[np.float64]:
    """Return the uniform number of token `step` of each completion, in `[0, 1)`, `[N]`."""
    with np.errstate(over="ignore"):
        bits = _mix(keys + np.uint64(step) * np.uint64(0xD1342543DE82EF95))
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def pick(logits: Tensor, uniform: NDArray[np.float64], policy: Policy) -> Tensor:
    """Draw a token of each row by inverting its distribution: temperature first, then `top_p`.

    Args:
        logits: `[N, V]`.
        uniform: In `[0, 1)`, `[N]`.
        policy: Temperature and `top_p`.

    Returns:
        int64 `[N]`.
    """
    if policy.temperature == 0:
        return logits.argmax(dim=-1)
    kept = filter_logits(logits.float() / policy.temperature, 0, policy.top_p)
    cumulative = kept.softmax(dim=-1).double().cumsum(dim=-1)
    wanted = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


class ForkedLayer(DynamicLayer):
    """Keys and values of forked rows, in a buffer of their own that grows by blocks; the parent is only read.

    Args:
        keys: `[N, H, L, D]`; copied.
        values: `[N, H, L, D]`; copied.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[-2]
        self._buffers = [self._grown(keys), self._grown(values)]
        self._look()

    def _grown(self, full: Tensor) -> Tensor:
        n, heads, length, size = full.shape
        out = full.new_empty(n, heads, length + _BLOCK, size)
        out[:, :, :length] = full
        return out

    def _look(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the newest token."""
        end = self.length + key_states.shape[-2]
        for index, new in enumerate((key_states, value_states)):
            if end > self._buffers[index].shape[-2]:
                self._buffers[index] = self._grown(self._buffers[index])
            self._buffers[index][:, :, self.length : end] = new
        self.length = end
        self._look()
        return self.keys, self.values  # type: ignore[return-value]

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self._buffers = [buffer.index_select(0, rows) for buffer in self._buffers]
        self._look()


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
        self.cost: Cost | None = cost_of(model) if hasattr(model, "get_output_embeddings") else None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

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
        """Decode one batch of rows (number of the job, place in it)."""
        numbers = [i for i, _ in part]
        used = sorted(set(numbers), key=numbers.index)
        starts = {i: self._start(jobs[i], numbers.count(i)) for i in used}
        longest = max(length for length, _, _ in starts.values())
        forks = [
            ForkedLayer(
                *(torch.cat([_fork(starts[i], n, kind, numbers.count(i), longest) for i in used]) for kind in (0, 1))
            )
            for n in range(len(starts[used[0]][1]))
        ]
        # rows of a job lie together in `part`
        logits = torch.cat([starts[i][2].expand(numbers.count(i), -1) for i in used])
        keys = np.concatenate(
            [
                row_keys(
                    self.policy.seed, jobs[i].opened.key, jobs[i].boundary, [jobs[i].rows[b] for a, b in part if a == i]
                )
                for i in used
            ]
        )
        lengths = torch.tensor([starts[i][0] for i in numbers], device=self.device)
        room = np.array([self.policy.budget - jobs[i].cut for i in numbers])
        room = room if not most else room.clip(max=most)
        ends = np.array(sorted({*self.eos_ids, *stop}))
        return self._decode(Cache(layers=forks), logits, keys, lengths, room, longest, ends)  # type: ignore[arg-type]

    def _decode(
        self,
        cache: Cache,
        logits: Tensor,
        keys: NDArray[np.uint64],
        lengths: Tensor,
        room: NDArray[np.int64],
        longest: int,
        ends: NDArray[np.int64],
    ) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in keys]
        held = np.arange(len(keys))  # rows in the batch, ended ones among them
        going = np.ones(len(keys), dtype=bool)
        mask: Tensor | None = None
        if int(lengths.min()) < longest:
            mask = (torch.arange(longest, device=self.device) >= longest - lengths[:, None]).long()
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
                held, tokens, lengths = held[going], tokens[rows], lengths[rows]
                going = going[going]
                mask = mask[rows] if mask is not None else None
                for layer in cache.layers:
                    layer.keep(rows)  # type: ignore[union-attr, operator]
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=(lengths + step - 1)[:, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1]
            self.meter.forwards += 1
            if self.cost is not None:
                given = lengths.cpu().numpy()[going]
                for length, count in zip(*np.unique(given, return_counts=True), strict=True):
                    at = int(length) + step - 1
                    self.meter.flops += int(count) * (self.cost.span(at, at + 1) + self.cost.head)

    def _start(self, job: Job, rows: int) -> tuple[int, list[tuple[Tensor, Tensor]], Tensor]:
        """Length of the prefix, its keys and values, and the logits after it."""
        opened, length = job.opened, len(job.opened.prompt) + job.cut
        if self.scheme == "fork":
            return length, opened.layers, opened.logits[length]
        ids = torch.tensor([opened.prompt + opened.trace[: job.cut]], device=self.device)
        copies = rows if self.scheme == "naive" else 1
        output = self.model(input_ids=ids.expand(copies, -1), use_cache=True, logits_to_keep=1)
        self._count(0, length, rows=copies)
        self.meter.prefilled += copies * length
        return length, read_layers(output.past_key_values), output.logits[:, -1]


def read_layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache.

    Raises:
        ValueError: If a layer is not one that keeps all keys and values.
    """
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers} - {"DynamicLayer"}))
        raise ValueError(
            f"engine: a model with layers {kinds} is not accepted; accepted: full attention in every layer"
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _fork(
    start: tuple[int, list[tuple[Tensor, Tensor]], Tensor], layer: int, kind: int, rows: int, longest: int
) -> Tensor:
    """Keys or values of a prefix for `rows` rows, filled on the left, `[rows, H, longest, D]`; a view of the parent."""
    length, layers, _ = start
    parent = layers[layer][kind][:, :, :length]
    if length < longest:
        parent = torch.nn.functional.pad(parent, (0, 0, longest - length, 0))
    return parent.expand(rows, -1, -1, -1)
