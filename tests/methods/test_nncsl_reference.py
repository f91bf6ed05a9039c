"""A step of NNCSL in its second task against the equations by hand, and what counts as an answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.nncsl_toy import ARMS, in_second_task, make_batch, make_model, step
from zoo.methods.nncsl.networks import Network

TAU, SHARPENING, SMOOTHING, ALPHA = 0.2, 0.5, 0.3, 0.3
WEIGHTS = {"w_paws": 0.7, "w_me": 0.3, "w_lin": 0.2, "w_dist": 0.4}


# ---------------------------------------------------------------- the equations, without the module's helpers


def embed(net: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings and linear logits; statistics of batch norm are frozen, so that rows do not see one another."""
    assert net.projector is not None
    features = net.backbone(images)
    return net.projector(features), features @ net.classifier.weight.T + net.classifier.bias


def neighbours(z: Tensor, supports: Tensor, y: Tensor, classes: list[int]) -> Tensor:
    """Class distribution from the supports of these classes, one query and support after the other."""
    off = SMOOTHING / len(classes)
    rows = []
    for query in z:
        weight, total = torch.zeros(len(classes)), torch.zeros(())
        for support, label in zip(supports, y.tolist(), strict=True):
            if label not in classes:
                continue
            near = (query @ support / query.norm() / support.norm() / TAU).exp()
            smoothed = torch.tensor([1 - SMOOTHING + off if c == label else off for c in classes])
            weight, total = weight + near * smoothed, total + near
        rows.append(weight / total)
    return torch.stack(rows)


def sharp(p: Tensor) -> Tensor:
    powered = p ** (1 / SHARPENING)
    return powered / powered.sum(dim=1, keepdim=True)


def entropy(q: Tensor, p: Tensor) -> Tensor:
    """H(q, p), the mean over rows."""
    return -(q * p.log()).sum(dim=1).mean()


def expected_losses(model: Any, batch: dict[str, Any], mask: bool, distill: str) -> dict[str, Tensor]:
    y = torch.cat([batch["support_y"]] * 2)
    views, supports = batch["views"], torch.cat(batch["supports"])
    z, logits = (torch.cat(part) for part in zip(*(embed(model.net, view) for view in views), strict=True))
    z_s, logits_s = embed(model.net, supports)
    with torch.no_grad():
        z_o, logits_o = (torch.cat(part) for part in zip(*(embed(model.teacher, v) for v in views), strict=True))
        z_so, _ = embed(model.teacher, supports)

    # neighbours of the current task alone with the filter; the two global views swap their targets
    p = neighbours(z, z_s, y, [2, 3] if mask else [0, 1, 2, 3])
    p_a, p_b = p.detach()[:4], p.detach()[4:8]
    q = torch.cat([sharp(p_b), sharp(p_a)] + [(sharp(p_a) + sharp(p_b)) / 2] * 2)
    spread = sharp(p).mean(dim=0)

    # the head: hard labels, no temperature, the four classes seen so far
    seen = logits_s[:, :4]
    linear = (seen.exp().sum(dim=1).log() - seen[torch.arange(len(y)), y]).mean()

    embeddings = torch.cat([z, z_s])
    projected = embeddings @ model.net.feature_projector.weight.T + model.net.feature_projector.bias
    features = ((projected - torch.cat([z_o, z_so])) ** 2).mean()
    if distill == "neighbours":
        predictions = entropy(neighbours(z_o, z_so, y, [0, 1]), neighbours(z, z_s, y, [0, 1]))
    else:
        old, new = (x[:, :2].exp() / x[:, :2].exp().sum(dim=1, keepdim=True) for x in (logits_o, logits))
        predictions = entropy(old, new) - entropy(old, old)
    return {
        "snn": entropy(torch.where(q < 1e-4, 0.0, q), p),
        "me_max": (spread * spread.log()).sum(),
        "linear": linear,
        "distillation": ALPHA * features + (1 - ALPHA) * predictions,
    }


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("distill", ["neighbours", "logits"])
@pytest.mark.parametrize("mask", [True, False], ids=["filter", "all supports"])
def test_a_step_in_the_second_task(mask: bool, distill: str) -> None:
    options = {"tau": TAU, "sharpening": SHARPENING, "smoothing": SMOOTHING, "alpha": ALPHA}
    model = in_second_task(**WEIGHTS, **options, mask=mask, distill=distill)
    batch = make_batch(1, step=3, seed=5, small=2)
    # rows of one class do not lie side by side, and the classes are not equally many
    batch["support_y"] = torch.tensor([3, 0, 2, 1, 1, 3, 0, 3])
    got = step(model, batch)
    expected = expected_losses(model, batch, mask, distill)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), msg=lambda text, name=name: f"{name}: {text}")
    names = {"w_paws": "snn", "w_me": "me_max", "w_lin": "linear", "w_dist": "distillation"}
    total = torch.stack([WEIGHTS[key] * expected[name] for key, name in names.items()]).sum()
    torch.testing.assert_close(got["total"], total)
    trained = dict(model.net.named_parameters())
    ours, theirs = (torch.autograd.grad(value, list(trained.values())) for value in (got["total"], total))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_replay_compares_each_support_with_its_own_exemplar() -> None:
    """Both views of a support against the logits of its clean image, all classes; supports without any do not count."""
    model = make_model(**ARMS["derpp"])
    step(model, make_batch(0))
    first = make_batch(1, seed=2)
    model.eval()
    clean = model.net.classifier(model.net.backbone(first["exemplars"])).detach()
    stored = dict(zip(first["exemplar_index"].tolist(), clean, strict=True))
    model.train()
    step(model, first)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    index = [103, 7, 100, 101, 900, 102, 103, 104]
    batch = {**make_batch(1, step=3, seed=5), "support_index": torch.tensor(index)}
    got = step(model, batch)
    errors = []
    for view in batch["supports"]:
        logits = model.net.classifier(model.net.backbone(view))
        errors += [((row - stored[i]) ** 2).mean() for row, i in zip(logits, index, strict=True) if i in stored]
    assert len(errors) == 10
    torch.testing.assert_close(got["replay"], torch.stack(errors).mean().detach())
    torch.testing.assert_close(got["total"].detach(), got["linear"] + 0.5 * got["replay"])


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_class_to_come_is_no_answer_however_large_its_logit(task: int) -> None:
    model = make_model()
    step(model, make_batch(task))
    model.eval()
    seen = 2 * (task + 1)
    generator = torch.Generator().manual_seed(1)
    batch: Any = {"image": torch.randn(24, 1, 8, 8, generator=generator), "target": torch.arange(24) % 6}
    head = model.net.classifier
    with torch.no_grad():
        features = model.net.backbone(batch["image"])
        head.bias.copy_(-head.weight @ features.mean(dim=0))  # no class wins everywhere
        head.bias[seen:] += 100
    logits = (features @ head.weight.T + head.bias).tolist()
    expected, answers = torch.zeros(6, 6, dtype=torch.long), []
    for row, target in zip(logits, batch["target"].tolist(), strict=True):
        assert task == 2 or max(row) > max(row[:seen])
        answers.append(max(range(seen), key=lambda c, row=row: row[c]))
        if target < seen:
            expected[target, answers[-1]] += 1
    assert len(set(answers)) > 1
    model.test_step(batch, 0)
    assert torch.equal(model.test_confusion.compute(), expected)
    assert model.predict_step(batch, 0).tolist() == answers
    model.validation_step(batch, 0, dataloader_idx=1)
    assert torch.equal(model.val_confusion.compute(), expected)
    correct, total = model._task_counts(model.test_confusion)
    assert correct.tolist() == [int(expected[j, j] + expected[j + 1, j + 1]) for j in (0, 2, 4)]
    assert total.tolist() == [8 * (j < seen) for j in (0, 2, 4)]
