"""Start from weights of another run or of a published self-supervised checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: Containers that published checkpoints wrap their weights in, and prefixes that wrappers add to the names.
_CONTAINERS = ("state_dict", "teacher", "student", "model")
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "net.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of weights without running code from it, and unwrap `{"state_dict": ...}` and the like.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it holds no tensors by name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file of weights at {file}")
    content: Any
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        content = load_file(file)
    else:
        content = torch.load(file, map_location="cpu", weights_only=True)
    for container in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    weights = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not weights:
        raise ValueError(f"{file} holds no tensors by name")
    return weights


def load_part(module: nn.Module, weights: dict[str, Tensor], part: str) -> None:
    """Load the entries `<part>.*` into `module`; all of its parameters and buffers have to be there.

    Raises:
        ValueError: If names or shapes do not fit, naming the first few.
    """
    prefix = f"{part}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    _load(module, own, part)


def load_backbone(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a backbone from a published checkpoint; prefixes of wrappers and the weights of heads are dropped.

    Raises:
        ValueError: If a weight of the backbone is missing or has another shape.
    """
    wanted = module.state_dict().keys()
    own: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = name
        while short not in wanted and (prefix := next((p for p in _PREFIXES if short.startswith(p)), None)):
            short = short.removeprefix(prefix)
        if short in wanted:
            own[short] = value
    _load(module, own, "backbone")


def _load(module: nn.Module, own: dict[str, Tensor], part: str) -> None:
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in own and not name.endswith("num_batches_tracked")]
    wrong = [
        f"{name} is {list(own[name].shape)}, expected {list(value.shape)}"
        for name, value in wanted.items()
        if name in own and own[name].shape != value.shape
    ]
    extra = [name for name in own if name not in wanted]
    if missing or wrong or extra:
        said = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
        said += [f"{len(extra)} unknown: {', '.join(extra[:3])}"] if extra else []
        said += [f"{len(wrong)} of another shape: {', '.join(wrong[:2])}"] if wrong else []
        raise ValueError(f"weights do not fit the {part}; {'; '.join(said)}")
    module.load_state_dict(own, strict=False)
