"""The networks of a trained module as safetensors that timm and transformers read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from zoo.checks import import_class, parameters
from zoo.errors import UsageError

WEIGHTS = "model.safetensors"


def load_trained(content: Mapping[str, Any]) -> pl.LightningModule:
    """Build the method of a checkpoint again, with its weights, in evaluation mode.

    Args:
        content: What `zoo.cli.read_checkpoint` returned.

    Raises:
        UsageError: If the checkpoint does not say what it belongs to, or does not fit the method as it is now.
    """
    path = content.get("zoo", {}).get("config", {}).get("model", {}).get("class_path")
    if not path:
        raise UsageError("the checkpoint does not say which method wrote it", "accepted: checkpoints of `zoo fit`")
    cls = import_class(path, "model", pl.LightningModule)
    known = parameters(cls)
    options = {name: value for name, value in content.get("hyper_parameters", {}).items() if name in known}
    if "init_from" in options:
        options["init_from"] = None  # its weights were overwritten by the training
    model = cls(**options)
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"the checkpoint does not fit {cls.__name__}: {str(error).splitlines()[1].strip()}") from error
    return model.eval()


def known_networks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The outermost parts of a module that are models of timm or transformers: name, part, and which of the two."""
    found: list[str] = []
    for name, part in model.named_modules():
        if any(name == outer or name.startswith(f"{outer}.") for outer in found):
            continue
        kind = library(part)
        if kind:
            found.append(name)
            yield name, part, kind


def library(part: nn.Module) -> str:
    """`timm` or `transformers` if a module is a model of one of them, else an empty string."""
    package = type(part).__module__.partition(".")[0]
    if package == "transformers" and hasattr(part, "save_pretrained"):
        return "transformers"
    return "timm" if package == "timm" and hasattr(part, "pretrained_cfg") else ""


def export(model: pl.LightningModule, folder: Path) -> dict[str, str]:
    """Write the networks of a module, each into a folder of its own, and read them back.

    A method may have `export(self, folder: str) -> str | None`, which writes one folder under the names that others
    read, and may say how to load it; then that is all. Otherwise each model of timm or transformers is written as that
    library stores it, and the rest of the module's state under its own names.

    Args:
        model: The module.
        folder: An empty or new folder.

    Returns:
        For each folder written, how to load it.

    Raises:
        RuntimeError: If what was written does not read back equal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own: Any = getattr(model, "export", None)
    if own is not None:
        how = own(str(folder))
        return {str(folder): how or "as the method says: zoo info shows its docstring"}
    written: dict[str, str] = {}
    rest = dict(model.state_dict())
    for name, part, kind in known_networks(model):
        place = folder / (name.replace(".", "-") or "model")
        written[str(place)] = _transformers(part, place) if kind == "transformers" else _timm(part, place)
        rest = {key: value for key, value in rest.items() if name and not key.startswith(f"{name}.")}
    if rest:
        place = folder / ("other" if written else "module")
        save_tensors(rest, place)
        written[str(place)] = f"safetensors.torch.load_file({str(place / WEIGHTS)!r}), names of {type(model).__name__}"
    return written


def save_tensors(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors by name, those that share storage once each, and check that they read back equal."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    back = load_file(folder / WEIGHTS)
    _same(plain, back, folder)


def _transformers(part: Any, folder: Path) -> str:
    part.save_pretrained(folder, safe_serialization=True)
    auto = "AutoModelForCausalLM" if "CausalLM" in type(part).__name__ or hasattr(part, "lm_head") else "AutoModel"
    import transformers

    back = getattr(transformers, auto).from_pretrained(folder, dtype=next(part.parameters()).dtype)
    _same(part.state_dict(), back.state_dict(), folder)
    return f"transformers.{auto}.from_pretrained({str(folder)!r})"


def _timm(part: Any, folder: Path) -> str:
    import timm

    architecture = part.pretrained_cfg.get("architecture") or part.default_cfg.get("architecture")
    stem = next((m for m in part.modules() if isinstance(m, nn.Conv2d)), None)
    channels = stem.in_channels if stem else 3
    options: dict[str, Any] = {"num_classes": getattr(part, "num_classes", 0), "in_chans": channels}
    save_tensors(part.state_dict(), folder)
    try:
        back = timm.create_model(architecture, pretrained=False, **options)
        back.load_state_dict(part.state_dict())
    except (RuntimeError, TypeError):
        # built with options that its configuration does not remember: the names are timm's all the same
        return f"safetensors.torch.load_file({str(folder / WEIGHTS)!r}), names of timm's {architecture}"
    (folder / "config.json").write_text(
        json.dumps({"architecture": architecture, "num_classes": options["num_classes"], "model_args": options,
                    "pretrained_cfg": {}}, indent=2), encoding="utf-8",
    )  # fmt: skip
    return f"timm.create_model({'local-dir:' + str(folder)!r}, pretrained=True)"


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], folder: Path) -> None:
    for name, value in left.items():
        if name not in right or not torch.equal(value.cpu(), right[name].cpu()):
            raise RuntimeError(f"{name} in {folder} does not read back equal")
