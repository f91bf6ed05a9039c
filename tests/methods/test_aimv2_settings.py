"""AIMv2's settings reach what they are for: optimiser and schedule, pixel loss, masks, the scale of first weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.methods.aimv2_toy import EOS, make_batch, make_model, step
from tests.methods.test_aimv2_probe import make_probe
from zoo.methods.aimv2.decoder import Decoder, ResidualMLP


def optimisation(module: Any, steps: int = 10) -> tuple[Any, list[list[float]]]:
    """The optimiser of a module, and the learning rates of its groups before each step and after the last."""
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)
    found = module.configure_optimizers()
    assert found["lr_scheduler"]["interval"] == "step"
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return optimizer, rates


def schedule(peak: float, final: float, warmup: int, steps: int = 10) -> list[float]:
    """A line up to the peak, then half a cosine down to `final`."""
    line = [peak * (i + 1) / warmup for i in range(warmup)]
    cosine = [math.cos(math.pi * i / (steps - warmup)) for i in range(steps - warmup + 1)]
    return line + [final + (peak - final) * (1 + value) / 2 for value in cosine]


# ---------------------------------------------------------------- optimiser and schedule


def test_the_optimiser_has_the_values_of_the_module():
    optimizer, _ = optimisation(make_model(lr=2e-2, weight_decay=3e-3, betas=(0.8, 0.7)))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [tuple(group["betas"]) for group in optimizer.param_groups] == [(0.8, 0.7)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([3e-3 / 2e-2, 0])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-2] * 2


@pytest.mark.parametrize(("final_lr", "warmup_steps"), [(1e-5, 2), (4e-3, 5), (0.0, 0)])
def test_the_learning_rate_rises_in_the_warm_up_and_ends_at_its_final_value(final_lr, warmup_steps):
    _, rates = optimisation(make_model(lr=2e-2, final_lr=final_lr, warmup_steps=warmup_steps))
    expected = schedule(2e-2, final_lr, warmup_steps)
    for group in range(2):
        assert [rate[group] for rate in rates] == pytest.approx(expected)


LRS = [1e-3, 2e-2, 5e-3]  # the largest is not the first


@pytest.mark.parametrize(("final_lr", "warmup_steps"), [(1e-5, 0), (4e-3, 3)])
@pytest.mark.parametrize("freeze_trunk", [True, False])
def test_every_attentive_probe_has_its_own_learning_rate(freeze_trunk, final_lr, warmup_steps):
    """All follow one curve; the largest ends at `final_lr`. A trained encoder has the first."""
    changes = {"freeze_trunk": freeze_trunk, "final_lr": final_lr, "warmup_steps": warmup_steps}
    probe = make_probe(lrs=LRS, **changes)
    optimizer, rates = optimisation(probe)
    factors = [value / 2e-2 for value in schedule(2e-2, final_lr, warmup_steps)]
    rate_of = {
        id(p): [rate[number] for rate in rates]
        for number, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    trained = list(zip(probe.heads, LRS, strict=True)) + ([] if freeze_trunk else [(probe.trunk, LRS[0])])
    for part, lr in trained:
        for p in part.parameters():
            assert rate_of.pop(id(p)) == pytest.approx([lr * factor for factor in factors])
    assert not rate_of, "nothing else is trained"


@pytest.mark.parametrize("freeze_trunk", [True, False])
def test_matrices_of_probes_decay_and_vectors_do_not(freeze_trunk):
    probe = make_probe(lrs=LRS, weight_decay=0.3, freeze_trunk=freeze_trunk)
    optimizer, _ = optimisation(probe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: decay[id(p)] for name, p in probe.named_parameters() if p.requires_grad}
    assert len(trained) == len(decay)
    assert trained == {n: 0.3 if p.ndim > 1 else 0.0 for n, p in probe.named_parameters() if p.requires_grad}
    assert trained["heads.1.linear.weight"] == 0.3
    assert trained["heads.1.query"] == 0


def test_a_step_of_a_probe_goes_as_far_as_its_learning_rate():
    """The first step of Adam moves every weight that has a gradient by the learning rate."""
    probe = make_probe(lrs=LRS, weight_decay=0.0)
    probe.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    probe._trainer = SimpleNamespace(estimated_stepping_batches=10)  # type: ignore[assignment]
    optimizer: Any = probe.configure_optimizers()["optimizer"]  # type: ignore[index]
    before = [head.linear.weight.detach().clone() for head in probe.heads]
    images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    probe.training_step({"labelled": images, "target": torch.arange(20) % 10}, 0).backward()
    optimizer.step()
    for head, old, lr in zip(probe.heads, before, LRS, strict=True):
        moved = (head.linear.weight.detach() - old).abs()
        assert float(moved.median()) == pytest.approx(lr, rel=1e-2)


# ---------------------------------------------------------------- the pixel loss and the masks


@pytest.mark.parametrize("objective", ["aimv2", "image_only"])
def test_the_pixel_loss_of_the_paper_is_divided_by_all_patches(objective):
    """The same errors, over `B I` patches and not over the predicted ones; the caption is not concerned."""
    batch, alpha = make_batch(), 0.4 if objective == "aimv2" else 1.0
    official, paper = (step(make_model(pixel_norm=n, objective=objective), batch) for n in ("official", "paper"))
    torch.manual_seed(7)  # as `step` does
    predicted = int((16 - torch.randint(1, 16, (5,))).sum())
    assert predicted < 5 * 16
    torch.testing.assert_close(paper["loss_pixel"] * 5 * 16, official["loss_pixel"] * predicted)
    text = 0.0
    if objective == "aimv2":
        assert paper["loss_text"] == official["loss_text"]
        text = paper["loss_text"]
    torch.testing.assert_close(paper["total"].detach(), text + alpha * paper["loss_pixel"])


@pytest.mark.parametrize("mask", ["prefix", "causal"])
@pytest.mark.parametrize("objective", ["clip", "lit"])
def test_the_contrastive_objectives_see_the_whole_image(objective, mask):
    """Symmetric cross-entropy of features without a mask, whatever `mask` is, written out pair by pair."""
    model, batch = make_model(objective=objective, mask=mask), make_batch()
    towers: Any = model.towers
    tokens = model.trunk(batch["image"], torch.ones(5, 16, 16, dtype=torch.bool))
    image = towers.image_projection(tokens.mean(dim=1) if objective == "clip" else towers.pool(tokens))
    captions = [row[: int((row == EOS).nonzero()[0, 0]) + 1][None] for row in batch["text"]]
    caption = torch.cat([towers.text_projection(towers.text(words)) for words in captions])
    cosine = torch.stack([torch.stack([F.cosine_similarity(i, c, dim=0) for c in caption]) for i in image])
    logits = cosine / 0.07
    own = logits.diagonal()
    expected = (logits.logsumexp(dim=0) + logits.logsumexp(dim=1) - 2 * own).mean() / 2
    got = step(model, batch)
    torch.testing.assert_close(got["total"], expected)
    torch.testing.assert_close(got["loss_contrastive"], expected.detach())
    # under the mask of the other objectives the loss would be another one
    masked = model.trunk(batch["image"], torch.ones(16, 16, dtype=torch.bool).tril().expand(5, -1, -1))
    assert not torch.allclose(masked.mean(dim=1), tokens.mean(dim=1), atol=1e-3)


def prefixes(model: Any, stage: str, batches: list[int], size: int = 40) -> list[torch.Tensor]:
    """Prefix lengths that the evaluation of these batches measures with."""
    seen: list[torch.Tensor] = []
    errors = model.errors
    model.log = model.log_dict = lambda *_, **__: None
    model.errors = lambda batch, lengths: (seen.append(lengths), errors(batch, lengths))[1]
    for number in batches:
        getattr(model, f"{stage}_step")(make_batch(size), number)
    model.errors = errors
    return seen


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_batches_of_an_evaluation_have_prefixes_of_their_own(stage):
    """They depend on the number of the batch alone; they differ from batch to batch and from image to image."""
    model = make_model().eval()
    torch.manual_seed(0)
    first = prefixes(model, stage, [0, 1, 2, 3])
    torch.manual_seed(1)
    again = prefixes(model, stage, [3, 2, 1, 0])
    for lengths, other in zip(first, reversed(again), strict=True):
        assert torch.equal(lengths, other)
    together = torch.stack(first)
    assert together.shape == (4, 40)
    assert len(together.unique(dim=0)) == 4
    assert all(len(lengths.unique()) > 5 for lengths in first)
    assert all(len(column.unique()) > 1 for column in together.T[:5])
    assert (int(together.min()), int(together.max())) == (1, 15)


# ---------------------------------------------------------------- first weights


@pytest.mark.parametrize("depth", [1, 4])
def test_heads_start_with_the_scale_of_the_released_code(depth):
    """Variance scaling over the inputs, `1 / (1 + blocks) / width`, from a normal cut off at two of its deviations."""
    torch.manual_seed(0)
    decoder = Decoder(16, 256, depth, 2, 147, 200, 6)
    aimv1 = ResidualMLP(16, 147, 256, depth)
    assert decoder.pixel_head is not None
    assert decoder.text_head is not None
    deviation = math.sqrt(1 / (1 + depth) / 256)
    for head in (decoder.pixel_head, decoder.text_head, aimv1.out):
        assert head.bias is None
        weight = head.weight.detach()
        assert float(weight.std()) == pytest.approx(deviation, rel=0.02)
        assert float(weight.mean()) == pytest.approx(0, abs=0.02 * deviation)
        largest = 2 * deviation / 0.87962566  # the deviation of a normal that is cut off at two of its own
        assert 0.98 * largest < float(weight.abs().max()) <= largest * (1 + 1e-6)
