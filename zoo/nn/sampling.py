"""Batched sampling from causal language models: greedy, temperature, top-k, top-p, with cache and left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """What was sampled after `B` prompts."""

    tokens: Tensor
    """int64 `[B, N]`, `N` at most the number asked for; `pad_id` after the end of a text."""
    lengths: Tensor
    """int64 `[B]`: tokens of each text, its end-of-text token among them."""

    @property
    def mask(self) -> Tensor:
        """bool `[B, N]`, true on the tokens of a text."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]


def left_pad(rows: Sequence[Tensor], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Put sequences of tokens flush right in one batch.

    Args:
        rows: `B` sequences, int64 `[P_b]`.
        pad_id: Fills the left.

    Returns:
        Tokens int64 `[B, P]` and mask bool `[B, P]`, true on tokens.
    """
    flipped = torch.nn.utils.rnn.pad_sequence([row.flip(0) for row in rows], batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows], device=flipped.device)
    mask = torch.arange(flipped.shape[1], device=flipped.device) < lengths[:, None]
    return flipped.flip(1), mask.flip(1)


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Exclude unlikely tokens by a logit of minus infinity.

    Args:
        logits: `[..., V]`, after division by the temperature.
        top_k: Keep the `top_k` most likely tokens (and what ties with the last); 0 keeps all.
        top_p: Then keep the smallest set of most likely tokens whose probability reaches `top_p`; 1 keeps all.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        excluded = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token of each row.

    Args:
        logits: `[B, V]`.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: See `filter_logits`.
        top_p: See `filter_logits`.
        generator: Source of randomness on the device of `logits`; None for torch's global one.

    Returns:
        int64 `[B]`.

    Raises:
        ValueError: If a value is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = filter_logits(logits.float() / temperature, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `ValueError` if one of the sampling values is out of range."""
    if temperature < 0:
        raise ValueError(f"temperature: {temperature} is not accepted; accepted: 0 (greedy) or more")
    if top_k < 0:
        raise ValueError(f"top_k: {top_k} is not accepted; accepted: 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} is not accepted; accepted: above 0, at most 1 (all tokens)")


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> Samples:
    """Continue a batch of prompts with the model's cache, until each has ended or `max_new_tokens` are reached.

    Put the model in evaluation mode first; its mode is left as it is.

    Args:
        model: Causal language model of `transformers`.
        prompt_ids: int64 `[B, P]`, padded on the left where lengths differ (`left_pad`).
        max_new_tokens: Most tokens to add.
        attention_mask: `[B, P]`, true or 1 on tokens; None if there is no padding.
        temperature: See `sample_next`; 0 is greedy.
        top_k: See `filter_logits`.
        top_p: See `filter_logits`.
        eos_id: Token that ends a text; None if there is none.
        pad_id: Fills a text after its end.
        generator: See `sample_next`.

    Raises:
        ValueError: If a value is out of range, a prompt is empty or padded on the right.
    """
    check_sampling(temperature, top_k, top_p)
    mask = torch.ones_like(prompt_ids) if attention_mask is None else attention_mask.to(prompt_ids.dtype)
    if prompt_ids.shape[1] == 0 or not bool(mask[:, -1].all()):
        raise ValueError(f"prompts {list(prompt_ids.shape)} must have a token each and be padded on the left")
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    done = torch.zeros(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
    inputs, cache, tokens = prompt_ids, None, list[Tensor]()
    for _ in range(max_new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = sample_next(output.logits[:, -1], temperature, top_k, top_p, generator).masked_fill(done, pad_id)
        tokens.append(token)
        if eos_id is not None:
            done = done | (token == eos_id)
            if bool(done.all()):
                break
        inputs, cache = token[:, None], output.past_key_values
        mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        positions = positions[:, -1:] + 1
    new = torch.stack(tokens, dim=1) if tokens else prompt_ids[:, :0]
    lengths = torch.full((len(new),), new.shape[1], device=new.device)
    if eos_id is not None and tokens:
        ends = new == eos_id
        lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, lengths)
    return Samples(new, lengths)
