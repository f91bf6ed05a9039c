"""The training step of Suave and its baselines: gradients, weights, queue, phases, and what they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor

from tests.methods.suave_toy import TINY, loader, make_batch, trainer
from zoo.methods.suave.module import Suave
from zoo.nn.sinkhorn import sinkhorn

OBJECTIVES = ("suave", "supervised", "swav", "unshared", "supcon", "fixmatch")
PLAIN: dict[str, Any] = {**TINY, "mix_labelled": False, "mix_unlabelled": False, "label_smoothing": 0.0}


def module(**options: Any) -> Suave:
    """A small module in training mode, outside a trainer."""
    torch.manual_seed(0)
    built = Suave(**{**PLAIN, **options}).train()
    built.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment, method-assign]
    built.log = lambda *args, **kwargs: None  # type: ignore[assignment, method-assign]
    built.steps = built.switch_step = 10
    return built


def fit(run: Trainer, built: Suave, batches: int) -> None:
    run.fit(built, loader(batches), loader(1, evaluate=True))


def loss_of(built: Suave, batch: dict[str, Any]) -> Tensor:
    return built.training_step(batch, 0)


def test_the_step_is_one_cross_entropy_over_labelled_rows_and_swapped_views() -> None:
    """Fig. 2: with two views the loss is the mean CE of (labelled, y), (view 1, q2), (view 2, q1)."""
    built, batch = module(), make_batch()
    ours = loss_of(built, batch)
    e = built.net.encode([batch["labelled"], *batch["views"]])
    logits = built.net.prototypes(e.z)
    labelled, v1, v2 = logits.split([8, 16, 16])
    q1, q2 = (sinkhorn(v.detach(), 0.05, 3) for v in (v1, v2))
    target = torch.cat([F.one_hot(batch["target"], 4).float(), q2, q1])
    rows = -(target * F.log_softmax(torch.cat([labelled, v1, v2]) / 0.1, dim=1)).sum(dim=1)
    probes = sum(F.cross_entropy(p, batch["target"]) for p in built.probes(e, slice(8)).values())
    torch.testing.assert_close(ours, rows.mean() + 8 / 40 * probes)


def test_without_unlabelled_images_the_loss_is_the_labelled_one() -> None:
    built, batch = module(objective="supervised"), make_batch()
    built.probe_loss = lambda e, target: torch.zeros(())  # type: ignore[method-assign]
    e = built.net.encode([batch["labelled"]])
    expected = F.cross_entropy(built.net.prototypes(e.z) / 0.1, batch["target"])
    torch.testing.assert_close(loss_of(built, batch), expected)


def test_both_parts_teach_the_prototypes_and_probes_teach_nothing_else() -> None:
    batch = make_batch()
    grads = {}
    for name in ("labelled", "unlabelled"):
        built = module()
        built.probe_loss = lambda e, target: torch.zeros(())  # type: ignore[method-assign]
        if name == "labelled":
            built.unlabelled_losses = lambda *args: {"unlabelled": torch.zeros(())}  # type: ignore[method-assign]
        else:
            built.labelled_losses = lambda *args: ({"labelled": torch.zeros(())}, {"labelled": 8})  # type: ignore[method-assign]
        loss_of(built, batch).backward()
        grads[name] = built.net.prototypes.weight.grad
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    built = module()
    built.labelled_losses = lambda *args: ({"labelled": torch.zeros(())}, {"labelled": 8})  # type: ignore[method-assign]
    built.unlabelled_losses = lambda *args: {"unlabelled": torch.zeros(())}  # type: ignore[method-assign]
    loss_of(built, batch).backward()
    assert all(p.grad is None for p in built.net.parameters())
    assert all(p.grad is not None for p in built.probes.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_the_toy_and_trains_what_it_uses(objective: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {} if objective in ("suave", "supervised", "fixmatch") else {"num_prototypes": 8}
    built = Suave(**{**PLAIN, "objective": objective, "threshold": 0.5, **options})
    before = {name: p.clone() for name, p in built.named_parameters()}
    run = trainer(30, default_root_dir=tmp_path)
    fit(run, built, 30)
    for name, parameter in built.named_parameters():
        used = not (objective == "supervised" and "prototypes" in name and built.net.classifier is not None)
        assert not used or not torch.equal(parameter, before[name]), name
    # chance is 0.25
    assert run.test(built, loader(3, evaluate=True), verbose=False)[0]["test/acc"] > 0.6


def test_an_objective_that_looks_on_sends_no_label_into_the_encoder() -> None:
    batch = make_batch()
    built = module(objective="swav", num_prototypes=8)
    loss_of(built, batch).backward()
    first = [p.grad.clone() for p in built.net.backbone.parameters() if p.grad is not None]
    built = module(objective="swav", num_prototypes=8)
    loss_of(built, {**batch, "target": batch["target"].flip(0)}).backward()
    second = [p.grad for p in built.net.backbone.parameters() if p.grad is not None]
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_small_crops_are_taught_but_teach_nothing() -> None:
    built, batch = module(), make_batch(sizes=(12, 12, 8))
    seen: list[int] = []
    original = built.assign

    def assign(views: list[Tensor], logits: Any, z_views: list[Tensor]) -> list[Tensor]:
        seen.append(len(views))
        return original(views, logits, z_views)

    built.assign = assign  # type: ignore[method-assign]
    loss_of(built, batch).backward()
    assert seen == [2]


def test_mixed_rows_stay_out_of_assignment_and_queue() -> None:
    built, batch = module(mix_unlabelled=True, mix_labelled=True, queue_length=32), make_batch()
    z = []
    push = built.queue.push
    built.queue.push = lambda views: (z.extend(views), push(views))[1]  # type: ignore[assignment, method-assign]
    loss_of(built, batch)
    assert [len(part) for part in z] == [16, 16]


def test_the_queue_takes_part_once_it_is_full_and_is_in_the_checkpoint() -> None:
    built, batch = module(queue_length=32), make_batch()
    assert not built.queue.full()
    loss_of(built, batch)
    loss_of(built, batch)
    assert built.queue.full()
    assert any(name.startswith("queue") for name in built.state_dict())
    lone = module()
    lone.net.load_state_dict(built.net.state_dict())
    z = [built.net.encode([view]).z for view in batch["views"]]
    logits = [built.net.prototypes(part) for part in z]
    with_queue = built.assign(batch["views"], logits, z)
    without = lone.assign(batch["views"], logits, z)
    assert not torch.allclose(with_queue[0], without[0])
    torch.testing.assert_close(with_queue[0].sum(dim=1), torch.ones(16))


def test_permuted_classes_permute_the_predictions() -> None:
    """Labels pin the clusters: with permuted labels and prototypes, training gives permuted logits."""
    batch, order = make_batch(), torch.tensor([2, 0, 3, 1])
    images = batch["views"][0]
    one, other = module(), module()
    other.net.prototypes.weight.data = one.net.prototypes.weight.data[order]
    inverse = order.argsort()
    for built, target in ((one, batch["target"]), (other, inverse[batch["target"]])):
        optimizer = torch.optim.SGD(built.net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(built, {**batch, "target": target}).backward()
            optimizer.step()
        built.eval()
    torch.testing.assert_close(other(images), one(images)[:, order], atol=1e-4, rtol=1e-4)


def test_the_second_phase_learns_labels_alone_at_its_own_rate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"objective": "swav", "num_prototypes": 8, "finetune_fraction": 0.5, "finetune_lr": 0.02}
    built = Suave(**{**PLAIN, **options})
    phases: list[bool] = []
    original = built.labelled_losses

    def labelled_losses(objective: str, *rest: Tensor) -> Any:
        phases.append(objective == "supervised")
        return original(objective, *rest)

    built.labelled_losses = labelled_losses  # type: ignore[method-assign]
    run = trainer(8, default_root_dir=tmp_path)
    fit(run, built, 8)
    assert phases == [False] * 4 + [True] * 4
    assert built.lr_factor(4) == pytest.approx(0.2)


def test_frozen_prototypes_stay_and_then_move(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = Suave(**{**PLAIN, "freeze_prototypes_steps": 3})
    start = built.net.prototypes.weight.clone()
    fit(trainer(3, default_root_dir=tmp_path), built, 3)
    torch.testing.assert_close(built.net.prototypes.weight, start)
    fit(trainer(6, default_root_dir=tmp_path), built, 6)
    assert not torch.allclose(built.net.prototypes.weight, start)


def test_training_starts_from_the_weights_it_is_given(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = Suave(**PLAIN)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "first.ckpt")
    for parts, same_head in (("backbone", False), ("network", True)):
        torch.manual_seed(2)
        built = Suave(**{**PLAIN, "init_from": str(tmp_path / "first.ckpt"), "init_parts": parts, "lr": 1e-9})
        fit(trainer(1, default_root_dir=tmp_path), built, 1)
        for module_name, same in (("backbone", True), ("projector", same_head), ("prototypes", same_head)):
            ours, theirs = (x.net.get_submodule(module_name).parameters() for x in (built, source))
            close = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
            assert close == same, (parts, module_name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "suav"}, "objective must be one of suave"),
        ({"num_prototypes": 7}, "num_prototypes must be 4 or null, got 7"),
        ({"mix_weight": "code"}, "mix_weight must be one of paper, official"),
        ({"tau": -1.0}, "tau must be positive, got -1.0"),
        ({"ema_momentum": 2.0}, r"ema_momentum must lie in \[0, 1\], got 2.0"),
        ({"finetune_fraction": 1.0}, r"finetune_fraction must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Suave(**{**PLAIN, **options})
