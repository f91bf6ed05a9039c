"""Supervised fine-tuning of a causal language model on demonstrations, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from zoo.card import Card
from zoo.methods.salsa.networks import (
    StartsFrom,
    add_adapters,
    base_fingerprint,
    check_tokens,
    no_dropout,
    positions,
)
from zoo.nn.distributed import all_reduce_sum, world_size
from zoo.nn.lm import IGNORE, build_lm, token_logprobs
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import linear_ramp, total_steps, warmup_cosine

SCHEDULES = ("constant", "linear", "cosine")


class SFT(StartsFrom):
    """Maximise the likelihood of answers given prompts; without prompts, of texts.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a pre-trained model.
        init_from: Model that the training starts from: a checkpoint of this method, a folder or a hub name.
        dropout: Whether the model keeps the dropout of its configuration.
        lora_rank: Rank of low-rank adapters; 0 trains all weights.
        lora_alpha: Scale of the adapters times their rank.
        lora_targets: Names of the layers with adapters; none for all linear layers but the head.
        lr: Peak learning rate of AdamW.
        betas: Its momenta.
        weight_decay: Weight decay of matrices.
        schedule: Learning rate after the warm-up: `constant`, `linear` or `cosine` to zero.
        warmup_steps: Steps of linear warm-up.
        vocab_size: Number of tokens, from the data.
        eos_id: Token that ends a text, from the data.
        pad_id: Token that fills rows, from the data.

    Raises:
        ValueError: If a value is out of range, or the data have no end token of its own.
    """

    card = Card(
        title="Supervised fine-tuning of language models on demonstrations",
        summary="Fine-tune a language model on demonstrations: the first stage of RLHF, a member of a soup",
        arxiv="2203.02155",
        year=2022,
        batch="datamodules.preferences_batches.SFTBatch",
        kind="language, alignment",
        links={"vocab_size": "vocab_size", "eos_id": "eos_id", "pad_id": "pad_id"},
    )

    def __init__(
        self,
        lm: str | dict[str, Any],
        init_from: str | None = None,
        dropout: bool = False,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        super().__init__()
        check_tokens(eos_id, pad_id)
        check_training(lr, lora_rank, schedule)
        self.save_hyperparameters()
        lm_ = build_lm(lm, vocab_size)
        self.lm = add_adapters(lm_ if dropout else no_dropout(lm_), lora_rank, lora_alpha, lora_targets).train()
        self.base = ""
        self.loss, self.acc = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        """Load `init_from` before training."""
        if stage == "fit":
            self.load_start(self.lm)
            self.base = base_fingerprint(self.lm)

    def logprobs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the next tokens, whether each counts, whether it is the most likely; `[B, S - 1]`."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        labels = batch["labels"][:, 1:]
        return token_logprobs(logits[:, :-1], labels), labels != IGNORE, logits[:, :-1].argmax(dim=-1) == labels

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Negative log-likelihood of each token that counts, their mean over the batch of all processes."""
        logprobs, counts, _ = self.logprobs(batch)
        total = all_reduce_sum(counts.sum().float())
        loss = -logprobs.sum() * world_size() / total.clamp(min=1)
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=False)
        return loss

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str) -> None:
        logprobs, counts, hits = self.logprobs(batch)
        if not bool(counts.any()):
            return
        self.loss(-logprobs[counts])
        self.acc(hits[counts].float())
        values = {f"{stage}/loss": self.loss, f"{stage}/acc": self.acc}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(logprobs))

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log the loss per token in nats, and the share of tokens that were the most likely."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same on the test part."""
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and the schedule."""
        return adamw(self, self.lm.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the model was fine-tuned from, so that soups can tell."""
        checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        self.base = checkpoint.get("base", "")


def check_training(lr: float, lora_rank: int, schedule: str) -> None:
    """Raise `ValueError` if one of the options that the methods share is out of range."""
    if lr <= 0:
        raise ValueError(f"lr: {lr} is not accepted; accepted: above 0")
    if lora_rank < 0:
        raise ValueError(f"lora_rank: {lora_rank} is not accepted; accepted: 0 (all weights) or more")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is unknown; accepted: {', '.join(SCHEDULES)}")


def adamw(module: Any, parameters: Any) -> dict[str, Any]:
    """AdamW by the module's `lr`, `betas` and `weight_decay`, with its warm-up and schedule."""
    hp, steps = module.hparams, total_steps(module.trainer)
    optimizer = torch.optim.AdamW(decay_groups(parameters, hp["weight_decay"]), lr=hp["lr"], betas=tuple(hp["betas"]))

    def factor(step: int) -> float:
        warmup = hp["warmup_steps"]
        if hp["schedule"] == "cosine" or step < warmup:
            return warmup_cosine(step, steps, warmup)
        return 1.0 if hp["schedule"] == "constant" else linear_ramp(step - warmup, max(steps - warmup, 1), 1.0, 0.0)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
