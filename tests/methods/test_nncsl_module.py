"""NNCSL as a module: what reaches which loss, the switch of tasks, the optimiser, and two ranks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.methods.nncsl_toy import ARMS, SUPERVISED, disturbed, in_second_task, make_batch, make_model, step
from tests.nn.test_distributed import on_two_ranks
from zoo.methods.nncsl.networks import Network, official_resnet18, parameter_groups

# ---------------------------------------------------------------- what reaches which loss


def test_the_filter_keeps_old_supports_from_consistency_and_spread():
    batch = make_batch(1, step=3)
    for arm, filtered in (("nncsl", True), ("csl", True), ("paws", False), ("paws_attached", False)):
        model = in_second_task(**ARMS[arm])
        before, after = step(model, batch), step(model, disturbed(batch, old=True))
        for name in ("snn", "me_max"):
            assert torch.equal(before[name], after[name]) == filtered, (arm, name)
        assert before["linear"] != after["linear"]
        assert before["snn"] != step(model, disturbed(batch, old=False))["snn"]


def test_distillation_depends_on_old_supports_alone():
    batch, model = make_batch(1, step=3), in_second_task()
    value = step(model, batch)["distillation"]
    assert torch.equal(value, step(model, disturbed(batch, old=False))["distillation"])
    assert value != step(model, disturbed(batch, old=True))["distillation"]


def test_on_the_first_task_filter_and_distillation_change_nothing():
    batch = make_batch(0)
    totals = [
        step(make_model(**ARMS[arm]), batch)["total"] for arm in ("nncsl", "csl", "paws_attached", "csl_logit_kd")
    ]
    assert all(torch.equal(total, totals[0]) for total in totals)


def test_a_detached_head_leaves_the_backbone_alone():
    for detach in (True, False):
        model = make_model(**SUPERVISED, detach=detach)
        step(model, make_batch(0))["total"].backward()
        reached = [p.grad is not None and bool(p.grad.any()) for p in model.net.backbone.parameters()]
        assert any(reached) is all(reached) is not detach
        assert model.net.classifier.weight.grad.any()


def test_total_is_the_weighted_sum():
    weights = {"w_paws": 0.7, "w_me": 0.3, "w_lin": 0.2, "w_dist": 0.4}
    got = step(in_second_task(**weights), make_batch(1, step=3))
    names = {"w_paws": "snn", "w_me": "me_max", "w_lin": "linear", "w_dist": "distillation"}
    torch.testing.assert_close(got["total"].detach(), sum(weights[key] * got[name] for key, name in names.items()))


def test_small_crops_are_anchors_too():
    model = in_second_task()
    batch = make_batch(1, step=3, small=2)
    without = {**batch, "views": batch["views"][:2]}
    assert step(model, batch)["snn"] != step(model, without)["snn"]


def test_logits_of_classes_to_come_are_not_trained():
    model = make_model()
    step(model, make_batch(1))["total"].backward()
    gradient = model.net.classifier.weight.grad
    assert gradient[:4].any(dim=1).all()
    assert not gradient[4:].any()


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "paws"])
def test_every_parameter_is_trained_and_the_teacher_never(arm):
    model = in_second_task(**ARMS[arm])
    step(model, make_batch(1, step=3))["total"].backward()
    for name, parameter in model.net.named_parameters():
        assert parameter.grad is not None, name
    if model.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


# ---------------------------------------------------------------- the switch of tasks


def test_at_the_switch_the_teacher_is_the_student_and_distillation_is_at_its_minimum():
    model = make_model(**{**SUPERVISED, "w_dist": 1.0}, w_lin=0.0)
    for _ in range(3):  # statistics of batch norm that differ from their start
        step(model, make_batch(0, seed=3))
    got = step(model, make_batch(1))
    assert model.teacher is not None
    for name, value in model.net.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[name], value), name
    got["total"].backward()
    for name, parameter in model.net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter), atol=1e-5, rtol=0, msg=name)


def test_the_teacher_stays_until_the_next_switch():
    model = make_model()
    step(model, make_batch(0))
    start = {name: value.clone() for name, value in model.net.state_dict().items()}
    step(model, make_batch(1))
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.mul_(1.5)
    step(model, make_batch(1, step=1))
    assert model.teacher is not None
    kept = dict(model.teacher.named_parameters())
    assert all(torch.equal(kept[name], start[name]) for name in kept)
    step(model, make_batch(2))
    assert all(torch.equal(kept[name], value) for name, value in model.net.named_parameters())


@pytest.mark.parametrize("mode", ["frozen", "train"])
def test_statistics_of_batch_norm_after_the_first_task(mode):
    model = make_model(bn_after_first_task=mode)
    means = []
    for task in (0, 1, 2):
        model.eval().train()  # as after a validation
        step(model, make_batch(task, seed=task))
        model.train()
        step(model, make_batch(task, step=1, seed=5 + task))
        means.append(model.net.backbone[1].running_mean.clone())
    assert means[0].any()
    assert torch.equal(means[0], means[1]) == torch.equal(means[1], means[2]) == (mode == "frozen")
    assert model.teacher is not None
    assert not model.teacher.training


def test_derpp_stores_what_the_network_said_at_the_end_of_the_task():
    model = make_model(**ARMS["derpp"])
    step(model, make_batch(0))
    model.eval()
    batch = make_batch(1)
    expected = model.net.classifier(model.net(batch["exemplars"])[0])
    model.train()
    step(model, batch)
    stored, known = model.exemplars.lookup(torch.tensor([103, 7, 100]))
    assert known.tolist() == [True, False, True]
    torch.testing.assert_close(stored[[0, 2]], expected[[3, 0]].detach())
    with torch.no_grad():
        model.net.classifier.bias.add_(1)
    moved = step(model, {**make_batch(1, step=1), "support_index": batch["support_index"]})
    assert moved["replay"] > 0
    third = {**make_batch(2), "exemplar_index": torch.tensor([101, 103, 300, 301])}
    step(model, third)
    again, known = model.exemplars.lookup(torch.tensor([103, 300, 100]))
    assert known.tolist() == [True, True, False]
    torch.testing.assert_close(again[0], expected[3].detach(), msg="an old exemplar keeps the logits of its own task")


# ---------------------------------------------------------------- optimisation


def test_the_rate_starts_again_with_each_task_and_keeps_its_peak():
    model = make_model(lr=0.4, start_lr=0.08, final_lr=0.032, warmup_steps=4, lr_classifier=0.12)
    rates = [model._learning_rate(n, 20) for n in range(20)]
    assert rates[0] == pytest.approx(0.08)
    assert rates[2] == pytest.approx(0.24)
    assert max(rates) == rates[4] == pytest.approx(0.4)
    assert rates[12] == pytest.approx((0.4 + 0.032) / 2)
    assert rates[-1] == pytest.approx(0.032 + 0.368 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    optimizer = model.configure_optimizers()
    model._trainer = type("Stub", (), {"optimizers": [optimizer]})()
    for n in (0, 4, 0, 4):
        model._set_learning_rate(n, 20)
        got = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert got["weights"] == got["no_adaptation"] == pytest.approx(rates[n])
        assert got["classifier"] == pytest.approx(rates[n] * 0.12 / 0.4)


def test_groups_are_those_of_the_official_optimiser():
    net = Network(10, 3, None, [512, 512, 128])
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    got = {group: {names[id(p)] for p in parameters} for group, parameters in parameter_groups(net).items()}
    assert got["classifier"] == {"classifier.weight", "classifier.bias"}
    rest = set(names.values()) - got["classifier"]
    # the rule of the official code, with its own name for what we call the projector's layers
    assert got["no_adaptation"] == {name for name in rest if "bias" in name or "bn" in name.rpartition(".")[0]}
    assert "backbone.layer2.0.downsample.1.weight" in got["weights"]
    assert net(torch.randn(2, 3, 32, 32))[0].shape == (2, 512)
    assert official_resnet18(1).conv1(torch.zeros(1, 1, 32, 32)).shape == (1, 64, 34, 34)


def test_lars_adapts_weights_and_head_but_not_norms_and_biases():
    model = make_model(optimizer="lars", lr=1.0, lr_classifier=1.0, momentum=0.0, weight_decay=1e-9)
    optimizer = model.configure_optimizers()
    before = {name: parameter.detach().clone() for name, parameter in model.net.named_parameters()}
    step(model, make_batch(0))["total"].backward()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    for name, parameter in model.net.named_parameters():
        moved = (before[name] - parameter.detach()).norm()
        adapted = name.startswith("classifier") or parameter.ndim > 1
        expected = 0.001 * before[name].norm() if adapted else parameter.grad.norm()
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)


# ---------------------------------------------------------------- two ranks, and mistakes


def two_ranks(number: int) -> dict[str, Tensor]:
    """Gradients of one rank, with statistics of batch norm that do not depend on the batch."""
    return gradients(number, 2)


def gradients(number: int, world_size: int) -> dict[str, Tensor]:
    model, batch = in_second_task(), make_batch(1, step=3)
    share = slice(number * 2, number * 2 + 2) if world_size > 1 else slice(None)
    rows = slice(number * 4, number * 4 + 4) if world_size > 1 else slice(None)
    batch["views"] = [view[share] for view in batch["views"]]
    batch["supports"] = [view[rows] for view in batch["supports"]]
    batch |= {"support_y": batch["support_y"][rows], "support_index": batch["support_index"][rows]}
    got = step(model, batch)
    got["total"].backward()
    out = {name: p.grad for name, p in model.net.named_parameters() if p.grad is not None}
    return out | {"total": got["total"].detach()}


def test_two_ranks_compute_the_loss_of_the_global_batch(tmp_path: Path):
    whole, parts = gradients(0, 1), on_two_ranks(two_ranks, tmp_path)
    for name, value in whole.items():
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 4}, "num_tasks: 4 tasks do not divide 6 classes"),
        ({"distill": "features"}, "distill: 'features' is not accepted; accepted: neighbours, logits"),
        ({"bn_after_first_task": "eval"}, "accepted: frozen, train"),
        ({"optimizer": "adam"}, "optimizer: 'adam' is not accepted; accepted: lars, sgd"),
        ({"tau": 0.0}, "tau: 0.0 is not accepted"),
        ({"alpha": 1.5}, "alpha: 1.5 is not accepted; accepted: a number in"),
        ({"projector": []}, "projector: an empty list"),
        ({"backbone": {"name": "small_con"}}, "backbone name must be one of"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


def test_distillation_without_a_buffer_says_what_it_lacks():
    model = in_second_task()
    batch = make_batch(1, step=3)
    new = batch["support_y"] >= 2
    batch |= {"supports": [view[new] for view in batch["supports"]], "support_y": batch["support_y"][new]}
    with pytest.raises(ValueError, match="no supports of old classes to distil; give a buffer_size above 0"):
        step(model, batch)
