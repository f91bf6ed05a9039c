"""Random tokens for measurements of speed, which does not depend on what is read."""

from __future__ import annotations

import torch

from datamodules.loading import ResumableLoader, ZooDataModule, keyed_generator
from datamodules.text import TextBlocks


class SyntheticTokens(ZooDataModule):
    """Uniformly random tokens, made before the training; batches are `TextBatch`.

    Args:
        vocab_size: Number of tokens.
        seq_len: Tokens of a sequence.
        batch_size: Sequences in a (global) batch.
        num_batches: Batches of an epoch.
        eval_batches: Batches of validation and of test.
        num_workers: Loader processes; 0 is best for tokens in memory.
        data_seed: Seed of the tokens and of their order.
    """

    def __init__(
        self,
        vocab_size: int = 32000,
        seq_len: int = 1024,
        batch_size: int = 8,
        num_batches: int = 64,
        eval_batches: int = 1,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "batch_size": batch_size, "num_batches": num_batches}
        for key, value in {**sizes, "eval_batches": eval_batches}.items():
            if value < 1:
                raise ValueError(f"{key}: {value} is not accepted; accepted: 1 or more")
        self.vocab_size, self.seq_len, self.batch_size = vocab_size, seq_len, batch_size
        self.num_batches = {"train": num_batches, "val": eval_batches, "test": eval_batches}
        self.blocks: dict[str, torch.Tensor] = {}

    def setup(self, stage: str) -> None:
        """Draw all tokens."""
        for part, count in self.num_batches.items():
            if part not in self.blocks:
                self.blocks[part] = torch.randint(
                    self.vocab_size,
                    (count * self.batch_size, self.seq_len + 1),
                    generator=keyed_generator(self.data_seed, part),
                    dtype=torch.int32,
                )

    def _loader(self, part: str) -> ResumableLoader:
        evaluates = part != "train"
        seed = None if evaluates else self.data_seed
        return self.loader(TextBlocks(self.blocks[part], self.batch_size, seed), same_every_epoch=evaluates)

    def train_dataloader(self) -> ResumableLoader:
        """Sequences in an order that changes with the epoch."""
        return self._loader("train")

    def val_dataloader(self) -> ResumableLoader:
        """Sequences that are not trained on."""
        return self._loader("val")

    def test_dataloader(self) -> ResumableLoader:
        """Sequences that are not trained on."""
        return self._loader("test")
