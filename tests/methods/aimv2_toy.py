"""A tiny AIMv2 and batches of noise for its tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from zoo.methods.aimv2.module import AIMv2

VOCAB, PAD, EOS = 12, 0, 1


def make_model(**changes: Any) -> AIMv2:
    arguments: dict[str, Any] = {"vocab_size": VOCAB, "pad_id": PAD, "eos_id": EOS, "context_length": 6}
    arguments |= {"in_channels": 1, "image_size": 12, "lr": 3e-3, "warmup_steps": 2}
    arguments |= {"trunk": {"patch_size": 3, "width": 16, "depth": 2, "heads": 2, "multiple_of": 16}}
    arguments |= {"decoder": {"width": 16, "depth": 2, "heads": 2, "multiple_of": 16, "mlp_width": 8, "mlp_depth": 2}}
    arguments |= {"text_tower": {"width": 16, "depth": 2, "heads": 2, "embed_dim": 8, "multiple_of": 16}}
    torch.manual_seed(0)
    return AIMv2(**(arguments | changes))


def make_batch(n: int = 5, seed: int = 0, size: int = 12) -> dict[str, Tensor]:
    """Noise images with captions of 2 to 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(2, VOCAB, (n, 5), generator=generator)
    length = torch.arange(n) % 4 + 1
    text[torch.arange(n), length] = EOS
    text[torch.arange(5) > length[:, None]] = PAD
    image = torch.randn(n, 1, size, size, generator=generator)
    return {"image": image, "text": text, "target": torch.arange(n) % 3 - 1}


def step(model: AIMv2, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses of one batch by name; `total` has the gradient. Prefix lengths follow from a fixed seed."""
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    torch.manual_seed(7)
    total = model.training_step(batch, 0)
    return {"total": total} | {key.removeprefix("train/"): value for key, value in logged.items()}


def gradient_of(model: AIMv2, start: str) -> Tensor:
    found = [p.grad for name, p in model.named_parameters() if name.startswith(start)]
    assert found, start
    return torch.stack([torch.zeros(()) if g is None else g.abs().max() for g in found]).max()


def begin(model: AIMv2) -> AIMv2:
    """Load what `init_from` names, as a trainer does."""
    model._trainer = SimpleNamespace(ckpt_path=None)  # type: ignore[assignment]
    model.setup("fit")
    return model


def quiet_trainer(**changes: Any) -> Trainer:
    """A trainer on the CPU that writes nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    return Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **changes)


def save(model: AIMv2, path: Path) -> str:
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)
