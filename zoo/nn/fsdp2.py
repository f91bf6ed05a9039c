"""FSDP2 for methods that do not know of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.tensor import DTensor


def blocks(module: nn.Module, min_parameters: int) -> list[nn.Module]:
    """Return the modules to shard one by one, inner ones first: large members of a `ModuleList` or `Sequential`.

    A member without `forward` only holds parts that others call; it would not notice when to gather its parameters.

    Args:
        module: The whole model.
        min_parameters: Least number of parameters (with those of its parts) of a block.
    """
    found: list[nn.Module] = []
    for parent in module.modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            called = [m for m in parent.children() if type(m).forward is not nn.Module.forward]
            found += [m for m in called if sum(p.numel() for p in m.parameters()) >= min_parameters]
    return list(dict.fromkeys(reversed(found)))


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with FSDP2 (`fully_shard`) applied to any method, over all processes.

    Lightning asks every module for a `configure_model` that shards it. A module without one gets the usual: its large
    blocks and then the rest are sharded. A module that has one keeps it. Hooks of a module that mix its parameters with
    plain tensors, or call the network outside of a step, do not work on shards; torch then raises an error that names
    `DTensor`. `on_fit_end`, where methods write models, finds the parameters whole on rank 0.

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
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # shards of another memory format are not supported
        if self._layer_sync is not None:  # Lightning's strategy for sharded models leaves batch norm as it is
            self._layer_sync.apply(module)
        mesh = self.device_mesh["data_parallel"]
        for block in blocks(module, self.min_parameters):
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        # Lightning calls the steps, not `forward`: they are what has to gather the parameters first
        for step in ("training_step", "validation_step", "test_step", "predict_step"):
            if is_overridden(step, module):
                register_fsdp_forward_method(module, step)
        if is_overridden("on_fit_end", module):
            module.on_fit_end = _on_whole_parameters(module, module.on_fit_end)


def _on_whole_parameters(module: nn.Module, hook: Callable[[], None]) -> Callable[[], None]:
    """Wrap a hook so that rank 0 finds the whole parameters, on the CPU; the other processes keep their parts."""

    @wraps(hook)
    def call() -> None:
        sharded: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
        whole: dict[nn.Parameter, nn.Parameter] = {}  # parameters that two modules share stay shared
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if isinstance(parameter, DTensor):
                    if parameter not in whole:
                        value = parameter.full_tensor().detach()  # every process takes part
                        whole[parameter] = parameter if dist.get_rank() else nn.Parameter(value.cpu())
                    sharded.append((part._parameters, name, parameter))
        try:
            for held, name, parameter in sharded:
                held[name] = whole[parameter]
            hook()
        finally:
            for held, name, parameter in sharded:
                held[name] = parameter

    return call
