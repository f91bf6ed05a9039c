"""A zoo of research methods for PyTorch Lightning, launched from one command line and open to plugins.

What a plugin may import is what this module names (`docs/api.md`); the rest may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from datamodules.images import ImageBatch, SemiSupervisedBatch
    from datamodules.loading import (
        Batches,
        ResumableLoader,
        ZooDataModule,
        cycled_order,
        epoch_permutation,
        keyed_generator,
    )
    from zoo.api import run
    from zoo.card import ZOO_API, Card
    from zoo.errors import UsageError, did_you_mean
    from zoo.nn.distributed import all_gather_rows, all_reduce_mean, all_reduce_sum, rank, world_size
    from zoo.nn.ema import ema_update, frozen_copy
    from zoo.nn.optim import build_optimizer, decay_groups
    from zoo.nn.schedules import total_steps, warmup_cosine_lr
    from zoo.runs import RunResult
    from zoo.testing.run import check_method

#: Public name -> module that defines it; imported when first asked for, so that `import zoo` stays light.
_PUBLIC = {
    "Batches": "datamodules.loading",
    "Card": "zoo.card",
    "ImageBatch": "datamodules.images",
    "ResumableLoader": "datamodules.loading",
    "RunResult": "zoo.runs",
    "SemiSupervisedBatch": "datamodules.images",
    "UsageError": "zoo.errors",
    "ZOO_API": "zoo.card",
    "ZooDataModule": "datamodules.loading",
    "all_gather_rows": "zoo.nn.distributed",
    "all_reduce_mean": "zoo.nn.distributed",
    "all_reduce_sum": "zoo.nn.distributed",
    "build_optimizer": "zoo.nn.optim",
    "check_method": "zoo.testing.run",
    "cycled_order": "datamodules.loading",
    "decay_groups": "zoo.nn.optim",
    "did_you_mean": "zoo.errors",
    "ema_update": "zoo.nn.ema",
    "epoch_permutation": "datamodules.loading",
    "frozen_copy": "zoo.nn.ema",
    "keyed_generator": "datamodules.loading",
    "rank": "zoo.nn.distributed",
    "run": "zoo.api",
    "total_steps": "zoo.nn.schedules",
    "warmup_cosine_lr": "zoo.nn.schedules",
    "world_size": "zoo.nn.distributed",
}

__all__ = [
    "ZOO_API",
    "Batches",
    "Card",
    "ImageBatch",
    "ResumableLoader",
    "RunResult",
    "SemiSupervisedBatch",
    "UsageError",
    "ZooDataModule",
    "all_gather_rows",
    "all_reduce_mean",
    "all_reduce_sum",
    "build_optimizer",
    "check_method",
    "cycled_order",
    "decay_groups",
    "did_you_mean",
    "ema_update",
    "epoch_permutation",
    "frozen_copy",
    "keyed_generator",
    "rank",
    "run",
    "total_steps",
    "warmup_cosine_lr",
    "world_size",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        if not _PUBLIC[name].startswith("zoo."):
            from zoo import registry

            registry.claim_packages()
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
