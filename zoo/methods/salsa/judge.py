"""Pairwise comparison of answers: by a reward, or by a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from zoo.errors import RunError
from zoo.methods.salsa.losses import bootstrap_interval

QUESTION = """\
Which of two answers to a prompt is better? Judge how helpful and correct they are; neither order nor length counts.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Reply with one word: A, B or TIE."""


class Judge(Protocol):
    """Prefers one of two answers."""

    def __call__(self, prompt: str, first: str, second: str) -> float:
        """1 if the first is better, 0 if the second is, 0.5 for a tie."""


class Verdict(NamedTuple):
    """How often the left answers win, ties counting half."""

    win_rate: float
    low: float
    """Lower end of the 95 % interval of the bootstrap over prompts."""
    high: float
    """Upper end."""
    ties: float
    """Share of prompts on which the judge does not decide, among them those where the order of the answers does."""
    scores: Tensor
    """Of each prompt, float64 `[N]`."""


def verdict(scores: Tensor) -> Verdict:
    """Summarise scores `[N]` of 1, 0.5 and 0 (or means of two of them)."""
    low, high = bootstrap_interval(scores)
    return Verdict(float(scores.mean()), low, high, float((scores == 0.5).double().mean()), scores)


def pairwise(judge: Judge, prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> Verdict:
    """Let a judge compare answers, each pair in both orders.

    Judges prefer one place. The score of a pair is the mean over the two orders: a judge that always takes the first
    answer scores one half.

    Raises:
        ValueError: If the lists differ in length or are empty.
    """
    if not len(prompts) == len(left) == len(right) or not prompts:
        raise ValueError(f"{len(prompts)} prompts, {len(left)} and {len(right)} answers; accepted: as many of each")
    scores = [
        (judge(prompt, a, b) + 1 - judge(prompt, b, a)) / 2 for prompt, a, b in zip(prompts, left, right, strict=True)
    ]
    return verdict(torch.tensor(scores, dtype=torch.float64))


class RewardJudge:
    """Prefers the answer with the larger reward.

    Args:
        reward: Of a prompt and an answer.
    """

    def __init__(self, reward: Callable[[str, str], float]) -> None:
        self.reward = reward

    def __call__(self, prompt: str, first: str, second: str) -> float:
        """1, 0.5 or 0."""
        a, b = self.reward(prompt, first), self.reward(prompt, second)
        return 0.5 if a == b else float(a > b)


class EndpointJudge:
    """Asks a language model behind `URL/chat/completions`; a reply that does not begin with A or B is a tie.

    Args:
        url: Base of the endpoint, such as `http://127.0.0.1:8000/v1`.
        model: Name of the model there.
        key_variable: Environment variable that holds the key; empty or unset for none.
        template: Question with `{prompt}`, `{first}` and `{second}`.
        timeout: Seconds to wait for a reply.
    """

    def __init__(
        self, url: str, model: str, key_variable: str = "", template: str = QUESTION, timeout: float = 60.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge.url: {url!r} is not accepted; accepted: http:// or https://")
        for name in ("{prompt}", "{first}", "{second}"):
            if name not in template:
                raise ValueError(f"judge.template lacks {name}")
        self.url, self.model, self.key_variable = url.rstrip("/"), model, key_variable
        self.template, self.timeout = template, timeout

    def __call__(self, prompt: str, first: str, second: str) -> float:
        """Ask once.

        Raises:
            RunError: If the endpoint does not answer as expected.
        """
        texts = {"prompt": prompt, "first": first, "second": second}
        question = re.sub(r"\{(prompt|first|second)\}", lambda found: texts[found[1]], self.template)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable, "") if self.key_variable else "":
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
        except (urllib.error.URLError, TimeoutError, KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise RunError(
                f"judge: {self.url} gave no verdict ({error})", "is the endpoint up, and the model there?"
            ) from error
        word = None if re.search(r"\btie\b", text, re.IGNORECASE) else re.match(r"\W*([AB])\b", text)
        return {"A": 1.0, "B": 0.0}[word[1]] if word else 0.5
