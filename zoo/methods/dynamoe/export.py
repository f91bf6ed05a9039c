"""A model directory of `transformers` with routers beside it.

`config.json` and `model.safetensors` are those of the dense model, its neurons sorted: any program that loads such
models runs it at full width, without code of ours. `dynamoe.json` and `dynamoe.safetensors` hold the routers; `load`
puts them into the same model, whose own `generate` then chooses a width for each token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.methods.dynamoe.losses import activity
from zoo.methods.dynamoe.networks import NestedMLP, add_routers, nest
from zoo.methods.dynamoe.routes import EXECUTIONS, ByRouter, Route, Trace
from zoo.nn.lm import build_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTINGS, ROUTERS = "dynamoe.json", "dynamoe.safetensors"
_FORMAT = 1
_SAMPLES = 64


def fingerprint(model: nn.Module) -> str:
    """Return a hash of some numbers of each dense weight: routers only fit the model that they were trained on."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ".router." not in name:
            flat = value.detach().reshape(-1)
            some = flat[torch.linspace(0, len(flat) - 1, _SAMPLES, dtype=torch.float64).round().long().to(flat.device)]
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def nested_layers(model: nn.Module) -> list[NestedMLP]:
    """The nested MLPs of a model, by layer.

    Raises:
        ValueError: If it has none.
    """
    layers = sorted((m for m in model.modules() if isinstance(m, NestedMLP)), key=lambda m: m.layer)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nested MLPs; accepted: a model that dynamoe.export.load returned"
        )
    return layers


def save(model: Any, directory: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a model with nested MLPs and routers.

    Args:
        model: Causal language model of `transformers`.
        directory: Where to; it is made.
        settings: `head`, `router_units`, `similarity`, `theta`, `tau`.
    """
    from safetensors.torch import save_file

    folder, layers = Path(directory), nested_layers(model)
    dense = {name: value for name, value in model.state_dict().items() if ".router." not in name}
    model.save_pretrained(folder, state_dict=dense)
    routers = {
        f"{mlp.layer}.{name}": value.contiguous()
        for mlp in layers
        if mlp.router is not None
        for name, value in mlp.router.state_dict().items()
    }
    save_file(routers, folder / ROUTERS)
    content = {
        "format": _FORMAT,
        "experts": layers[0].experts,
        **settings,
        "fingerprint": fingerprint(model),
    }
    (folder / SETTINGS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(
    directory: str | Path, theta: float | None = None, tau: float | None = None, execution: str = "grouped"
) -> PreTrainedModel:
    """Read what `save` wrote; the model's own `generate` chooses widths.

    Args:
        directory: The folder.
        theta: Threshold of a score head; None for the stored one.
        tau: That of a label head.
        execution: `grouped` or `masked`.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        ValueError: If the folder has no routers, they belong to other weights, or a value is not accepted.
    """
    from safetensors.torch import load_file

    folder = Path(directory).expanduser()
    for name in (SETTINGS, ROUTERS):
        if not (folder / name).is_file():
            raise ValueError(f"no {name} in {folder}; accepted: a folder that `zoo moefy` wrote")
    if execution not in EXECUTIONS:
        raise ValueError(f"execution: {execution!r} is unknown; accepted: {', '.join(EXECUTIONS)}")
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    if settings.get("format") != _FORMAT:
        raise ValueError(f"{folder / SETTINGS}: format {settings.get('format')!r} is unknown; accepted: {_FORMAT}")
    model = build_lm(str(folder))
    if fingerprint(model) != settings["fingerprint"]:
        raise ValueError(f"the routers in {folder} were trained on another model than the weights beside them")
    layers, control = nest(model, settings["experts"], settings["similarity"])
    add_routers(layers, settings["router_units"], settings["head"])
    weights = load_file(folder / ROUTERS)
    for mlp in layers:
        if mlp.router is not None:
            own = {n.partition(".")[2]: value for n, value in weights.items() if n.partition(".")[0] == str(mlp.layer)}
            mlp.router.load_state_dict(own)
    control.execution = execution
    knob, given = ("theta", theta) if settings["head"] == "score" else ("tau", tau)
    set_threshold(model, settings["head"], settings[knob] if given is None else given)
    return model.eval()


def set_threshold(model: nn.Module, head: str, knob: float | None) -> None:
    """Choose how much a model computes from now on.

    Args:
        model: With nested MLPs.
        head: Kind of its routers.
        knob: theta or tau, 0 to 1; None takes the likeliest label of a label head.

    Raises:
        ValueError: If it is out of range.
    """
    name = "theta" if head == "score" else "tau"
    if knob is not None and not 0 <= knob <= 1:
        raise ValueError(f"{name}: {knob} is not accepted; accepted: 0 to 1")
    nested_layers(model)[0].control.route = ByRouter(head, knob)


@torch.no_grad()
def mean_activity(model: Any, batches: Sequence[Mapping[str, Any]], route: Route) -> float:
    """Activity of a route over some batches of `input_ids` (and `attention_mask`); padding does not count."""
    layers = nested_layers(model)
    total = count = 0.0
    for batch in batches:
        ids, mask, trace = batch["input_ids"], batch.get("attention_mask"), Trace()
        with layers[0].control.using(route, trace):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        sizes = torch.tensor([[w / mlp.hidden_width for w in mlp.widths] for mlp in layers], device=ids.device)
        active = activity(trace.stacked("widths").long(), sizes)
        active = active.flatten() if mask is None else active[mask.bool()]
        total, count = total + float(active.sum()), count + active.numel()
    return total / max(count, 1.0)


def calibrate(measure: Callable[[float], float], target: float, steps: int = 12) -> float:
    """Find the least theta (or tau) whose activity reaches a target, by bisection.

    Args:
        measure: Activity at a threshold; does not fall.
        target: Above 0, at most 1.
        steps: Halvings of the interval from 0 to 1.

    Raises:
        ValueError: If the target is out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"activity: {target} is not accepted; accepted: above 0, at most 1")
    low, high = 0.0, 1.0
    if measure(low) >= target:
        return low
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(middle) >= target else (middle, high)
    return high
