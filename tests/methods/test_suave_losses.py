"""Suave's equations against naive loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.methods.suave.losses import (
    confident_pseudo_labels,
    cross_entropy,
    frequency_weights,
    mixed_rows,
    supervised_contrastive,
    swapped_prediction,
)
from zoo.nn.sinkhorn import sinkhorn

TAU = 0.1


def cosines(seed: int, views: int, batch: int = 5, classes: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, classes, generator=generator) * 2 - 1 for _ in range(views)]


def plain(logits: list[float], target: list[float], tau: float) -> float:
    """Cross-entropy of one row, by hand."""
    shifted = [x / tau for x in logits]
    log_norm = math.log(sum(math.exp(x) for x in shifted))
    return -sum(y * (x - log_norm) for x, y in zip(shifted, target, strict=True))


def test_cross_entropy_divides_by_the_temperature_and_takes_soft_targets() -> None:
    logits = cosines(0, 1)[0]
    soft = torch.rand(5, 4).softmax(dim=1)
    want = sum(plain(row, y, TAU) for row, y in zip(logits.tolist(), soft.tolist(), strict=True)) / 5
    assert cross_entropy(logits, soft, TAU).item() == pytest.approx(want, rel=1e-5)
    hard = torch.tensor([0, 3, 1, 1, 2])
    smoothed = 0.9 * F.one_hot(hard, 4) + 0.1 / 4
    torch.testing.assert_close(cross_entropy(logits, hard, TAU, 0.1), cross_entropy(logits, smoothed, TAU))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 2))
def test_swapped_prediction_is_the_naive_double_loop(seed: int, views: int, num_global: int) -> None:
    logits = cosines(seed, views)
    q = [sinkhorn(view) for view in logits[:num_global]]
    want = 0.0
    for i in range(num_global):
        others = [v for v in range(views) if v != i]
        for v in others:
            rows = [plain(a, b, TAU) for a, b in zip(logits[v].tolist(), q[i].tolist(), strict=True)]
            want += sum(rows) / len(rows) / len(others) / num_global
    assert swapped_prediction(logits, q, TAU).item() == pytest.approx(want, rel=1e-4)


def test_two_views_with_hard_assignments_are_two_plain_cross_entropies() -> None:
    a, b = cosines(1, 2)
    label_a, label_b = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([3, 2, 2, 1, 0])
    loss = swapped_prediction([a, b], [F.one_hot(label_a, 4).float(), F.one_hot(label_b, 4).float()], TAU)
    torch.testing.assert_close(loss, (F.cross_entropy(b / TAU, label_a) + F.cross_entropy(a / TAU, label_b)) / 2)


@pytest.mark.parametrize("own", [0, 1])
def test_an_assignment_never_teaches_its_own_view(own: int) -> None:
    logits = [view.requires_grad_() for view in cosines(2, 4)]
    assignments = [torch.zeros(5, 4), torch.zeros(5, 4)]
    assignments[own] = sinkhorn(logits[own])
    swapped_prediction(logits, assignments, TAU).backward()
    taught = [view.grad is not None and bool(view.grad.abs().sum() > 0) for view in logits]
    assert taught == [v != own for v in range(4)]


def test_no_gradient_reaches_the_assignments_and_one_view_is_not_enough() -> None:
    logits = cosines(3, 2)
    q = [torch.rand(5, 4, requires_grad=True) for _ in range(2)]
    assert not swapped_prediction(logits, q, TAU).requires_grad
    with pytest.raises(ValueError, match="two views"):
        swapped_prediction(logits[:1], q[:1], TAU)


def test_weights_are_row_counts_and_sum_to_one() -> None:
    weights = frequency_weights({"labelled": 128, "unlabelled": 512, "mixed": 256, "probes": 64, "classifier": 64})
    assert weights["labelled"] + weights["unlabelled"] + weights["mixed"] == pytest.approx(1.0)
    assert weights["mixed"] == pytest.approx(256 / 896)
    assert weights["probes"] == weights["classifier"] == pytest.approx(64 / 896)
    assert frequency_weights({"labelled": 64, "unlabelled": 0}) == {"labelled": 1.0, "unlabelled": 0.0}


def test_the_official_code_counts_mixed_views_and_the_paper_rows() -> None:
    assert mixed_rows(256, 1, "paper") == 256
    assert mixed_rows(256, 1, "official") == 1


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
def test_with_two_views_the_loss_is_one_cross_entropy_over_all_rows(seed: int, batch: int, n: int) -> None:
    """Figure 2's pseudo-code: concatenate (labelled; view 1, q2; view 2, q1) and take one mean."""
    a, b = cosines(seed, 2, batch)
    labelled, target = cosines(seed + 1, 1, n)[0], torch.arange(n) % 4
    q1, q2 = sinkhorn(a), sinkhorn(b)
    weights = frequency_weights({"labelled": n, "unlabelled": 2 * batch})
    ours = weights["labelled"] * cross_entropy(labelled, target, TAU)
    ours += weights["unlabelled"] * swapped_prediction([a, b], [q1, q2], TAU)
    merged = torch.cat([F.one_hot(target, 4).float(), q2, q1])
    torch.testing.assert_close(ours, F.cross_entropy(torch.cat([labelled, a, b]) / TAU, merged))


def test_supervised_contrastive_is_the_naive_loop() -> None:
    z = F.normalize(torch.randn(7, 3), dim=1)
    target = [0, 0, 1, 1, 1, 2, 0]  # class 2 is alone and has no positive
    rows = []
    for i in range(7):
        positives = [p for p in range(7) if p != i and target[p] == target[i]]
        if positives:
            norm = math.log(sum(math.exp(float(z[i] @ z[a]) / TAU) for a in range(7) if a != i))
            rows.append(-sum(float(z[i] @ z[p]) / TAU - norm for p in positives) / len(positives))
    ours = supervised_contrastive(z, torch.tensor(target), TAU)
    assert ours.item() == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    lonely = z.clone().requires_grad_()
    supervised_contrastive(lonely, torch.arange(7), TAU).backward()
    assert lonely.grad is not None
    assert torch.equal(lonely.grad, torch.zeros_like(z))


def test_fixmatch_counts_only_confident_rows() -> None:
    weak = torch.tensor([[1.0, 0.0, 0.0], [0.1, 0.12, 0.1]])
    strong = torch.tensor([[0.2, 0.5, 0.1], [0.9, 0.1, 0.0]], requires_grad=True)
    loss, share = confident_pseudo_labels(weak, strong, TAU, 0.95)
    assert share.item() == 0.5
    assert loss.item() == pytest.approx(plain([0.2, 0.5, 0.1], [1, 0, 0], TAU) / 2, rel=1e-5)
    loss.backward()
    assert strong.grad is not None
    assert not strong.grad[1].any()
