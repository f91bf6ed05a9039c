"""How DynaMoE is trained: thresholds of routed sequences, when routing begins, sorting, learning rates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_dynamoe_module import batch, made
from zoo.methods.dynamoe.module import DynaMoE
from zoo.methods.dynamoe.networks import matrix, router_parameters
from zoo.methods.dynamoe.routes import Mixture, Route


class Dataset:
    """Batches by epoch and number, and which of them were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        self.asked.append(key)
        return batch(4, seed=10 + key[1])


class Loader(list[int]):
    """A training loader of six batches."""

    def __init__(self) -> None:
        super().__init__(range(6))
        self.dataset = Dataset()


def begun(step: int = 0, steps: int = 40, **options: Any) -> tuple[DynaMoE, Loader]:
    """A module at the start of a fit of some steps that goes on from a step."""
    model, loader = made(**options), Loader()
    trainer = SimpleNamespace(global_step=step, estimated_stepping_batches=steps, train_dataloader=loader)
    model._trainer = trainer  # type: ignore[assignment]
    return model, loader


def route_at(model: DynaMoE, step: int, rows: int = 8) -> Mixture:
    model._trainer.global_step = step  # type: ignore[misc, union-attr]
    route = model.training_route(batch(rows, seed=step)["input_ids"])
    assert isinstance(route, Mixture)
    return route


# -- routes ---------------------------------------------------------------------------------------------------------


def test_thresholds_of_training_fill_their_range_evenly() -> None:
    """Half of the sequences are routed at a theta from 0.5 to 0.95, another one each step."""
    model, _ = begun()
    thetas = torch.tensor([route_at(model, step, 1).knob for step in range(90)])
    assert 0.5 <= float(thetas.min()) < 0.52
    assert 0.93 < float(thetas.max()) <= 0.95
    ninths = ((thetas - 0.5) / 0.05).long().bincount(minlength=9)
    assert int(ninths.min()) >= 9
    assert int(ninths.max()) <= 11
    spread = [float(thetas[a : a + 10].mean()) for a in range(0, 90, 10)]
    assert spread == pytest.approx([0.725] * 9, abs=0.04), "any stretch of steps sees the whole range"
    narrow, _ = begun(theta_low=0.6, theta_high=0.7)
    assert all(0.6 <= (route_at(narrow, step, 1).knob or 0) <= 0.7 for step in range(20))
    assert route_at(begun(head="label")[0], 0).knob is None


@pytest.mark.parametrize(("share", "steps", "first"), [(0.1, 40, 4), (0.5, 40, 20), (0.0, 40, 0), (0.25, 10, 2)])
def test_routing_begins_after_its_share_of_the_steps(share: float, steps: int, first: int) -> None:
    model, _ = begun(steps=steps, unrouted_fraction=share, sort_neurons=False)
    model.on_train_start()
    for step in range(steps):
        kinds = route_at(model, step, 60).kind
        assert bool((kinds == 2).any()) == (step >= first), step
        assert bool((kinds == 0).any())
        assert bool((kinds == 1).any())


def test_a_tenth_of_the_training_is_unrouted_by_default() -> None:
    model, _ = begun(step=30, steps=500)
    model.on_train_start()
    assert model._unrouted_steps == 50, "a run that goes on knows it too"


# -- sorting --------------------------------------------------------------------------------------------------------


def measured(model: DynaMoE, numbers: range) -> list[Tensor]:
    """Size of what each neuron adds to the output on some batches, by layer; none of the code of the sorting."""
    inputs: dict[int, list[Tensor]] = {0: [], 1: []}
    handles = [
        mlp.down.register_forward_pre_hook(lambda module, args, layer=mlp.layer: inputs[layer].append(args[0]))
        for mlp in model.layers
    ]
    with torch.no_grad(), model.control.using(Route()):
        for number in numbers:
            model.lm(input_ids=batch(4, seed=10 + number)["input_ids"])
    for handle in handles:
        handle.remove()
    seen = [torch.cat(inputs[mlp.layer]).flatten(0, 1) for mlp in model.layers]
    return [h.abs().sum(0) * matrix(mlp.down).detach().norm(dim=0) for h, mlp in zip(seen, model.layers, strict=True)]


def test_neurons_are_sorted_by_importance_before_the_first_step() -> None:
    model, loader = begun(sort_batches=2)
    before = measured(model, range(2))
    with torch.no_grad(), model.control.using(Route()):
        logits = model.lm(input_ids=batch()["input_ids"]).logits
    weights = [matrix(mlp.down).clone() for mlp in model.layers]
    model.on_train_start()
    assert loader.dataset.asked == [(0, 0), (0, 1)]
    for mlp, sums, old, now in zip(model.layers, before, weights, measured(model, range(2)), strict=True):
        order = sums.argsort(descending=True)
        assert not torch.equal(order, torch.arange(24)), "it was not sorted before"
        assert torch.equal(matrix(mlp.down), old[:, order])
        assert torch.allclose(now, sums[order], rtol=1e-4)
        assert bool((now.diff() <= 1e-5).all())
    with torch.no_grad(), model.control.using(Route()):
        assert torch.allclose(model.lm(input_ids=batch()["input_ids"]).logits, logits, atol=1e-5), "the same function"


@pytest.mark.parametrize(
    ("options", "step"),
    [({"sort_neurons": False}, 0), ({}, 7), ({"sort_batches": 0}, 0), ({"objective": "dense"}, 0)],
    ids=str,
)
def test_neurons_stay_where_they_are(options: dict[str, Any], step: int) -> None:
    model, loader = begun(step, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.on_train_start()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not loader.dataset.asked


def test_no_more_batches_are_measured_than_there_are() -> None:
    model, loader = begun(sort_batches=32)
    model.on_train_start()
    assert [number for _, number in loader.dataset.asked] == list(range(6))


# -- learning rates -------------------------------------------------------------------------------------------------


def test_routers_have_a_learning_rate_of_their_own_and_only_matrices_decay() -> None:
    model, _ = begun(lr=3e-4, router_lr=3e-3, weight_decay=0.1, betas=(0.8, 0.9))
    optimizer = model.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    routers = {id(p) for p in router_parameters(model.layers)}
    seen = set()
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9)
        for p in group["params"]:
            seen.add(id(p))
            assert group["initial_lr"] == (3e-3 if id(p) in routers else 3e-4)
            assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    assert routers
    assert seen == {id(p) for p in model.parameters()}
    frozen, _ = begun(freeze_backbone=True, router_lr=2e-3)
    groups = frozen.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in router_parameters(frozen.layers)}
    assert {group["initial_lr"] for group in groups} == {2e-3}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 24: 0.5, 44: 0.0}),
        ("trapezoid", {0: 0.25, 3: 1.0, 22: 1.0, 33: 0.525, 44: 0.05}),
    ],
)
def test_both_rates_follow_the_schedule(schedule: str, expected: dict[int, float]) -> None:
    model, _ = begun(steps=44, warmup_steps=4, schedule=schedule, lr=1e-3, router_lr=1e-2)
    found = model.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    assert found["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(45):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
        scheduler.step()
    for step, factor in expected.items():
        assert rates[step] == pytest.approx(sorted({1e-3 * factor, 1e-2 * factor})), step
