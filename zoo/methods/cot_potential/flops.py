"""Floating-point operations of potential curves, exact, for the ways in which they can be sampled (ours).

A multiplication with an addition is two. `P` is the length of the prompt, `t_k` are the boundaries, and `m_kj` is how
many tokens of completion `j` from boundary `k` went through the model: one less than it has, as nothing follows the
last one, and its first token comes from the logits of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What the passes of a decoder cost.

    Args:
        body: Parameters of its matrix products, without embedding and head.
        layers: Number of layers.
        attention: Width of all heads together.
        head: Operations for the logits of one position, `2 V d`.
    """

    body: int
    layers: int
    attention: int
    head: int

    def span(self, a: int, b: int) -> int:
        """`F(a, b)`: positions `a + 1 .. b` on top of a cache of the first `a`; attention costs `4 L d s` at `s`."""
        return 2 * self.body * (b - a) + 2 * self.layers * self.attention * (b * (b + 1) - a * (a + 1))


def cost_of(model: Any) -> Cost:
    """Read the sizes of a causal language model of `transformers` with dense layers."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not head and p is not embedding)
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Cost(body, config.num_hidden_layers, heads * size, 2 * head.numel())


def decode_flops(cost: Cost, prompt: int, boundaries: Sequence[int], lengths: Sequence[Sequence[int]]) -> int:
    """`D = sum_kj F(P + t_k, P + t_k + m_kj) + m_kj h`; the same for every way that has a cache."""
    return sum(
        cost.span(prompt + t, prompt + t + m) + m * cost.head
        for t, row in zip(boundaries, lengths, strict=True)
        for m in row
    )


def naive_flops(cost: Cost, prompt: int, boundaries: Sequence[int], lengths: Sequence[Sequence[int]]) -> int:
    """`A`: each of the rows runs its whole prefix."""
    prefill = sum(len(row) * (cost.span(0, prompt + t) + cost.head) for t, row in zip(boundaries, lengths, strict=True))
    return prefill + decode_flops(cost, prompt, boundaries, lengths)


def prefix_flops(cost: Cost, prompt: int, boundaries: Sequence[int], lengths: Sequence[Sequence[int]]) -> int:
    """`B`: one prefix run for each boundary, as a server with a prefix cache does within a request."""
    prefill = sum(cost.span(0, prompt + t) + cost.head for t in boundaries)
    return prefill + decode_flops(cost, prompt, boundaries, lengths)


def fork_flops(cost: Cost, prompt: int, boundaries: Sequence[int], lengths: Sequence[Sequence[int]]) -> int:
    """`C`: one run over prompt and trace up to the last boundary, with logits at the boundaries alone."""
    prefill = cost.span(0, prompt + boundaries[-1]) + len(boundaries) * cost.head
    return prefill + decode_flops(cost, prompt, boundaries, lengths)


def cacheless_flops(cost: Cost, prompt: int, boundaries: Sequence[int], lengths: Sequence[Sequence[int]]) -> int:
    """`E`: no cache at all; every token of a completion runs everything before it again."""
    return sum(
        cost.span(0, prompt + t + i) + cost.head
        for t, row in zip(boundaries, lengths, strict=True)
        for m in row
        for i in range(m + 1)
    )
