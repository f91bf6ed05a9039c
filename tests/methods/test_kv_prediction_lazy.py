"""LazyLLM against a version that is written out: token by token, head by head, one prompt at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.methods.test_kv_prediction_networks import close, make, tokens
from zoo.methods.kv_prediction import prefill
from zoo.methods.kv_prediction.networks import Block, CausalLM, Shape

SHAPES = {
    "without key norm": Shape(23, 16, 4, heads=(4,) * 4, kv_heads=(2,) * 4, mlp=(24,) * 4, qkv_bias=True, tied=False),
    "with key norm": Shape(23, 16, 4, heads=(4, 4, 8, 8), kv_heads=(1, 2, 4, 8), mlp=(8, 16, 24, 32), qk_norm=True),
}


class Entry(NamedTuple):
    """Key as attention reads it and value of a token, `[h, d]` each."""

    key: Tensor
    value: Tensor


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding of heads `[h, d]`: halves are real and imaginary parts."""
    half = x.shape[-1] // 2
    frequencies = torch.tensor([theta ** (-i / half) for i in range(half)])
    z = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * position * frequencies)
    return torch.cat([z.real, z.imag], dim=-1)


class Naive:
    """A model one token at a time; its layers may hold different tokens.

    Args:
        model: Whose weights it has.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model, self.shape = model, model.shape
        #: Of each layer, what it holds by position.
        self.held: list[dict[int, Entry]] = [{} for _ in model.blocks()]

    def heads(self, block: Block, name: str, hidden: Tensor, position: int) -> Tensor:
        """Queries, keys or values of a token, `[h, d]`."""
        attention = block.self_attn
        linear = getattr(attention, f"{name}_proj")
        x = F.linear(hidden, linear.weight, linear.bias).view(-1, self.shape.head_dim)
        if name == "v":
            return x
        if self.shape.qk_norm:
            x = normed(x, getattr(attention, f"{name}_norm").weight, self.shape.norm_eps)
        return turned(x, position, self.shape.rope_theta)

    def layer(self, i: int, stream: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, float]]:
        """Tokens by position through a layer, and how much the last one attends to each, mean over heads."""
        block = self.model.blocks()[i]
        out: dict[int, Tensor] = {}
        scores: dict[int, float] = {}
        for position, x in stream.items():
            hidden = normed(x, block.input_layernorm.weight, self.shape.norm_eps)
            queries, keys, values = (self.heads(block, name, hidden, position) for name in "qkv")
            self.held[i][position] = Entry(keys, values)
            seen, attended = sorted(self.held[i]), []
            scores = dict.fromkeys(seen, 0.0)
            for head, query in enumerate(queries):
                kv = head * len(keys) // len(queries)
                logits = torch.stack([query @ self.held[i][s].key[kv] for s in seen]) / self.shape.head_dim**0.5
                weights = logits.exp() / logits.exp().sum()
                attended.append(sum(w * self.held[i][s].value[kv] for w, s in zip(weights, seen, strict=True)))
                for w, s in zip(weights.tolist(), seen, strict=True):
                    scores[s] += w / len(queries)
            x = x + block.self_attn.o_proj.weight @ torch.cat(attended)  # type: ignore[arg-type]
            out[position] = x + block.mlp(normed(x, block.post_attention_layernorm.weight, self.shape.norm_eps))
        return out, scores

    def logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head.weight @ normed(x, self.model.norm.weight, self.shape.norm_eps)

    def prefill(self, prompt: list[int], counts: list[int]) -> Tensor:
        """Logits of the first token after a prompt of which layers see ever fewer tokens."""
        last = len(prompt) - 1
        stream = {position: self.model.embed_tokens.weight[token] for position, token in enumerate(prompt)}
        scores: dict[int, float] = {}
        for i, count in enumerate(counts):
            if count < len(stream):
                others = sorted((s for s in stream if s != last), key=lambda s: scores[s], reverse=True)
                stream = {s: stream[s] for s in sorted([*others[: count - 1], last])}
            stream, scores = self.layer(i, stream)
        return self.logits(stream[last])

    def go_on(self, token: int, position: int) -> Tensor:
        """Logits after one more token, which sees what each layer holds."""
        stream = {position: self.model.embed_tokens.weight[token]}
        for i in range(self.shape.depth):
            stream, _ = self.layer(i, stream)
        return self.logits(stream[position])


@pytest.mark.parametrize("counts", [[10, 7, 5, 3], [10, 10, 4, 4], [10, 2, 1, 1]])
@pytest.mark.parametrize("shape", SHAPES)
def test_lazy_pruning_keeps_what_the_last_token_attends_to_at_its_place(shape: str, counts: list[int]) -> None:
    model, ids = make(SHAPES[shape], seed=1), tokens(b=3, s=12, seed=1)
    start = prefill.lazy(model, ids[:, :10], counts, 2)
    found = prefill.continue_from(model, start, ids[:, 10:])
    kept: set[tuple[int, ...]] = set()
    for row in range(3):
        naive = Naive(model)
        expected = [naive.prefill(ids[row, :10].tolist(), counts), naive.go_on(int(ids[row, 10]), 10)]
        assert close(found[row], torch.stack(expected))
        assert start.cache.lengths == [len(held) for held in naive.held]
        for layer, held in enumerate(naive.held):
            keys, values = start.cache.read(layer)
            assert close(keys[row], torch.stack([held[s].key for s in sorted(held)], dim=1))
            assert close(values[row], torch.stack([held[s].value for s in sorted(held)], dim=1))
        kept.add(tuple(sorted(naive.held[-1])))
    assert len(kept) > 1 or counts[-1] == 1  # rows choose for themselves


def test_the_written_out_version_is_the_model_itself_where_all_is_kept() -> None:
    for shape in SHAPES.values():
        model, ids = make(shape), tokens(b=1, s=6)
        naive = Naive(model)
        rows = [naive.prefill(ids[0, :4].tolist(), [4] * 4), *(naive.go_on(int(ids[0, i]), i) for i in (4, 5))]
        assert close(torch.stack(rows), model.logits(model(ids)[0])[0, 3:])
