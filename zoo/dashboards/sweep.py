"""A W&B sweep of the search space that a method documents in its card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo import registry
from zoo.claims.reader import claims_files, load_plan
from zoo.config import shipped_configs
from zoo.errors import UsageError, did_you_mean

#: What an axis of a search space may say.
KEYS = ("min", "max", "log", "values")


def parameter(key: str, axis: Mapping[str, Any]) -> dict[str, Any]:
    """Return an axis of a search space as W&B writes it.

    Args:
        key: Option, for errors.
        axis: `{"values": [...]}`, or `{"min": a, "max": b}`, with `"log": True` uniformly in the logarithm.

    Raises:
        UsageError: If it is neither.
    """
    for word in axis:
        if word not in KEYS:
            raise UsageError(f"search: {key}: {word!r} is not accepted; {did_you_mean(str(word), KEYS)}")
    if set(axis) == {"values"} and axis["values"]:
        return {"values": list(axis["values"])}
    if {"min", "max"} <= set(axis) <= {"min", "max", "log"} and axis["min"] < axis["max"]:
        whole = isinstance(axis["min"], int) and isinstance(axis["max"], int)
        kind = f"{'q_' if whole and axis.get('log') else ''}log_uniform_values" if axis.get("log") else (
            "int_uniform" if whole else "uniform")  # fmt: skip
        return {"distribution": kind, "min": axis["min"], "max": axis["max"]}
    raise UsageError(f"search: {key}: {dict(axis)} is not accepted", "values: [...], or min below max, and log: true")


def default_config(name: str) -> str:
    """The config of the first run of a method's claims, else its smoke config."""
    files = claims_files()
    if name in files:
        for run in load_plan(files[name][0]).runs.values():
            if run.configs[0].startswith(f"{name}/"):
                return run.configs[0]
    if f"{name}/smoke" in shipped_configs():
        return f"{name}/smoke"
    raise UsageError(f"{name!r} ships no config", "--config NAME says what the sweep starts from")


def sweep_of(name: str, config: str = "", project: str = "method-zoo", entity: str = "") -> dict[str, Any]:
    """Return a sweep file: the search space of the card around a config.

    Args:
        name: Method.
        config: Config that the sweep starts from; see `default_config`.
        project: W&B project.
        entity: W&B entity, empty for the default one.

    Raises:
        UsageError: If the method documents no search space, or one with mistakes.
    """
    card = registry.read_card(registry.find("methods", name))
    space, goal = card.get("search") or {}, str(card.get("objective") or "")
    if not space:
        raise UsageError(f"{name!r} documents no search space", "card = Card(search={'lr': {'min': ..., 'max': ...}})")
    direction, _, metric = goal.partition(" ")
    if direction not in ("minimize", "maximize") or not metric:
        raise UsageError(f"objective: {goal!r} is not accepted", "card = Card(objective='maximize val/acc')")
    options = {key if "." in key else f"model.{key}": axis for key, axis in space.items()}
    return {
        "name": f"{name}-search",
        "project": project,
        **({"entity": entity} if entity else {}),
        "method": "bayes",
        "metric": {"name": metric, "goal": direction},
        "early_terminate": {"type": "hyperband", "min_iter": 3},
        "parameters": {key: parameter(key, axis) for key, axis in options.items()},
        "command": [
            "${env}", "zoo", "fit", "--config", config or default_config(name), "--wandb", "online", "${args}",
        ],
    }  # fmt: skip
