"""Attention over a shared prefix: equal to plain attention over copies, nothing copied, the model left as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.methods.cot_potential.caches import (
    SharedPrefixes,
    can_share,
    copied_layers,
    shared_prefix_attention,
)
from zoo.methods.cot_potential.engine import Job, LocalEngine
from zoo.methods.cot_potential.streams import Policy
from zoo.nn.lm import build_lm

SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 1, "initializer_range": 0.3},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3},
}  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=4),
    own=st.integers(1, 6),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_it_is_plain_attention_over_prefix_and_own_tokens(
    groups: list[tuple[int, int]], own: int, repeats: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    heads, size = 2, 4
    lengths, counts = [length for length, _ in groups], [count for _, count in groups]
    # parents are longer than what is used of them
    parents = [[tuple(3 * torch.randn(1, heads, length + 2, size, generator=draw) for _ in "kv")] for length in lengths]
    n = sum(counts)
    query = torch.randn(n, heads * repeats, 1, size, generator=draw)
    key, value = (torch.randn(n, heads, own, size, generator=draw) for _ in "kv")
    shared = SharedPrefixes(parents, lengths, counts)  # type: ignore[arg-type]
    keep = torch.randperm(n, generator=draw)[: max(1, n // 2)].sort().values
    for rows in (torch.arange(n), keep):
        if len(rows) < n:
            shared.keep(rows)
        out, _ = shared_prefix_attention(
            SimpleNamespace(layer_idx=0), query[rows], key[rows], value[rows], None, prefixes=shared
        )
        owners = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(counts))[rows]
        for place, row in enumerate(rows.tolist()):
            g = int(owners[place])
            whole = [
                torch.cat([parents[g][0][kind][:, :, : lengths[g]], mine[row : row + 1]], dim=2)
                for kind, mine in enumerate((key, value))
            ]
            k, v = (part.repeat_interleave(repeats, dim=1) for part in whole)
            expected = torch.nn.functional.scaled_dot_product_attention(query[row : row + 1], k, v)
            torch.testing.assert_close(out[place, 0], expected[0, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(SIZES))
def test_models_draw_the_same_tokens_from_shared_prefixes_and_from_copies(kind: str) -> None:
    torch.manual_seed(1)
    lm: Any = build_lm({"model_type": kind, **SIZES[kind]}, 40)
    before = lm.config._attn_implementation
    out = []
    for shares in (True, False):
        engine = LocalEngine(lm, [39], Policy(temperature=0.8, budget=20, seed=3))
        assert engine.shares
        engine.shares = shares
        jobs = []
        for key, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6, 7, 8])):
            opened = engine.open(key, prompt, list(range(10, 18)), [0, 3, 8])
            jobs += [Job(opened, cut, k, range(2 + k)) for k, cut in enumerate((0, 3, 8))]
        out.append(engine.complete(jobs))
    assert out[0] == out[1]
    assert len({len(row) for rows in out[0] for row in rows}) > 1
    assert lm.config._attn_implementation == before


def test_one_prefix_is_read_where_it_lies_and_rows_keep_their_own_tokens_alone() -> None:
    parent = [(torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8))]
    shared = SharedPrefixes([parent], [40], [300])
    assert shared.layers[0][0].data_ptr() == parent[0][0].data_ptr()
    assert all(layer._buffers[0].shape[2] <= 16 for layer in shared.own())
    assert copied_layers([parent], [40], [300])[0].keys.shape == (300, 2, 40, 8)


def test_the_attention_of_a_model_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lm: Any = build_lm({"model_type": "gpt2", **SIZES["gpt2"]}, 40)
    before, seen = lm.config._attn_implementation, []

    def broken(*args: Any) -> None:
        seen.append(lm.config._attn_implementation)
        raise RuntimeError("broken")

    engine = LocalEngine(lm, [39], Policy(budget=20))
    opened = engine.open("a", [1, 2], [3], [0])
    monkeypatch.setattr(engine, "_decode", broken)
    with pytest.raises(RuntimeError, match="broken"):
        engine.complete([Job(opened, 0, 0, range(2))])
    assert seen != [before]
    assert lm.config._attn_implementation == before
    assert not can_share(torch.nn.Linear(1, 1))


def test_what_it_does_not_offer_is_refused() -> None:
    parent = [(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4))]
    shared, one = SharedPrefixes([parent], [3], [1]), torch.randn(1, 1, 1, 4)
    layer = SimpleNamespace(layer_idx=0)
    with pytest.raises(ValueError, match="softcap in its attention is not accepted; accepted: engine: naive"):
        shared_prefix_attention(layer, one, one, one, None, prefixes=shared, softcap=30.0)
    with pytest.raises(ValueError, match="not told of the prefix"):
        shared_prefix_attention(layer, one, one, one, None)
