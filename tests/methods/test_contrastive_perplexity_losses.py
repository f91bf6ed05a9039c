"""The objective against naive loops, closed forms and the properties that follow from the equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.methods.contrastive_perplexity.losses import (
    contrastive_perplexity,
    dpo_loss,
    log_perplexity,
    official_loss,
    perplexity,
    prototype,
    simpo_loss,
)


def sets(b: int = 3, p: int = 4, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(b, p, generator=generator, dtype=torch.float64) * 2 + 1,
        torch.rand(b, n, generator=generator, dtype=torch.float64) * 3 + 1.5,
    )


def paper(pos: Tensor, neg: Tensor, **options: Any) -> Tensor:
    return contrastive_perplexity(pos, neg, prototype(pos), **options)


def naive(pos: Tensor, neg: Tensor, alpha: float, tau: float, inside: bool) -> float:
    total = 0.0
    for i in range(len(pos)):
        c = sum(float(x) for x in pos[i]) / len(pos[i])

        def s(x: Any, c: float = c) -> float:
            d = abs(float(x) - c)
            return math.exp(-d / tau) if inside else math.exp(-d) / tau

        above = sum(s(x) for x in pos[i])
        total -= math.log(above / (above + alpha * sum(s(x) for x in neg[i])))
    return total / len(pos)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (1.1, 0.2), (3.0, 0.1)])
def test_equals_the_formula_as_printed(alpha: float, tau: float, inside: bool) -> None:
    pos, neg = sets()
    loss = paper(pos, neg, alpha=alpha, tau=tau, tau_mode="inside" if inside else "cancel")
    assert loss.item() == pytest.approx(naive(pos, neg, alpha, tau, inside), abs=1e-9)


@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.01, 10))
@settings(max_examples=25, deadline=None)
def test_equal_perplexities_give_the_closed_form(p: int, n: int, alpha: float) -> None:
    loss = paper(torch.full((2, p), 3.3), torch.full((2, n), 3.3), alpha=alpha)
    assert loss.item() == pytest.approx(math.log((p + alpha * n) / p), abs=1e-5)


def test_it_starts_at_log_2_and_the_official_loss_at_its_closed_form() -> None:
    same = torch.full((2, 5), 1.7)
    assert paper(same, same).item() == pytest.approx(0.693147, abs=1e-6)
    p, n = 5, 3
    loss = official_loss(torch.ones(2, p), torch.ones(2, n), torch.ones(2, 0), torch.ones(1, 1), alpha=0.0)
    assert loss.item() == pytest.approx(p * math.log(p + n) / (p + 1), abs=1e-6)


def test_a_factor_of_every_similarity_cancels() -> None:
    results = []
    for tau in (0.1, 10.0):
        pos, neg = (x.requires_grad_() for x in sets())
        loss = paper(pos, neg, tau=tau)
        results.append((loss.item(), *torch.autograd.grad(loss, [pos, neg])))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=0, atol=0)
    pos, neg = sets()
    assert paper(pos, neg, tau=0.1, tau_mode="inside") != paper(pos, neg, tau=10.0, tau_mode="inside")


@pytest.mark.parametrize("kind", ["per_anchor", "batch"])
@pytest.mark.parametrize("distance", ["absolute", "one_sided"])
def test_adding_a_constant_changes_nothing(kind: Any, distance: Any) -> None:
    pos, neg = sets()
    random = sets(seed=5)[1]

    def losses(shift: float) -> list[float]:
        x, y, z = pos + shift, neg + shift, random + shift
        c = prototype(x, kind)
        return [contrastive_perplexity(x, y, c, distance=distance).item(), official_loss(x, y, z, c).item()]

    assert losses(0.0) == pytest.approx(losses(7.5), abs=1e-9)


def test_limits_and_monotony_in_alpha() -> None:
    pos, neg = sets()
    assert paper(pos, neg + 1e4).item() == pytest.approx(0, abs=1e-9)
    assert paper(pos, neg, alpha=0.0).item() == 0
    values = [paper(pos, neg, alpha=a).item() for a in (0.0, 0.1, 1.0, 1.1, 5.0)]
    assert values == sorted(values)
    assert len(set(values)) == 5


def test_order_within_a_set_does_not_matter() -> None:
    pos, neg = sets()
    other = paper(pos[:, torch.randperm(4)], neg[:, torch.randperm(5)])
    assert other.item() == pytest.approx(paper(pos, neg).item(), abs=1e-12)


def test_a_negative_below_the_prototype_is_made_more_likely_unless_one_sided() -> None:
    pos = torch.tensor([[2.0, 2.2, 2.4]])
    for distance, expected in (("absolute", [1, -1]), ("one_sided", [-1, -1])):
        neg = torch.tensor([[1.5, 3.0]], requires_grad=True)
        c = prototype(pos)
        (grad,) = torch.autograd.grad(contrastive_perplexity(pos, neg, c, distance=distance), neg)  # type: ignore[arg-type]
        assert grad[0].sign().tolist() == expected, "descent moves against the gradient: up where it is negative"


def test_a_single_positive_gets_its_gradient_through_the_prototype_alone() -> None:
    pos, neg = sets(p=1)
    pos.requires_grad_()
    neg.requires_grad_()
    loss = contrastive_perplexity(pos, neg, prototype(pos, detach=True))
    assert torch.autograd.grad(loss, pos)[0].eq(0).all()
    grads = torch.autograd.grad(paper(pos, neg), [pos, neg])
    torch.testing.assert_close(grads[0], -grads[1].sum(dim=1, keepdim=True))


@pytest.mark.parametrize("official", [False, True])
def test_gradients_over_a_set_sum_to_zero(official: bool) -> None:
    pos, neg = sets()
    pos.requires_grad_()
    neg.requires_grad_()
    c = prototype(pos)
    loss = official_loss(pos, neg, neg[:, :0], c, alpha=2.0) if official else contrastive_perplexity(pos, neg, c)
    grads = torch.autograd.grad(loss, [pos, neg])
    torch.testing.assert_close(torch.cat(grads, 1).sum(1), torch.zeros(3, dtype=torch.float64))
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("kind", ["per_anchor", "batch"])
@pytest.mark.parametrize("r", [0, 3])
def test_the_official_loss_equals_an_independent_numpy_version(kind: Any, r: int) -> None:
    rng = np.random.default_rng(1)
    p, n, alpha, tau = 5, 6, 100.0, 1.0
    losses = rng.uniform(1, 4, size=(2, p + n + r))
    total = 0.0
    for row in losses:
        c = losses[:, :p].mean() if kind == "batch" else row[:p].mean()
        z = np.exp(-np.abs(row - c)) / tau
        z[p : p + n] += alpha
        q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        log_q = z - z.max() - np.log(np.exp(z - z.max()).sum())
        assert np.allclose(np.log(q[q > 0]), log_q[q > 0])
        total -= log_q[:p].sum()
    expected = total / 2 / (p + 1 + r)
    x = torch.from_numpy(losses)
    got = official_loss(x[:, :p], x[:, p : p + n], x[:, p + n :], prototype(x[:, :p], kind), alpha, tau)
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_the_batch_prototype_is_one_number() -> None:
    pos, _ = sets()
    assert prototype(pos, "batch").item() == pytest.approx(pos.mean().item())
    assert prototype(pos).squeeze(1).tolist() == pytest.approx(pos.mean(1).tolist())
    assert not prototype(pos.requires_grad_(), detach=True).requires_grad


def test_hopeless_sentences_stay_finite() -> None:
    l_pos, l_neg = torch.full((2, 3), 50.0), torch.full((2, 3), 800.0)
    l_pos[0, 0], l_neg[0, 0] = 1.0, 2.0
    l_pos.requires_grad_()
    loss = paper(perplexity(l_pos), perplexity(l_neg))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, l_pos)[0].isfinite().all()
    assert perplexity(torch.tensor(2.0)).item() == pytest.approx(math.exp(2))


def test_log_perplexity_ignores_what_is_masked() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")], [-4.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert log_perplexity(logprobs, mask).tolist() == pytest.approx([1.5, 2.0])


def test_preference_losses_equal_their_formulas() -> None:
    w, l, rw, rl = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0]), torch.tensor([-3.5, -4.0]), torch.zeros(2)  # noqa: E741
    expected = 0.0
    for i in range(2):
        expected += math.log(1 + math.exp(-0.1 * float((w[i] - rw[i]) - (l[i] - rl[i])))) / 2
    assert dpo_loss(w, l, rw, rl, beta=0.1).item() == pytest.approx(expected, abs=1e-6)
    assert dpo_loss(w, l, w, l, beta=5.0).item() == pytest.approx(math.log(2), abs=1e-6)
    expected = sum(math.log(1 + math.exp(-(2.0 * (b - a) - 0.5))) for a, b in ((1.0, 3.0), (2.0, 1.0))) / 2
    got = simpo_loss(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), beta=2.0, gamma=0.5)
    assert got.item() == pytest.approx(expected, abs=1e-6)
