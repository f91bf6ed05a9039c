"""SimSiam keeps the contract, and its loss is the paper's."""

from __future__ import annotations

import torch
from zoo_simsiam.losses import negative_cosine, spread

from zoo import check_method


def test_contract() -> None:
    report = check_method("simsiam")
    assert report.ok, report


def test_the_loss_is_minus_the_mean_cosine_and_stops_the_gradient() -> None:
    p, z = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = negative_cosine(p, z)
    expected = -sum((p[i] @ z[i] / (p[i].norm() * z[i].norm()) for i in range(5)), torch.zeros(())) / 5
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert p.grad is not None
    assert z.grad is None


def test_spread_is_one_on_the_sphere_and_zero_when_collapsed() -> None:
    z = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert abs(float(spread(z)) - 1) < 0.02
    assert float(spread(torch.ones(10, 64))) == 0
