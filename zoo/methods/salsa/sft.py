"""Supervised fine-tuning of a causal language model on demonstrations, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.card import Card
from zoo.methods.salsa.finetuning import FineTuning
from zoo.methods.salsa.networks import base_fingerprint, positions
from zoo.nn.distributed import all_reduce_sum, world_size
from zoo.nn.lm import IGNORE, token_logprobs


class SFT(FineTuning):
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
        super().__init__(metrics=("loss", "acc"))
        self.save_hyperparameters()
        self.lm = self.build(dropout)
        self.base = ""

    @property
    def language_model(self) -> Any:
        """The model that is trained."""
        return self.lm

    def setup(self, stage: str) -> None:
        """Load `init_from` before training, and remember what it was."""
        super().setup(stage)
        if stage == "fit":
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

    def measured(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of each token that counts in nats, and whether it was the most likely; each `[N]`."""
        logprobs, counts, hits = self.logprobs(batch)
        return {"loss": -logprobs[counts], "acc": hits[counts].float()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the model was fine-tuned from, so that soups can tell."""
        checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it."""
        self.base = checkpoint.get("base", "")
