"""The exact next-token tables of a chain's writer, written a second time, and a language model that is nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from datamodules.reasoning_chain_task import ChainProblem, ChainTask, Writer

#: Small enough for the whole tree of traces.
TASK = ChainTask(p=5, steps=3, hard=(1,), operands=(1, 4))
WRITER = Writer(insight=0.4, tangent=0.3, recover=0.5, guess=0.25)
PROBLEM = ChainProblem(TASK, 3, (("H", 2), ("+", 4), ("*", 3)), WRITER, "toy")


def next_tokens(problem: ChainProblem, trace: Sequence[int]) -> dict[int, float]:
    """Distribution of the token after a prefix of a trace of the problem's writer."""
    task, who, ids = problem.task, problem.writer, problem.task.ids
    chunks: list[list[int]] = [[]]
    for token in trace:
        chunks[-1].append(token)
        if token == ids["SEP"]:
            chunks.append([])
    step, value, tried, mode, filler = 0, problem.start, -1, "", 0
    for chunk in chunks[:-1]:
        if chunk[0] == ids["HMM"]:
            mode, filler = "guess", filler + 1
        elif chunk[0] == ids["NO"]:
            mode = "no"
        elif chunk[0] == ids["OK"]:
            value, step, mode = tried, step + 1, ""
        elif chunk[3] == ids["TRY"]:
            tried, mode = chunk[4], "try"
        else:
            value, step, mode = chunk[3], step + 1, ""
    part = chunks[-1]
    if mode == "guess" or part[:1] == [ids["HMM"]]:
        if filler == task.steps:
            return [
                {ids["ANS"]: 1.0},
                dict.fromkeys(range(task.p), 1 / task.p),
                {ids["EOS"]: 1.0},
            ][len(part)]
        return {ids["HMM"] if len(part) < 4 else ids["SEP"]: 1.0}
    if mode == "try":
        return {ids["NO"]: who.recover, ids["OK"]: 1 - who.recover} if not part else {ids["SEP"]: 1.0}
    if step == task.steps:
        return [{ids["ANS"]: 1.0}, {value: 1.0}, {ids["EOS"]: 1.0}][len(part)]
    op, k = problem.ops[step]
    right = task.successor(step + 1, value, op, k)
    wrong = [v for v in range(task.p) if v != right]
    if not part:
        first = {ids[f"S{step + 1}"]: 1.0}
        return first if trace else {ids["HMM"]: who.guess, ids["S1"]: 1 - who.guess}
    if len(part) < 3:
        return {[0, ids[op], k][len(part)]: 1.0}
    if len(part) == 3:
        if mode == "no":
            return {right: 1.0}
        if step + 1 in task.hard:
            return {right: who.insight, **{v: (1 - who.insight) / len(wrong) for v in wrong}}
        return {right: 1 - who.tangent, ids["TRY"]: who.tangent}
    if len(part) == 4 and part[3] == ids["TRY"]:
        return {v: 1 / len(wrong) for v in wrong}
    return {ids["SEP"]: 1.0}


class TabularLM(nn.Module):
    """A model whose cache keeps the tokens themselves and whose logits are the logarithms of the tables.

    Args:
        problems: What it knows; their prompts differ and are equally long.
    """

    def __init__(self, *problems: ChainProblem) -> None:
        super().__init__()
        self.problems = {tuple(problem.prompt): problem for problem in problems}
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)

    @functools.lru_cache(maxsize=100_000)  # noqa: B019 - lives as long as a test
    def row(self, prompt: tuple[int, ...], trace: tuple[int, ...]) -> Tensor:
        problem = self.problems[prompt]
        probabilities = torch.zeros(len(problem.task.words), dtype=torch.float64)
        if problem.task.ids["EOS"] in trace:
            probabilities[-1] = 1  # rows that have ended are carried along
        else:
            for token, probability in next_tokens(problem, trace).items():
                probabilities[token] = probability
        return probabilities.log()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: Any = 0,
    ) -> Any:
        cache = DynamicCache() if past_key_values is None else past_key_values
        stored = input_ids[:, None, :, None].double()
        tokens = cache.update(stored, stored, 0)[0][:, 0, :, 0].long()
        new, total = input_ids.shape[1], tokens.shape[1]
        where = list(range(total - new, total))
        if isinstance(logits_to_keep, Tensor):
            where = [total - new + int(i) for i in logits_to_keep]
        elif logits_to_keep:
            where = where[-logits_to_keep:]
        length, rows = len(next(iter(self.problems))), []
        for b, own in enumerate(tokens.tolist()):
            start = 0 if attention_mask is None else int((attention_mask[b] == 0).sum())
            prompt, begin = tuple(own[start : start + length]), start + length
            # in the midst of the prompt there is nothing to be said
            spots = [tuple(own[begin : i + 1]) for i in where if i >= begin - 1]
            known = [self.row(prompt, trace) for trace in spots]
            blank = [torch.zeros(len(self.problems[prompt].task.words), dtype=torch.float64)]
            rows.append(torch.stack(blank * (len(where) - len(known)) + known))
        return SimpleNamespace(logits=torch.stack(rows), past_key_values=cache)
