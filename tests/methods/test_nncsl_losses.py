"""The equations of NNCSL against closed forms, a naive loop and numbers from PAWS' published loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.methods.nncsl import losses


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waves(rows: int, dim: int, phase: float) -> torch.Tensor:
    """Fixed embeddings that need no random generator; the published loss was run on the same ones."""
    t = torch.arange(rows * dim, dtype=torch.float64)
    return torch.sin(1.7 * t + phase + 0.3 * t**1.2).float().reshape(rows, dim)


# ---------------------------------------------------------------- soft nearest neighbours


def test_one_orthogonal_support_per_class_has_the_closed_form():
    num_classes = 5
    p = losses.soft_nearest_neighbours(3 * torch.eye(num_classes), torch.eye(num_classes), torch.eye(num_classes), 0.1)
    expected = math.exp(10) / (math.exp(10) + num_classes - 1)
    torch.testing.assert_close(p.diagonal(), torch.full((num_classes,), expected))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_classes=st.integers(2, 6), scale=st.floats(0.1, 50))
def test_neighbours_are_a_distribution_that_ignores_scale_and_order(seed, num_classes, scale):
    z, supports = randn(7, 6, seed=seed), randn(3 * num_classes, 6, seed=seed + 1)
    y = losses.label_matrix(torch.arange(num_classes).repeat(3), 0, num_classes)
    p = losses.soft_nearest_neighbours(z, supports, y)
    torch.testing.assert_close(p.sum(1), torch.ones(7))
    torch.testing.assert_close(losses.soft_nearest_neighbours(scale * z, supports, y), p, rtol=1e-4, atol=1e-5)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses.soft_nearest_neighbours(z, supports[order], y[order]), p)
    columns = torch.randperm(num_classes, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(losses.soft_nearest_neighbours(z, supports, y[:, columns]), p[:, columns])


def test_limits_of_the_temperature():
    z, supports = randn(20, 8), randn(6, 8, seed=1)
    y = F.one_hot(torch.tensor([0, 1, 2, 0, 1, 2])).float()
    nearest = (F.normalize(z) @ F.normalize(supports).T).argmax(1)
    torch.testing.assert_close(losses.soft_nearest_neighbours(z, supports, y, 1e-5), y[nearest])
    torch.testing.assert_close(losses.soft_nearest_neighbours(z, supports, y, 1e6), torch.full((20, 3), 1 / 3))


def test_label_matrix_rows():
    y = losses.label_matrix(torch.tensor([4, 5, 4]), first=4, num_classes=2, smoothing=0.1)
    torch.testing.assert_close(y, torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.95, 0.05]]))
    torch.testing.assert_close(losses.label_matrix(torch.arange(5), 0, 5, 0.0), torch.eye(5))


# ---------------------------------------------------------------- sharpening and me-max


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 8), temperature=st.floats(0.1, 0.95))
def test_sharpening(seed, k, temperature):
    p = torch.softmax(randn(9, k, seed=seed), 1)
    sharp = losses.sharpen(p, temperature)
    torch.testing.assert_close(losses.sharpen(p, 1.0), p)
    torch.testing.assert_close(losses.sharpen(torch.full((1, k), 1 / k), temperature), torch.full((1, k), 1 / k))
    assert (sharp.argmax(1) == p.argmax(1)).all()
    assert (torch.special.entr(sharp).sum(1) <= torch.special.entr(p).sum(1) + 1e-5).all()


def test_sharpening_by_hand():
    sharp = losses.sharpen(torch.tensor([[0.6, 0.4]]), 0.25)
    torch.testing.assert_close(sharp, torch.tensor([[0.8351, 0.1649]]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("k", [2, 5])
def test_me_max_is_bounded_and_least_at_a_uniform_mean(k):
    uniform_mean = torch.eye(k).repeat(3, 1)
    assert losses.me_max(uniform_mean).item() == pytest.approx(-math.log(k), abs=1e-6)
    assert losses.me_max(torch.eye(k)[:1]).item() == pytest.approx(0.0, abs=1e-6)
    p = torch.softmax(randn(11, k), 1).requires_grad_()
    value = losses.me_max(p)
    assert -math.log(k) <= value.item() <= 0
    value.backward()
    assert p.grad.abs().max() > 0


def test_probabilities_of_zero_give_finite_losses_and_gradients():
    p = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = losses.me_max(p) + losses.cross_entropy(torch.tensor([[0.5, 0.5, 0.0]] * 2), p)
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()


# ---------------------------------------------------------------- PAWS


def naive_paws(views, supports, y, tau=0.1, temperature=0.25):
    """Image by image, class by class, with plain Python numbers."""

    def neighbours(z):
        weights = []
        for support in supports.tolist():
            dot = sum(a * b for a, b in zip(z, support, strict=True))
            norm = math.sqrt(sum(a * a for a in z)) * math.sqrt(sum(b * b for b in support))
            weights.append(math.exp(dot / norm / tau))
        return [sum(w * row[k] for w, row in zip(weights, y.tolist(), strict=True)) / sum(weights) for k in range(3)]

    def rho(p):
        powered = [v ** (1 / temperature) for v in p]
        return [v / sum(powered) for v in powered]

    total, count, mean = 0.0, 0, [0.0] * 3
    for i in range(len(views[0])):
        p = [neighbours(view[i].tolist()) for view in views]
        from_a, from_b = rho(p[0]), rho(p[1])
        small = [(a + b) / 2 for a, b in zip(from_a, from_b, strict=True)]
        for number, (p_view, q) in enumerate(zip(p, [from_b, from_a, small, small], strict=True)):
            assert number < 4
            q = [0.0 if v < 1e-4 else v for v in q]
            total -= sum(t * math.log(v) for t, v in zip(q, p_view, strict=True))
            mean = [m + v for m, v in zip(mean, rho(p_view), strict=True)]
            count += 1
    mean = [m / count for m in mean]
    return total / count, sum(m * math.log(m) for m in mean)


def test_paws_equals_a_naive_loop():
    views = [randn(5, 7, seed=s).double() for s in range(4)]
    supports = randn(12, 7, seed=9).double()
    y = losses.label_matrix(torch.arange(3).repeat(4), 0, 3).double()
    expected = naive_paws(views, supports, y)
    actual = losses.paws_losses(views, supports, y)
    assert [a.item() for a in actual] == pytest.approx(expected, abs=1e-9)


def test_paws_equals_the_published_loss():
    """Values and gradients of `init_paws_loss(multicrop=2, tau=0.1, T=0.25, me_max=True)` of facebookresearch/suncet."""  # noqa: E501
    views = torch.cat([waves(6, 8, phase) for phase in (0.1, 0.2, 0.9, 2.0)]).requires_grad_()
    supports = waves(12, 8, 5.0).requires_grad_()
    y = losses.label_matrix(torch.arange(3).repeat(4), 0, 3)
    snn, mem = losses.paws_losses(list(views.chunk(4)), supports, y)
    assert snn.item() == pytest.approx(1.4625425338745117, abs=1e-5)
    assert mem.item() == pytest.approx(-1.048811674118042, abs=1e-5)
    d_snn = torch.autograd.grad(snn, [views, supports], retain_graph=True)
    d_mem = torch.autograd.grad(mem, [views, supports])
    assert [g.norm().item() for g in d_snn] == pytest.approx([0.15573222935199738, 0.2938133478164673], abs=1e-5)
    assert [g.norm().item() for g in d_mem] == pytest.approx([0.13459709286689758, 0.21671515703201294], abs=1e-5)
    torch.testing.assert_close(
        d_snn[0][0, :4],
        torch.tensor([0.007357853930443525, -0.0008852151222527027, -0.003398848231881857, 0.0038469864521175623]),
        atol=1e-6,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        d_snn[1][3, :4],
        torch.tensor([-0.000341003411449492, 0.0002970818313769996, 9.247189154848456e-06, -0.0002832204627338797]),
        atol=1e-6,
        rtol=1e-4,
    )


def test_targets_swap_the_views_and_drop_small_entries():
    p_a, p_b = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.3, 0.7]])
    targets = losses.paws_targets(p_a, p_b, num_small=2)
    torch.testing.assert_close(targets[0], losses.sharpen(p_b)[0])
    expected_b = losses.sharpen(p_a)[0]
    torch.testing.assert_close(targets[1], expected_b)
    torch.testing.assert_close(targets[2], (targets[0] + expected_b) / 2)
    torch.testing.assert_close(targets[3], targets[2])
    dropped = losses.paws_targets(torch.tensor([[0.95, 0.05]]), p_b, num_small=0)[1]
    assert dropped[1] == 0
    assert dropped.sum() < 1  # not normalised again


def test_no_gradient_through_the_targets():
    """Shifting what only the targets depend on leaves the gradient of the anchors alone."""
    view_a, view_b = randn(4, 6).requires_grad_(), randn(4, 6, seed=1)
    y = losses.label_matrix(torch.arange(2).repeat(3), 0, 2)
    supports = randn(6, 6, seed=2)
    snn, _ = losses.paws_losses([view_a, view_b], supports, y)
    gradient = torch.autograd.grad(snn, view_a)[0]
    q_a = losses.sharpen(losses.soft_nearest_neighbours(view_b, supports, y))
    p_a = losses.soft_nearest_neighbours(view_a, supports, y)
    by_hand = torch.autograd.grad(losses.cross_entropy(torch.where(q_a < 1e-4, 0.0, q_a), p_a) / 2, view_a)[0]
    torch.testing.assert_close(gradient, by_hand)


# ---------------------------------------------------------------- distillation and replay


def test_nnd_at_the_teacher_is_the_teachers_entropy_with_zero_gradient():
    z, supports = randn(8, 6).requires_grad_(), randn(6, 6, seed=1).requires_grad_()
    y = losses.label_matrix(torch.arange(3).repeat(2), 0, 3)
    loss = losses.nnd_loss(z, supports, z.detach(), supports.detach(), y)
    p = losses.soft_nearest_neighbours(z, supports, y)
    torch.testing.assert_close(loss, torch.special.entr(p).sum(1).mean())
    for gradient in torch.autograd.grad(loss, [z, supports]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_nnd_teaches_queries_and_supports_but_not_the_teacher():
    z, supports = randn(8, 6).requires_grad_(), randn(6, 6, seed=1).requires_grad_()
    z_teacher, supports_teacher = randn(8, 6, seed=2).requires_grad_(), randn(6, 6, seed=3).requires_grad_()
    y = losses.label_matrix(torch.arange(3).repeat(2), 0, 3)
    losses.nnd_loss(z, supports, z_teacher, supports_teacher, y).backward()
    assert z.grad.abs().max() > 0
    assert supports.grad.abs().max() > 0
    assert z_teacher.grad is None
    assert supports_teacher.grad is None


def test_nnd_does_not_sharpen_and_keeps_the_view():
    z_teacher, supports = torch.eye(4), torch.eye(4)
    y = losses.label_matrix(torch.arange(4), 0, 4, smoothing=0.5)
    z = torch.eye(4).flip(0)
    p_teacher = losses.soft_nearest_neighbours(z_teacher, supports, y)
    p = losses.soft_nearest_neighbours(z, supports, y)
    expected = -(p_teacher * p.log()).sum(1).mean()
    torch.testing.assert_close(losses.nnd_loss(z, supports, z_teacher, supports, y), expected)


def test_logit_distillation_is_a_divergence():
    logits, teacher = randn(5, 4).requires_grad_(), randn(5, 4, seed=1)
    assert losses.logit_distillation(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    p, q = teacher.softmax(1), logits.softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(losses.logit_distillation(logits, teacher), expected)
    torch.testing.assert_close(losses.logit_distillation(logits + 3, teacher), expected)


def test_replay_loss_counts_only_stored_rows():
    logits, stored = randn(3, 4), randn(3, 4, seed=1)
    known = torch.tensor([True, False, True])
    expected = ((logits - stored)[known] ** 2).mean()
    torch.testing.assert_close(losses.replay_loss(logits, stored, known), expected)
    nothing = losses.replay_loss(logits, torch.full((3, 4), 1e6), torch.zeros(3, dtype=torch.bool))
    assert nothing.item() == 0
