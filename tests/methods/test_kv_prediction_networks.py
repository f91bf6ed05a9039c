"""Three ways of attending, the predictor, pruned prompts: what has to be equal, and what must not move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.methods.kv_prediction import prefill
from zoo.methods.kv_prediction.losses import cache_loss
from zoo.methods.kv_prediction.networks import Cache, CausalLM, KVPredictor, Shape, unused_for_entries

UNIFORM: dict[str, Any] = {"vocab_size": 23, "width": 16, "head_dim": 4, "mlp": (24, 24, 24)}
SHAPES = {
    "llama": Shape(**UNIFORM, heads=(4, 4, 4), kv_heads=(4, 4, 4)),
    "grouped, biased, untied": Shape(**UNIFORM, heads=(4, 4, 4), kv_heads=(2, 2, 2), qkv_bias=True, tied=False),
    "openelm": Shape(23, 16, 4, heads=(4, 4, 8), kv_heads=(1, 2, 4), mlp=(8, 16, 32), qk_norm=True),
}
AUXILIARY = Shape(23, 12, 6, heads=(2, 4), kv_heads=(1, 2), mlp=(16, 8), qk_norm=True)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def make(shape: Shape, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    model = CausalLM(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))  # at their first values norms would hide an order
    return model.eval().requires_grad_(False)


def tokens(b: int = 2, s: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(23, (b, s), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


# ---------------------------------------------------------------- replace, append


def test_replacing_by_the_true_entries_changes_nothing(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    stream, entries = model(ids)
    assert close(model(ids, given=entries)[0], stream)
    for (k, v), (k2, v2) in zip(model.entries(ids), entries, strict=True):
        assert close(k, k2)
        assert close(v, v2)


def test_replacing_computes_queries_alone(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    stream, entries = model(ids)
    for block in model.blocks():
        block.self_attn.k_proj.weight.zero_()
        block.self_attn.v_proj.weight.zero_()
    assert close(model(ids, given=entries)[0], stream)


def test_with_its_own_entry_each_position_sees_what_the_last_token_of_a_prompt_sees(shape: Shape) -> None:
    base, auxiliary, ids = make(shape), make(AUXILIARY), tokens()
    predictor = KVPredictor(AUXILIARY, shape, [0, 1, 1]).requires_grad_(False)
    given = predictor(auxiliary.entries(ids))
    logits = base.logits(base(ids, given=given, own_self=True)[0])
    for t in range(9):
        assert close(logits[:, t], prefill.predicted(base, auxiliary, predictor, ids[:, : t + 1], 0).logits)
    assert not close(logits, base.logits(base(ids, given=given)[0]))
    assert close(base(ids, given=base.entries(ids), own_self=True)[0], base(ids)[0])


def test_appending_to_a_cache_gives_the_rows_of_the_whole_pass(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    whole = model.logits(model(ids)[0])
    for split in (1, 4, 8):
        cache = model.cache_of(model.entries(ids[:, :split]), 9)
        assert close(model.extend(ids[:, split:], cache), whole[:, split:])
    cache = Cache(shape.depth, 9)
    rows = [model.extend(ids[:, t : t + 1], cache)[:, 0] for t in range(9)]
    assert close(torch.stack(rows, dim=1), whole)


def test_a_cache_from_entries_is_that_of_the_model_itself(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    own, made = Cache(shape.depth, 9), model.cache_of(model.entries(ids), 9)
    model.extend(ids, own)
    for layer in range(shape.depth):
        for a, b in zip(own.read(layer), made.read(layer), strict=True):
            assert close(a, b)


def test_for_a_first_token_the_last_layer_finishes_one_row_and_keeps_all_entries(shape: Shape) -> None:
    model, ids, rows = make(shape), tokens(), []
    for block in model.blocks():
        block.mlp.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    start = prefill.full(model, ids, 0)
    assert rows == [9, 9, 1]
    assert start.cache.lengths == [9, 9, 9]
    assert close(start.logits, model.logits(model(ids)[0])[:, -1])


def test_a_full_cache_says_so(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    cache = model.cache_of(model.entries(ids), 9)
    with pytest.raises(ValueError, match="a cache of 9 tokens cannot hold 10"):
        model.extend(ids[:, :1], cache)
    with pytest.raises(ValueError, match="layer 0 of the cache is empty"):
        Cache(2, 4).read(0)


def test_entries_are_before_the_norm_and_the_rotation() -> None:
    model, ids = make(SHAPES["openelm"]), tokens()
    hidden = model.blocks()[0].input_layernorm(model.embed_tokens(ids))
    keys = model.entries(ids)[0][0]
    assert close(keys.transpose(1, 2).flatten(2), hidden @ model.blocks()[0].self_attn.k_proj.weight.T)
    normed = model.normed(model.entries(ids))[0][0]
    expected = keys * keys.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * model.blocks()[0].self_attn.k_norm.weight
    assert close(normed, expected)


# ---------------------------------------------------------------- the predictor


def identity(model: CausalLM) -> KVPredictor:
    predictor = KVPredictor(model.shape, model.shape, list(range(model.shape.depth)))
    for linear in (*predictor.keys, *predictor.values):
        linear.weight.data = torch.eye(len(linear.weight))
        linear.bias.data.zero_()
    return predictor.requires_grad_(False)


def test_with_itself_as_auxiliary_and_identity_maps_nothing_is_lost(shape: Shape) -> None:
    base, auxiliary, predictor, ids = make(shape), make(shape), identity(make(shape)), tokens()
    guessed, true = predictor(auxiliary.entries(ids)), base.entries(ids)
    assert float(cache_loss(base.normed(guessed), base.normed(true))) == 0
    whole = base.logits(base(ids)[0])
    assert close(base.logits(base(ids, given=guessed)[0]), whole)
    start = prefill.predicted(base, auxiliary, predictor, ids[:, :5], 4)
    assert close(start.logits, whole[:, 4])
    assert close(prefill.continue_from(base, start, ids[:, 5:]), whole[:, 4:8])


def test_maps_see_merged_heads_in_the_order_of_the_paper() -> None:
    base, auxiliary = make(SHAPES["openelm"]), make(AUXILIARY)
    layer_map = [1, 0, 1]
    torch.manual_seed(1)
    predictor = KVPredictor(AUXILIARY, base.shape, layer_map).requires_grad_(False)
    entries = auxiliary.entries(tokens())
    for i, (found, j) in enumerate(zip(predictor(entries), layer_map, strict=True)):
        for x, source, linear in zip(found, entries[j], (predictor.keys[i], predictor.values[i]), strict=True):
            heads, kv = base.shape.kv_heads[i], AUXILIARY.kv_heads[j]
            weight = linear.weight.view(heads, 4, kv, 6)  # type: ignore[operator, union-attr]
            bias = linear.bias.view(heads, 1, 4)  # type: ignore[operator, union-attr]
            assert close(x, torch.einsum("bhsd,HDhd->bHsD", source, weight) + bias)


def test_a_map_of_the_wrong_length_or_range_is_refused() -> None:
    for layer_map in ([0, 1], [0, 1, 2], [0, 0, -1]):
        with pytest.raises(ValueError, match="layer_map: .* accepted: 3 numbers, one for each base layer, from 0 to 1"):
            KVPredictor(AUXILIARY, SHAPES["llama"], layer_map)


def test_later_tokens_do_not_reach_earlier_logits(shape: Shape) -> None:
    base, auxiliary = make(shape), make(AUXILIARY)
    predictor = KVPredictor(AUXILIARY, shape, [0, 0, 1])
    ids, other = tokens(), tokens()
    other[:, 5] = (other[:, 5] + 1) % 23
    a, b = (base.logits(base(x, given=predictor(auxiliary.entries(x)))[0]) for x in (ids, other))
    assert torch.equal(a[:, :5], b[:, :5])
    assert not close(a[:, 5:6], b[:, 5:6])


def test_without_a_loss_of_its_own_the_rest_of_the_auxiliary_gets_no_gradient() -> None:
    base, ids = make(SHAPES["llama"]), tokens()
    auxiliary = make(AUXILIARY).requires_grad_(True)
    for layer_map in ([0, 1, 1], [0, 0, 0]):
        auxiliary.zero_grad()
        predictor = KVPredictor(AUXILIARY, base.shape, layer_map)
        base.logits(base(ids, given=predictor(auxiliary(ids)[1]))[0]).square().mean().backward()
        unused = {id(p) for p in unused_for_entries(auxiliary, layer_map)}
        for name, parameter in auxiliary.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached == (id(parameter) not in unused), (layer_map, name)
        assert all(p.grad is not None and bool(p.grad.any()) for p in predictor.parameters())


# ---------------------------------------------------------------- pruned prompts


def test_pruning_that_keeps_all_is_the_base_itself(shape: Shape) -> None:
    model, ids = make(shape), tokens()
    whole = model.logits(model(ids)[0])
    prompt, answer, rows = ids[:, :6], ids[:, 6:], torch.arange(2)
    starts = {
        "full": prefill.full(model, prompt, 3),
        "truncate": prefill.pruned(model, prompt, prefill.truncated_positions(prompt, 6), 3),
        "random": prefill.pruned(model, prompt, prefill.random_positions(prompt, rows, 6), 3),
        "static": prefill.pruned(model, prompt, prefill.static_positions(model, prompt, 6), 3),
        "lazy": prefill.lazy(model, prompt, [6] * shape.depth, 3),
    }
    for name, start in starts.items():
        assert close(prefill.continue_from(model, start, answer), whole[:, 5:8]), name


def test_kept_tokens_keep_their_positions() -> None:
    model, ids = make(SHAPES["llama"]), tokens()
    kept = torch.tensor([[1, 4, 8]] * 2)
    start = prefill.pruned(model, ids, kept, 1)
    x = model.embed_tokens(ids.gather(1, kept))
    rotation = model.rotation(kept)
    for block in model.blocks():
        attention, hidden = block.self_attn, block.input_layernorm(x)
        keys, values = attention.entries(hidden)
        queries = attention.queries(hidden, rotation)
        x = block.finish(x, attention(queries, attention.ready(keys, rotation), values, None, True))
    assert close(start.logits, model.logits(x[:, -1]))
    assert start.cache.position == 9
    again = prefill.pruned(model, ids[:, [1, 4, 8]], torch.tensor([[0, 1, 2]] * 2), 1)
    assert not close(start.logits, again.logits)


def test_random_tokens_are_the_rows_own_and_have_the_last() -> None:
    ids = tokens(6, 12)
    kept = prefill.random_positions(ids, torch.arange(6), 5)
    assert bool((kept[:, -1] == 11).all())
    assert bool((kept.diff(dim=1) > 0).all())
    assert torch.equal(kept[2:4], prefill.random_positions(ids[2:4], torch.arange(2, 4), 5))
    assert len({tuple(row) for row in kept.tolist()}) > 3
    many = prefill.random_positions(torch.zeros(4000, 8), torch.arange(4000), 3)
    shares = torch.bincount(many.flatten(), minlength=8)[:-1] / 4000
    assert bool((shares - 2 / 7).abs().max() < 0.04)


def test_static_pruning_follows_the_last_tokens_attention() -> None:
    model, ids = make(SHAPES["grouped, biased, untied"]), tokens()
    block = model.blocks()[0]
    hidden, rotation = block.input_layernorm(model.embed_tokens(ids)), model.rotation(torch.arange(9))
    queries = block.self_attn.queries(hidden, rotation)
    keys = block.self_attn.ready(block.self_attn.entries(hidden)[0], rotation).repeat_interleave(2, dim=1)
    attention = (queries[:, :, -1:] @ keys.transpose(2, 3) / 2).softmax(-1).mean(1)[:, 0]
    assert close(
        prefill.last_attention(queries, block.self_attn.ready(block.self_attn.entries(hidden)[0], rotation)), attention
    )
    for row, kept in zip(attention, prefill.static_positions(model, ids, 4), strict=True):
        best = set(row[:-1].topk(3).indices.tolist()) | {8}
        assert set(kept.tolist()) == best


def test_lazy_pruning_drops_tokens_for_good() -> None:
    model, ids = make(SHAPES["openelm"]), tokens()
    start = prefill.lazy(model, ids, [9, 6, 3], 2)
    assert start.cache.lengths == [9, 6, 3]
    model.extend(ids[:, :1], start.cache)
    assert start.cache.lengths == [10, 7, 4]
    assert prefill.lazy_counts(3, 9, 2 / 3, 1 / 3) == [9, 5, 3]
    assert prefill.lazy_counts(1, 9, 0.5, 0.1) == [9]


def test_equal_cost_is_the_least_that_is_not_cheaper() -> None:
    from zoo.methods.kv_prediction.flops import kvp_flops, lazy_flops, prefill_flops, static_prune_flops

    base = Shape(100, 64, 16, heads=(4,) * 4, kv_heads=(2,) * 4, mlp=(160,) * 4)
    auxiliary = Shape(100, 32, 16, heads=(2,) * 2, kv_heads=(2,) * 2, mlp=(96,) * 2)
    found, cost = prefill.equal_cost(auxiliary, base, [0, 0, 1, 1], 50), kvp_flops(auxiliary, base, [0, 0, 1, 1], 50)
    assert prefill_flops(base, found.tokens) >= cost > prefill_flops(base, found.tokens - 1)
    assert static_prune_flops(base, 50, found.static) >= cost
    assert lazy_flops(base, found.lazy) >= cost


# ---------------------------------------------------------------- generation


def test_a_prompt_of_one_token_needs_no_prediction() -> None:
    base, auxiliary = make(SHAPES["llama"]), make(AUXILIARY)
    start = prefill.predicted(base, auxiliary, KVPredictor(AUXILIARY, base.shape, [0, 0, 1]), tokens(s=1), 1)
    assert close(start.logits, base.logits(base(tokens(s=1))[0])[:, 0])
