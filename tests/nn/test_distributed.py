"""Collectives with gradients and batch norm over ranks: two gloo processes equal one."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from zoo.nn.distributed import all_gather_rows, all_reduce_mean, all_reduce_sum, rank, world_size
from zoo.nn.sync_batchnorm import GlobalBatchNorm, GlobalBatchNormSync, convert_sync_batchnorm


def _child(number: int, port: int, function: Callable[[int], Any], folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=2)
    torch.save(function(number), Path(folder) / f"{number}.pt")
    dist.destroy_process_group()


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `function(rank)` returns in each of two gloo processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_child, (port, function, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]


def rows() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mine(number: int, first: int = 3) -> Tensor:
    return (rows()[:first] if number == 0 else rows()[first:]).clone()


def global_loss(x: Tensor, weight: Tensor) -> Tensor:
    """Couples all rows: an infoNCE-like loss of the whole batch."""
    z = (x @ weight).tanh()
    return torch.logsumexp(z @ z.T, 1).mean()


def collectives(number: int) -> dict[str, Any]:
    x = torch.tensor([1.0, 2.0]) * (number + 1)
    x.requires_grad_()
    # the losses differ between ranks: 1 * sum on rank 0, 3 * sum on rank 1
    ((2 * number + 1) * all_reduce_sum(x)).sum().backward()
    out: dict[str, Any] = {"sum": all_reduce_sum(x).detach(), "mean": all_reduce_mean(x).detach(), "grad": x.grad}
    out["labels"] = all_gather_rows(torch.arange(2 + number) + 10 * number)
    y = mine(number, 2).requires_grad_()
    gathered = all_gather_rows(y)
    ((number + 1) * gathered.square()).sum().backward()
    return out | {"gathered": gathered.detach(), "gathered_grad": y.grad, "place": [rank(), world_size()]}


def test_collectives_and_their_adjoints(tmp_path: Path) -> None:
    for number, got in enumerate(on_two_ranks(collectives, tmp_path)):
        assert got["place"] == [number, 2]
        assert got["sum"].tolist() == [3.0, 6.0]
        assert got["mean"].tolist() == [1.5, 3.0]
        assert got["grad"].tolist() == [4.0, 4.0]  # 1 + 3
        assert got["labels"].tolist() == [0, 1, 10, 11, 12]  # unequal numbers of rows
        torch.testing.assert_close(got["gathered"], rows(), rtol=0, atol=0)
        torch.testing.assert_close(got["gathered_grad"], 3 * 2 * mine(number, 2))


def ddp_gradients(number: int) -> dict[str, Tensor]:
    """Gradients as DDP averages them, for the two kinds of losses that the module's docstring names."""
    out = {}
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    z = (mine(number) @ weight).tanh()
    everything = all_gather_rows(z)
    torch.logsumexp(everything @ everything.T, 1).mean().backward()
    out["same loss everywhere"] = _averaged(weight)
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    z = (mine(number) @ weight).tanh()
    torch.logsumexp(z @ all_gather_rows(z).T, 1).mean().backward()
    out["own rows"] = _averaged(weight)
    return out


def _averaged(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise ValueError("no gradient")
    dist.all_reduce(weight.grad)
    return weight.grad / 2


def test_averaged_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    global_loss(rows(), weight).backward()
    for got in on_two_ranks(ddp_gradients, tmp_path):
        torch.testing.assert_close(got["same loss everywhere"], weight.grad)
        torch.testing.assert_close(got["own rows"], weight.grad)


def test_identity_in_one_process() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    assert all_reduce_sum(x) is x
    assert all_reduce_mean(x) is x
    assert all_gather_rows(x) is x
    assert (rank(), world_size()) == (0, 1)
    with pytest.raises(ValueError, match="got a scalar"):
        all_gather_rows(torch.tensor(1.0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 4, 2),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 2),
        nn.BatchNorm1d(2, momentum=None),
    ).double()


def normalise(number: int, split: int) -> dict[str, Any]:
    net, x = convert_sync_batchnorm(network()), mine(number, split)
    out = {}
    for _ in range(2):
        net.zero_grad()
        y = net(x[:, None])
        # own rows' share of the mean over the global batch, so that ranks may hold different numbers of rows
        (y.pow(3).sum() / 12 * world_size()).backward()
    out["y"], out["state"] = y.detach(), net.state_dict()
    grads = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return out | {"grads": {name: grad / 2 for name, grad in grads.items()}, "eval": net.eval()(x[:, None]).detach()}


@pytest.mark.parametrize("split", [3, 1])
def test_batch_norm_over_two_ranks_is_that_of_one_process(split: int, tmp_path: Path) -> None:
    net = network()
    for _ in range(2):
        net.zero_grad()
        y = net(rows()[:, None])
        (y.pow(3).sum() / 12).backward()
    results = on_two_ranks(lambda number: normalise(number, split), tmp_path)
    torch.testing.assert_close(torch.cat([got["y"] for got in results]), y.detach())
    for got in results:
        torch.testing.assert_close(got["state"], dict(net.state_dict()))
        torch.testing.assert_close(got["grads"], {name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(torch.cat([got["eval"] for got in results]), net.eval()(rows()[:, None]).detach())


def test_conversion_keeps_parameters_and_can_be_undone() -> None:
    net = network()
    before = dict(net.named_parameters())
    plugin = GlobalBatchNormSync()
    converted = plugin.apply(net)
    assert [type(layer) for layer in converted][1] is GlobalBatchNorm
    assert all(parameter is before[name] for name, parameter in converted.named_parameters())
    torch.testing.assert_close(converted(rows()[:, None]), network()(rows()[:, None]))
    reverted = plugin.revert(converted)
    assert type(reverted[1]) is nn.BatchNorm1d  # type: ignore[index]
    assert reverted[5].momentum is None  # type: ignore[index]
    assert all(parameter is before[name] for name, parameter in reverted.named_parameters())
