"""Intervals, events, pass@k, cuts and costs against closed forms and naive counts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from zoo.methods.cot_potential.chunking import cut_trace
from zoo.methods.cot_potential.flops import (
    Cost,
    cacheless_flops,
    fork_flops,
    naive_flops,
    prefix_flops,
)
from zoo.methods.cot_potential.losses import (
    Thresholds,
    area_under_curve,
    corrected_pass_at_k,
    difference_se,
    find_events,
    pass_at_k,
    potential,
    trace_loss,
    transfer_cut,
    wilson_interval,
)


@pytest.mark.parametrize(("c", "n"), [(0, 8), (3, 8), (64, 128), (128, 128), (1, 1)])
def test_wilson_interval_is_scipys(c: int, n: int) -> None:
    low, high = wilson_interval(c, n, z=1.959963984540054)
    expected = binomtest(c, n).proportion_ci(method="wilson")
    assert float(low) == pytest.approx(expected.low, abs=1e-9)
    assert float(high) == pytest.approx(expected.high, abs=1e-9)


def test_potential_is_the_share_of_right_answers() -> None:
    assert potential(torch.tensor([[True, False, False, True], [False] * 4])).tolist() == [0.5, 0.0]


def test_the_standard_error_of_a_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    true, n = torch.tensor([0.5, 0.8], dtype=torch.float64), 128
    draws = torch.binomial(torch.full((20000, 2), float(n)), true.float().expand(20000, 2), generator=generator) / n
    assert float(difference_se(true, n)) == pytest.approx(float((draws[:, 1] - draws[:, 0]).std()), rel=0.03)
    assert float(difference_se(torch.zeros(2, dtype=torch.float64), n)) > 0


CURVE = [0.3, 0.31, 0.8, 0.4, 0.85, 1.0]


def test_events_at_their_chunks_and_the_answer_is_none() -> None:
    found = find_events(CURVE, 4, True)
    assert found.insights == (1, 3)
    assert found.tangents == (2,)
    assert not found.late_guess
    assert not found.monotone
    late = find_events([0.04, 0.02, 1.0], 1, True)
    assert late.late_guess
    assert late.insights == ()  # the rise into the answer is the answer's
    assert not find_events([0.04, 0.02, 0.0], 1, False).late_guess
    assert not find_events([0.04, 0.05, 1.0], 1, True).late_guess


def test_thresholds_are_exceeded_not_reached() -> None:
    assert find_events([0.0, 0.4], 1, True).insights == ()
    assert find_events([0.5, 0.2], 1, True, Thresholds(tangent=0.3 + 1e-12)).tangents == ()
    assert find_events([0.0, 0.41], 1, True).insights == (0,)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.data())
@settings(max_examples=60, deadline=None)
def test_events_do_not_change_with_a_chunk_of_no_length(curve: list[float], data: Any) -> None:
    last = data.draw(st.integers(0, len(curve) - 1))
    twice = data.draw(st.integers(0, last))
    one = find_events(curve, last, True)
    other = find_events([*curve[: twice + 1], *curve[twice:]], last + 1, True)
    assert len(one.insights) == len(other.insights)
    assert len(one.tangents) == len(other.tangents)
    assert (one.late_guess, one.monotone) == (other.late_guess, other.monotone)


def test_monotone_with_a_tolerance() -> None:
    curve = [0.5, 0.47, 0.6, 0.58]
    assert not find_events(curve, 3, True).monotone
    assert find_events(curve, 3, True, tolerance=0.031).monotone
    assert not find_events(curve, 3, True, tolerance=torch.tensor([0.02, 0.5, 0.5])).monotone
    with pytest.raises(ValueError, match="before_answer: 4"):
        find_events(curve, 4, True)


def test_pass_at_k_counts_subsets() -> None:
    n, c = 7, 3
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(any(i < c for i in s) for s in subsets) / len(subsets))
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert [pass_at_k(n, c, n) for c in (0, 1, 5)] == [0, 1, 1]
    with pytest.raises(ValueError, match="pass@k: n=7, c=8"):
        pass_at_k(7, 8, 1)


@given(st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_corrected_pass_at_k_is_never_more(n: int, data: Any) -> None:
    c = data.draw(st.integers(0, n))
    guesses, k = data.draw(st.integers(0, c)), data.draw(st.integers(1, n))
    corrected = corrected_pass_at_k(n, c, guesses, k)
    assert 0 <= corrected <= pass_at_k(n, c, k)
    assert corrected_pass_at_k(n, c, 0, k) == pass_at_k(n, c, k)


def test_loss_counts_the_trace_alone_and_halves_average_to_the_whole() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 9, requires_grad=True)
    labels = torch.randint(9, (4, 6))
    labels[:, :2], labels[1, 4:] = -100, -100
    loss = trace_loss(logits, labels)
    naive = 0.0
    for b in range(4):
        own = [t for t in range(6) if labels[b, t] != -100]
        naive += sum(-float(logits[b, t].detach().log_softmax(0)[labels[b, t]]) for t in own) / len(own) / 4
    assert float(loss.detach()) == pytest.approx(naive, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[:, :2].any()
    assert not gradient[1, 4:].any()
    assert bool(gradient[:, 2:4].any(dim=-1).all())
    halves = (trace_loss(logits[:2], labels[:2]) + trace_loss(logits[2:], labels[2:])) / 2
    torch.testing.assert_close(halves, loss, rtol=0, atol=1e-6)


def test_transfer_rounds_up_to_a_boundary_and_never_gives_the_answer() -> None:
    bounds, before = [0, 5, 10, 15, 20, 23], 4
    cuts = [transfer_cut(bounds, before, share) for share in (0, 0.1, 0.2, 5 / 23, 0.4, 0.9, 1.0)]
    assert cuts == [0, 1, 1, 1, 2, 4, 4]


def test_area_under_curve() -> None:
    scores, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert area_under_curve(scores, positive) == 0.75
    assert area_under_curve(torch.zeros(4), positive) == 0.5
    assert math.isnan(area_under_curve(scores, torch.zeros(4, dtype=torch.bool)))


def test_cuts_lie_between_tokens_and_the_answer_is_a_chunk_of_its_own() -> None:
    pieces = ["Say", " 3", ".", "5", " is", " it", ".", " Then", "\n", "go", "!", " Answer", " 4"]
    assert cut_trace(pieces, 11, "newline") == [0, 9, 11, 13]
    assert cut_trace(pieces, 11, "sentence") == [0, 7, 11, 13]
    assert cut_trace(pieces, 11, "every_m_tokens", 4) == [0, 4, 8, 11, 13]
    assert cut_trace(pieces, 11, "step_token", token=".") == [0, 3, 7, 11, 13]
    assert len(cut_trace(pieces, 11, "equal_k", 5)) == 5 + 2
    assert cut_trace(pieces, 13, "equal_k", 40) == list(range(14))
    for kind in ("equal_k", "newline"):
        assert cut_trace(["a"], 1, kind) == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunker": "sentences"}, "did you mean 'sentence'"),
        ({"chunker": "equal_k", "size": 0}, "chunk_size: 0"),
        ({"chunker": "step_token"}, "step_token: empty"),
    ],
)
def test_bad_chunkers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_trace(["a"], 1, **options)


COST = Cost(body=1000, layers=2, attention=16, head=320)


def test_costs_of_the_schemes() -> None:
    prompt, bounds, lengths = 7, [0, 4, 9], [[3, 5], [2, 0], [1, 1]]
    one = sum(2 * 1000 + 4 * 2 * 16 * s for s in range(5, 9))
    assert COST.span(4, 8) == one
    a, b, c, e = (f(COST, prompt, bounds, lengths) for f in (naive_flops, prefix_flops, fork_flops, cacheless_flops))
    assert e > a > b > c
    n, k = 2, 3
    prefixes = sum(COST.span(0, prompt + t) for t in bounds)
    assert a - c == n * prefixes - COST.span(0, prompt + bounds[-1]) + (n - 1) * k * COST.head
