"""What the options of SALSA may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import did_you_mean
from zoo.methods.salsa.generation import ENGINES

REFERENCES = ("sft", "other", "soup", "mkl")
CHOICES = {
    "init": ("sft", "soup"),
    "advantage": ("gae", "rloo", "group"),
    "value": ("separate", "shared"),
    "value_init": ("sft", "reward"),
    "engine": ENGINES,
    "schedule": ("constant", "linear"),
}
#: Options with a least value, by it.
ABOVE_ZERO = ("lr", "value_lr", "temperature", "clip", "value_clip", "max_grad_norm")
FROM_ZERO = ("beta", "missing_eos_penalty", "lora_rank", "micro_batch_size", "best_of", "value_weight")
FROM_ONE = ("samples_per_prompt", "answer_length", "ppo_epochs", "minibatches")
SHARES = ("gamma", "lam")


def check_options(given: Mapping[str, Any]) -> None:
    """Check values and what does not go together.

    Args:
        given: Arguments of the constructor by name.

    Raises:
        ValueError: For the first mistake: key, value and what is accepted.
    """
    for key, accepted in CHOICES.items():
        if given[key] not in accepted:
            raise ValueError(f"{key}: {given[key]!r} is unknown; accepted: {', '.join(accepted)}")
    for keys, fits, accepted_range in (
        (ABOVE_ZERO, lambda x: x > 0, "above 0"),
        (FROM_ZERO, lambda x: x >= 0, "0 or more"),
        (FROM_ONE, lambda x: x >= 1, "1 or more"),
        (SHARES, lambda x: 0 <= x <= 1, "0 to 1"),
    ):
        for key in keys:
            if not fits(given[key]):
                raise ValueError(f"{key}: {given[key]} is not accepted; accepted: {accepted_range}")
    samples = given["samples_per_prompt"]
    if given["advantage"] != "gae" and samples < 2:
        raise ValueError(f"samples_per_prompt: {samples} with advantage {given['advantage']!r}; accepted: 2 or more")
    if given["value_init"] == "reward" and given["reward_model"] is None:
        raise ValueError("value_init: 'reward' needs a reward_model")


def read_reference(given: Mapping[str, Any] | None) -> tuple[str, float, list[str]]:
    """Mode, alpha and members of a reference.

    Raises:
        ValueError: If a key or the mode is unknown, or the members do not suffice.
    """
    values = {"mode": "soup", "alpha": 0.5, "members": [], **(given or {})}
    for key in values:
        if key not in ("mode", "alpha", "members"):
            raise ValueError(f"reference.{key} is unknown; {did_you_mean(key, ('mode', 'alpha', 'members'))}")
    mode, alpha, members = values["mode"], values["alpha"], list(values["members"] or [])
    if mode not in REFERENCES:
        raise ValueError(f"reference.mode: {mode!r} is unknown; {did_you_mean(str(mode), REFERENCES)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"reference.alpha: {alpha!r} is not accepted; accepted: a number")
    if len(members) == 1 and mode != "sft":
        raise ValueError(f"reference.members: one is not enough for mode {mode!r}; accepted: two or more")
    return mode, float(alpha), members
