"""Batches of the branching modular chain: traces to train on, and problems to analyse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule, keyed_generator
from datamodules.reasoning_chain_task import ChainProblem, ChainTask, Writer, Written, draw_problem, read_problem

#: Label of a position that does not count.
IGNORE = -100


class ReasoningBatch(TypedDict):
    """Problems with traces to train on; position `t` predicts what follows it."""

    input_ids: Tensor
    """Prompt and trace, int64 `[B, T]`."""
    labels: Tensor
    """The token that follows, int64 `[B, T]`; -100 where that is the prompt or padding."""
    prompt_len: Tensor
    """Tokens of the prompt, int64 `[B]`."""
    right: Tensor
    """Where the value of a step follows that is written for the first time: the right value, else -100. `[B, T]`."""
    hard: Tensor
    """Whether that step is hard, bool `[B, T]`."""
    target: Tensor
    """Probability of the right value there under the writer, else 0, float32 `[B, T]`."""
    logprob: Tensor
    """Log-probability of the trace under its writer in nats, float32 `[B]`."""


class ReasoningItems(TypedDict):
    """Problems to analyse, as objects."""

    problems: list[Any]
    """`B` problems with `key`, `prompt`, `judge`, `pieces`, `answer_start`, `annotate` and `text`."""
    traces: list[list[Any]]
    """Given traces of each problem; none where the model is to write them."""


class _Coins(Iterator[float]):
    """Uniform numbers from a keyed generator."""

    def __init__(self, count: int, *key: int | str) -> None:
        self._numbers = iter(torch.rand(count, generator=keyed_generator(*key), dtype=torch.float64).tolist())

    def __next__(self) -> float:
        return next(self._numbers)


class ChainTraces(Batches):
    """Training batches, written when they are asked for, anew in every epoch. Traces of a small task recur.

    Args:
        task: The grammar.
        writer: Writes the traces.
        batch_size: Global batch size.
        num_batches: Batches of an epoch.
        seed: Seed of problems and traces.
        split: Name that keeps training and validation apart.
    """

    def __init__(
        self, task: ChainTask, writer: Writer, batch_size: int, num_batches: int, seed: int, split: str
    ) -> None:
        self.task, self.writer, self.batch_size = task, writer, batch_size
        self.num_batches, self.seed, self.split = num_batches, seed, split

    def __len__(self) -> int:
        return self.num_batches

    def batch(self, epoch: int, index: int) -> ReasoningBatch:
        """Rows of this rank."""
        per_row = 5 * self.task.steps + 4
        coins = _Coins(self.batch_size * per_row, self.seed, self.split, epoch, index)
        rows: list[tuple[ChainProblem, Written]] = []
        for _ in range(self.batch_size):
            own = iter([next(coins) for _ in range(per_row)])
            problem = draw_problem(self.task, self.writer, own)
            rows.append((problem, problem.write(own)))
        # the width of the global batch, so that ranks see what one process sees
        longest = max(len(written.tokens) for _, written in rows)
        return pack(rows[self.rows(len(rows))], self.writer, self.task.ids["PAD"], longest)


def pack(rows: list[tuple[ChainProblem, Written]], writer: Writer, pad_id: int, longest: int) -> ReasoningBatch:
    """Put problems and traces into a batch, filled on the right to traces of `longest` tokens."""
    prompt_len = len(rows[0][0].prompt)
    width = prompt_len + longest
    tokens = torch.full((len(rows), width), pad_id)
    labels, right = torch.full_like(tokens, IGNORE), torch.full_like(tokens, IGNORE)
    hard, target = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.float32)
    for row, (problem, written) in enumerate(rows):
        trace = torch.tensor(written.tokens)
        tokens[row, :prompt_len] = torch.tensor(problem.prompt)
        tokens[row, prompt_len : prompt_len + len(trace)] = trace
        labels[row, prompt_len : prompt_len + len(trace)] = trace
        for position, value, is_hard in written.choices:
            right[row, prompt_len + position] = value
            hard[row, prompt_len + position] = is_hard
            target[row, prompt_len + position] = writer.insight if is_hard else 1 - writer.tangent
    return {
        "input_ids": tokens[:, :-1],
        "labels": labels[:, 1:].contiguous(),
        "prompt_len": torch.full((len(rows),), prompt_len),
        "right": right[:, 1:].contiguous(),
        "hard": hard[:, 1:].contiguous(),
        "target": target[:, 1:].contiguous(),
        "logprob": torch.tensor([written.logprob for _, written in rows], dtype=torch.float32),
    }


class ItemBatches(Batches):
    """Problems in their order.

    Args:
        problems: The problems.
        traces: Given traces of each problem.
        batch_size: Problems in a (global) batch.
    """

    def __init__(self, problems: list[Any], traces: list[list[Any]], batch_size: int) -> None:
        self.problems, self.traces, self.batch_size = problems, traces, batch_size

    def __len__(self) -> int:
        return -(-len(self.problems) // self.batch_size)

    def batch(self, epoch: int, index: int) -> ReasoningItems:
        """Problems of this rank."""
        start, stop = index * self.batch_size, min((index + 1) * self.batch_size, len(self.problems))
        own = self.rows(stop - start)
        rows = slice(start + own.start, start + own.stop)
        return {"problems": self.problems[rows], "traces": self.traces[rows]}


class ReasoningData(ZooDataModule):
    """A datamodule whose batches may hold problems, which are objects and no tensors."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Problems stay as they are; Lightning would take them apart."""
        return batch if "problems" in batch else super().transfer_batch_to_device(batch, device, dataloader_idx)


class ReasoningChain(ReasoningData):
    """The branching modular chain with exact potentials.

    Args:
        p: The prime; values are `0 .. p - 1`, chance is `1 / p`.
        steps: Number of operations.
        hard: Steps, counted from 1, that need an insight.
        operands: Least and largest operand.
        insight: Probability of the right value at a hard step.
        tangent: Probability of a tangent at another step.
        recover: Probability that a tangent is taken back.
        guess: Probability of filler and a guess instead of a calculation.
        batch_size: Traces in a (global) training batch.
        num_batches: Batches of an epoch; all traces are drawn anew.
        val_batches: Batches of validation.
        num_problems: Problems to analyse.
        problem_batch: Problems that are analysed together.
        temperature: Temperature of the analysis, which sharpens the exact potentials likewise.
        top_p: Its nucleus.
        traces: JSONL file of traces for `predict`: lines `{"prompt_ids": [..], "trace_ids": [..]}`. Empty for traces of
            the writer.
        num_workers: Loader processes.
        data_seed: Seed of problems and traces.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        p: int = 31,
        steps: int = 5,
        hard: list[int] = [2],  # noqa: B006 - never changed; a list is what the command line shows
        operands: list[int] = [1, 2],  # noqa: B006
        insight: float = 0.4,
        tangent: float = 0.1,
        recover: float = 0.5,
        guess: float = 0.25,
        batch_size: int = 64,
        num_batches: int = 500,
        val_batches: int = 4,
        num_problems: int = 80,
        problem_batch: int = 20,
        temperature: float = 1.0,
        top_p: float = 1.0,
        traces: str = "",
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        sizes = {"batch_size": batch_size, "num_batches": num_batches, "val_batches": val_batches}
        for key, value in {**sizes, "num_problems": num_problems, "problem_batch": problem_batch}.items():
            if value < 1:
                raise ValueError(f"{key}: {value} is not accepted; accepted: 1 or more")
        if temperature <= 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"temperature, top_p: {temperature}, {top_p} are not accepted; accepted: above 0, and above 0 to 1"
            )
        self.task = ChainTask(p, steps, tuple(hard), (operands[0], operands[-1]) if operands else (0, 0))
        self.writer = Writer(insight, tangent, recover, guess)
        self.oracle = self.writer.sharpened(p, temperature, top_p)
        self.batch_size, self.num_batches, self.val_batches = batch_size, num_batches, val_batches
        self.num_problems, self.problem_batch, self.traces_file = num_problems, problem_batch, traces

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.task.words)

    @property
    def eos_id(self) -> int:
        """Token that ends a trace."""
        return self.task.ids["EOS"]

    def problems(self, split: str, count: int) -> list[ChainProblem]:
        """Draw problems; those of different splits are independent."""
        needed = 2 * self.task.steps + 1
        return [
            draw_problem(self.task, self.oracle, _Coins(needed, self.data_seed, split, index), f"{split}-{index}")
            for index in range(count)
        ]

    def given_traces(self) -> tuple[list[ChainProblem], list[list[list[int]]]]:
        """Problems and traces of `predict`.

        Raises:
            FileNotFoundError: If the file is not there.
            ValueError: If a line is no trace of this task.
        """
        if not self.traces_file:
            problems = self.problems("test", self.num_problems)
            coins = [_Coins(3 * self.task.steps + 4, self.data_seed, "trace", i) for i in range(len(problems))]
            return problems, [
                [problem.write(coin, self.writer).tokens] for problem, coin in zip(problems, coins, strict=True)
            ]
        path = Path(self.traces_file).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"data.traces: there is no file {path}")
        problems, traces = [], []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                prompt, trace = [int(t) for t in row["prompt_ids"]], [int(t) for t in row["trace_ids"]]
            except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: no line with prompt_ids and trace_ids ({error})") from error
            if any(not 0 <= token < self.vocab_size for token in trace):
                raise ValueError(f"{path}:{number}: a token id is outside 0 .. {self.vocab_size - 1}")
            problems.append(read_problem(self.task, self.oracle, prompt, str(row.get("key", number))))
            traces.append([trace])
        return problems, traces

    def train_dataloader(self) -> ResumableLoader:
        """Traces that are drawn anew in every epoch."""
        return self.loader(
            ChainTraces(self.task, self.writer, self.batch_size, self.num_batches, self.data_seed, "train")
        )

    def val_dataloader(self) -> ResumableLoader:
        """Traces drawn apart from those of the training; of a small task many occur in both."""
        batches = ChainTraces(self.task, self.writer, self.batch_size, self.val_batches, self.data_seed, "val")
        return self.loader(batches, same_every_epoch=True)

    def test_dataloader(self) -> list[ResumableLoader]:
        """Traces drawn apart from those of the training, and problems without traces: the model writes them."""
        traces = ChainTraces(self.task, self.writer, self.batch_size, self.val_batches, self.data_seed, "test")
        problems = self.problems("test", self.num_problems)
        items = ItemBatches(list(problems), [[] for _ in problems], self.problem_batch)
        return [self.loader(traces, same_every_epoch=True), self.loader(items, same_every_epoch=True)]

    def predict_dataloader(self) -> ResumableLoader:
        """Problems with given traces."""
        problems, traces = self.given_traces()
        return self.loader(ItemBatches(list(problems), list(traces), self.problem_batch), same_every_epoch=True)


def with_writer(problem: ChainProblem, writer: Writer) -> ChainProblem:
    """The same problem with the exact potential of another writer."""
    return replace(problem, writer=writer)
