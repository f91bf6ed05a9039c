"""Cost of the first token in floating-point operations: the paper's rules of thumb and exact counts."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.methods.kv_prediction.networks import Shape


def random_prune_reduction(retention: float) -> float:
    """Reduction of cost by random pruning, `1 / r` (inferred; gives the ratios of arXiv 2410.08391, Table 5)."""
    return 1 / retention


def static_prune_reduction(retention: float) -> float:
    """Reduction by static pruning: a quarter of the layers on all tokens, then all layers on the kept ones."""
    return 1 / (0.25 + retention)


def lazyllm_reduction(first: float, last: float) -> float:
    """Reduction by LazyLLM: all tokens to 30 % of the depth, `first` to `last` from there to 90 %, then `last`."""
    return 1 / (0.3 + 0.6 * (first + last) / 2 + 0.1 * last)


def layer_flops(shape: Shape, layer: int, tokens: int, keys: int | None = None) -> int:
    """Operations of one layer on `tokens` tokens.

    Two for each weight and token, four for each pair of query and key, head and dimension. Norms, rotary embedding and
    softmax are left out.

    Args:
        shape: Sizes of the model.
        layer: Which one.
        tokens: Tokens of the pass.
        keys: Query-key pairs; None for causal attention among the tokens themselves.
    """
    heads, kv_heads, mlp = shape.heads[layer], shape.kv_heads[layer], shape.mlp[layer]
    weights = shape.width * shape.head_dim * (2 * heads + 2 * kv_heads) + 3 * shape.width * mlp
    pairs = tokens * (tokens + 1) // 2 if keys is None else keys
    return 2 * weights * tokens + 4 * heads * shape.head_dim * pairs


def head_flops(shape: Shape) -> int:
    """Operations of the output layer on one token."""
    return 2 * shape.width * shape.vocab_size


def prefill_flops(shape: Shape, tokens: int) -> int:
    """Operations of a model until it gives its first token; the embedding is a look-up."""
    return sum(layer_flops(shape, i, tokens) for i in range(shape.depth)) + head_flops(shape)


def predictor_flops(auxiliary: Shape, base: Shape, layer_map: Sequence[int], tokens: int) -> int:
    """Operations of the linear maps from the auxiliary's cache to the base's."""
    weights = sum(
        2 * base.kv_heads[i] * base.head_dim * auxiliary.kv_heads[j] * auxiliary.head_dim
        for i, j in enumerate(layer_map)
    )
    return 2 * weights * tokens


def kvp_flops(auxiliary: Shape, base: Shape, layer_map: Sequence[int], tokens: int) -> int:
    """Operations to the first token with a predicted cache: auxiliary and maps on `N - 1` tokens, base on the last."""
    prompt = sum(layer_flops(auxiliary, i, tokens - 1) for i in range(auxiliary.depth))
    step = sum(layer_flops(base, i, 1, keys=tokens) for i in range(base.depth)) + head_flops(base)
    return prompt + predictor_flops(auxiliary, base, layer_map, tokens - 1) + step


def static_prune_flops(shape: Shape, tokens: int, kept: int) -> int:
    """Operations of static pruning: scoring layers on all tokens, then the whole model on the kept ones."""
    return sum(layer_flops(shape, i, tokens) for i in range(scoring_layers(shape))) + prefill_flops(shape, kept)


def lazy_flops(shape: Shape, kept: Sequence[int]) -> int:
    """Operations of a pass whose layer `i` sees `kept[i]` tokens; the scores are part of the attention."""
    return sum(layer_flops(shape, i, count) for i, count in enumerate(kept)) + head_flops(shape)


def scoring_layers(shape: Shape) -> int:
    """Layers whose attention static pruning reads: the first quarter, at least one."""
    return max(shape.depth // 4, 1)
