"""FSDP2 for methods that do not know of it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn


def blocks(module: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return the modules to shard one by one, inner ones first: large members of a `ModuleList` or `Sequential`.

    Args:
        module: The whole model.
        min_parameters: Least number of parameters (with those of its parts) of a block.
    """
    found: list[nn.Module] = []
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            found += [m for m in parent.children() if sum(p.numel() for p in m.parameters()) >= min_parameters]
    return list(dict.fromkeys(reversed(found)))


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with FSDP2 (`fully_shard`) applied to any method, over all processes.

    Lightning asks every module for a `configure_model` that shards it. A module without one gets the usual: its large
    blocks and then the rest are sharded. A module that has one keeps it. Hooks of a module that mix its parameters with
    plain tensors (an EMA updated by hand) do not work on shards; torch then raises an error about `DTensor`.

    Args:
        min_parameters: Blocks below this size are sharded together with what surrounds them.
        save_distributed_checkpoint: Each process writes its part into a folder; else one file is assembled on rank 0.
    """

    def __init__(self, min_parameters: int = 1_000_000, save_distributed_checkpoint: bool = False) -> None:
        super().__init__(
            data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=save_distributed_checkpoint
        )
        self.min_parameters = min_parameters

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        module: Any = self.lightning_module
        if not is_overridden("configure_model", module):
            module.configure_model = self._shard

    def _shard(self) -> None:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        module: Any = self.lightning_module
        if getattr(module, "_zoo_sharded", False):  # the hook is called for each of fit, validate and test
            return
        module._zoo_sharded = True
        for tensor in [*module.parameters(), *module.buffers()]:  # as DDP does: rank 0's initial values
            dist.broadcast(tensor.detach(), 0)
        mesh = self.device_mesh["data_parallel"]
        for block in blocks(module, self.min_parameters):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        # Lightning calls the steps, not `forward`: they are what has to gather the parameters first
        for step in ("training_step", "validation_step", "test_step", "predict_step"):
            if is_overridden(step, module):
                register_fsdp_forward_method(module, step)
