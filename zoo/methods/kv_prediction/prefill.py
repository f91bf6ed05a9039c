"""Ways from a prompt to the first token and a cache: the base itself, a predicted cache, and pruned prompts.

Each takes prompts of one length `[B, N]` and returns the logits of the first token `[B, V]` and the cache that decoding
goes on with. Kept tokens keep their positions. The last token is always kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.methods.kv_prediction.flops import (
    kvp_flops,
    lazy_flops,
    prefill_flops,
    scoring_layers,
    static_prune_flops,
)
from zoo.methods.kv_prediction.losses import lazy_retention
from zoo.methods.kv_prediction.networks import Cache, CausalLM, KVPredictor, Shape


class Prefill(NamedTuple):
    """The first token's logits `[B, V]`, and the cache to go on with."""

    logits: Tensor
    cache: Cache


def full(model: CausalLM, prompt: Tensor, more: int) -> Prefill:
    """Run the model over the whole prompt; `more` tokens can be added afterwards, here and below."""
    cache = Cache(model.shape.depth, prompt.shape[1] + more)
    return Prefill(model.extend(prompt, cache, last_only=True)[:, 0], cache)


def predicted(base: CausalLM, auxiliary: CausalLM, predictor: KVPredictor, prompt: Tensor, more: int) -> Prefill:
    """Predict the cache of all but the last token, on which the base runs (arXiv 2410.08391, Fig. 2b).

    The paper's text says that the auxiliary model reads all `N` tokens; its code reads `N - 1`, as here: the last one
    would be there twice. A prompt of one token needs no prediction.
    """
    if prompt.shape[1] == 1:
        return full(base, prompt, more)
    cache = base.cache_of(predictor(auxiliary.entries(prompt[:, :-1])), prompt.shape[1] + more)
    return Prefill(base.extend(prompt[:, -1:], cache)[:, 0], cache)


def pruned(model: CausalLM, prompt: Tensor, kept: Tensor, more: int) -> Prefill:
    """Run the model over some tokens of each prompt; `kept` `[B, K]` holds their positions in rising order."""
    cache = Cache(model.shape.depth, kept.shape[1] + more)
    logits = model.extend(prompt.gather(1, kept), cache, positions=kept, last_only=True)[:, 0]
    cache.position = prompt.shape[1]
    return Prefill(logits, cache)


def truncated_positions(prompt: Tensor, count: int) -> Tensor:
    """The last `count` positions, `[B, count]`."""
    return torch.arange(prompt.shape[1] - count, prompt.shape[1], device=prompt.device).expand(len(prompt), count)


def random_positions(prompt: Tensor, rows: Tensor, count: int) -> Tensor:
    """`count` positions of each prompt without repetition, the last one among them, in rising order.

    They follow from the numbers of the rows `[B]` alone, not from the batch or the process that a row is in.
    """
    return best_positions(_scramble(rows[:, None] * prompt.shape[1] + torch.arange(prompt.shape[1]).to(rows)), count)


def _scramble(x: Tensor) -> Tensor:
    """Map integers to numbers in [0, 1) that look random (splitmix64)."""
    x = (x + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53


def best_positions(scores: Tensor, count: int) -> Tensor:
    """The `count` positions of highest score `[B, S]`, the last one among them, in rising order; `[B, count]`."""
    last = torch.full_like(scores[:, :1], torch.inf)
    return torch.cat([scores[:, :-1], last], dim=1).topk(count, dim=1).indices.sort(dim=1).values


def last_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Attention of the last query to all keys, mean over heads.

    Args:
        queries: `[B, H, T, d]`.
        keys: `[B, h, S, d]`; each is read by `H / h` heads in turn.

    Returns:
        `[B, S]`, rows sum to 1.
    """
    batch, heads, _, d = queries.shape
    last = queries[:, :, -1].view(batch, keys.shape[1], heads // keys.shape[1], d)
    return (torch.einsum("bgrd,bgsd->bgrs", last, keys) * d**-0.5).softmax(dim=-1).mean(dim=(1, 2))


def static_positions(model: CausalLM, prompt: Tensor, count: int) -> Tensor:
    """The `count` tokens that the last one attends to most in the first quarter of the layers, `[B, count]`.

    Scores are means over heads and layers (inferred: the paper does not say how they are put together).
    """
    rotation = model.rotation(torch.arange(prompt.shape[1], device=prompt.device))
    x, scores = model.embed_tokens(prompt), torch.zeros(prompt.shape, device=prompt.device)
    for block in model.blocks()[: scoring_layers(model.shape)]:
        attention, hidden = block.self_attn, block.input_layernorm(x)
        keys, values = attention.entries(hidden)
        queries, keys = attention.queries(hidden, rotation), attention.ready(keys, rotation)
        scores = scores + last_attention(queries, keys)
        x = block.finish(x, attention(queries, keys, values, None, True))
    return best_positions(scores, count)


def lazy_counts(depth: int, tokens: int, first: float, last: float) -> list[int]:
    """Tokens that each layer of LazyLLM sees; layer `i` of `n` is at depth `i / (n - 1)`, the first sees all."""
    depths = [i / max(depth - 1, 1) for i in range(depth)]
    return [max(round(tokens * lazy_retention(at, first, last)), 1) for at in depths]


def lazy(model: CausalLM, prompt: Tensor, counts: Sequence[int], more: int) -> Prefill:
    """Drop tokens from layer to layer, by the last token's attention in the layer before (LazyLLM, arXiv 2407.14057).

    Dropped tokens do not come back when decoding: that could not change the first token.

    Args:
        model: The base.
        prompt: int64 `[B, N]`.
        counts: Tokens that each layer sees, never more than the one before.
        more: Tokens that can be added.
    """
    cache = Cache(model.shape.depth, prompt.shape[1] + more)
    cache.position = prompt.shape[1]
    positions = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
    x, scores = model.embed_tokens(prompt), torch.zeros(prompt.shape, device=prompt.device)
    for i, (block, count) in enumerate(zip(model.blocks(), counts, strict=True)):
        if count < x.shape[1]:
            kept = best_positions(scores, count)
            x, positions = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), positions.gather(1, kept)
        rotation = model.rotation(positions)
        attention, hidden = block.self_attn, block.input_layernorm(x)
        keys, values = attention.entries(hidden)
        keys, values = cache.extend(i, attention.ready(keys, rotation), values)
        if i + 1 == model.shape.depth:
            x, hidden, rotation = x[:, -1:], hidden[:, -1:], rotation.last()
        queries = attention.queries(hidden, rotation)
        scores = last_attention(queries, keys)
        x = block.finish(x, attention(queries, keys, values, None, x.shape[1] > 1))
    return Prefill(model.logits(x[:, -1]), cache)


class Budget(NamedTuple):
    """How much each pruning method keeps so that it costs no less than a predicted cache."""

    tokens: int
    """Tokens of random pruning and of truncation."""
    static: int
    """Tokens of static pruning."""
    lazy: list[int]
    """Tokens of LazyLLM by layer, with retentions `a` to `a / 4`."""


def equal_cost(auxiliary: Shape, base: Shape, layer_map: Sequence[int], tokens: int) -> Budget:
    """Find the least that the pruning methods must keep to cost as much as the predicted cache, or more.

    Where even one token costs more, as with static pruning at small budgets, one token is kept.
    """
    budget = kvp_flops(auxiliary, base, layer_map, tokens)
    counts = range(1, tokens + 1)
    lazies = [lazy_counts(base.depth, tokens, a / tokens, a / tokens / 4) for a in counts]
    return Budget(
        next((k for k in counts if prefill_flops(base, k) >= budget), tokens),
        next((k for k in counts if static_prune_flops(base, tokens, k) >= budget), tokens),
        next((kept for kept in lazies if lazy_flops(base, kept) >= budget), [tokens] * base.depth),
    )


def continue_from(model: CausalLM, start: Prefill, answer: Tensor) -> Tensor:
    """Logits of each token of an answer `[B, M]` after a prompt, teacher forced: `[B, M, V]`."""
    if answer.shape[1] == 1:
        return start.logits[:, None]
    return torch.cat([start.logits[:, None], model.extend(answer[:, :-1], start.cache)], dim=1)
