"""What DynaMoE's router is compared with: exchanged or drawn widths; and the tokens that difficulty is read on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.methods.dynamoe.evaluation import Point, Sequences, difficulty_metrics, independent, quartile_gap, shuffled


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- shuffled -------------------------------------------------------------------------------------------------------


def test_widths_change_places_within_their_group_alone() -> None:
    """Each group has widths of its own, so that a width says which group it came from."""
    groups = torch.randint(-1, 3, (30, 8), generator=seeded(1))
    widths = torch.stack([10 * groups, 10 * groups + torch.randint(4, groups.shape, generator=seeded(2))])
    out = shuffled(widths, groups, seeded())
    assert torch.equal(out // 10, widths // 10)
    assert torch.equal(out[:, groups == -1], widths[:, groups == -1]), "no group: padding stays"
    for group in range(3):
        assert not torch.equal(out[1][groups == group], widths[1][groups == group])
    again = shuffled(widths, torch.where(groups < 0, -1, 0), seeded())
    assert not torch.equal(again // 10, widths // 10), "in one group all of them mix"


def test_each_layer_is_shuffled_by_itself_and_the_widths_stay_as_they_were() -> None:
    numbers = torch.arange(40).reshape(1, 5, 8).expand(3, 5, 8)
    kept = numbers.clone()
    out = shuffled(numbers, torch.zeros(5, 8).long(), seeded())
    assert torch.equal(numbers, kept)
    for layer in range(3):
        assert out[layer].flatten().sort().values.tolist() == list(range(40))
        assert not torch.equal(out[layer], out[layer - 1])
    assert torch.equal(shuffled(numbers, torch.zeros(5, 8).long(), seeded()), out)
    assert not torch.equal(shuffled(numbers, torch.zeros(5, 8).long(), seeded(1)), out)


def test_all_orders_of_a_group_are_as_likely() -> None:
    generator, counts = seeded(), dict[tuple[int, ...], int]()
    widths, groups = torch.tensor([[[0, 1, 2, 9]]]), torch.tensor([[5, 5, 5, 7]])
    for _ in range(1200):
        order = tuple(shuffled(widths, groups, generator).flatten().tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(order[3] == 9 for order in counts), "alone in its group"
    assert min(counts.values()) > 150
    assert max(counts.values()) < 250


# -- independent ----------------------------------------------------------------------------------------------------


def test_drawn_widths_have_the_shares_of_their_layer_without_padding() -> None:
    """A quarter of the first layer is 1, the rest 2; the second is 3 throughout; padding, half of all, is 0."""
    mask = (torch.arange(100) < 50).expand(80, 100)
    first = torch.where(torch.arange(80)[:, None] < 20, 1, 2).expand(80, 100)
    widths = torch.stack([torch.where(mask, first, 0), torch.where(mask, 3, 0)])
    out = independent(widths, mask, seeded())
    assert out.shape == widths.shape
    assert out.dtype == widths.dtype
    shares = (out[0].flatten().bincount(minlength=4) / 8000).tolist()
    assert shares == pytest.approx([0.0, 0.25, 0.75, 0.0], abs=0.02)
    assert bool((out[1] == 3).all())
    rows = (out[0] == 1).float().mean(1)
    assert float(rows.max()) < 0.5, "where a token stands has no influence"
    assert not torch.equal(independent(widths, mask, seeded(1)), out)


def test_layers_and_neighbours_are_drawn_by_themselves() -> None:
    row = torch.where(torch.arange(200) < 50, 1, 2).expand(40, 200)
    out = independent(torch.stack([row, row]).byte(), torch.ones(40, 200).bool(), seeded())
    by_chance = 0.25**2 + 0.75**2
    for left, right in ((out[0], out[1]), (out[0, :, 1:], out[0, :, :-1]), (out[1, 1:], out[1, :-1])):
        assert float((left == right).float().mean()) == pytest.approx(by_chance, abs=0.03)


# -- difficulty -----------------------------------------------------------------------------------------------------


def difficulty_case(first: int) -> tuple[Point, Tensor, Tensor, Sequences, Tensor]:
    """Widths that are the labels, but on first tokens, whose width is `first` and whose label is 0."""
    labels = torch.tensor([[[0, 1, 1, 2, 3], [0, 3, 2, 1, 1]]]).repeat(2, 1, 1)
    widths = labels.clone()
    widths[:, :, 0] = first
    mask = torch.ones(2, 5).bool()
    mask[1, 4] = False
    widths[:, 1, 4] = 0  # padding is as wrong
    sizes = torch.tensor([[0.25, 0.5, 0.75, 1.0]]).repeat(2, 1)
    said = torch.where(mask, 1, -100)
    said[0, 2] = -100
    loss = torch.tensor([[9.0, 0.2, 5.0, 0.7, 0.9], [9.0, 0.8, 0.6, 0.1, 9.0]])
    none = torch.zeros(2)
    point = Point(none.double(), none.double(), widths.byte(), 0.0, 0.0, loss, {})
    sequences = Sequences(torch.zeros(2, 5).long(), said, torch.zeros(2, 5).long(), mask)
    return point, labels, sizes, sequences, loss


@pytest.mark.parametrize("first", [0, 3])
def test_first_tokens_and_padding_are_left_out_of_difficulty(first: int) -> None:
    found = difficulty_metrics(*difficulty_case(first))
    assert found["label_acc"] == 1.0
    assert found["spearman_oracle"] == pytest.approx(1.0)
    assert found["majority"] == pytest.approx(3 / 7), "1 1 2 3 and 3 2 1"
    # seven tokens, a quarter is one: the last of the threes, and the first of the ones
    assert found["quartile_gap"] == pytest.approx(1.0 - 0.5)
    # the six with a label, widths 1 2 3 3 2 1 and losses .2 .7 .9 .8 .6 .1: rising together but for ties
    assert 0.9 < found["spearman_loss"] < 1.0


def test_the_quartile_gap_is_hard_minus_easy() -> None:
    active = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.4, 0.6, 1.0, 0.2])
    hardness = torch.tensor([2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 3.0, 0.5])
    assert quartile_gap(active, hardness) == pytest.approx((0.9 + 1.0) / 2 - (0.1 + 0.2) / 2)
    assert quartile_gap(active, -hardness) == pytest.approx((0.1 + 0.2) / 2 - (0.9 + 1.0) / 2)
    assert quartile_gap(active[:3], hardness[:3]) == pytest.approx(0.9 - 0.1)
