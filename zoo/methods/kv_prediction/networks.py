"""A small Llama whose keys can be had before normalisation and rotation, and the predictor of such keys and values.

`transformers` keeps rotated keys in its caches. Here a layer's *entries* are what its projections give; a `Cache` holds
what attention reads: normalised and rotated. Between the two stands `Attention.ready`, so that predicted entries go
the way of true ones.

Longer than other files: the cache, the layers that fill it and the predictor share one layout of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.methods.kv_prediction.losses import rotate

#: Keys and values of a layer, `[B, h, S, d]` each.
Entries = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; heads and hidden units of the MLP may differ between layers.

    Args:
        vocab_size: Number of tokens.
        width: Width of the residual stream.
        head_dim: Dimensions of a head.
        heads: Query heads of each layer.
        kv_heads: Key and value heads of each layer.
        mlp: Hidden units of the gated MLP of each layer.
        rope_theta: Base of the rotary embedding.
        norm_eps: Added to the mean square in norms.
        qk_norm: Whether queries and keys are normalised by head, as in OpenELM and Qwen3.
        qkv_bias: Whether the three projections have a bias, as in Qwen2.
        tied: Whether the output layer is the embedding.
        context: Longest sequence that the model was made for; 0 if unknown.
    """

    vocab_size: int
    width: int
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    mlp: tuple[int, ...]
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    qkv_bias: bool = False
    tied: bool = True
    context: int = 0

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.heads)

    def keep(self, layers: Sequence[int]) -> Shape:
        """Return the sizes of the model with these layers alone."""
        own = asdict(self)
        return replace(self, **{key: tuple(own[key][i] for i in layers) for key in ("heads", "kv_heads", "mlp")})  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """Return the values with lists for tuples, as a checkpoint holds them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Shape:
        """Read what `plain` gave."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]


class Rotation(NamedTuple):
    """Rotary embedding at some positions: `[S, d]`, or `[B, 1, S, d]` where rows have positions of their own."""

    cos: Tensor
    sin: Tensor

    def last(self) -> Rotation:
        """That of the last position alone."""
        return Rotation(self.cos[..., -1:, :], self.sin[..., -1:, :])


class Attention(nn.Module):
    """Causal attention with grouped heads; keys come from outside, so that they may be predicted.

    Args:
        shape: Sizes of the model.
        layer: Which layer.
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads[layer], shape.kv_heads[layer], shape.head_dim
        d = shape.head_dim
        self.q_proj = nn.Linear(shape.width, self.heads * d, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.width, self.kv_heads * d, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.width, self.kv_heads * d, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(self.heads * d, shape.width, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(d, eps=shape.norm_eps) if shape.qk_norm else nn.Identity()

    def entries(self, hidden: Tensor) -> Entries:
        """Own keys and values of normalised inputs `[B, S, D]`: before the key norm and the rotation."""
        shape = (*hidden.shape[:2], self.kv_heads, self.head_dim)
        return self.k_proj(hidden).view(shape).transpose(1, 2), self.v_proj(hidden).view(shape).transpose(1, 2)

    def ready(self, keys: Tensor, rotation: Rotation) -> Tensor:
        """Turn keys of entries into what attention reads."""
        return rotate(self.k_norm(keys), *rotation)

    def queries(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Rotated queries `[B, H, T, d]`."""
        queries = self.q_proj(hidden).view(*hidden.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        return rotate(self.q_norm(queries), *rotation)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attend: queries `[B, H, T, d]`, keys and values `[B, h, S, d]`; returns `[B, T, D]`."""
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated MLP with SiLU.

    Args:
        width: Inputs and outputs.
        hidden: Hidden units.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`down(silu(gate(x)) * up(x))`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the stream. Names are those of `transformers`.

    Args:
        shape: Sizes of the model.
        layer: Which layer.
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer)
        self.mlp = MLP(shape.width, shape.mlp[layer])
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.norm_eps)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what attention gave, then the MLP."""
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Cache:
    """Keys and values that attention reads, layer by layer, in buffers that are filled from the left.

    Args:
        depth: Number of layers.
        capacity: Most tokens of a layer.
    """

    def __init__(self, depth: int, capacity: int) -> None:
        self.capacity = capacity
        self.position = 0
        self.lengths = [0] * depth
        self._buffers: list[Entries | None] = [None] * depth

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> Entries:
        """Add ready keys and values `[B, h, S, d]` to a layer and return all that it holds.

        Raises:
            ValueError: If the buffer is full.
        """
        start, end = self.lengths[layer], self.lengths[layer] + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} tokens cannot hold {end}")
        buffers = self._buffers[layer]
        if buffers is None:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            buffers = self._buffers[layer] = (keys.new_empty(shape), values.new_empty(shape))
        buffers[0][:, :, start:end] = keys
        buffers[1][:, :, start:end] = values
        self.lengths[layer] = end
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def read(self, layer: int) -> Entries:
        """Return what a layer holds."""
        buffers = self._buffers[layer]
        if buffers is None:
            raise ValueError(f"layer {layer} of the cache is empty")
        return buffers[0][:, :, : self.lengths[layer]], buffers[1][:, :, : self.lengths[layer]]


class CausalLM(nn.Module):
    """Llama-style language model with three ways of attending.

    `forward` is ordinary (`self`), or attends to given entries in place of its own (`replace`); `extend` adds to a
    cache and attends to all of it (`append`).

    Args:
        shape: Sizes.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Block(shape, i) for i in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed_tokens.weight
        frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.frequencies: Tensor
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)

    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return list(self.layers)  # type: ignore[arg-type]

    def rotation(self, positions: Tensor) -> Rotation:
        """Rotary embedding at positions `[S]` or `[B, S]`."""
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        if positions.ndim == 2:
            angles = angles[:, None]
        dtype = self.embed_tokens.weight.dtype
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the stream after the last layer, `[..., V]`."""
        return self.lm_head(self.norm(hidden))

    def forward(
        self, ids: Tensor, given: Sequence[Entries] | None = None, own_self: bool = False
    ) -> tuple[Tensor, list[Entries]]:
        """Run over whole sequences with causal attention.

        Args:
            ids: int64 `[B, S]`.
            given: Entries of each layer that take the place of its own; position `t` attends to `0 .. t` of them.
            own_self: Whether position `t` attends to `0 .. t - 1` of them and to its own entry: each position sees
                what the last token of a prompt sees after `cache_of(given)`.

        Returns:
            The stream after the last layer `[B, S, D]`, see `logits`, and the entries that were attended to.
        """
        rotation = self.rotation(torch.arange(ids.shape[1], device=ids.device))
        x, entries = self.embed_tokens(ids), list[Entries]()
        for i, block in enumerate(self.blocks()):
            attention, hidden = block.self_attn, block.input_layernorm(x)
            keys, values = attention.entries(hidden) if given is None else given[i]
            entries.append((keys, values))
            queries, ready = attention.queries(hidden, rotation), attention.ready(keys, rotation)
            if own_self and given is not None:
                own_keys, own_values = attention.entries(hidden)
                ready = torch.cat([ready, attention.ready(own_keys, rotation)], dim=2)
                both = torch.cat([values, own_values], dim=2)
                x = block.finish(x, attention(queries, ready, both, _others_and_self(ids), False))
            else:
                x = block.finish(x, attention(queries, ready, values, None, True))
        return x, entries

    def entries(self, ids: Tensor) -> list[Entries]:
        """Entries of each layer of a sequence.

        What is after the last layer's projections gives no entry and is not run; `flops` counts it all the same, as
        the paper does.
        """
        rotation = self.rotation(torch.arange(ids.shape[1], device=ids.device))
        x, entries = self.embed_tokens(ids), list[Entries]()
        for i, block in enumerate(self.blocks()):
            attention, hidden = block.self_attn, block.input_layernorm(x)
            keys, values = attention.entries(hidden)
            entries.append((keys, values))
            if i + 1 < self.shape.depth:
                queries = attention.queries(hidden, rotation)
                x = block.finish(x, attention(queries, attention.ready(keys, rotation), values, None, True))
        return entries

    def normed(self, entries: Sequence[Entries]) -> list[Entries]:
        """Keys after the key norm, before the rotation, with the values: what the consistency loss compares."""
        return [(b.self_attn.k_norm(k), v) for b, (k, v) in zip(self.blocks(), entries, strict=True)]

    def cache_of(self, entries: Sequence[Entries], capacity: int) -> Cache:
        """Make a cache of the entries of positions `0 .. S - 1`."""
        cache = Cache(self.shape.depth, capacity)
        cache.position = entries[0][0].shape[2]
        rotation = self.rotation(torch.arange(cache.position, device=entries[0][0].device))
        for i, (block, (keys, values)) in enumerate(zip(self.blocks(), entries, strict=True)):
            cache.extend(i, block.self_attn.ready(keys, rotation), values)
        return cache

    def extend(self, ids: Tensor, cache: Cache, positions: Tensor | None = None, last_only: bool = False) -> Tensor:
        """Run over new tokens, which attend to the cache and, causally, to each other; the cache grows by them.

        Args:
            ids: int64 `[B, T]`.
            cache: Filled by `cache_of` or by earlier calls, or empty.
            positions: `[T]` or `[B, T]`; None to go on where the cache ends.
            last_only: Whether to compute the logits of the last token alone; then only its row goes through what comes
                after the last layer's entries, as no other row of it is read. `flops` counts them all the same.

        Returns:
            Logits `[B, T, V]`, or `[B, 1, V]`.
        """
        count = ids.shape[1]
        if positions is None:
            positions = torch.arange(cache.position, cache.position + count, device=ids.device)
            cache.position += count
        rotation = self.rotation(positions)
        x = self.embed_tokens(ids)
        for i, block in enumerate(self.blocks()):
            attention, hidden = block.self_attn, block.input_layernorm(x)
            keys, values = attention.entries(hidden)
            held = cache.lengths[i]
            keys, values = cache.extend(i, attention.ready(keys, rotation), values)
            if last_only and i + 1 == self.shape.depth:
                x, hidden, rotation, count = x[:, -1:], hidden[:, -1:], rotation.last(), 1
            mask = None
            if count > 1 and held:
                mask = torch.ones(count, held + count, dtype=torch.bool, device=ids.device).tril(held)
            # Not `is_causal` for a single query: torch would let it see the first key alone.
            attended = attention(attention.queries(hidden, rotation), keys, values, mask, count > 1 and not held)
            x = block.finish(x, attended)
        return self.logits(x)


def _others_and_self(ids: Tensor) -> Tensor:
    """Mask `[S, 2 * S]`: of the first half all earlier positions, of the second half the position itself."""
    square = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)
    return torch.cat([square.tril(-1), square.tril().triu()], dim=1)


class KVPredictor(nn.Module):
    """Affine maps from the auxiliary's entries to the base's, one for keys and one for values of each base layer.

    Heads are merged: `[B, h, S, d] -> [B, S, h * d]` (arXiv 2410.08391, Section 4.2).

    Args:
        auxiliary: Sizes of the auxiliary model.
        base: Sizes of the base model.
        layer_map: Auxiliary layer of each base layer.

    Raises:
        ValueError: If the map does not have an auxiliary layer for each base layer.
    """

    def __init__(self, auxiliary: Shape, base: Shape, layer_map: Sequence[int]) -> None:
        super().__init__()
        if len(layer_map) != base.depth or not all(0 <= j < auxiliary.depth for j in layer_map):
            raise ValueError(
                f"layer_map: {list(layer_map)} is not accepted; accepted: {base.depth} numbers, one for each base "
                f"layer, from 0 to {auxiliary.depth - 1}"
            )
        self.layer_map, self.heads, self.head_dim = list(layer_map), base.kv_heads, base.head_dim
        sizes = [
            (auxiliary.kv_heads[j] * auxiliary.head_dim, base.kv_heads[i] * base.head_dim)
            for i, j in enumerate(layer_map)
        ]
        self.keys = nn.ModuleList(nn.Linear(*size) for size in sizes)
        self.values = nn.ModuleList(nn.Linear(*size) for size in sizes)

    def forward(self, entries: Sequence[Entries]) -> list[Entries]:
        """Predict the entries of each base layer, `[B, h, S, d]`."""
        merged = [tuple(x.transpose(1, 2).flatten(2) for x in pair) for pair in entries]
        predicted: list[Entries] = []
        for i, j in enumerate(self.layer_map):
            keys, values = self.keys[i](merged[j][0]), self.values[i](merged[j][1])
            shape = (*keys.shape[:2], self.heads[i], self.head_dim)
            predicted.append((keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)))
        return predicted


def unused_for_entries(model: CausalLM, layer_map: Sequence[int]) -> list[nn.Parameter]:
    """Parameters of an auxiliary model that no entry which the map reads depends on: they need a loss of their own."""
    last = max(layer_map)
    unused = [model.norm, *model.layers[last + 1 :]]
    block = model.blocks()[last]
    attention = block.self_attn
    unused += [block.mlp, block.post_attention_layernorm, attention.q_proj, attention.o_proj, attention.q_norm]
    if not model.shape.tied:
        unused.append(model.lm_head)
    # the auxiliary's last key norm serves its own attention alone
    unused.append(attention.k_norm)
    return [parameter for module in unused for parameter in module.parameters()]
