"""Random numbers of completions that depend on nothing but a name, and how tokens are drawn with them.

The random number of token `i` of a completion is a function of the seed and of (trace, boundary, row, i): it does not
matter what else is in a batch, in which order work is done, or whether a killed analysis goes on.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.nn.sampling import check_sampling, filter_logits


@dataclass(frozen=True)
class Policy:
    """How completions are drawn.

    Args:
        temperature: Divides the logits, before `top_p`; 0 is greedy.
        top_p: Mass of the most likely tokens that are kept.
        budget: Most tokens of trace and completion together, so that a long prefix gives no longer text.
        seed: Seed of all draws.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    budget: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, 0, self.top_p)
        if self.budget < 1:
            raise ValueError(f"budget: {self.budget} is not accepted; accepted: 1 token or more")


def row_keys(seed: int, key: str, boundary: int, rows: Sequence[int]) -> NDArray[np.uint64]:
    """Return a 64-bit key for each completion, `[N]`."""
    name = np.uint64(zlib.crc32(key.encode()) | (zlib.adler32(key.encode()) << 32))
    with np.errstate(over="ignore"):
        out = _mix(np.asarray(rows, dtype=np.uint64) + _mix(np.uint64(boundary) + _mix(name + _mix(np.uint64(seed)))))
    return out


def uniforms(keys: NDArray[np.uint64], step: int) -> NDArray[np.float64]:
    """Return the uniform number of token `step` of each completion, in `[0, 1)`, `[N]`."""
    with np.errstate(over="ignore"):
        bits = _mix(keys + np.uint64(step) * np.uint64(0xD1342543DE82EF95))
    return (bits >> np.uint64(11)).astype(np.float64) / 2.0**53


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def pick(logits: Tensor, uniform: NDArray[np.float64], policy: Policy) -> Tensor:
    """Draw a token of each row by inverting its distribution: temperature first, then `top_p`.

    Args:
        logits: `[N, V]`.
        uniform: In `[0, 1)`, `[N]`.
        policy: Temperature and `top_p`.

    Returns:
        int64 `[N]`.
    """
    if policy.temperature == 0:
        return logits.argmax(dim=-1)
    kept = filter_logits(logits.float() / policy.temperature, 0, policy.top_p)
    cumulative = kept.softmax(dim=-1).double().cumsum(dim=-1)
    wanted = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
