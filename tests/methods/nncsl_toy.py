"""A small NNCSL, batches of noise for it, and the arms of its claims."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.methods.nncsl.module import NNCSL

SUPERVISED: dict[str, Any] = {"w_paws": 0.0, "w_me": 0.0, "w_dist": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "nncsl": {},
    "csl": {"w_dist": 0.0},
    "csl_logit_kd": {"distill": "logits"},
    "csl_feat_kd": {"alpha": 1.0},
    "paws": {"w_dist": 0.0, "mask": False, "detach": True},
    "paws_attached": {"w_dist": 0.0, "mask": False},
    "er": SUPERVISED,
    "derpp": {**SUPERVISED, "w_replay": 0.5},
    "finetune": {**SUPERVISED, "bn_after_first_task": "train"},
}


def make_model(**changes: Any) -> NNCSL:
    arguments: dict[str, Any] = {"num_classes": 6, "num_tasks": 3, "in_channels": 1, "projector": [8, 8]}
    arguments |= {"backbone": {"name": "small_conv", "channels": [4, 8]}, "optimizer": "sgd", "lr": 0.05}
    arguments |= {"start_lr": 0.01, "final_lr": 0.001, "warmup_steps": 2, "w_lin": 1.0, "w_dist": 1.0}
    torch.manual_seed(0)
    return NNCSL(**(arguments | changes))


def make_batch(task: int, step: int = 0, seed: int = 0, small: int = 1) -> dict[str, Any]:
    """Noise in the form of a batch: 4 unlabelled images, 2 supports of each seen class in 2 views."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(2 * (task + 1)).repeat(2)
    return {
        "task": task,
        "step": step,
        "steps": 10,
        "views": [torch.randn(4, 1, size, size, generator=generator) for size in [8, 8] + [6] * small],
        "supports": [torch.randn(len(y), 1, 8, 8, generator=generator) for _ in range(2)],
        "support_y": y,
        "support_index": 100 + torch.arange(len(y)),
        "exemplars": torch.randn(4 if task and not step else 0, 1, 8, 8, generator=generator),
        "exemplar_index": 100 + torch.arange(4 if task and not step else 0),
    }


def step(model: NNCSL, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses of one batch by name, without an update of the weights; `total` has the gradient."""
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    total = model.training_step(batch, 0)  # type: ignore[arg-type]
    return {"total": total} | {key.removeprefix("train/"): value for key, value in logged.items()}


def in_second_task(**changes: Any) -> NNCSL:
    """A model in its second task whose teacher has other weights than the student."""
    model = make_model(**changes)
    step(model, make_batch(0, seed=1))
    step(model, make_batch(1, seed=2))
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def disturbed(batch: dict[str, Any], old: bool) -> dict[str, Any]:
    """The batch with other images of old (or of new) classes among the supports."""
    rows = (batch["support_y"] < 2) == old
    supports = [torch.where(rows[:, None, None, None], view.flip(0) + 1, view) for view in batch["supports"]]
    return {**batch, "supports": supports}
