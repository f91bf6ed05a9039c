"""What supervised fine-tuning and reward models share: where they start, how they are optimised and evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.errors import UsageError
from zoo.methods.salsa.networks import add_adapters, check_tokens, no_dropout, start_from
from zoo.nn.lm import build_lm
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import linear_ramp, total_steps, warmup_cosine

SCHEDULES = ("constant", "linear", "cosine")


class FineTuning(LightningModule):
    """A language model that is trained from `init_from` with AdamW; losses and their metrics are the subclass's.

    The subclass saves its options as `hparams` and gives the model by `language_model`. Lightning restores a checkpoint
    after `setup`: a resumed run has its weights from there, and needs no other file.

    Args:
        metrics: Names of what `measured` returns.
    """

    def __init__(self, metrics: Iterable[str]) -> None:
        super().__init__()
        self._missing = ""
        self.metrics = nn.ModuleDict({name: MeanMetric() for name in metrics})

    @property
    def language_model(self) -> Any:
        """The model, adapters and all."""
        raise NotImplementedError

    def measured(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of held-out rows or tokens, of which the means are logged; each `[N]`, `N` may be 0."""
        raise NotImplementedError

    def build(self, dropout: bool) -> Any:
        """Make the model that the options ask for, ready to be trained.

        Raises:
            ValueError: If an option is out of range, or the data have no end token of its own.
        """
        hp = self.hparams
        check_tokens(hp["eos_id"], hp["pad_id"])
        if hp["lr"] <= 0:
            raise ValueError(f"lr: {hp['lr']} is not accepted; accepted: above 0")
        if hp["lora_rank"] < 0:
            raise ValueError(f"lora_rank: {hp['lora_rank']} is not accepted; accepted: 0 (all weights) or more")
        if hp["schedule"] not in SCHEDULES:
            raise ValueError(f"schedule: {hp['schedule']!r} is unknown; accepted: {', '.join(SCHEDULES)}")
        model: Any = build_lm(hp["lm"], hp["vocab_size"])
        if not dropout:
            model = no_dropout(model)
        return add_adapters(model, hp["lora_rank"], hp["lora_alpha"], hp["lora_targets"]).train()

    def setup(self, stage: str) -> None:
        """Load `init_from` before training."""
        spec, self._missing = self.hparams["init_from"], ""
        if stage != "fit" or not spec:
            return
        if spec.endswith(".ckpt") and not Path(spec).expanduser().is_file():
            self._missing = spec
        else:
            start_from(self.language_model, spec, self.hparams["vocab_size"])

    def on_fit_start(self) -> None:
        """Refuse to start without the model to start from."""
        if self._missing and not self.trainer.ckpt_path:
            raise UsageError(f"init_from: there is no checkpoint {self._missing}")

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        found = self.measured(batch)
        for name, values in found.items():
            if len(values):
                self.metrics[name](values)
        logged: dict[str, Any] = {f"{stage}/{n}": self.metrics[n] for n, values in found.items() if len(values)}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(next(iter(batch.values()))))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log means over the held-out rows."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same on the test part."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and the schedule."""
        hp, steps = self.hparams, total_steps(self.trainer)
        groups = decay_groups(self.parameters(), hp["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], betas=tuple(hp["betas"]))

        def factor(step: int) -> float:
            warmup = hp["warmup_steps"]
            if hp["schedule"] == "cosine" or step < warmup:
                return warmup_cosine(step, steps, warmup)
            return 1.0 if hp["schedule"] == "constant" else linear_ramp(step - warmup, max(steps - warmup, 1), 1.0, 0.0)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
