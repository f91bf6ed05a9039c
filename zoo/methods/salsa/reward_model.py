"""A reward model trained on preferences, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from zoo.card import Card
from zoo.methods.salsa.finetuning import FineTuning
from zoo.methods.salsa.losses import bradley_terry
from zoo.methods.salsa.networks import ScalarModel
from zoo.nn.distributed import all_reduce_sum
from zoo.nn.schedules import total_steps


class RewardModel(FineTuning):
    """Learn a scalar for each answer so that preferred answers have the larger one (Bradley-Terry).

    After the last step the rewards are shifted so that demonstrations have mean 0: those of the datamodule's
    `demonstration_batches()` where it has them, else the preferred answers of `shift_batches` training batches.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a pre-trained model.
        init_from: Model that the training starts from: a checkpoint of `sft`, a folder or a hub name.
        shift_batches: Training batches for the shift; unused where the data have demonstrations. 0 for no shift.
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
        title="Learning to summarize from human feedback: reward models",
        summary="Train a reward model on pairs of answers: the second stage of RLHF",
        arxiv="2009.01325",
        year=2020,
        batch="datamodules.preferences_batches.PreferenceBatch",
        kind="language, alignment",
        links={"vocab_size": "vocab_size", "eos_id": "eos_id", "pad_id": "pad_id"},
    )

    shift: Tensor

    def __init__(
        self,
        lm: str | dict[str, Any],
        init_from: str | None = None,
        shift_batches: int = 8,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "linear",
        warmup_steps: int = 0,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        super().__init__(metrics=("loss", "acc", "gap"))
        if shift_batches < 0:
            raise ValueError(f"shift_batches: {shift_batches} is not accepted; accepted: 0 (no shift) or more")
        self.save_hyperparameters()
        self.net = ScalarModel(self.build(dropout=False)).train()
        self.register_buffer("shift", torch.zeros(()))

    @property
    def language_model(self) -> Any:
        """The model that is trained, below the head."""
        return self.net.lm

    def rewards(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rewards of the preferred and of the other answers, each `[B]`, not shifted."""
        chosen = self.net.score(batch["chosen_ids"], batch["chosen_mask"])
        return chosen, self.net.score(batch["rejected_ids"], batch["rejected_mask"])

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Bradley-Terry loss of the pairs."""
        chosen, rejected = self.rewards(batch)
        loss = bradley_terry(chosen, rejected).mean()
        acc = (chosen > rejected).float().mean()
        self.log_dict({"train/loss": loss.detach(), "train/acc": acc}, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Set the shift when the last step is done."""
        if self.global_step >= total_steps(self.trainer) and self.hparams["shift_batches"]:
            # under FSDP2 only calls that it knows of gather the weights; without it this does nothing
            register_fsdp_forward_method(self, "score")
            self.set_shift()

    def score(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Reward of each text `[B]`, not shifted."""
        return self.net.score(input_ids, mask)

    @torch.no_grad()
    def set_shift(self) -> None:
        """Make the mean reward of the demonstrations 0."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "demonstration_batches"):
            batches, keys = data.demonstration_batches(), ("input_ids", "attention_mask")
            batches.rank, batches.world_size = self.global_rank, self.trainer.world_size
            count = len(batches)
        else:
            batches, keys = self.trainer.train_dataloader.dataset, ("chosen_ids", "chosen_mask")  # type: ignore[union-attr]
            count = min(self.hparams["shift_batches"], len(batches))
        total = torch.zeros(2, device=self.device)
        for index in range(count):
            batch = self.transfer_batch_to_device(batches.batch(0, index), self.device, 0)
            rewards = self.score(batch[keys[0]], batch[keys[1]])
            total += torch.stack([rewards.sum(), torch.tensor(float(len(rewards)), device=self.device)])
        total = all_reduce_sum(total)
        self.shift.copy_(total[0] / total[1])

    def measured(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each pair, whether it is in the right order, and the difference of its rewards; each `[B]`."""
        chosen, rejected = self.rewards(batch)
        right = (chosen > rejected).float()
        return {"loss": bradley_terry(chosen, rejected), "acc": right, "gap": chosen - rejected}
