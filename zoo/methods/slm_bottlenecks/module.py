"""Training of small language models with the levers of the cost study as options, and its studies as tests."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.card import Card
from zoo.errors import UsageError, did_you_mean
from zoo.methods.slm_bottlenecks.costs import SIZES, Shape, flops_per_token
from zoo.methods.slm_bottlenecks.grid import COLUMNS, Grid, read_grid, run_grid
from zoo.methods.slm_bottlenecks.losses import LossLaw, fit_loss_law
from zoo.methods.slm_bottlenecks.networks import CausalLM, build_adamw
from zoo.methods.slm_bottlenecks.planner import leave_one_out
from zoo.methods.slm_bottlenecks.published import published_rows
from zoo.methods.slm_bottlenecks.reduce import over_repeats
from zoo.methods.slm_bottlenecks.studies import STUDIES
from zoo.nn.distributed import world_size
from zoo.nn.lm import IGNORE
from zoo.nn.schedules import total_steps, warmup_cosine_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Points of a validation curve that a law is fitted to at least.
LAW_POINTS = 4


class SLMBottlenecks(LightningModule):
    """Pre-training of Llama-style models of 100M to 2B parameters, as the paper's study of its cost does it.

    What is spread over devices and how is the strategy's affair: `hardware/ddp`, or `hardware/fsdp2` with
    `reshard_after_forward` true (full sharding) or false (gradients and optimiser).

    Args:
        vocab_size: Number of tokens; from the data.
        size: `100m`, `500m`, `1b` or `2b`: the paper's width, depth and MLP; empty for those below.
        width: Hidden size.
        depth: Number of blocks.
        intermediate: Hidden size of the MLP; 0 for 2.7 times the width.
        head_dim: Size of an attention head.
        attention: `eager` (scores as a tensor), `flash`, `efficient`, or `sdpa` (PyTorch's choice).
        compile: Whether the model is compiled.
        fused: Whether the optimiser is one kernel.
        loss_chunks: Chunks of the cross-entropy, so that the logits never exist at once; 0 for none.
        checkpointing: Whether activations are computed again in the backward pass instead of kept.
        lr: Peak learning rate.
        betas: Momenta of AdamW.
        weight_decay: Weight decay of matrices.
        warmup_steps: Steps of linear warm-up; a cosine to a tenth follows.
        save_pretrained: Folder in the run directory that takes the trained model in the format of `transformers`;
            empty for none.
        study: What `test` measures besides the loss: `attention`, `batch`, `comm`, `levers` or `planner` on the cells
            of `grid`, each in a process of its own; `replay`: the paper's findings on its own points. Empty for none.
        grid: The cells of a study, see `zoo.methods.slm_bottlenecks.grid.read_grid`.

    Raises:
        ValueError: If a value is out of range or two do not go together.

    Departures:
        The paper does not say optimiser, learning rate or data: AdamW and a usual schedule. Its table's width of 864
        for 100M does not give its number of parameters; 832 does.
    """

    card = Card(
        title="Computational Bottlenecks of Training Small-scale Large Language Models",
        summary="What training a small language model costs: attention, batch, hardware, sharding; a planner",
        arxiv="2410.19456",
        year=2024,
        batch="datamodules.text.TextBatch",
        kind="language, training cost",
        links={"vocab_size": "vocab_size"},
        check="zoo.methods.slm_bottlenecks.checks:check_options",
        compiles=True,
        search={
            "lr": {"min": 1e-4, "max": 1e-2, "log": True},
            "weight_decay": {"values": [0.0, 0.03, 0.1, 0.3]},
            "warmup_steps": {"values": [0, 20, 50]},
        },
        objective="minimize val/loss",
    )

    def __init__(
        self,
        vocab_size: int = 32000,
        size: str = "",
        width: int = 128,
        depth: int = 2,
        intermediate: int = 0,
        head_dim: int = 64,
        attention: str = "sdpa",
        compile: bool = False,
        fused: bool = True,
        loss_chunks: int = 0,
        checkpointing: bool = False,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int = 0,
        save_pretrained: str = "",
        study: str = "",
        grid: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if size and size not in SIZES:
            raise ValueError(f"size: {size!r} is not accepted; {did_you_mean(size, SIZES)}")
        if study and study not in STUDIES:
            raise ValueError(f"study: {study!r} is not accepted; {did_you_mean(study, STUDIES)}")
        if (grid is None) == (study not in ("", "replay")):
            raise ValueError(f"grid: {'missing' if grid is None else 'given'} with study {study!r}; it goes with "
                             "attention, batch, comm, levers and planner")  # fmt: skip
        if loss_chunks < 0:
            raise ValueError(f"loss_chunks: {loss_chunks} is not accepted; accepted: 0 or more")
        own = Shape(vocab_size, width, depth, intermediate, head_dim)
        self.shape = replace(SIZES[size], vocab_size=vocab_size) if size else own
        self.grid: Grid | None = None
        if grid is not None:
            try:
                self.grid = read_grid(grid, "grid", here=False)  # the device is looked for when it is measured
            except UsageError as error:
                raise ValueError(str(error)) from error
        self.net = CausalLM(self.shape, attention, loss_chunks, checkpointing)
        if compile:
            self.net.compile()
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.tokens_seen: Tensor
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        #: Validation: tokens seen and loss.
        self.curve: list[tuple[float, float]] = []
        self.rows: list[dict[str, Any]] = []
        self.flops_per_batch = 0
        self._last: float | None = None
        self.save_hyperparameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of tokens `[B, T]`."""
        return self.net.logits(input_ids)

    def setup(self, stage: str) -> None:
        """A study measures the machine, which no other process of this run may use."""
        if self.hparams["study"] and self.trainer.world_size > 1:
            raise UsageError(
                f"study: {self.hparams['study']!r} in a run of {self.trainer.world_size} processes", "one is accepted"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the next tokens; speed is counted from step to step, without waiting for the device."""
        loss = self.net(batch["input_ids"], batch["labels"])
        tokens = batch["input_ids"].numel()
        self.flops_per_batch = tokens * flops_per_token(self.shape, batch["input_ids"].shape[1])
        self.tokens_seen += tokens * world_size()
        logged: dict[str, Any] = {"train/loss": loss.detach()}
        now = time.perf_counter()
        if self._last is not None:
            logged["train/tokens_per_second"] = tokens * world_size() / (now - self._last)
        self._last = now
        self.log_dict(logged, on_step=True, on_epoch=False)
        return loss

    def _evaluate(self, name: str, metric: MeanMetric, batch: Mapping[str, Tensor]) -> None:
        loss = self.net(batch["input_ids"], batch["labels"])
        metric.update(loss.float(), (batch["labels"] != IGNORE).sum())
        self.log(name, metric, on_step=False, on_epoch=True)

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Collect the loss, weighted by tokens."""
        self._evaluate("val/loss", self.val_loss, batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Collect the loss, weighted by tokens."""
        self._evaluate("test/loss", self.test_loss, batch)

    def on_validation_epoch_end(self) -> None:
        """Add a point to the curve."""
        self._last = None
        if not self.trainer.sanity_checking and self.trainer.state.fn == "fit":
            self.curve.append((float(self.tokens_seen), float(self.val_loss.compute())))

    def on_test_epoch_end(self) -> None:
        """Log the law of the validation curve, and the numbers of the study."""
        metrics: dict[str, float] = {}
        law = self.law()
        if law is not None:
            metrics = {"law_floor": law.floor, "law_scale": law.scale, "law_exponent": law.exponent}
        if self.hparams["study"]:
            metrics |= self.run_study()
        self.log_dict({f"test/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def law(self) -> LossLaw | None:
        """Law of the validation curve, None if it is too short."""
        return fit_loss_law(*zip(*self.curve, strict=True)) if len(self.curve) >= LAW_POINTS else None

    def run_study(self) -> dict[str, float]:
        """Measure the grid (what a killed test has measured is taken over) and return the numbers of the study."""
        study = STUDIES[self.hparams["study"]]
        if self.hparams["grid"] is None:
            self.rows = published_rows()
            return study(self.rows, Grid((), {}))
        self.grid = read_grid(self.hparams["grid"], "grid")
        self.rows = run_grid(self.grid, Path(self.trainer.default_root_dir) / "cells.csv")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("cells", columns=list(COLUMNS), data=[list(row.values()) for row in self.rows])
        return study(self.rows, self.grid)

    def on_fit_end(self) -> None:
        """Write the model for `transformers`."""
        folder = self.hparams["save_pretrained"]
        if folder and self.trainer.is_global_zero:
            self.net.lm.save_pretrained(Path(self.trainer.default_root_dir) / folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the validation curve."""
        checkpoint["slm_curve"] = [list(point) for point in self.curve]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the validation curve."""
        self.curve = [(float(tokens), float(loss)) for tokens, loss in checkpoint["slm_curve"]]

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices alone, linear warm-up, cosine to a tenth."""
        hparams = self.hparams
        optimizer = build_adamw(self.net, hparams["lr"], tuple(hparams["betas"]), hparams["weight_decay"],
                                hparams["fused"])  # fmt: skip
        scheduler = warmup_cosine_lr(optimizer, total_steps(self.trainer), hparams["warmup_steps"], final=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def figures(self) -> dict[str, Figure]:
        """The loss curve with its law; for a study the paper's figures of its rows, and the planner's check."""
        from zoo.methods.slm_bottlenecks.figures import loss_figure, paper_figures, planner_figure

        out = {"loss": loss_figure(self.curve, self.law())} if self.curve else {}
        if not self.rows:
            return out
        out |= paper_figures(over_repeats(self.rows) if self.grid else self.rows)
        if self.hparams["study"] == "planner" and self.grid is not None:
            out["planner"] = planner_figure(leave_one_out(self.rows, self.grid.shapes))
        return out
