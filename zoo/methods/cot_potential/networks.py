"""The language models of an analysis: the one that is trained or analysed, and one that provides traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from zoo.nn.lm import build_lm
from zoo.nn.pretrained import load_part, read_weights


def load_provider(source: str, vocab_size: int | None) -> Any:
    """Load the model that provides traces, frozen, in evaluation mode.

    Args:
        source: Checkpoint of a run of this method, or a path or a name as `build_lm` takes it.
        vocab_size: Number of tokens of the data.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is not one of this method.
    """
    if not source.endswith(".ckpt"):
        return build_lm(source, vocab_size).requires_grad_(False)
    path = Path(source).expanduser()
    weights = read_weights(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    lm = content.get("hyper_parameters", {}).get("lm")
    if not lm:
        raise ValueError(f"provider: {path} is no checkpoint of cot_potential with a model of its own")
    net: Any = build_lm(lm, vocab_size)
    load_part(net, weights, "net")
    return net.eval().requires_grad_(False)
