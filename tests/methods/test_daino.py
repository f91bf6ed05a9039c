"""Daino: teacher, centre, assignments, and the training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from tests.methods.suave_toy import TINY, loader, make_batch, trainer
from zoo.methods.daino.losses import teacher_assignment, updated_centre
from zoo.methods.daino.module import Daino

PLAIN: dict[str, Any] = {**TINY, "head": "suave", "mix_labelled": False, "label_smoothing": 0.0}


def test_the_centre_converges_geometrically_to_a_constant_teacher() -> None:
    """gamma_t = c (1 - 0.9^t)."""
    constant = torch.tensor([0.3, -0.2, 0.9])
    centre = torch.zeros(3)
    for t in range(1, 20):
        centre = updated_centre(centre, constant.expand(7, 3), 0.9)
        torch.testing.assert_close(centre, constant * (1 - 0.9**t))


def test_a_cold_uncentred_assignment_is_the_argmax() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    cold = teacher_assignment(logits, torch.zeros(5), 1e-4)
    torch.testing.assert_close(cold, F.one_hot(logits.argmax(dim=1), 5).float())


def test_the_assignment_is_the_softmax_of_centred_logits_without_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    centre = torch.tensor([0.1, 0.0, -0.4])
    assigned = teacher_assignment(logits, centre, 0.5)
    torch.testing.assert_close(assigned, torch.softmax((logits.detach() - centre) / 0.5, dim=1))
    assert not assigned.requires_grad


def run(tmp_path: Path, steps: int, **options: Any) -> Daino:
    torch.manual_seed(0)
    built = Daino(**{**PLAIN, **options})
    trainer(steps, default_root_dir=tmp_path).fit(built, loader(steps), loader(1, evaluate=True))
    return built


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_teacher_copies_or_keeps(momentum: float, tmp_path: Path) -> None:
    built = run(tmp_path, 3, ema_momentum=momentum, ema_momentum_end=momentum)
    torch.manual_seed(0)
    start = Daino(**PLAIN)
    reference = built.net if momentum == 0.0 else start.net
    for ours, expected in zip(built.teacher.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_teacher_makes_the_predictions(tmp_path: Path) -> None:
    """Targets are the teacher's own answers, so that it alone is always right; its probes see its activations."""
    torch.manual_seed(0)
    built = Daino(**PLAIN)
    with torch.no_grad():
        for parameter in built.teacher.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    built.eval()
    image = make_batch(unlabelled=32)["views"][0]
    logits = {}
    for name, net in (("teacher", built.teacher), ("student", built.net)):
        z = F.normalize(net.projector(net.backbone(image))[1], dim=1)
        logits[name] = (z @ F.normalize(net.prototypes.weight, dim=1).T).detach()
    target = logits["teacher"].argmax(dim=1)
    assert len(target.unique()) > 1
    assert (logits["student"].argmax(dim=1) == target).float().mean() < 0.75
    torch.testing.assert_close(built(image), torch.softmax(logits["teacher"] / 0.1, dim=1))
    torch.testing.assert_close(built.predict_step({"image": image}, 0), built(image))

    batches: DataLoader[Any] = DataLoader([{"image": image, "target": target}], batch_size=None)  # type: ignore[arg-type]
    run = trainer(1, default_root_dir=tmp_path)
    tested, validated = run.test(built, batches, verbose=False)[0], run.validate(built, batches, verbose=False)[0]
    seen = built.probes["backbone"](built.teacher.backbone(image)).argmax(dim=1)
    for stage, result in (("test", tested), ("val", validated)):
        assert result[f"{stage}/acc"] == 1.0
        assert result[f"{stage}/loss"] == pytest.approx(F.cross_entropy(logits["teacher"] / 0.1, target).item(), 1e-4)
        assert result[f"{stage}/acc_backbone"] == pytest.approx((seen == target).float().mean().item())


def test_teacher_and_centre_are_in_the_checkpoint_and_take_no_gradient() -> None:
    built = Daino(**PLAIN)
    names = set(built.state_dict())
    assert "centre" in names
    assert any(name.startswith("teacher.") for name in names)
    assert not any(p.requires_grad for p in built.teacher.parameters())


def naive_unlabelled(student: list[Tensor], assigned: list[Tensor], tau: float) -> Tensor:
    """Mean over all pairs of a teacher's global view and another view of the student."""
    terms = []
    for i, q in enumerate(assigned):
        for v, logits in enumerate(student):
            if v != i:
                terms.append(-(q * F.log_softmax(logits / tau, dim=1)).sum(dim=1).mean())
    return torch.stack(terms).mean()


def test_the_step_follows_the_equations() -> None:
    torch.manual_seed(0)
    built = Daino(**{**PLAIN, "warmup_teacher_steps": 0}).train()
    built.log_dict = lambda *args, **kwargs: None  # type: ignore[assignment, method-assign]
    built.steps = 10
    with torch.no_grad():
        for parameter in built.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    built.centre.copy_(torch.tensor([0.1, -0.1, 0.2, 0.0]))
    centre, batch = built.centre.clone(), make_batch(sizes=(12, 12, 8))
    loss = built.training_step(batch, 0)

    taught = list(built.teacher.prototypes(built.teacher.encode(batch["views"][:2]).z).split(16))
    assigned = [torch.softmax((part - centre) / 0.07, dim=1).detach() for part in taught]
    e = built.net.encode([batch["labelled"], *batch["views"]])
    labelled, *views = built.net.prototypes(e.z).split([8, 16, 16, 16])
    probes = sum(F.cross_entropy(p, batch["target"]) for p in built.probes(e, slice(8)).values())
    expected = (
        8 * F.cross_entropy(labelled / 0.1, batch["target"]) + 48 * naive_unlabelled(views, assigned, 0.1) + 8 * probes
    ) / 56
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    # the centre moves after the loss
    torch.testing.assert_close(built.centre, 0.9 * centre + 0.1 * torch.cat(taught).mean(dim=0))


def test_weight_decay_rises_along_its_cosine_and_spares_vectors(tmp_path: Path) -> None:
    built = run(tmp_path, 5, optimizer="adamw", lr=1e-3, final_lr=1e-4, weight_decay=0.04, weight_decay_end=0.4)
    decays = {group["weight_decay"] for group in built.trainer.optimizers[0].param_groups}
    assert 0.0 in decays
    assert 0.3 < max(decays) <= 0.4


def test_it_learns_the_toy(tmp_path: Path) -> None:
    built = run(tmp_path, 40, ema_momentum=0.8, ema_momentum_end=0.8)
    result = trainer(1, default_root_dir=tmp_path).test(built, loader(3, evaluate=True), verbose=False)
    # chance is 0.25
    assert result[0]["test/acc"] > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "swav"}, "head must be one of dino, suave, got 'swav'"),
        ({"ema_momentum": 2.0}, r"ema_momentum must lie in \[0, 1\], got 2.0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be positive, got 0.0"),
    ],
)
def test_bad_arguments_name_what_is_accepted(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Daino(**{**PLAIN, **options})
