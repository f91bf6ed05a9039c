"""Batch norm over the rows of all ranks, on any backend.

`torch.nn.SyncBatchNorm` refuses tensors on a CPU. The layer here works on gloo as well; it is also exact when ranks
hold different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.nn.distributed import all_reduce_sum, is_distributed


class GlobalBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are those of the global batch; `[n, C, ...]`, the same as `nn.BatchNorm*d`.

    Gradients pass through the statistics to the rows of all ranks; DDP's mean of them is the single-process gradient,
    see `zoo.nn.distributed`. Without a process group, and in evaluation mode, it is plain batch norm.
    """

    #: Class of the layer it was made from.
    original: type[_BatchNorm] = nn.BatchNorm1d

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch norm expects [n, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[n, C, ...]` per channel.

        Raises:
            ValueError: In training, if the global batch has a single value per channel.
        """
        uses_batch = self.training or self.running_mean is None
        if not (uses_batch and is_distributed()):
            return super().forward(input)
        self._check_input_dim(input)
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        rows = x.new_tensor([x.numel() // x.shape[1]])
        # two rounds, mean first: the variance as E x^2 - (E x)^2 would lose its digits
        total = all_reduce_sum(torch.cat([x.sum(dims), rows]))
        count = total[-1].detach()
        if self.training and count <= 1:
            raise ValueError(f"expected more than 1 value per channel over all ranks, got {list(input.shape)} on each")
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = all_reduce_sum(centred.square().sum(dims)) / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


def _replaced(layer: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    new = kind(layer.num_features, layer.eps, layer.momentum, affine=False, track_running_stats=False)
    new.affine, new.track_running_stats = layer.affine, layer.track_running_stats
    # the very same tensors: an optimiser or a tied layer may hold them
    new._parameters, new._buffers = layer._parameters, layer._buffers
    new.train(layer.training)
    return new


def _convert(module: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    out = change(module)
    for name, child in out.named_children():
        setattr(out, name, _convert(child, change))
    return out


def convert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every `BatchNorm*d` in `module` by one over the global batch; the parameters stay the same objects.

    Where ranks talk over NCCL torch's own fused layer is used, elsewhere `GlobalBatchNorm`.
    """
    if is_distributed() and dist.get_backend() == "nccl":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def change(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            return layer
        new = _replaced(layer, GlobalBatchNorm)
        new.original = type(layer)  # type: ignore[assignment]
        return new

    return _convert(module, change)


class GlobalBatchNormSync(TorchSyncBatchNorm):
    """Lightning plugin for `trainer.plugins`: batch norm over the global batch, on CPU too.

    `trainer.sync_batchnorm: true` alone takes torch's layer, which works on CUDA only; with this plugin it may be on or
    left out.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        return convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        def change(layer: nn.Module) -> nn.Module:
            return _replaced(layer, layer.original) if isinstance(layer, GlobalBatchNorm) else layer

        return super().revert(_convert(model, change))
