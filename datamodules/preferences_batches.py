"""Batches of fine-tuning, reward models and reinforcement learning on text, from rows of tokens in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.loading import Batches, cycled_order
from zoo.nn.lm import IGNORE
from zoo.nn.sampling import left_pad


class SFTBatch(TypedDict):
    """`B` texts to learn."""

    input_ids: Tensor
    """int64 `[B, S]`, padded on the right."""
    attention_mask: Tensor
    """bool `[B, S]`, true on tokens."""
    labels: Tensor
    """int64 `[B, S]`: the token itself where it is to be learned, -100 elsewhere (prompt, padding); not shifted."""


class PreferenceBatch(TypedDict):
    """`B` pairs of answers to a prompt, each with its prompt before it; padded on the right."""

    chosen_ids: Tensor
    """int64 `[B, S]`."""
    chosen_mask: Tensor
    """bool `[B, S]`, true on tokens."""
    rejected_ids: Tensor
    """int64 `[B, S']`."""
    rejected_mask: Tensor
    """bool `[B, S']`."""


class PromptBatch(TypedDict):
    """`B` prompts to be answered."""

    prompt_ids: Tensor
    """int64 `[B, P]`, padded on the left."""
    prompt_mask: Tensor
    """bool `[B, P]`, true on tokens."""
    row: Tensor
    """Number of each prompt: in training in its global batch, in evaluation in the whole set; int64 `[B]`."""


class _Rows(Batches):
    """Rows in an endless shuffled order, or in their own order.

    Args:
        count: Number of rows.
        batch_size: Rows of a global batch.
        seed: Seed of the order; None keeps it, and then a last batch may be smaller.
        steps: Batches of an epoch in training.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, steps: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.steps = count, batch_size, seed, steps

    def __len__(self) -> int:
        return self.steps if self.seed is not None else -(-self.count // self.batch_size)

    def order(self, epoch: int, index: int) -> Tensor:
        """Rows of a global batch."""
        if self.seed is None:
            return torch.arange(index * self.batch_size, min((index + 1) * self.batch_size, self.count))
        start = (epoch * self.steps + index) * self.batch_size
        return cycled_order(self.count, start, self.batch_size, self.seed)


def right_pad(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[B, S]`, padded on the right, and mask bool `[B, S]`, true on tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence([row.long() for row in rows], batch_first=True, padding_value=pad_id)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


class SFTBatches(_Rows):
    """Prompts with their answers.

    Args:
        prompts: Tokens of each prompt; empty ones make every token of the text count.
        answers: Tokens of each answer.
        pad_id: Fills rows.
        batch_size: Rows of a global batch.
        seed: Seed of the order, or None.
        steps: Batches of an epoch in training.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        answers: Sequence[Tensor],
        pad_id: int,
        batch_size: int,
        seed: int | None,
        steps: int = 0,
    ) -> None:
        super().__init__(len(answers), batch_size, seed, steps)
        self.prompts, self.answers, self.pad_id = prompts, answers, pad_id

    def batch(self, epoch: int, index: int) -> SFTBatch:
        """This rank's rows of a batch."""
        order = self.order(epoch, index)
        chosen = order[self.rows(len(order))].tolist()
        ids, mask = right_pad([torch.cat([self.prompts[i], self.answers[i]]) for i in chosen], self.pad_id)
        start = torch.tensor([len(self.prompts[i]) for i in chosen])
        learned = mask & (torch.arange(ids.shape[1]) >= start[:, None])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~learned, IGNORE)}


class PreferenceBatches(_Rows):
    """Pairs of texts, the preferred one first.

    Args:
        chosen: Prompt and preferred answer.
        rejected: Prompt and the other answer.
        pad_id: Fills rows.
        batch_size: Pairs of a global batch.
        seed: Seed of the order, or None.
        steps: Batches of an epoch in training.
    """

    def __init__(
        self,
        chosen: Sequence[Tensor],
        rejected: Sequence[Tensor],
        pad_id: int,
        batch_size: int,
        seed: int | None,
        steps: int = 0,
    ) -> None:
        super().__init__(len(chosen), batch_size, seed, steps)
        self.chosen, self.rejected, self.pad_id = chosen, rejected, pad_id

    def batch(self, epoch: int, index: int) -> PreferenceBatch:
        """This rank's rows of a batch."""
        order = self.order(epoch, index)
        rows = order[self.rows(len(order))].tolist()
        won, won_mask = right_pad([self.chosen[i] for i in rows], self.pad_id)
        lost, lost_mask = right_pad([self.rejected[i] for i in rows], self.pad_id)
        return {"chosen_ids": won, "chosen_mask": won_mask, "rejected_ids": lost, "rejected_mask": lost_mask}


class PromptBatches(_Rows):
    """Prompts.

    Args:
        prompts: Tokens of each prompt.
        pad_id: Fills rows.
        batch_size: Prompts of a global batch.
        seed: Seed of the order, or None.
        steps: Batches of an epoch in training.
    """

    def __init__(
        self, prompts: Sequence[Tensor], pad_id: int, batch_size: int, seed: int | None, steps: int = 0
    ) -> None:
        super().__init__(len(prompts), batch_size, seed, steps)
        self.prompts, self.pad_id = prompts, pad_id

    def batch(self, epoch: int, index: int) -> PromptBatch:
        """This rank's rows of a batch."""
        order = self.order(epoch, index)
        rows = self.rows(len(order))
        ids, mask = left_pad([self.prompts[i].long() for i in order[rows].tolist()], self.pad_id)
        first = 0 if self.seed is not None else index * self.batch_size
        return {"prompt_ids": ids, "prompt_mask": mask, "row": first + torch.arange(len(order))[rows]}
