"""The equations of AIMv2 against loops and closed forms (section numbers of arXiv 2411.14402)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.methods.aimv2.losses import (
    contrastive_loss,
    normalise_patches,
    patchify,
    pixel_errors,
    pooled_mean,
    prefix_mask,
    token_errors,
    unpatchify,
)
from zoo.methods.aimv2.optimiser import adam_lh
from zoo.nn.schedules import warmup_cosine_lr


@given(st.integers(1, 12), st.data())
def test_a_query_of_the_prefix_mask_sees_the_prefix_and_what_came_before(patches, data):
    length = data.draw(st.integers(0, patches))
    mask = prefix_mask(torch.tensor([length]), patches)[0]
    for q in range(patches):
        for k in range(patches):
            assert mask[q, k] == (k < length or k <= q)
    assert mask.sum(1).tolist() == [max(length, q + 1) for q in range(patches)]


def test_prefix_mask_at_its_ends():
    causal, one, full = prefix_mask(torch.tensor([0, 1, 6]), 6)
    assert torch.equal(causal, torch.ones(6, 6, dtype=torch.bool).tril())
    assert torch.equal(one, causal)
    assert full.all()


def test_patches_are_in_raster_order_with_values_by_row_column_channel():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[0, 0, :3], images[0, :, 0, 0])
    assert torch.equal(patches[0, 0, 3:6], images[0, :, 0, 1])
    assert torch.equal(patches[1, 4, :3], images[1, :, 4, 4])  # second row of patches, second column
    assert torch.equal(unpatchify(patches, 4, 8, 12), images)


@pytest.mark.parametrize("n", [16, 588])
def test_predicting_zeros_costs_what_the_unbiased_variance_says(n):
    patches = torch.randn(3, 5, n, dtype=torch.float64).float() * 2 + 1
    target = normalise_patches(patches)
    errors, _ = pixel_errors(torch.zeros_like(target), target, torch.ones(3, dtype=torch.int64))
    variance = patches.var(dim=-1)[:, 1:]
    assert torch.allclose(errors, (n - 1) / n * variance / (variance + 1e-6), atol=1e-5)


def test_a_constant_patch_is_zeros():
    assert torch.equal(normalise_patches(torch.full((1, 2, 9), 0.3)), torch.zeros(1, 2, 9))


def test_normalisation_is_done_in_float32():
    patches = (torch.randn(2, 3, 49) * 0.1 + 5).bfloat16()
    assert torch.equal(normalise_patches(patches), normalise_patches(patches.float()))


def naive_pixel_loss(predicted, target, lengths):
    total, count = 0.0, 0
    for b, length in enumerate(lengths):
        for j in range(1, target.shape[1]):
            if j >= length:
                total += float(((predicted[b, j - 1] - target[b, j]) ** 2).mean())
                count += 1
    return total, count


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 999))
def test_pixel_loss_is_the_pooled_mean_over_what_is_not_in_the_prefix(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted, target = torch.randn(2, len(lengths), 8, 5, generator=generator)
    errors, counted = pixel_errors(predicted, target, torch.tensor(lengths))
    total, count = naive_pixel_loss(predicted, target, lengths)
    assert int(counted.sum()) == count == sum(8 - length for length in lengths)
    assert float(pooled_mean(errors, counted)) == pytest.approx(total / count, rel=1e-5)
    assert float(pooled_mean(errors, counted, "paper")) == pytest.approx(total / (8 * len(lengths)), rel=1e-5)


def test_gradient_reaches_the_predictions_of_counted_patches_alone():
    predicted = torch.randn(2, 6, 4, requires_grad=True)
    target = torch.randn(2, 6, 4)
    pooled_mean(*pixel_errors(predicted, target, torch.tensor([5, 3]))).backward()
    touched = predicted.grad.abs().sum(2) > 0
    assert touched.tolist() == [[False] * 4 + [True, False], [False, False, True, True, True, False]]


def test_a_perfect_prediction_costs_nothing():
    target = torch.randn(2, 6, 4)
    predicted = torch.cat([target[:, 1:], torch.full((2, 1, 4), 9.0)], dim=1)
    errors, counted = pixel_errors(predicted, target, torch.tensor([1, 2]))
    assert float(pooled_mean(errors, counted)) == 0


def test_unequal_prefixes_are_not_a_mean_of_means():
    errors = torch.tensor([[1.0, 1.0, 1.0], [9.0, 9.0, 5.0]])
    counted = torch.tensor([[True, True, True], [False, False, True]])
    assert float(pooled_mean(errors, counted)) == 2.0


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary_and_padding_does_not_count():
    text = torch.tensor([[4, 5, 1, 0, 0], [6, 1, 0, 0, 0]])
    errors, counted = token_errors(torch.zeros(2, 5, 45), text, pad_id=0)
    assert float(pooled_mean(errors, counted)) == pytest.approx(math.log(45))
    assert int(counted.sum()) == 5
    logits = torch.randn(2, 5, 45)
    mean = pooled_mean(*token_errors(logits, text, 0))
    assert float(mean) == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), text.flatten(), ignore_index=0)))


def test_contrastive_loss_against_a_loop():
    image, text = F.normalize(torch.randn(2, 5, 7), dim=2)
    scale = torch.tensor(14.0)
    total = 0.0
    for i in range(5):
        over_text = sum(math.exp(14 * float(image[i] @ text[j])) for j in range(5))
        over_image = sum(math.exp(14 * float(image[j] @ text[i])) for j in range(5))
        total += math.log(over_text) + math.log(over_image) - 2 * 14 * float(image[i] @ text[i])
    assert float(contrastive_loss(image, text, scale)) == pytest.approx(total / 10, rel=1e-4)


def test_adam_lh_is_adam_after_a_decay_relative_to_the_peak():
    torch.manual_seed(0)
    peak, decay, betas, steps = 3e-3, 1e-2, (0.9, 0.95), 12
    weight = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = adam_lh([("weight", weight)], peak, decay, betas)
    scheduler = warmup_cosine_lr(optimizer, steps, 3, 0.1)
    p, m, v = weight.detach().clone(), torch.zeros(3, 4), torch.zeros(3, 4)
    for step in range(1, steps + 1):
        lr, grad = scheduler.get_last_lr()[0], torch.randn(3, 4)
        weight.grad = grad
        optimizer.step()
        scheduler.step()
        p = p * (1 - decay * lr / peak)
        m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
        p = p - lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + 1e-8)
        assert torch.allclose(weight, p, atol=1e-6)
    assert float(decay / peak) == pytest.approx(optimizer.param_groups[0]["weight_decay"])
