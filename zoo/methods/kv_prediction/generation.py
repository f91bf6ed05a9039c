"""Greedy generation after a predicted cache: token by token, or for a whole batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from zoo.methods.kv_prediction.networks import CausalLM
from zoo.methods.kv_prediction.prefill import Prefill, full

if TYPE_CHECKING:
    from zoo.methods.kv_prediction.module import KVPrediction


class Step(NamedTuple):
    """A token of each prompt as it comes."""

    tokens: Tensor
    """int64 `[B]`."""
    milliseconds: float
    """Since generation began: of the first token, its TTFT."""


def stream(model: KVPrediction, prompt: Tensor, count: int, with_base: bool = False) -> Iterator[Step]:
    """Yield the most likely tokens after prompts `[B, N]`, one at a time.

    The auxiliary model is called once, before the first token; the base reads the last prompt token and what follows.

    Args:
        model: The method.
        prompt: int64 `[B, N]`.
        count: Tokens to generate.
        with_base: Whether the base reads the whole prompt itself.

    Raises:
        ValueError: If the prompt is empty or too long.
    """
    started = time.perf_counter()
    model.check_length(prompt, count)
    with torch.no_grad():
        start = full(model.base, prompt, count) if with_base else model.prefill(prompt, count)
    for tokens in decode(model.base, start, count):
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        yield Step(tokens, 1000 * (time.perf_counter() - started))


def decode(model: CausalLM, start: Prefill, count: int) -> Iterator[Tensor]:
    """Yield the most likely tokens `[B]` one at a time; the cache grows by one for each but the last."""
    logits = start.logits
    for left in range(count, 0, -1):
        tokens = logits.argmax(dim=-1)
        yield tokens
        if left > 1:
            with torch.no_grad():
                logits = model.extend(tokens[:, None], start.cache)[:, 0]


def generate(model: KVPrediction, prompt: Tensor, count: int, with_base: bool = False) -> Tensor:
    """Return the most likely tokens after prompts `[B, N]`; int64 `[B, count]`."""
    return torch.stack([step.tokens for step in stream(model, prompt, count, with_base)], dim=1)
