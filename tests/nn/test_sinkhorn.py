"""Sinkhorn-Knopp against the pseudo-code, its algebra, and two processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.nn.sinkhorn import assignment_entropy, sinkhorn


def published(p: Tensor, epsilon: float, iterations: int) -> Tensor:
    """SwAV's pseudo-code (arXiv 2006.09882, appendix A), one process, float64."""
    q = torch.exp(p.double() / epsilon).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= samples
    return (q * samples).T


def cosines(seed: int, batch: int, prototypes: int) -> Tensor:
    return torch.rand(batch, prototypes, generator=torch.Generator().manual_seed(seed)) * 2 - 1


shapes = st.tuples(st.integers(0, 10**6), st.integers(1, 24), st.integers(2, 12))


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(1, 4), st.sampled_from([0.05, 0.1, 0.5]))
def test_agrees_with_the_published_loop(shape: tuple[int, int, int], iterations: int, epsilon: float) -> None:
    p = cosines(*shape)
    torch.testing.assert_close(
        sinkhorn(p, epsilon, iterations).double(), published(p, epsilon, iterations), atol=2e-5, rtol=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(shapes, st.floats(-50, 50))
def test_rows_sum_to_one_and_a_constant_changes_nothing(shape: tuple[int, int, int], constant: float) -> None:
    p = cosines(*shape)
    q = sinkhorn(p)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(len(q)), atol=1e-5, rtol=0)
    torch.testing.assert_close(sinkhorn(p + constant), q, atol=2e-3, rtol=1e-2)  # float32 of p + constant


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_permuting_samples_or_prototypes_permutes_the_result(shape: tuple[int, int, int]) -> None:
    p = cosines(*shape)
    generator = torch.Generator().manual_seed(shape[0])
    rows = torch.randperm(p.shape[0], generator=generator)
    columns = torch.randperm(p.shape[1], generator=generator)
    torch.testing.assert_close(sinkhorn(p[rows][:, columns]), sinkhorn(p)[rows][:, columns], atol=1e-5, rtol=1e-4)


def test_many_iterations_balance_the_prototypes() -> None:
    q = sinkhorn(cosines(0, 64, 8), epsilon=0.2, iterations=200)
    torch.testing.assert_close(q.mean(dim=0), torch.full((8,), 1 / 8), atol=1e-4, rtol=0)


def test_constant_logits_give_the_uniform_assignment() -> None:
    torch.testing.assert_close(sinkhorn(torch.full((6, 4), 0.3)), torch.full((6, 4), 0.25), atol=1e-6, rtol=0)


def test_larger_epsilon_means_higher_entropy() -> None:
    p = cosines(1, 32, 6)
    entropies = [torch.special.entr(sinkhorn(p, eps)).sum(dim=1).mean() for eps in (0.02, 0.05, 0.2, 1.0)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.5


def test_a_queue_acts_on_the_batch_only_through_the_balance() -> None:
    batch, queue = cosines(2, 16, 5), cosines(3, 80, 5)
    alone, joined = sinkhorn(batch), sinkhorn(torch.cat([queue, batch]))[-16:]
    assert (alone - joined).abs().max() > 1e-3
    # log q + const is p / eps + (something of the prototype) + (something of the sample): interactions agree
    for q in (alone, joined):
        log = q.double().log() - batch.double() / 0.05
        rest = log - log.mean(dim=0) - log.mean(dim=1, keepdim=True) + log.mean()
        torch.testing.assert_close(rest, torch.zeros_like(rest), atol=2e-3, rtol=0)


def test_half_precision_and_tiny_epsilon_stay_finite() -> None:
    q = sinkhorn(cosines(4, 16, 5).half() * 40, epsilon=0.01)
    assert q.dtype == torch.float32
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(16))


def test_no_gradient_and_bad_arguments() -> None:
    p = cosines(5, 8, 3).requires_grad_()
    assert not sinkhorn(p).requires_grad
    with pytest.raises(ValueError, match="positive"):
        sinkhorn(p, epsilon=0.0)
    with pytest.raises(ValueError, match="positive"):
        sinkhorn(p, iterations=0)


def test_assignment_entropy_measures_collapse() -> None:
    assert assignment_entropy(torch.eye(4)) == pytest.approx(1.0)
    assert assignment_entropy(torch.eye(4)[[0, 0, 0]]) == pytest.approx(0.0)


def _share(rank: int, file: str, p: Tensor, cuts: list[int]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        mine = p[: cuts[0]] if rank == 0 else p[cuts[0] :]
        torch.save(sinkhorn(mine), f"{file}.{rank}")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_the_result_for_the_whole_batch(tmp_path: Path) -> None:
    p = cosines(6, 30, 7)
    file = str(tmp_path / "rendezvous")
    mp.spawn(_share, args=(file, p, [13]), nprocs=2)
    parts = torch.cat([torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)])
    torch.testing.assert_close(parts, sinkhorn(p), atol=1e-5, rtol=1e-5)
