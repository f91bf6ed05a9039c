"""What the options of a cell do in a training step, and which way the schemes of communication are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zoo.methods.slm_bottlenecks import measure
from zoo.methods.slm_bottlenecks.costs import Shape
from zoo.methods.slm_bottlenecks.grid import Grid, expand, fill_row
from zoo.methods.slm_bottlenecks.measure import Effort, distribute
from zoo.methods.slm_bottlenecks.networks import CausalLM
from zoo.methods.slm_bottlenecks.studies import STUDIES

TINY = Shape(64, 32, 2, head_dim=16)
ONE_STEP = Effort(steps=1, warmup=0)


def test_ddp_is_compared_with_the_other_schemes_and_not_they_with_it() -> None:
    axes = {"size": ["small", "large"], "n_gpu": 2, "comm": ["ddp", "fsdp_full", "fsdp_grad_op"], "seq_len": 16}
    cells = tuple(expand(axes, "grid"))
    grid = Grid(cells, {"small": TINY, "large": TINY}, prices={"cpu": 1.0})
    # seconds of a step: small models like ddp, large ones do not
    seconds = {"small": {"ddp": 0.2, "fsdp_full": 0.5, "fsdp_grad_op": 0.3},
               "large": {"ddp": 0.4, "fsdp_full": 0.2, "fsdp_grad_op": 0.1}}  # fmt: skip
    rows = []
    for repeat, disturbed in enumerate((0.1, 0.0)):  # the undisturbed repeat counts
        for cell in cells:
            steps = [seconds[cell.size][cell.comm] + disturbed]
            rows.append(fill_row(cell, grid, repeat, {"status": "ok", "seconds": sum(steps), "step_seconds": steps}))
    assert STUDIES["comm"](rows, grid) == pytest.approx(
        {
            "ddp_over_fsdp_full_small": 2.5,
            "ddp_over_fsdp_grad_op_small": 1.5,
            "ddp_over_fsdp_full_large": 0.5,
            "ddp_over_fsdp_grad_op_large": 0.25,
        }
    )


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(module: nn.Module) -> set[bool]:
    """Whether the parameters are shards at this moment, each."""
    return {isinstance(parameter, DTensor) for parameter in module.parameters()}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("comm", ["fsdp_full", "fsdp_grad_op"])
def test_full_sharding_lets_parameters_go_after_the_forward_pass_and_gradient_sharding_keeps_them(comm: str) -> None:
    net = CausalLM(TINY, "sdpa")
    model = distribute(net, comm, torch.device("cpu"))
    parts = {"blocks": net.lm.model.layers, "embedding": net.lm.model.embed_tokens, "head": net.lm.lm_head}
    assert all(sharded(part) == {True} for part in parts.values())
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], ids[:, 1:])
    assert all(sharded(part) == {comm == "fsdp_full"} for part in parts.values())
    loss.backward()
    assert all(sharded(part) == {True} for part in parts.values())
    assert all(isinstance(parameter.grad, DTensor) for parameter in net.parameters())


PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_and_products_have_the_precision_of_the_cell(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    real, seen = CausalLM.forward, list[Any]()

    def forward(self: CausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
        seen.append(({parameter.dtype for parameter in self.parameters()}, self.logits(input_ids).dtype))
        return real(self, input_ids, labels)

    monkeypatch.setattr(CausalLM, "forward", forward)
    (cell,) = expand({"size": "tiny", "batch": 1, "seq_len": 8, "precision": precision}, "grid")
    measure.measure(cell, TINY, ONE_STEP)
    weights, products = PRECISIONS[precision]
    assert seen == [({weights}, products)]


def test_the_optimiser_is_fused_where_the_cell_says_so() -> None:
    cells = expand({"size": "tiny", "batch": 1, "seq_len": 8, "precision": "32-true", "fused": [True, False]}, "grid")
    seen: list[set[tuple[bool, bool]]] = []

    def look(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        seen.append({(group["fused"], group["foreach"]) for group in optimizer.param_groups})

    hook = register_optimizer_step_pre_hook(look)
    try:
        for cell in cells:
            measure.measure(cell, TINY, ONE_STEP)
    finally:
        hook.remove()
    assert seen == [{(True, False)}, {(False, True)}]
