"""Keys and values of rows that go on from one prefix: read by all of them from one place, never copied.

Attention of a row over prefix and own tokens is that over both parts, merged by their normalisers. Rows of a prefix ask
it together, as one matrix product (as Hydragen, arXiv 2402.05099, does on servers).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

#: Tokens by which the buffers of own tokens grow.
_BLOCK = 16
#: Name of our attention in `transformers`.
_NAME = "zoo_shared_prefix"
#: What a model may ask of its attention besides masks; ours has none of it.
_EXTRAS = ("softcap", "s_aux", "sliding_window", "position_bias", "head_mask")
#: Keys and values `[1, H, L, D]` of each layer.
Layers = Sequence[tuple[Tensor, Tensor]]


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


class SharedPrefixes:
    """Keys and values of some prefixes, each kept once, and which row goes on from which.

    Args:
        layers: Of each of `G` prefixes, keys and values `[1, H, L_g or more, D]` of each layer; only read.
        lengths: `L_g`, tokens of each prefix.
        counts: Rows of each prefix; rows of one lie together.
    """

    def __init__(self, layers: Sequence[Layers], lengths: Sequence[int], counts: Sequence[int]) -> None:
        self.layers = [tuple(_stack([own[n][kind] for own in layers], lengths) for kind in (0, 1))
                       for n in range(len(layers[0]))]  # fmt: skip
        device = self.layers[0][0].device
        self.blocked: Tensor | None = None
        if min(lengths) < max(lengths):
            places = torch.arange(max(lengths), device=device)
            self.blocked = (places >= torch.tensor(lengths, device=device)[:, None])[:, None, None]
        self._place(torch.repeat_interleave(torch.arange(len(layers)), torch.tensor(counts)).to(device))

    def _place(self, owner: Tensor) -> None:
        self.owner = owner
        counts = torch.bincount(owner, minlength=len(self.layers[0][0]))
        self.width = int(counts.max())
        first = (counts.cumsum(0) - counts)[owner]
        self.slots = owner * self.width + torch.arange(len(owner), device=owner.device) - first

    def own(self) -> list[ForkedLayer]:
        """Caches for the rows' own tokens, empty."""
        empty = [tuple(part[:1, :, :0].expand(len(self.owner), -1, -1, -1) for part in pair) for pair in self.layers]
        return [ForkedLayer(keys, values) for keys, values in empty]

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self._place(self.owner[rows])

    def attend(self, layer: int, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of rows over their prefixes.

        Args:
            layer: Number of the layer.
            query: Scaled queries `[N, H, R, D]`, `R` for each head of keys.

        Returns:
            Numerator `[N, H, R, D]`, denominator and largest logit `[N, H, R, 1]`, see `_part`.
        """
        keys, values = self.layers[layer]
        n, heads, queries, size = query.shape
        groups, width = len(keys), self.width
        grid = query
        if groups * width > n:
            grid = query.new_zeros(groups * width, heads, queries, size).index_copy_(0, self.slots, query)
        # rows of a prefix beside each other: [G, H, W R, D]
        grid = grid.view(groups, width, heads, queries, size).transpose(1, 2).reshape(groups, heads, -1, size)
        parts = _part(grid, keys, values, self.blocked)
        rows = [p.view(groups, heads, width, queries, -1).transpose(1, 2).flatten(0, 1) for p in parts]
        numerator, denominator, peak = (p if groups * width == n else p.index_select(0, self.slots) for p in rows)
        return numerator, denominator, peak


def _stack(parts: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Prefixes filled on the right to one length, `[G, H, L, D]`; one alone is a view."""
    cut = [part[:, :, :length] for part, length in zip(parts, lengths, strict=True)]
    if len(cut) == 1:
        return cut[0]
    longest = max(lengths)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in cut])


def _part(query: Tensor, keys: Tensor, values: Tensor, blocked: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over some of the keys, unfinished: numerator, denominator, and the largest logit, which both lack."""
    logits = (query @ keys.transpose(-1, -2)).float()
    if blocked is not None:
        logits = logits.masked_fill(blocked, -torch.inf)
    peak = logits.amax(dim=-1, keepdim=True)
    weights = (logits - peak).exp()
    return (weights.to(values.dtype) @ values).float(), weights.sum(dim=-1, keepdim=True), peak


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefixes: SharedPrefixes | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token of each row over its prefix and its own tokens, in the form of `transformers`.

    Args:
        module: The layer, which knows its number.
        query: `[N, H R, 1, D]`.
        key: Of the row's own tokens, `[N, H, S, D]`.
        value: `[N, H, S, D]`.
        attention_mask: None: own tokens are equally many in all rows.
        scaling: Factor of the logits.
        dropout: Not used.
        prefixes: What comes before the own tokens.
        **kwargs: What else a model hands over.

    Returns:
        `[N, 1, H R, D]`, and None.

    Raises:
        ValueError: If the model asks for what this attention has not.
    """
    asked = [name for name in _EXTRAS if kwargs.get(name) is not None]
    if prefixes is None or asked or query.shape[2] != 1:
        what = f"{asked[0]} in its attention" if asked else "an attention that is not told of the prefix"
        raise ValueError(f"engine: a model with {what} is not accepted; accepted: engine: naive")
    n, heads, _, size = query.shape
    scaled = query * (size**-0.5 if scaling is None else scaling)
    scaled = scaled.reshape(n, key.shape[1], heads // key.shape[1], size)
    far, far_sum, far_peak = prefixes.attend(module.layer_idx, scaled)
    near, near_sum, near_peak = _part(scaled, key, value)
    peak = torch.maximum(far_peak, near_peak)
    first, second = (far_peak - peak).exp(), (near_peak - peak).exp()
    out = (first * far + second * near) / (first * far_sum + second * near_sum)
    return out.to(query.dtype).reshape(n, 1, heads, size), None


AttentionInterface.register(_NAME, shared_prefix_attention)


def can_share(model: Any) -> bool:
    """Whether a model takes another attention than its own."""
    check = getattr(model, "_can_set_attn_implementation", None)
    return check is not None and bool(check())


@contextmanager
def shared_attention(model: Any) -> Iterator[None]:
    """Let a model use `shared_prefix_attention` for a while; it takes `prefixes=` then."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def copied_layers(layers: Sequence[Layers], lengths: Sequence[int], counts: Sequence[int]) -> list[ForkedLayer]:
    """Caches of rows that each hold their prefix, filled on the left; for models whose attention stays their own.

    Args:
        layers: Of each prefix, keys and values `[1 or its rows, H, L_g or more, D]` of each layer.
        lengths: Tokens of each prefix.
        counts: Rows of each.
    """
    longest = max(lengths)
    out = []
    for n in range(len(layers[0])):
        pair = []
        for kind in (0, 1):
            cut = [own[n][kind][:, :, :length] for own, length in zip(layers, lengths, strict=True)]
            filled = [torch.nn.functional.pad(part, (0, 0, longest - part.shape[2], 0)) for part in cut]
            pair.append(torch.cat([p.expand(count, -1, -1, -1) for p, count in zip(filled, counts, strict=True)]))
        out.append(ForkedLayer(*pair))
    return out


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
