"""Batches of sets, of documents and of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from datamodules.loading import Batches, epoch_permutation, keyed_generator
from datamodules.perplexity_sets.worlds import World


class PerplexityBatch(TypedDict):
    """`B` anchors, each with `K = p + n + r` sentences: positives, hard negatives, random negatives."""

    input_ids: Tensor
    """int64 `[B, K, S]`, padded on the right."""
    attention_mask: Tensor
    """bool `[B, K, S]`, true on tokens."""
    sizes: list[int]
    """`[p, n, r]`: positives, hard negatives and random negatives, in this order along `K`; plain numbers, so that
    taking the sentences apart makes no accelerator wait."""
    anchor_id: Tensor
    """int64 `[B]`."""


class DocumentBatch(TypedDict):
    """Documents whose perplexity is measured."""

    input_ids: Tensor
    """int64 `[B, S]`, padded on the right."""
    attention_mask: Tensor
    """bool `[B, S]`."""


class PromptBatch(TypedDict):
    """Prompts to be continued."""

    prompt_ids: Tensor
    """int64 `[B, T]`, padded on the left."""
    prompt_mask: Tensor
    """bool `[B, T]`."""
    prompt_is_unwanted: Tensor
    """bool `[B]`."""
    group: Tensor
    """Index into the datamodule's `groups`, int64 `[B]`."""


def right_mask(length: Tensor, longest: int) -> Tensor:
    """Return bool `[..., longest]`, true on the first `length` `[...]` positions."""
    return torch.arange(longest) < length[..., None]


@dataclass(frozen=True)
class Sentences:
    """Lists of sentences, one list for each of `A` anchors.

    Args:
        tokens: `[A, C, S]`, padded on the right; rows beyond `count` are not used.
        length: Tokens of each sentence, int64 `[A, C]`.
        count: Sentences of each anchor, int64 `[A]`.
    """

    tokens: Tensor
    length: Tensor
    count: Tensor

    def take(self, anchor: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens `[B, k, S]` and lengths `[B, k]` of items `[B, k]` of anchors `[B]` or `[B, k]`."""
        anchor = anchor if anchor.ndim == item.ndim else anchor[:, None]
        return self.tokens[anchor, item].long(), self.length[anchor, item]


@dataclass(frozen=True)
class Sets:
    """Positives and negatives of `A` anchors.

    Args:
        positives: Wanted sentences.
        negatives: Unwanted ones.
        group: Group of each anchor, int64 `[A]`.
        matched: Whether the k-th negative of an anchor is its k-th positive with other words, so that the two are drawn
            together.
    """

    positives: Sentences
    negatives: Sentences
    group: Tensor
    matched: bool = False


def draw_items(count: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Draw an order without replacement of each list, int64 `[B, most]`; the first `count[b]` are its items."""
    keys = torch.rand(len(count), most, generator=generator)
    return keys.masked_fill(~right_mask(count, most), 2.0).argsort(dim=1)


class SetBatches(Batches):
    """Batches of anchors in an order of their own each epoch; sentences are drawn anew every time.

    Args:
        sets: The sets.
        positives: Positives `p` of an anchor; every list has as many.
        negatives: Hard negatives `n`.
        random_negatives: Negatives `r` drawn from anchors of other groups.
        batch_size: Anchors of a global batch.
        seed: Seed of order and draws.
    """

    def __init__(
        self, sets: Sets, positives: int, negatives: int, random_negatives: int, batch_size: int, seed: int
    ) -> None:
        self.sets, self.batch_size, self.seed = sets, batch_size, seed
        self.positives, self.negatives, self.random_negatives = positives, negatives, random_negatives

    def __len__(self) -> int:
        return len(self.sets.group) // self.batch_size

    def batch(self, epoch: int, index: int) -> PerplexityBatch:
        """Anchors `index * batch_size ...` of the epoch's order."""
        order = epoch_permutation(len(self.sets.group), self.seed, epoch)
        anchors = order[index * self.batch_size : (index + 1) * self.batch_size]
        generator = keyed_generator(self.seed, "sets", epoch, index)
        pos, neg = self.sets.positives, self.sets.negatives
        chosen = draw_items(pos.count[anchors], pos.length.shape[1], generator)
        matched = chosen if self.sets.matched else draw_items(neg.count[anchors], neg.length.shape[1], generator)
        parts = [pos.take(anchors, chosen[:, : self.positives]), neg.take(anchors, matched[:, : self.negatives])]
        if self.random_negatives:
            foreign = (self.sets.group[anchors][:, None] != self.sets.group).float()
            others = foreign.multinomial(self.random_negatives, generator=generator)
            item = (torch.rand(others.shape, generator=generator) * neg.count[others]).long()
            parts.append(neg.take(others, item))
        length = torch.cat([part[1] for part in parts], dim=1)
        rows, longest = self.rows(len(anchors)), int(length.max())
        return {
            "input_ids": torch.cat([part[0][:, :, :longest] for part in parts], dim=1)[rows],
            "attention_mask": right_mask(length, longest)[rows],
            "sizes": [self.positives, self.negatives, self.random_negatives],
            "anchor_id": anchors[rows],
        }


class CorpusBatches(Batches):
    """An endless corpus as anchors with one positive and no negative: what a base model is trained on.

    Args:
        world: The world.
        size: Documents of an epoch.
        batch_size: Documents of a global batch.
        seed: Seed of the draws.
        share: See `World.corpus`.
        strength: See `World.corpus`.
        switch: See `World.corpus`.
    """

    def __init__(
        self, world: World, size: int, batch_size: int, seed: int, share: float, strength: float, switch: float
    ) -> None:
        self.world, self.size, self.batch_size, self.seed = world, size, batch_size, seed
        self.mixture = (share, strength, switch)

    def __len__(self) -> int:
        return self.size // self.batch_size

    def batch(self, epoch: int, index: int) -> PerplexityBatch:
        """Draw new documents."""
        generator = keyed_generator(self.seed, "corpus", epoch, index)
        tokens, length = self.world.render(self.world.corpus(self.batch_size, generator, *self.mixture))
        rows = self.rows(self.batch_size)
        first = index * self.batch_size
        return {
            "input_ids": tokens[rows, None],
            "attention_mask": right_mask(length, tokens.shape[1])[rows, None],
            "sizes": [1, 0, 0],
            "anchor_id": torch.arange(first, first + self.batch_size)[rows],
        }


class DocumentBatches(Batches):
    """Documents in their order.

    Args:
        tokens: `[D, S]`, padded on the right.
        length: Tokens of each, int64 `[D]`.
        batch_size: Documents of a global batch.
    """

    def __init__(self, tokens: Tensor, length: Tensor, batch_size: int) -> None:
        self.tokens, self.length, self.batch_size = tokens, length, batch_size

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def batch(self, epoch: int, index: int) -> DocumentBatch:
        """Rows `index * batch_size ...`."""
        start, stop = index * self.batch_size, min((index + 1) * self.batch_size, len(self.tokens))
        rows = self.rows(stop - start)
        length = self.length[start:stop]
        longest = int(length.max())
        return {
            "input_ids": self.tokens[start:stop, :longest][rows].long(),
            "attention_mask": right_mask(length, longest)[rows],
        }


class PromptBatches(Batches):
    """Prompts in their order; a batch is the same whatever the number of processes: they take whole batches in turn.

    Args:
        tokens: `[D, T]`, padded on the left.
        mask: bool `[D, T]`.
        unwanted: bool `[D]`.
        group: int64 `[D]`.
        batch_size: Prompts of a batch.
    """

    def __init__(self, tokens: Tensor, mask: Tensor, unwanted: Tensor, group: Tensor, batch_size: int) -> None:
        self.tokens, self.mask, self.unwanted, self.group, self.batch_size = tokens, mask, unwanted, group, batch_size

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch_size)

    def batch(self, epoch: int, index: int) -> PromptBatch:
        """Rows `index * batch_size ...`, without the columns that only pad."""
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        first = int(self.mask[rows].any(dim=0).int().argmax())
        return {
            "prompt_ids": self.tokens[rows, first:].long(),
            "prompt_mask": self.mask[rows, first:],
            "prompt_is_unwanted": self.unwanted[rows],
            "group": self.group[rows],
        }
