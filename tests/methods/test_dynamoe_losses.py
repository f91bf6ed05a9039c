"""The equations of DynaMoE against loops, closed forms and the properties that its specification lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.methods.dynamoe import losses
from zoo.methods.dynamoe.routes import ByRouter, Oracle, chosen, hashed_uniform

SCORES = st.lists(st.lists(st.floats(-1.5, 1.5, width=32), min_size=3, max_size=3), min_size=1, max_size=6)
THETAS = st.tuples(st.floats(-1, 1.25, width=32), st.floats(-1, 1.25, width=32)).map(sorted)


def outputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("hidden", "experts", "sizes"), [(8, 4, [2, 4, 6, 8]), (10, 4, [2, 5, 7, 10]), (5, 1, [5])])
def test_widths_are_floored_and_end_with_the_whole(hidden: int, experts: int, sizes: list[int]) -> None:
    assert losses.expert_widths(hidden, experts) == sizes


@pytest.mark.parametrize("experts", [0, 9])
def test_an_expert_without_neurons_is_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=r"experts: .* accepted: 1 to 8"):
        losses.expert_widths(8, experts)


def test_similarities_are_the_formulas() -> None:
    y = outputs(5, 4, 6)
    for n in range(5):
        full = y[n, -1]
        for e in range(3):
            inner = y[n, e] @ full
            assert losses.similarity(y, "inner")[n, e] == pytest.approx(float(inner / (full @ full)), abs=1e-5)
            cosine = inner / (y[n, e].norm() * full.norm())
            assert losses.similarity(y, "cosine")[n, e] == pytest.approx(float(cosine), abs=1e-5)
            relative = 1 - (y[n, e] - full).norm() / full.norm()
            assert losses.similarity(y, "relerr")[n, e] == pytest.approx(float(relative), abs=1e-5)


@pytest.mark.parametrize("kind", losses.SIMILARITIES)
def test_the_full_expert_has_similarity_one_and_a_zero_output_is_easy(kind: str) -> None:
    y = outputs(6, 4, 5)
    y[2, -1] = 0
    scores = losses.similarity(y, kind)
    assert torch.equal(scores[:, -1], torch.ones(6))
    assert torch.isfinite(scores).all()
    assert losses.difficulty(scores, 0.99)[2] == 0


@pytest.mark.parametrize("kind", losses.SIMILARITIES)
def test_labels_ignore_sign_and_scale_of_the_output(kind: str) -> None:
    y = outputs(50, 4, 5).cumsum(1)
    labels = losses.difficulty(losses.similarity(y, kind), 0.6)
    assert labels.unique().numel() > 1
    for factor in (-1.0, 7.5):
        assert torch.equal(losses.difficulty(losses.similarity(factor * y, kind), 0.6), labels)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match="similarity: 'dot' is unknown; accepted: inner, cosine, relerr"):
        losses.similarity(outputs(1, 2, 3), "dot")
    with pytest.raises(ValueError, match="mode: 'last' is unknown; accepted: first, stable"):
        losses.narrowest_above(outputs(1, 2), 0.5, "last")


@settings(max_examples=60, deadline=None)
@given(SCORES, THETAS)
def test_the_label_is_the_smallest_good_expert_and_never_falls(rows: list[list[float]], thetas: list[float]) -> None:
    scores = torch.tensor([[*row, 1.0] for row in rows])
    low, high = (losses.difficulty(scores, theta) for theta in thetas)
    assert bool((low <= high).all())
    for theta, labels in zip(thetas, (low, high), strict=True):
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
            good = [e for e in range(3) if row[e] > theta and theta < 1]
            assert label == (good[0] if good else 3)
            stable = int(losses.difficulty(torch.tensor([row]), theta, "stable"))
            assert stable == next(e for e in range(4) if all(i in good or i == 3 for i in range(e, 4)))


def test_the_ends_of_theta() -> None:
    scores = torch.tensor([[0.2, 0.9, 0.5, 1.0], [1.4, 0.1, 1.2, 1.0]])
    assert losses.difficulty(scores, float("-inf")).tolist() == [0, 0]
    assert losses.difficulty(scores, 0.9).tolist() == [3, 0]
    assert losses.difficulty(scores, 1.0).tolist() == [3, 3]  # although predictions may be above
    assert losses.difficulty(scores, torch.tensor([0.1, 1.3])).tolist() == [0, 3]


@settings(max_examples=40, deadline=None)
@given(SCORES, st.tuples(st.floats(0, 1, width=32), st.floats(0, 1, width=32)).map(sorted))
def test_tau_takes_the_narrowest_likely_width_and_never_falls(rows: list[list[float]], taus: list[float]) -> None:
    p = torch.tensor(rows).softmax(-1)
    low, high = (losses.narrowest_likely(p, tau) for tau in taus)
    assert bool((low <= high).all())
    for row, width in zip(p.cumsum(-1).tolist(), low.tolist(), strict=True):
        assert width == next((e for e in range(2) if row[e] >= taus[0]), 2)


def test_inference_of_the_heads() -> None:
    prediction = torch.tensor([[0.2, 0.7, 0.9], [0.95, 0.1, 0.1]])
    assert ByRouter("score", 0.65).widths(0, prediction, None).tolist() == [1, 0]  # type: ignore[union-attr]
    assert ByRouter("label", None).widths(0, prediction, None).tolist() == [2, 0]  # type: ignore[union-attr]
    assert ByRouter("label", 1.0).widths(0, prediction, None).tolist() == [2, 2]  # type: ignore[union-attr]
    scores = torch.cat([prediction, torch.ones(2, 1)], dim=1)
    assert Oracle(0.92).widths(0, None, scores).tolist() == [3, 0]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="theta: the score head needs a threshold"):
        chosen(prediction, "score", None)


def test_router_losses_are_the_formulas() -> None:
    predicted, scores = torch.tensor([[0.5, 3.0]]), torch.tensor([[0.1, 9.0, 1.0]])
    assert losses.score_loss(predicted, scores).tolist() == pytest.approx([(0.5 * 0.16 + 0.5) / 2])
    logits, labels = outputs(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
    expected = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(losses.label_loss(logits, labels), expected)


def test_the_row_mean_does_not_depend_on_how_a_batch_is_divided() -> None:
    values, counted = outputs(4, 6), outputs(4, 6) > -0.5
    whole = losses.row_mean(values, counted)
    halves = [losses.row_mean(values[part], counted[part]) for part in (slice(0, 2), slice(2, 4))]
    assert whole == pytest.approx(float(sum(halves)) / 2)
    assert losses.row_mean(values, torch.zeros(4, 6).bool()) == 0


def test_importance_is_the_size_of_a_neurons_contribution() -> None:
    hidden, down = outputs(3, 5, 4), outputs(7, 4)
    by_hand = [sum(float((h[n] * down[:, n]).norm()) for h in hidden.flatten(0, 1)) for n in range(4)]
    assert losses.importance(hidden, down).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_active_parameters_of_a_small_model() -> None:
    """D = 4, H = 8, E = 4, widths 0 and 2: the MLPs use 3*4*2 + 3*4*6 = 96 of 192."""
    sizes = torch.tensor([[0.25, 0.5, 0.75, 1.0]])
    widths = torch.tensor([[[0]], [[2]]])
    assert float(losses.activity(widths, sizes)) == pytest.approx(0.5)
    used = [losses.expert_widths(8, 4)[int(w)] for w in widths.flatten()]
    assert losses.active_parameters(1000, 10, 4, [8, 8], used) == 1000 + 10 - 192 + 96
    assert losses.active_parameters(1000, 10, 4, [8, 8], used, matrices=2) == 1000 + 10 - 128 + 64


def test_the_penalty_of_flextron() -> None:
    assert float(losses.activity_penalty(torch.tensor([[0.2, 0.6]]), 0.5)) == pytest.approx(0.01)


def test_hashed_numbers_follow_from_the_row_and_the_salt_alone() -> None:
    rows = torch.randint(2000, (400, 32), generator=torch.Generator().manual_seed(0))
    draws = hashed_uniform(rows, 7, 5)
    assert torch.equal(hashed_uniform(rows[3:5], 7, 5), draws[3:5])
    assert not torch.equal(hashed_uniform(rows, 8, 5), draws)
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(draws.std()) == pytest.approx(12**-0.5, abs=0.02)
    assert float(torch.corrcoef(draws.T).fill_diagonal_(0).abs().max()) < 0.2
    assert len(draws.unique()) > 1900
