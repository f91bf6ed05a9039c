"""Layer maps, losses and costs against the paper's tables, naive loops and the released code's definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.methods.kv_prediction.flops import (
    kvp_flops,
    lazy_flops,
    lazyllm_reduction,
    predictor_flops,
    prefill_flops,
    random_prune_reduction,
    static_prune_flops,
    static_prune_reduction,
)
from zoo.methods.kv_prediction.losses import (
    IGNORE,
    cache_loss,
    canonical_map,
    lazy_retention,
    pruned_map,
    recovery,
    rotate,
    token_loss,
    total_loss,
)
from zoo.methods.kv_prediction.networks import Shape

Cache = list[tuple[Tensor, Tensor]]

# ---------------------------------------------------------------- maps


def doubled(first: int, each: int, then: int, rest: int) -> list[int]:
    """`first` layers that feed `each`, then `then` layers that feed `rest`."""
    return [j for j in range(first) for _ in range(each)] + [first + j for j in range(then) for _ in range(rest)]


@pytest.mark.parametrize(
    ("auxiliary", "base", "expected"),
    [
        (20, 28, doubled(8, 2, 12, 1)),
        (16, 28, doubled(12, 2, 4, 1)),
        (28, 36, doubled(8, 2, 20, 1)),
        (20, 36, doubled(16, 2, 4, 1)),
        (16, 36, doubled(4, 3, 12, 2)),
    ],
)
def test_canonical_maps_are_those_of_table_1(auxiliary: int, base: int, expected: list[int]) -> None:
    assert canonical_map(auxiliary, base) == expected


@pytest.mark.parametrize("base", [28, 36])
@pytest.mark.parametrize(
    ("dropped", "beginning"),
    [
        (lambda i: i % 4 == 3, [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8]),
        (lambda i: i % 2 == 1, [0, 0, 1, 1, 2, 2]),
        (lambda i: i % 4 != 0, [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_pruned_maps_are_those_of_tables_1_and_4(base: int, dropped, beginning: list[int]) -> None:  # type: ignore[no-untyped-def]
    kept = [i for i in range(base) if not dropped(i)]
    assert len(kept) in {28: (21, 14, 7), 36: (27, 18, 9)}[base]
    found = pruned_map(kept, base)
    assert found[: len(beginning)] == beginning
    assert found[-1] == len(kept) - 1


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_maps_have_a_layer_for_each_base_layer_rise_and_leave_none_out(data: st.DataObject) -> None:
    base = data.draw(st.integers(1, 40))
    depth = data.draw(st.integers(1, base))
    kept = [0, *sorted(data.draw(st.sets(st.integers(1, base), max_size=base)) - {base})]
    for found, used in ((canonical_map(depth, base), depth), (pruned_map(kept, base), len(kept))):
        assert len(found) == base
        assert found == sorted(found)
        assert set(found) == set(range(used))


def test_maps_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="5 layers cannot feed a base of 4; accepted: 1 to 4"):
        canonical_map(5, 4)
    for kept in ([1, 2], [0, 4], [0, 2, 1], []):
        with pytest.raises(ValueError, match="accepted: rising from 0, less than 4"):
            pruned_map(kept, 4)


# ---------------------------------------------------------------- losses


def caches(seed: int, layers: int = 3, b: int = 2, h: int = 2, s: int = 5, d: int = 4) -> Cache:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(b, h, s, d, generator=g), torch.randn(b, h, s, d, generator=g)) for _ in range(layers)]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_consistency_is_the_released_codes_sum_of_layer_means(reduction: str) -> None:
    predicted, true = caches(0), caches(1)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]]).bool()
    total = 0.0
    for (pk, pv), (tk, tv) in zip(predicted, true, strict=True):
        for p, t in ((pk, tk), (pv, tv)):
            errors = [
                float((p[b, h, s, d] - t[b, h, s, d]).abs())
                for b in range(2)
                for h in range(2)
                for s in range(5)
                for d in range(4)
                if mask[b, s]
            ]
            total += sum(errors) / len(errors)
    expected = total / 3 if reduction == "mean" else total
    assert float(cache_loss(predicted, true, mask, reduction)) == pytest.approx(expected, rel=1e-5)


def test_an_offset_of_the_keys_alone_costs_its_size_once_a_layer() -> None:
    true = caches(0)
    offset = [(k - 0.25, v) for k, v in true]
    assert float(cache_loss(offset, true)) == pytest.approx(0.25)
    assert float(cache_loss(offset, true, reduction="sum")) == pytest.approx(0.25 * 3)
    assert float(cache_loss(true, true)) == 0


def test_ignored_positions_do_not_change_the_consistency_loss() -> None:
    predicted, true = caches(0), caches(1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 3:] = False
    disturbed = [(k.clone(), v.clone()) for k, v in predicted]
    for k, v in disturbed:
        k[:, :, 3:] += 100
        v[:, :, 3:] -= 100
    assert torch.equal(cache_loss(predicted, true, mask), cache_loss(disturbed, true, mask))
    assert not torch.equal(cache_loss(predicted, true), cache_loss(disturbed, true))


def test_consistency_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="consistency_reduction: 'max' is not accepted; accepted: mean, sum"):
        cache_loss(caches(0), caches(1), reduction="max")
    with pytest.raises(ValueError, match="2 predicted layers do not fit 3"):
        cache_loss(caches(0, layers=2), caches(1))


def test_the_z_loss_is_a_mean_over_labels_that_count() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 4, 7, generator=g), torch.randint(7, (2, 4), generator=g)
    labels[0, 1] = labels[1, 3] = IGNORE
    counts = labels != IGNORE
    expected = F.cross_entropy(logits[counts], labels[counts])
    expected = expected + 0.1 * logits[counts].logsumexp(dim=-1).square().mean()
    assert torch.allclose(token_loss(logits, labels, 0.1), expected)
    disturbed = torch.where(counts[..., None], logits, 50.0)
    assert torch.allclose(token_loss(disturbed, labels, 0.1), expected)
    nothing = token_loss(logits[:, :1], torch.full((2, 1), IGNORE), 0.1)
    assert math.isnan(float(nothing)) or float(nothing) == 0


def test_the_total_is_that_of_the_released_code() -> None:
    base, auxiliary, consistency = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)
    assert float(total_loss(base, auxiliary, consistency)) == 10
    assert float(total_loss(base, auxiliary, consistency, 1, 0, 0.5)) == 4.5


def test_recovery_is_one_for_the_base_and_zero_without_prompt() -> None:
    assert recovery(4.0, 4.0, 5.0) == 1
    assert recovery(5.0, 4.0, 5.0) == 0
    assert recovery(4.25, 4.0, 5.0) == 0.75
    assert math.isnan(recovery(4.0, 5.0, 5.0))


def test_rotation_keeps_lengths_and_turns_by_the_difference_of_positions() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, generator=g), torch.randn(6, generator=g)
    angle = torch.cat([torch.tensor([0.3, 0.1, 0.02])] * 2)

    def at(x: Tensor, position: int) -> Tensor:
        return rotate(x, (angle * position).cos(), (angle * position).sin())

    assert torch.allclose(at(q, 9).norm(), q.norm())
    assert torch.allclose(at(q, 9) @ at(k, 4), at(q, 5) @ k, atol=1e-5)
    assert not torch.allclose(at(q, 9) @ at(k, 4), q @ k, atol=1e-2)


# ---------------------------------------------------------------- costs


def test_reductions_of_pruning_are_those_of_table_5() -> None:
    assert [round(random_prune_reduction(r), 2) for r in (0.75, 0.5, 0.25)] == [1.33, 2.0, 4.0]
    assert [round(static_prune_reduction(r), 2) for r in (0.5, 0.25)] == [1.33, 2.0]
    lazy = [lazyllm_reduction(0.75, b) for b in (0.75, 0.5, 0.25, 0.10, 0.05, 0.01)]
    assert [round(r, 2) for r in lazy] == [1.21, 1.38, 1.60, 1.77, 1.83, 1.89]
    lazy = [lazyllm_reduction(0.5, b) for b in (0.5, 0.25, 0.10, 0.05, 0.01)]
    assert [round(r, 2) for r in lazy] == [1.54, 1.82, 2.04, 2.13, 2.20]


def test_retention_falls_in_a_line_between_30_and_90_percent_of_the_depth() -> None:
    assert [lazy_retention(x, 0.8, 0.2) for x in (0.0, 0.29, 0.9, 1.0)] == [1, 1, 0.2, 0.2]
    assert lazy_retention(0.3, 0.8, 0.2) == 0.8
    assert lazy_retention(0.6, 0.8, 0.2) == pytest.approx(0.5)


SHAPE = Shape(vocab_size=50, width=12, head_dim=4, heads=(4, 2), kv_heads=(2, 1), mlp=(20, 24))
SMALL = Shape(vocab_size=50, width=8, head_dim=4, heads=(2,), kv_heads=(1,), mlp=(16,))


def counted(shape: Shape, tokens: int) -> int:
    """Multiply-adds one by one."""
    total = 2 * shape.width * shape.vocab_size
    for heads, kv, mlp in zip(shape.heads, shape.kv_heads, shape.mlp, strict=True):
        for t in range(tokens):
            total += 2 * shape.width * shape.head_dim * (heads + kv + kv) + 2 * heads * shape.head_dim * shape.width
            total += 3 * 2 * shape.width * mlp
            total += (t + 1) * heads * shape.head_dim * (2 + 2)
    return total


@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_operations_of_a_prompt_agree_with_counting(tokens: int) -> None:
    assert prefill_flops(SHAPE, tokens) == counted(SHAPE, tokens)


def test_operations_of_a_predicted_cache_are_auxiliary_maps_and_one_step() -> None:
    # what is left of the whole prompt when all but the last token have been read
    step = counted(SHAPE, 9) - counted(SHAPE, 8) + 2 * SHAPE.width * SHAPE.vocab_size
    auxiliary = counted(SMALL, 8) - 2 * SMALL.width * SMALL.vocab_size
    maps = 8 * 2 * 2 * (1 * 4) * (2 * 4 + 1 * 4)
    assert predictor_flops(SMALL, SHAPE, [0, 0], 8) == maps
    assert kvp_flops(SMALL, SHAPE, [0, 0], 9) == auxiliary + maps + step


def test_operations_of_pruning_that_keeps_all_are_those_of_the_base() -> None:
    assert lazy_flops(SHAPE, [9, 9]) == prefill_flops(SHAPE, 9)
    assert lazy_flops(SHAPE, [9, 3]) < prefill_flops(SHAPE, 9)
    assert static_prune_flops(SHAPE, 9, 9) > prefill_flops(SHAPE, 9)
