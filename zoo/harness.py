"""Language models of the zoo in the lm-evaluation-harness (`pip install 'method-zoo[lm-eval]'`).

The harness asks three things of a model: how likely a text is after another, how likely a whole text is, and how a
prompt goes on. `HarnessLM` turns them into tokens, batches and windows; a method says how its model reads tokens.
"""

from __future__ import annotations

import csv
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo.nn.lm import IGNORE, token_logprobs

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise ImportError("the harness is missing: pip install 'method-zoo[lm-eval]'") from error

#: Metrics that are a share of right answers, the first that a task has counts for the mean over tasks.
ACCURACIES = ("acc", "exact_match")
_BOOTSTRAP = 1000  # samples for errors of metrics that are no mean
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of `datamodules.text` have it."""

    eos_id: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens."""


class HarnessLM(LM):
    """A causal language model that the harness can ask, on one device.

    Args:
        tokenizer: Of the model.
        context: Most tokens that the model reads; None for any number. Longer prompts lose their beginning.
        batch_size: Texts that are scored at a time.
        max_new_tokens: Most tokens of an answer where the task names none.
        prefix: Tokens that begin every text, such as the one that Llama's tokenizer puts first.

    Raises:
        ValueError: If `batch_size` is less than 1.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int | None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        prefix: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not accepted; accepted: 1 or more")
        self.tokenizer, self.context, self.batch_size = tokenizer, context, batch_size
        self.max_new_tokens, self.prefix = max_new_tokens, list(prefix)
        self._device = torch.device("cpu")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._device

    @abstractmethod
    def logits(self, ids: Tensor, mask: Tensor, keep: int) -> Tensor:
        """Logits of what follows each of the last `keep` places.

        Args:
            ids: int64 `[B, T]`, padded at the end.
            mask: bool `[B, T]`, false at padding.
            keep: At least 1, at most T.

        Returns:
            `[B, keep, V]`; what stands at padding does not count.
        """

    @abstractmethod
    def greedy(self, ids: Tensor, count: int) -> Iterator[int]:
        """Yield the most likely tokens after a prompt `[1, N]`, `count` of them."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding gives it."""
        return self.scores([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of whole texts; the first token is predicted from the prefix, else from an end token.

        Texts longer than the context are read in windows: each token counts once, and the last window is a full one.
        """
        windows, owners = list[tuple[list[int], list[int]]](), list[int]()
        for owner, request in enumerate(requests):
            ids = self.tokenizer.encode([request.args[0]])[0]
            whole = [*(self.prefix or [self.tokenizer.eos_id])[-1:], *ids]
            width = self.context or max(len(ids), 1)
            for begin in range(0, len(ids), width):
                end = min(begin + width, len(ids))
                windows.append((whole[max(0, end - width) : begin + 1], ids[begin:end]))
                owners.append(owner)
        found = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.scores(windows), strict=True):
            found[owner] += value
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the stop strings."""
        return [self.answer(*request.args) for request in requests]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the tokens of the whole text are; a blank between goes with the continuation."""
        blank = len(context) - len(context.rstrip())
        if blank:
            context, continuation = context[:-blank], context[-blank:] + continuation
        whole, start = self.tokenizer.encode([context + continuation, context])
        return [*self.prefix, *whole[: len(start)]] or [self.tokenizer.eos_id], whole[len(start) :]

    @torch.no_grad()
    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of the second tokens of each pair after the first, and whether each is the likeliest.

        Raises:
            ValueError: If a continuation is longer than the context.
        """
        found = [(0.0, True)] * len(pairs)
        long = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        long.sort(key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))  # little padding
        for start in range(0, len(long), self.batch_size):
            chosen = long[start : start + self.batch_size]
            ids, labels, mask = self._batch([pairs[i] for i in chosen])
            keep = labels.shape[1] - int((labels != IGNORE).any(0).nonzero()[0])
            logits, labels = self.logits(ids, mask, keep), labels[:, -keep:]
            sums = token_logprobs(logits, labels).sum(1)
            right = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
            for i, value, greedy in zip(chosen, sums.tolist(), right.tolist(), strict=True):
                found[i] = (value, greedy)
        return found

    def _batch(self, pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, labels and mask of some pairs, `[B, T]`, padded at the end."""
        rows, longest = [], self.context or 10**9
        for context, continuation in pairs:
            if len(continuation) > longest:
                raise ValueError(f"a continuation has {len(continuation)} tokens; accepted: {longest} at most")
            rows.append(([*context, *continuation][-longest - 1 :], len(continuation)))
        width = max(len(row) for row, _ in rows) - 1
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, count) in enumerate(rows):
            n = len(row) - 1
            ids[i, :n], mask[i, :n] = torch.tensor(row[:-1]), True
            labels[i, n - count : n] = torch.tensor(row[-count:])
        return ids.to(self.device), labels.to(self.device), mask.to(self.device)

    def answer(self, prompt: str, options: Mapping[str, Any]) -> str:
        """Continue a prompt greedily up to an end token or one of the stop strings.

        Raises:
            ValueError: If the task wants samples, or an answer that leaves no room for the prompt.
        """
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("do_sample: True is not accepted; accepted: False, greedy decoding")
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count = int(next((options[name] for name in _LENGTHS if name in options), self.max_new_tokens))
        ids = [*self.prefix, *self.tokenizer.encode([prompt])[0]] or [self.tokenizer.eos_id]
        if self.context is not None:
            if count >= self.context:
                raise ValueError(f"max_gen_toks: {count} is not accepted; accepted: less than {self.context}")
            ids = ids[-(self.context - count) :]
        tokens: list[int] = []
        for token in self.greedy(torch.tensor([ids], device=self.device), count):
            if token == self.tokenizer.eos_id:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            ends = [text.index(stop) for stop in stops if stop and stop in text]
            if ends:
                return text[: min(ends)]
        return self.tokenizer.decode(tokens)


def evaluate(
    lm: LM,
    tasks: Sequence[str],
    include: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    shipped: bool = True,
    run_code: bool = False,
) -> dict[str, float]:
    """Evaluate a model on tasks of the harness.

    Args:
        lm: The model.
        tasks: Names of tasks, groups or tags of the harness, or of those in `include`.
        include: Folder with tasks of one's own, as YAML files.
        limit: Most examples of each task; None for all.
        shots: Examples in each prompt; None for what the task says.
        shipped: Whether the harness's own tasks are looked up; without them it starts sooner.
        run_code: Whether tasks such as HumanEval may run what the model writes.

    Returns:
        Each metric as `task/metric`, its standard error as `task/metric_stderr`, and `accuracy`: the plain mean over
        the tasks that count right answers.

    Raises:
        ValueError: If there is no such task, or it would run code of the model and may not.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=shipped)
    unknown = sorted({*tasks} - {*manager.all_tasks})
    if unknown or not tasks:
        named = ", ".join(unknown) or "none"
        raise ValueError(f"tasks: {named} not known to the harness; accepted: `lm-eval ls tasks`, or files in a folder")
    content = simple_evaluate(
        lm,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=False,
        confirm_run_unsafe_code=run_code,
    )
    return metrics(content["results"])


def metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Numbers of the harness under plain names, and the mean accuracy; see `evaluate`."""
    found: dict[str, float] = {}
    right: list[float] = []
    for task, values in results.items():
        # "acc,none": the metric, and the filter that answers went through
        named: dict[str, float] = {}
        for key, value in values.items():
            name, comma, chosen = key.partition(",")
            if comma and isinstance(value, int | float):
                named[name if chosen == "none" else f"{name} ({chosen})"] = float(value)
        found |= {f"{task}/{name}": value for name, value in named.items()}
        right += [named[name] for name in ACCURACIES if name in named][:1]
    return {"accuracy": sum(right) / len(right), **found} if right else found


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows to a .csv file, or with facts about them to a .json file.

    Raises:
        ValueError: If the name ends otherwise.
    """
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path.name} is no name of a table; accepted: .csv, .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps({**facts, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
