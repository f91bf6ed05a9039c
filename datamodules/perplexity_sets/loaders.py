"""The loaders that a source of sets has, wherever its sentences come from."""

from __future__ import annotations

from abc import abstractmethod

from datamodules.loading import Batches, ResumableLoader, ZooDataModule
from datamodules.perplexity_sets.batches import DocumentBatches, PromptBatches


class SetsDataModule(ZooDataModule):
    """Serves sets to train on; held-out documents, wanted ones in the first loader, to evaluate; prompts to continue.

    Args:
        positives: Positives `p` of an anchor.
        negatives: Hard negatives `n` of an anchor.
        random_negatives: Negatives `r` of anchors of other groups.
        num_workers: Loader processes.
        data_seed: Seed of all draws.

    Raises:
        ValueError: If there is no positive, or a count is negative.
    """

    def __init__(
        self, positives: int, negatives: int, random_negatives: int, num_workers: int = 0, data_seed: int = 0
    ) -> None:
        super().__init__(num_workers, data_seed)
        if positives < 1:
            raise ValueError(f"positives: {positives} is not accepted; accepted: 1 or more")
        for key, count in (("negatives", negatives), ("random_negatives", random_negatives)):
            if count < 0:
                raise ValueError(f"{key}: {count} is not accepted; accepted: 0 or more")
        self.positives, self.negatives, self.random_negatives = positives, negatives, random_negatives
        self._train: Batches | None = None

    @abstractmethod
    def training_batches(self) -> Batches:
        """Batches to train on."""

    @abstractmethod
    def document_batches(self, split: str, unwanted: bool) -> DocumentBatches:
        """Held-out documents of a split, all of them wanted or all unwanted."""

    @abstractmethod
    def prompt_batches(self, split: str) -> PromptBatches:
        """Held-out prompts of a split, the unwanted ones first."""

    def setup(self, stage: str) -> None:
        """Make the training batches, once."""
        if stage == "fit" and self._train is None:
            self._train = self.training_batches()

    def _documents(self, split: str) -> list[ResumableLoader]:
        return [self.loader(self.document_batches(split, kind), same_every_epoch=True) for kind in (False, True)]

    def train_dataloader(self) -> ResumableLoader:
        """What is trained on."""
        self.setup("fit")
        assert self._train is not None
        return self.loader(self._train)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Wanted and unwanted documents of validation."""
        return self._documents("val")

    def test_dataloader(self) -> list[ResumableLoader]:
        """Wanted and unwanted documents of testing."""
        return self._documents("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Prompts of testing."""
        return self.loader(self.prompt_batches("test"), same_every_epoch=True)
