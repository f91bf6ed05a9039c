"""Answers with all that the update needs of them, their advantages, and their division into minibatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from zoo.errors import RunError
from zoo.methods.salsa import losses
from zoo.nn.distributed import is_distributed


class Rollout(NamedTuple):
    """Prompts and answers with all that is known of them before the update; tensors of `B` rows."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    """Under the policy that drew the answers, `[B, T]`."""
    values: Tensor
    """Before each token, `[B, T]`; 0 without a value network."""
    advantages: Tensor
    returns: Tensor
    row: Tensor
    """Place of each row in the global batch."""

    def take(self, rows: Tensor) -> Rollout:
        """Some of the rows."""
        return Rollout(*(part[rows] for part in self))


def ended(tokens: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """Whether each answer `[B, T]` has its end-of-text token, bool `[B]`."""
    return ((tokens == eos_id) & mask).any(dim=1)


def final_scores(scores: Tensor, has_end: Tensor, penalty: float, source: str) -> Tensor:
    """Scores less the penalty for answers without an end, `[B]`.

    Args:
        scores: `[B]`.
        has_end: bool `[B]`.
        penalty: Of an answer without an end.
        source: Where the scores come from, for the error.

    Raises:
        RunError: If a score is not finite.
    """
    scores = scores - penalty * (~has_end).float()
    bad = ~torch.isfinite(scores)
    if bool(bad.any()):
        raise RunError(
            f"the reward of {source} is not finite for {int(bad.sum())} of {len(scores)} answers", "mend the reward"
        )
    return scores


def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, `[B, T]`.

    Args:
        rewards: Of each token, `[B, T]`.
        values: Before each token, `[B, T]`; unused without a value network.
        mask: bool `[B, T]`.
        options: `advantage`, `gamma`, `lam`, `samples_per_prompt`, `whiten_rewards` and `whiten_advantages` of `Salsa`.
    """
    if options["whiten_rewards"]:
        rewards = losses.whiten(rewards, mask, shift_mean=False)
    if options["advantage"] == "gae":
        advantages, returns = losses.gae(rewards, values, mask, options["gamma"], options["lam"])
    else:
        returns = rewards.sum(dim=1)
        compare = losses.leave_one_out if options["advantage"] == "rloo" else losses.group_relative
        advantages = torch.where(mask, compare(returns, options["samples_per_prompt"])[:, None], 0)
        returns = torch.where(mask, returns[:, None], 0)
    return losses.whiten(advantages, mask) if options["whiten_advantages"] else advantages, returns


def watched(
    scores: Tensor,
    logprobs: Tensor,
    reference: Tensor,
    entropy: Tensor,
    mask: Tensor,
    has_end: Tensor,
    beta: float,
    sft: Tensor | None = None,
) -> dict[str, Tensor]:
    """Means over the answers of all processes that a batch is logged with.

    Args:
        scores: `[B]`.
        logprobs: Under the policy, `[B, T]`.
        reference: Under the reference, `[B, T]`.
        entropy: Of the policy before each token, `[B, T]`.
        mask: bool `[B, T]`.
        has_end: bool `[B]`.
        beta: Weight of the KL.
        sft: Log-probabilities under the first member, where it is not the reference.
    """
    every = torch.ones_like(scores, dtype=torch.bool)

    def kl_to(other: Tensor) -> Tensor:
        return losses.masked_mean(torch.where(mask, losses.k1(logprobs, other), 0).sum(dim=1), every)

    means = {
        "score": losses.masked_mean(scores, every),
        "kl": kl_to(reference),
        "k3": losses.masked_mean(losses.k3(logprobs, reference), mask),
        "entropy": losses.masked_mean(entropy, mask),
        "length": losses.masked_mean(mask.sum(dim=1).float(), every),
        "no_eos": losses.masked_mean((~has_end).float(), every),
    }
    means["rlhf_reward"] = means["score"] - beta * means["kl"]
    return means if sft is None else {**means, "kl_sft": kl_to(sft)}


def minibatch_rows(row: Tensor, size: int, count: int, seed: int) -> Iterator[Tensor]:
    """Rows of this process in each minibatch of a random division of the global batch.

    Args:
        row: Place of each row of this process in the global batch, int64 `[B]`.
        size: Rows of the global batch.
        count: Minibatches.
        seed: Of the division, the same on all processes.

    Raises:
        ValueError: If there are more minibatches than rows.
    """
    if size < count:
        raise ValueError(f"minibatches: {count} is more than the {size} answers of a batch")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(row.device)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=row.device))
    part = place[row] * count // size
    for number in range(count):
        yield (part == number).nonzero()[:, 0]


def pieces(rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of each forward pass and whether each counts; as many passes in every process, none of them empty.

    Args:
        rows: int64 `[B]`.
        size: Most rows of a pass; 0 for one pass.
    """
    count = torch.tensor(max(math.ceil(len(rows) / size), 1) if size else 1, device=rows.device)
    if is_distributed():
        dist.all_reduce(count, dist.ReduceOp.MAX)
    for piece in rows.tensor_split(int(count)):
        counts = torch.ones_like(piece, dtype=torch.bool)
        yield (piece, counts) if len(piece) else (rows.new_zeros(1), counts.new_zeros(1))


def in_parts(tensors: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    """Split rows into parts of `size`; 0 for one part."""
    return list(zip(*(t.split(size or len(tensors[0])) for t in tensors), strict=True))
