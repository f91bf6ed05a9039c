"""Steps of Suave and Daino as the claims run them (mixes, smoothing, queue, average), against the equations by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from torch import Tensor

from tests.methods.suave_toy import TINY, loader, make_batch, trainer
from zoo.methods.daino.module import Daino
from zoo.methods.suave.mix import Mix
from zoo.methods.suave.module import Suave
from zoo.methods.suave.networks import ClusteringNetwork

TAU, EPSILON, ITERATIONS, SMOOTHING, CLASSES = 0.15, 0.08, 2, 0.1, 4
LABELLED, UNLABELLED, QUEUE = 6, 16, 40
CUT, BLEND = Mix(1 - 7 * 5 / 144, (2, 9, 4, 9)), Mix(0.7)


# ---------------------------------------------------------------- the equations, without the module's helpers


def mixed_images(mix: Mix, first: Tensor, second: Tensor) -> Tensor:
    """The box comes from the second image, or the two are weighed."""
    if mix.box is None:
        return mix.lam * first + (1 - mix.lam) * second
    top, bottom, left, right = mix.box
    inside = torch.zeros_like(first, dtype=torch.bool)
    inside[..., top:bottom, left:right] = True
    return torch.where(inside, second, first)


def labelled_part(mix: Mix, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images and smoothed distributions: the labelled rows, then their mix with the reverse order."""
    x, y = batch["labelled"], torch.eye(CLASSES)[batch["target"]]
    y = torch.cat([y, mix.lam * y + (1 - mix.lam) * y.flip(0)])
    return torch.cat([x, mixed_images(mix, x, x.flip(0))]), (1 - SMOOTHING) * y + SMOOTHING / CLASSES


def embed(net: ClusteringNetwork, images: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, hidden layer, output and unit embedding of all rows; the backbone sees each size once."""
    features = [torch.empty(0)] * len(images)
    for size in {x.shape[-1] for x in images}:
        places = [i for i, x in enumerate(images) if x.shape[-1] == size]
        rows = net.backbone(torch.cat([images[i] for i in places]))
        for i, part in zip(places, rows.split([len(images[i]) for i in places]), strict=True):
            features[i] = part
    joined = torch.cat(features)
    hidden, projected = net.projector(joined)
    return joined, hidden, projected, projected / projected.norm(dim=1, keepdim=True)


def scores(net: ClusteringNetwork, z: Tensor) -> Tensor:
    """Cosines with the prototypes, times the gain of DINO's head."""
    weight, gain = net.prototypes.weight, net.prototypes.gain
    if gain is not None:
        return z @ (gain[:, None] * weight / weight.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(CLASSES))  # the step has normalised them
    return z @ weight.T


def ce(logits: Tensor, target: Tensor, tau: float = TAU) -> Tensor:
    """Eq. 2, the mean over rows."""
    exponentials = (logits / tau).exp()
    return -(target * (exponentials / exponentials.sum(dim=1, keepdim=True)).log()).sum(dim=1).mean()


def balanced(logits: Tensor) -> Tensor:
    """Eqs. 4-6 as the official code iterates them."""
    q = (logits.detach() / EPSILON).exp().T
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(dim=1, keepdim=True) * len(q)
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def probes_part(built: Suave | Daino, activations: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Sum of the probes' cross-entropies on the labelled rows as they came, without temperature or smoothing."""
    parts = zip(built.probes.values(), activations, strict=True)
    one_hot = torch.eye(CLASSES)[target]
    return torch.stack([ce(probe(x[: len(target)].detach()), one_hot, 1.0) for probe, x in parts]).sum()


def check(built: Suave | Daino, loss: Tensor, expected: Tensor) -> None:
    """Compare the losses and what they teach."""
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    trained = {**dict(built.net.named_parameters()), **dict(built.probes.named_parameters())}
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------- one step


def ready(built: Any, labelled: Mix, unlabelled: Mix, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module in training mode outside a trainer, its teacher away from the student, the draws of mixes fixed."""
    for place, mix in (("base", labelled), ("module", unlabelled)):

        def draw(height: int, width: int, mix: Mix = mix) -> Mix:
            assert (height, width) == (12, 12)
            return mix

        monkeypatch.setattr(f"zoo.methods.suave.{place}.draw_mix", draw)
    built.log_dict = built.log = lambda *args, **kwargs: None
    built.steps = built.switch_step = 10
    if built.teacher is not None:
        with torch.no_grad():
            for parameter in built.teacher.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            weight = built.teacher.prototypes.weight
            weight.copy_(weight / weight.norm(dim=1, keepdim=True))
    return built.train()


@pytest.mark.parametrize(("labelled", "unlabelled"), [(BLEND, CUT), (CUT, Mix(0.3))], ids=["cut views", "cut labelled"])
@pytest.mark.parametrize("ema", [0.0, 0.7], ids=["student assigns", "average assigns"])
@pytest.mark.parametrize(("mix_weight", "n_m"), [("paper", UNLABELLED), ("official", 1)])
def test_a_step_of_suave(
    labelled: Mix, unlabelled: Mix, ema: float, mix_weight: Any, n_m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = {**TINY, "tau": TAU, "epsilon": EPSILON, "sinkhorn_iterations": ITERATIONS, "label_smoothing": SMOOTHING}
    built = Suave(**options, queue_length=QUEUE, ema_momentum=ema, mix_weight=mix_weight)
    ready(built, labelled, unlabelled, monkeypatch)
    built.queue.z.copy_(F.normalize(torch.randn(2, QUEUE, 8), dim=2))
    queue, batch = built.queue.z.clone(), make_batch(labelled=LABELLED, sizes=(12, 12, 8))
    loss = built.training_step(batch, 0)

    x, y = labelled_part(labelled, batch)
    views = batch["views"]
    sizes = [2 * LABELLED] + [UNLABELLED] * 4
    *activations, z = embed(built.net, [x, *views, mixed_images(unlabelled, views[0], views[1].flip(0))])
    p, p1, p2, p3, p_mixed = scores(built.net, z).split(sizes)
    assigning, z1, z2 = built.net, *z.detach().split(sizes)[1:3]
    if built.teacher is not None:
        assigning = built.teacher
        z1, z2 = embed(assigning, views[:2])[3].split(UNLABELLED)
    q1, q2 = (
        balanced(scores(assigning, torch.cat([old, new])))[-UNLABELLED:]
        for old, new in zip(queue, (z1, z2), strict=True)
    )
    l_u = ((ce(p2, q1) + ce(p3, q1)) / 2 + (ce(p1, q2) + ce(p3, q2)) / 2) / 2
    l_mix = ce(p_mixed, unlabelled.lam * q1 + (1 - unlabelled.lam) * q2.flip(0))
    l_probes = probes_part(built, tuple(activations), batch["target"])
    n_l, n_u = 2 * LABELLED, 3 * UNLABELLED
    total = n_l * ce(p, y) + n_u * l_u + n_m * l_mix + LABELLED * l_probes
    check(built, loss, total / (n_l + n_u + n_m))
    for rows, old, new in zip(built.queue.z, queue, (z1, z2), strict=True):
        torch.testing.assert_close(rows, torch.cat([new, old])[:QUEUE])


@pytest.mark.parametrize(("step", "temperature"), [(0, 0.04), (1, 0.05), (4, 0.08), (10, 0.08)])
@pytest.mark.parametrize(("head", "mix"), [("suave", BLEND), ("dino", CUT)])
def test_a_step_of_daino(head: str, mix: Mix, step: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"warmup_teacher_temperature": 0.04, "teacher_temperature": 0.08, "warmup_teacher_steps": 4}
    built = Daino(**TINY, **options, head=head, tau=TAU, label_smoothing=SMOOTHING, centre_momentum=0.8)
    ready(built, mix, mix, monkeypatch)
    monkeypatch.setattr(Daino, "global_step", property(lambda self: step))
    batch = make_batch(labelled=LABELLED, sizes=(12, 12, 8))
    taught = scores(built.teacher, embed(built.teacher, batch["views"][:2])[3]).detach()
    centre = taught.mean(dim=0) + torch.tensor([0.03, -0.03, 0.05, 0.0])  # near the mean no prototype wins everywhere
    built.centre.copy_(centre)
    loss = built.training_step(batch, 0)

    exponentials = ((taught - centre) / temperature).exp()
    q1, q2 = (exponentials / exponentials.sum(dim=1, keepdim=True)).split(UNLABELLED)
    x, y = labelled_part(mix, batch)
    *activations, z = embed(built.net, [x, *batch["views"]])
    p, p1, p2, p3 = scores(built.net, z).split([2 * LABELLED] + [UNLABELLED] * 3)
    l_u = (ce(p2, q1) + ce(p3, q1) + ce(p1, q2) + ce(p3, q2)) / 4
    n_l, n_u = 2 * LABELLED, 3 * UNLABELLED
    total = n_l * ce(p, y) + n_u * l_u + LABELLED * probes_part(built, tuple(activations), batch["target"])
    check(built, loss, total / (n_l + n_u))
    torch.testing.assert_close(built.centre, 0.8 * centre + 0.2 * taught.mean(dim=0))


# ---------------------------------------------------------------- the averaged network over a fit


class Momenta(Callback):
    """The momentum of each step, from the first kernel: what the average is now lies between it and the network."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.before = torch.empty(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = pl_module.teacher.backbone[0].weight.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        averaged, student = (net.backbone[0].weight.detach() for net in (pl_module.teacher, pl_module.net))
        way = self.before - student
        momentum = ((averaged - student) * way).sum() / (way**2).sum()
        torch.testing.assert_close(averaged, momentum * self.before + (1 - momentum) * student)
        self.found.append(momentum.item())


def momenta(built: Suave | Daino, steps: int, tmp_path: Path) -> list[float]:
    record = Momenta()
    trainer(steps, default_root_dir=tmp_path, callbacks=[record]).fit(built, loader(steps), loader(1, evaluate=True))
    return record.found


def test_the_average_of_suave_keeps_its_momentum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert momenta(Suave(**TINY, ema_momentum=0.8), 3, tmp_path) == pytest.approx([0.8] * 3, abs=1e-3)


def test_the_momentum_of_daino_rises_on_half_a_cosine(tmp_path: Path) -> None:
    """From `ema_momentum` in the first step; half-way up in the middle; the last step is one short of the end."""
    torch.manual_seed(0)
    found = momenta(Daino(**TINY, head="suave", ema_momentum=0.5, ema_momentum_end=0.9), 6, tmp_path)
    assert found == pytest.approx([0.9 - 0.2 * (1 + math.cos(math.pi * t / 6)) for t in range(6)], abs=1e-3)
    assert [found[0], found[3]] == pytest.approx([0.5, 0.7], abs=1e-3)
