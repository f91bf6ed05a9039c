"""Templated reviews: text to pre-train on, demonstrations, preferences and prompts, with a programmatic reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules import reviews_grammar as grammar
from datamodules.loading import Batches, ResumableLoader, ZooDataModule, keyed_generator
from datamodules.preferences_batches import PreferenceBatches, PromptBatches, SFTBatch, SFTBatches

STAGES = ("pretrain", "demonstrations", "preferences", "prompts")


class _Pretraining(Batches):
    """An endless stream of prompts with unrelated answers."""

    def __init__(self, data: Reviews) -> None:
        self.batch_size, self.seed, self.steps = data.batch_size, data.data_seed, data.steps_per_epoch

    def __len__(self) -> int:
        return self.steps

    def batch(self, epoch: int, index: int) -> SFTBatch:
        generator = keyed_generator(self.seed, "pretrain", epoch, index)
        ids = torch.cat(grammar.draw_unrelated(self.batch_size, generator), dim=1)[self.rows(self.batch_size)]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool), "labels": ids.clone()}


class Reviews(ZooDataModule):
    """Reviews of 24 products by 12 aspects in 75 words, for the three stages of RLHF.

    A prompt is `<bos> PRODUCT ASPECT ?`, an answer `the ASPECT of the PRODUCT is ADJECTIVE and ADJECTIVE . <eos>`.
    Batches are `SFTBatch`, `PreferenceBatch` or `PromptBatch`.

    Args:
        stage: What is served. `pretrain`: answers that have nothing to do with the prompts, every token counts.
            `demonstrations`: answers of a careless writer. `preferences`: pairs of such answers, labelled by the
            reward. `prompts`: prompts alone.
        demonstration_set: Which of the sets of demonstrations; each is drawn and ordered anew.
        num_demonstrations: Demonstrations of a set.
        right: Probability that the writer keeps to the product, and to the aspect.
        num_pairs: Pairs of answers.
        flipped: Share of pairs with the wrong label.
        batch_size: Rows of a global batch.
        steps_per_epoch: Batches of an epoch.
        val_rows: Held-out rows of validation: texts, pairs or prompts.
        test_rows: The same of the test; the prompts are the same for every seed.
        eval_batch_size: Rows of a batch of evaluation.
        num_workers: Loader processes.
        data_seed: Seed of all draws of training.

    Raises:
        ValueError: If a value is out of range.
    """

    vocab_size = len(grammar.VOCABULARY)
    eos_id = grammar.EOS
    pad_id = grammar.PAD

    def __init__(
        self,
        stage: str = "prompts",
        demonstration_set: int = 1,
        num_demonstrations: int = 384,
        right: float = 0.8,
        num_pairs: int = 4000,
        flipped: float = 0.1,
        batch_size: int = 64,
        steps_per_epoch: int = 100,
        val_rows: int = 500,
        test_rows: int = 2000,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        if stage not in STAGES:
            raise ValueError(f"stage: {stage!r} is unknown; accepted: {', '.join(STAGES)}")
        for key, value, least in (
            ("demonstration_set", demonstration_set, 0),
            ("num_demonstrations", num_demonstrations, 1),
            ("num_pairs", num_pairs, 1),
            ("batch_size", batch_size, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("val_rows", val_rows, 1),
            ("test_rows", test_rows, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        for name, share in (("right", right), ("flipped", flipped)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: {share} is not accepted; accepted: 0 to 1")
        self.stage, self.demonstration_set, self.num_demonstrations = stage, demonstration_set, num_demonstrations
        self.right, self.num_pairs, self.flipped = right, num_pairs, flipped
        self.batch_size, self.steps_per_epoch, self.eval_batch_size = batch_size, steps_per_epoch, eval_batch_size
        self.held_out = {"val": val_rows, "test": test_rows}

    def decode(self, tokens: Tensor) -> list[str]:
        """Text of each row `[N, T]`."""
        return grammar.decode(tokens)

    def reward(self, prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Programmatic reward `[B]`, see `datamodules.reviews_grammar.reward`."""
        return grammar.reward(prompt_ids, tokens, mask)

    def demonstrations(self, key: Sequence[int | str], count: int) -> tuple[Tensor, Tensor]:
        """Prompts `[count, 4]` and answers `[count, 11]` of the careless writer."""
        generator = keyed_generator("demonstrations", *key)
        topics = grammar.draw_topics(count, generator)
        return grammar.prompts(*topics), grammar.noisy_answers(*topics, generator, self.right)

    def pairs(self, key: Sequence[int | str], count: int, flipped: float) -> tuple[Tensor, Tensor]:
        """Preferred and other texts, each `[count, 15]`; ties are decided by lot."""
        generator = keyed_generator("pairs", *key)
        topics = grammar.draw_topics(count, generator)
        asked = grammar.prompts(*topics)
        two = [grammar.noisy_answers(*topics, generator, self.right) for _ in range(2)]
        mask = torch.ones_like(two[0], dtype=torch.bool)
        lot = torch.rand(2, count, generator=generator)
        better = grammar.reward(asked, two[0], mask) - grammar.reward(asked, two[1], mask) + 0.01 * (lot[0] - 0.5)
        first = ((better > 0) ^ (lot[1] < flipped))[:, None]
        chosen, rejected = torch.where(first, two[0], two[1]), torch.where(first, two[1], two[0])
        return torch.cat([asked, chosen], dim=1), torch.cat([asked, rejected], dim=1)

    def training_batches(self) -> Batches:
        """Batches of the stage."""
        size, seed, steps = self.batch_size, self.data_seed, self.steps_per_epoch
        if self.stage == "pretrain":
            return _Pretraining(self)
        if self.stage == "demonstrations":
            key = (seed, self.demonstration_set)
            order = int(keyed_generator("order", *key).initial_seed() % 2**31)
            prompts, answers = self.demonstrations(key, self.num_demonstrations)
            return SFTBatches(prompts.unbind(), answers.unbind(), grammar.PAD, size, order, steps)
        if self.stage == "preferences":
            chosen, rejected = self.pairs((seed,), self.num_pairs, self.flipped)
            return PreferenceBatches(chosen.unbind(), rejected.unbind(), grammar.PAD, size, seed, steps)
        count = len(grammar.PRODUCTS) * len(grammar.ASPECTS)
        every = torch.arange(count)
        asked = grammar.prompts(every // len(grammar.ASPECTS), every % len(grammar.ASPECTS))
        return PromptBatches(asked.unbind(), grammar.PAD, size, seed, steps)

    def held_out_batches(self, split: str) -> Batches:
        """Rows of validation or test, the same for every seed."""
        count, size = self.held_out[split], self.eval_batch_size
        if self.stage == "pretrain":
            asked, told = grammar.draw_unrelated(count, keyed_generator("held out", split))
            texts = torch.cat([asked, told], dim=1)
            return SFTBatches(texts[:, :0].unbind(), texts.unbind(), grammar.PAD, size, None)
        if self.stage == "demonstrations":
            prompts, answers = self.demonstrations(("held out", split), count)
            return SFTBatches(prompts.unbind(), answers.unbind(), grammar.PAD, size, None)
        if self.stage == "preferences":
            chosen, rejected = self.pairs(("held out", split), count, 0.0)
            return PreferenceBatches(chosen.unbind(), rejected.unbind(), grammar.PAD, size, None)
        topics = grammar.draw_topics(count, keyed_generator("prompts", split))
        return PromptBatches(grammar.prompts(*topics).unbind(), grammar.PAD, size, None)

    def demonstration_batches(self) -> Batches:
        """Demonstrations on which a reward model is shifted to mean 0."""
        prompts, answers = self.demonstrations((self.data_seed, "shift"), self.num_demonstrations)
        return SFTBatches(prompts.unbind(), answers.unbind(), grammar.PAD, self.eval_batch_size, None)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the stage."""
        return self.loader(self.training_batches())

    def val_dataloader(self) -> ResumableLoader:
        """Held-out rows."""
        return self.loader(self.held_out_batches("val"), same_every_epoch=True)

    def test_dataloader(self) -> ResumableLoader:
        """Other held-out rows."""
        return self.loader(self.held_out_batches("test"), same_every_epoch=True)

    def predict_dataloader(self) -> ResumableLoader:
        """Held-out rows."""
        return self.test_dataloader()
