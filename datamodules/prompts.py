"""Prompts with answers: real text that goes on, and facts of which one has to be looked up, once or twice."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule, keyed_generator
from datamodules.text import IGNORE, Text, TextBatch


class PromptBatch(TypedDict):
    """What evaluation sees: `B` prompts of one length and their answers."""

    prompt_ids: Tensor
    """int64 `[B, N]`."""
    answer_ids: Tensor
    """int64 `[B, M]`."""
    row: Tensor
    """Number of each prompt in its set, int64 `[B]`."""
    group: str
    """Kind of all prompts of the batch, such as `hop2`; `""` if there is but one."""


class _TextPrompts(Batches):
    """The beginning of each block as prompt, the rest as answer."""

    def __init__(self, blocks: Tensor, prompt_length: int, batch_size: int) -> None:
        self.blocks, self.prompt_length, self.batch_size = blocks, prompt_length, batch_size

    def __len__(self) -> int:
        return -(-len(self.blocks) // self.batch_size)

    def batch(self, epoch: int, index: int) -> PromptBatch:
        rows = torch.arange(index * self.batch_size, min((index + 1) * self.batch_size, len(self.blocks)))
        rows = rows[self.rows(len(rows))]
        block = self.blocks[rows, :-1].long()
        prompt, answer = block[:, : self.prompt_length], block[:, self.prompt_length :]
        return {"prompt_ids": prompt.contiguous(), "answer_ids": answer.contiguous(), "row": rows, "group": ""}


class TextPrompts(Text):
    """Blocks of text to train on, and prompts with their continuation to evaluate; `TextBatch` and `PromptBatch`.

    Args:
        prompt_length: Tokens of a prompt; the rest of a block of `block_size` is its answer.
        corpus: See `Text`.
        tokenizer: See `Text`.
        vocab_size: See `Text`.
        block_size: See `Text`.
        batch_size: See `Text`.
        eval_batch_size: Prompts in a batch of evaluation.
        val_fraction: See `Text`.
        test_fraction: See `Text`.
        eval_blocks: Most prompts of validation and of test, evenly spread; null for all.
        hub_config: See `Text`.
        hub_split: See `Text`.
        text_column: See `Text`.
        num_workers: See `Text`.
        data_seed: See `Text`.
    """

    def __init__(
        self,
        prompt_length: int = 192,
        corpus: str = "python",
        tokenizer: str = "bpe",
        vocab_size: int = 2048,
        block_size: int = 256,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        eval_blocks: int | None = None,
        hub_config: str | None = None,
        hub_split: str = "train",
        text_column: str = "text",
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(
            corpus,
            tokenizer,
            vocab_size,
            block_size,
            batch_size,
            eval_batch_size,
            val_fraction,
            test_fraction,
            eval_blocks,
            hub_config,
            hub_split,
            text_column,
            num_workers,
            data_seed,
        )
        if not 0 < prompt_length < block_size:
            raise ValueError(
                f"prompt_length: {prompt_length} is not accepted; accepted: 1 to {block_size - 1}, less than block_size"
            )
        self.prompt_length = prompt_length

    def _loader(self, part: str) -> ResumableLoader:
        if part == "train":
            return super()._loader(part)
        batches = _TextPrompts(self.blocks[part], self.prompt_length, self.eval_batch_size)
        return self.loader(batches, same_every_epoch=True)


def draw_cycles(count: int, symbols: int, facts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw cycles over some of the symbols, and their facts in random order.

    Returns:
        Cycles int64 `[count, facts]`: each symbol is followed by the next one, the last by the first. Facts
        `[count, 2 * facts]`: a symbol and what follows it, for each symbol of the cycle.
    """
    cycles = torch.rand(count, symbols, generator=generator).argsort(dim=1)[:, :facts]
    order = torch.rand(count, facts, generator=generator).argsort(dim=1)
    pairs = torch.stack([cycles.gather(1, order), cycles.gather(1, (order + 1) % facts)], dim=2)
    return cycles, pairs.flatten(1)


def walk(cycles: Tensor, start: Tensor, steps: Tensor, length: int) -> Tensor:
    """The symbols `steps`, `steps + 1`, ... after place `start` of each cycle.

    Args:
        cycles: `[B, F]`.
        start: Places, `[B, Q]`.
        steps: Steps along the cycle to the first symbol, `[B, Q]`.
        length: Symbols of an answer.

    Returns:
        `[B, Q, length]`.
    """
    places = (start + steps)[..., None] + torch.arange(length)
    return cycles.gather(1, (places % cycles.shape[1]).flatten(1)).view(places.shape)


class _HopTraining(Batches):
    def __init__(self, data: Hop) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def batch(self, epoch: int, index: int) -> TextBatch:
        data, size = self.data, self.data.batch_size
        generator = keyed_generator(data.data_seed, "hop", epoch, index)
        cycles, facts = draw_cycles(size, data.symbols, data.facts, generator)
        start = torch.randint(data.facts, (size, data.queries), generator=generator)
        kind = torch.randint(len(data.hops), start.shape, generator=generator)
        answers = walk(cycles, start, torch.tensor(data.hops)[kind], data.answer_length)
        questions = data.question(cycles.gather(1, start), data.symbols + kind)
        parts = torch.cat([questions, answers], dim=2)
        counts = torch.cat([torch.zeros_like(questions), torch.ones_like(answers)], dim=2).bool()
        facts = data.fact_tokens(facts)
        ids = torch.cat([facts, parts.flatten(1)], dim=1)
        labels = torch.cat([torch.full_like(facts, IGNORE), parts.masked_fill(~counts, IGNORE).flatten(1)], dim=1)
        rows = self.rows(size)
        return {"input_ids": ids[rows, :-1].contiguous(), "labels": labels[rows, 1:].contiguous()}


class _HopPrompts(Batches):
    def __init__(self, data: Hop, part: str) -> None:
        self.data, self.part = data, part
        self.per_kind = -(-data.eval_prompts // data.eval_batch_size)

    def __len__(self) -> int:
        return self.per_kind * len(self.data.hops)

    def batch(self, epoch: int, index: int) -> PromptBatch:
        data = self.data
        kind, place = divmod(index, self.per_kind)
        first = place * data.eval_batch_size
        size = min(data.eval_batch_size, data.eval_prompts - first)
        # The same prompts for every seed of training.
        cycles, facts = draw_cycles(size, data.symbols, data.facts, keyed_generator("hop", self.part, index))
        start = torch.arange(first, first + size)[:, None] % data.facts
        answer = walk(cycles, start, torch.full_like(start, data.hops[kind]), data.answer_length)[:, 0]
        question = data.question(cycles.gather(1, start), torch.full_like(start, data.symbols + kind))
        prompt = torch.cat([data.fact_tokens(facts), question.flatten(1)], dim=1)
        rows = self.rows(size)
        number = torch.arange(first, first + size)[rows]
        return {"prompt_ids": prompt[rows], "answer_ids": answer[rows], "row": number, "group": f"hop{data.hops[kind]}"}


class Hop(ZooDataModule):
    """Facts of a random cycle in random order, then questions: which symbol is one step on, or two?

    A sequence is `k v` (two tokens, or one) for each fact, then `marker` `x` and the answer for each question; only
    answers are labels. The marker says how many steps. Evaluation has one question a prompt. Nothing can be answered
    without the facts: a method that loses a part of the prompt loses answers.

    Args:
        symbols: Symbols to choose from.
        facts: Symbols of a cycle.
        hops: Steps that are asked for, each with a marker.
        joint_facts: Whether a fact `k v` is one token. Otherwise a model first has to learn to join two tokens, which
            takes small ones some thousand steps.
        marker_last: Whether a question is `x marker` and not `marker x`. Then a model has to carry `x` one token on
            before it can look it up, and learns later.
        queries: Questions of a training sequence.
        answer_length: Symbols of an answer: a walk from the one asked for.
        batch_size: Sequences in a (global) batch.
        steps_per_epoch: Batches of an epoch; every epoch is new.
        eval_prompts: Prompts of validation and of test for each of `hops`.
        eval_batch_size: Prompts in a batch of evaluation.
        num_workers: Loader processes.
        data_seed: Seed of the training sequences; validation and test are the same for all.
    """

    def __init__(
        self,
        symbols: int = 10,
        facts: int = 6,
        hops: list[int] | None = None,
        joint_facts: bool = False,
        marker_last: bool = False,
        queries: int = 8,
        answer_length: int = 1,
        batch_size: int = 64,
        steps_per_epoch: int = 100,
        eval_prompts: int = 600,
        eval_batch_size: int = 200,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        self.hops = [1, 2] if hops is None else hops
        for key, value, least in (
            ("facts", facts, 2),
            ("queries", queries, 1),
            ("answer_length", answer_length, 1),
            ("batch_size", batch_size, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("eval_prompts", eval_prompts, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        if facts > symbols:
            raise ValueError(f"facts: {facts} is more than the {symbols} symbols; accepted: 2 to {symbols}")
        if not self.hops or len(set(self.hops)) != len(self.hops) or not all(0 < h < facts for h in self.hops):
            raise ValueError(f"hops: {self.hops} is not accepted; accepted: different numbers from 1 to {facts - 1}")
        self.symbols, self.facts, self.queries, self.answer_length = symbols, facts, queries, answer_length
        self.joint_facts, self.marker_last = joint_facts, marker_last
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.eval_prompts, self.eval_batch_size = eval_prompts, eval_batch_size

    @property
    def vocab_size(self) -> int:
        """Number of tokens: symbols and markers, and the facts that are one token."""
        return self.symbols + len(self.hops) + self.joint_facts * self.symbols**2

    @property
    def tokenizer_id(self) -> str:
        """What the tokens mean."""
        options = "-joint" * self.joint_facts + "-last" * self.marker_last
        return f"hop-{self.symbols}-{'-'.join(map(str, self.hops))}{options}"

    def question(self, symbols: Tensor, markers: Tensor) -> Tensor:
        """Tokens of questions about symbols `[B, Q]`: `[B, Q, 2]`."""
        return torch.stack([symbols, markers] if self.marker_last else [markers, symbols], dim=2)

    def fact_tokens(self, facts: Tensor) -> Tensor:
        """Tokens of facts `[B, 2 * F]`: themselves, or one for each, `[B, F]`."""
        if not self.joint_facts:
            return facts
        first, second = facts.unflatten(1, (-1, 2)).unbind(dim=2)
        return self.symbols + len(self.hops) + first * self.symbols + second

    def train_dataloader(self) -> ResumableLoader:
        """New sequences in every epoch."""
        return self.loader(_HopTraining(self))

    def val_dataloader(self) -> ResumableLoader:
        """The prompts of validation."""
        return self.loader(_HopPrompts(self, "val"), same_every_epoch=True)

    def test_dataloader(self) -> ResumableLoader:
        """The prompts of the test."""
        return self.loader(_HopPrompts(self, "test"), same_every_epoch=True)

    def predict_dataloader(self) -> ResumableLoader:
        """The prompts of the test."""
        return self.test_dataloader()
