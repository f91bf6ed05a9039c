"""Synthetic batches of the shape that Suave and Daino train on: classes are blobs at different places."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

TINY: dict[str, Any] = {
    "num_classes": 4,
    "in_channels": 1,
    "backbone": {"name": "small_conv", "channels": [8, 16]},
    "hidden_dim": 16,
    "embed_dim": 8,
    "optimizer": "sgd",
    "lr": 0.1,
    "final_lr": 0.01,
    "weight_decay": 1e-4,
}


def images(target: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Noisy images whose bright quadrant is the class."""
    x = 0.3 * torch.randn(len(target), 1, size, size, generator=generator)
    half = size // 2
    for i, c in enumerate(target.tolist()):
        x[i, :, (c // 2) * half : (c // 2 + 1) * half, (c % 2) * half : (c % 2 + 1) * half] += 1.0
    return x


def make_batch(
    seed: int = 0, unlabelled: int = 16, labelled: int = 8, sizes: tuple[int, ...] = (12, 12)
) -> dict[str, Any]:
    """One batch; `sizes` gives the views' sizes in pixels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(4, (unlabelled,), generator=generator)
    target = torch.arange(labelled) % 4
    return {
        "views": [images(hidden, size, generator) for size in sizes],
        "labelled": images(target, sizes[0], generator),
        "target": target,
        "unlab_target": hidden,
    }


class Batches(Dataset[Any]):
    """`count` different training batches, or evaluation batches."""

    def __init__(self, count: int, evaluate: bool = False, **options: Any) -> None:
        self.count, self.evaluate, self.options = count, evaluate, options

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = make_batch(seed=index + (1000 if self.evaluate else 0), **self.options)
        return {"image": batch["views"][0], "target": batch["unlab_target"]} if self.evaluate else batch


def loader(count: int, evaluate: bool = False, **options: Any) -> DataLoader[Any]:
    """Loader of ready-made batches."""
    return DataLoader(Batches(count, evaluate, **options), batch_size=None)


def trainer(steps: int, **options: Any) -> Trainer:
    """A quiet trainer on the CPU."""
    return Trainer(
        **{
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )
