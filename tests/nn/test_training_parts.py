"""EMA teachers, schedules, optimisers by name."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from zoo.nn.ema import ema_update, frozen_copy
from zoo.nn.optim import build_optimizer
from zoo.nn.schedules import cosine_ramp, linear_ramp, total_steps, warmup_cosine, warmup_cosine_lr


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_ema_is_the_weighted_mean_of_parameters_and_leaves_buffers() -> None:
    student, teacher = network(), frozen_copy(network())
    student(torch.randn(8, 3))
    before = copy.deepcopy(teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    ema_update(teacher, student, 0.75)
    for new, old, theta in zip(teacher.parameters(), before.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * theta.detach())
    for new, old in zip(teacher.buffers(), before.buffers(), strict=True):
        assert torch.equal(new, old)


@pytest.mark.parametrize(("momentum", "same_as"), [(1.0, "teacher"), (0.0, "student")])
def test_ema_limits(momentum: float, same_as: str) -> None:
    student, teacher = network(), frozen_copy(network())
    for p in student.parameters():
        nn.init.normal_(p)
    want = copy.deepcopy(teacher if same_as == "teacher" else student)
    ema_update(teacher, student, momentum)
    for new, old in zip(teacher.parameters(), want.parameters(), strict=True):
        assert torch.equal(new, old)
    with pytest.raises(ValueError, match="momentum"):
        ema_update(teacher, student, 1.5)


def test_ramps() -> None:
    assert [linear_ramp(s, 4, 1.0, 3.0) for s in (0, 2, 4, 9)] == [1.0, 2.0, 3.0, 3.0]
    assert linear_ramp(0, 0, 1.0, 3.0) == 3.0
    assert [cosine_ramp(s, 4, 1.0, 3.0) for s in (0, 2, 4, 9)] == pytest.approx([1.0, 2.0, 3.0, 3.0])
    assert cosine_ramp(1, 4, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_warmup_then_cosine() -> None:
    factors = [warmup_cosine(s, 20, 4, 0.1) for s in range(21)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[12] == pytest.approx(0.55)
    assert factors[20] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_scheduler_scales_every_group() -> None:
    optimizer = build_optimizer(network().parameters(), "sgd", 0.5, exclude_vectors=True)
    scheduler = warmup_cosine_lr(optimizer, steps=10, warmup_steps=2)
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[0.25, 0.25], [0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("steps", [float("inf"), 0, -1])
def test_a_schedule_needs_an_end(steps: float) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        total_steps(cast(Any, SimpleNamespace(estimated_stepping_batches=steps)))
    assert total_steps(cast(Any, SimpleNamespace(estimated_stepping_batches=7))) == 7


def test_lars_step_is_the_formula_with_and_without_exclusions() -> None:
    lr, decay, trust = 0.4, 1e-2, 1e-3
    for exclude in (False, True):
        layer = nn.Linear(3, 2)
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer = build_optimizer(layer.parameters(), "lars", lr, weight_decay=decay, exclude_vectors=exclude)
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        for name, p in layer.named_parameters():
            w, g = before[name], cast(torch.Tensor, p.grad)
            ratio = trust * w.norm() / (g.norm() + decay * w.norm())
            update = g if exclude and p.ndim == 1 else ratio * (g + decay * w)
            torch.testing.assert_close(p.detach(), w - lr * update)


def test_exclusion_takes_vectors_out_of_weight_decay_and_frozen_parameters_out_of_training() -> None:
    net = network()
    net[0].bias.requires_grad_(False)
    optimizer = build_optimizer(net.parameters(), "adamw", 1e-3, weight_decay=0.1, exclude_vectors=True)
    decayed, free = optimizer.param_groups
    assert [list(p.shape) for p in decayed["params"]] == [[4, 3]]
    assert decayed["weight_decay"] == 0.1
    assert [list(p.shape) for p in free["params"]] == [[4], [4]]
    assert free["weight_decay"] == 0.0


def test_unknown_optimizer_names_the_choices() -> None:
    with pytest.raises(ValueError, match="sgd, lars, adamw"):
        build_optimizer(network().parameters(), "lamb", 0.1)
