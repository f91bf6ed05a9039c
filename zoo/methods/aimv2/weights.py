"""Weights of other runs and of transformers: names of `Aimv2VisionModel` and `Aimv2Model`, both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.methods.aimv2.encoder import Trunk
from zoo.methods.aimv2.positions import resize_positions
from zoo.methods.aimv2.towers import Towers
from zoo.nn.pretrained import load_part, read_weights

#: Names in transformers and ours, of everything but queries, keys and values, which are one matrix here.
_BLOCK = {
    "rms_norm1": "norm1",
    "rms_norm2": "norm2",
    "attention.out_proj": "attention.proj",
    "ffn.gate_proj": "ffn.gate",
    "ffn.up_proj": "ffn.up",
    "ffn.down_proj": "ffn.down",
}
_VISION = {
    "embeddings.patch_embed.weight": "patch_embed.weight",
    "embeddings.patch_embed.bias": "patch_embed.bias",
    "embeddings.rms_norm.weight": "patch_norm.weight",
    "embeddings.position_embedding.weight": "positions",
    "rms_norm.weight": "norm.weight",
}
_HEAD = {
    "head.cls_token": "pool.query",
    "head.k_proj.weight": "pool.key.weight",
    "head.v_proj.weight": "pool.value.weight",
    "head.output_proj.weight": "pool.proj.weight",
    "head.output_proj.bias": "pool.proj.bias",
}
_TEXT = {
    "embeddings.token_embedding.weight": "embedding.weight",
    "embeddings.position_embedding.weight": "positions",
    "rms_norm.weight": "norm.weight",
}
_TOWERS = {
    "visual_projection.weight": "image_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "logit_scale": "log_scale",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def _encoder(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Rename the weights of one of transformers' encoders; names that are not known are left out."""
    out = {ours: weights[theirs] for theirs, ours in names.items() if theirs in weights}
    numbers = sorted({int(m[1]) for name in weights if (m := re.match(r"encoder\.layers\.(\d+)\.", name))})
    for i in numbers:
        old, new = f"encoder.layers.{i}", f"blocks.{i}"
        out[f"{new}.attention.qkv.weight"] = torch.cat([weights[f"{old}.attention.{n}.weight"] for n in _QKV])
        out |= {f"{new}.{b}.weight": weights[f"{old}.{a}.weight"] for a, b in _BLOCK.items()}
    return out


def _encoder_back(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The inverse of `_encoder`."""
    out = {theirs: weights[ours] for theirs, ours in names.items() if ours in weights}
    for name, value in weights.items():
        match = re.match(r"blocks\.(\d+)\.(.*)\.weight$", name)
        if match is None:
            continue
        new = f"encoder.layers.{match[1]}"
        if match[2] == "attention.qkv":
            out |= {f"{new}.attention.{n}.weight": p for n, p in zip(_QKV, value.chunk(3), strict=True)}
        else:
            theirs = next(a for a, b in _BLOCK.items() if b == match[2])
            out[f"{new}.{theirs}.weight"] = value
    return out


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def trunk_from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `Trunk` from those of an `Aimv2VisionModel`, or of an `Aimv2Model`, whose trunk is taken."""
    return _encoder(_part(weights, "vision_model.") or weights, _VISION)


def trunk_to_transformers(trunk: Trunk) -> dict[str, Tensor]:
    """Weights of an `Aimv2VisionModel` without head from a trunk."""
    return _encoder_back(trunk.state_dict(), _VISION)


def towers_from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `Towers` (LiT) from those of an `Aimv2Model`."""
    vision = _part(weights, "vision_model.")
    out = {ours: vision[theirs] for theirs, ours in _HEAD.items()} | {o: weights[t] for t, o in _TOWERS.items()}
    out["pool.query"] = out["pool.query"].flatten()
    return out | {f"text.{k}": v for k, v in _encoder(_part(weights, "text_model."), _TEXT).items()}


def lit_to_transformers(trunk: Trunk, towers: Towers) -> dict[str, Tensor]:
    """Weights of an `Aimv2Model` from a trunk and the towers of LiT."""
    own = towers.state_dict()
    head = {theirs: own[ours] for theirs, ours in _HEAD.items()}
    head["head.cls_token"] = head["head.cls_token"].view(1, 1, -1)
    vision = {**trunk_to_transformers(trunk), **head}
    text = _encoder_back(_part(own, "text."), _TEXT)
    return {
        **{f"vision_model.{k}": v for k, v in vision.items()},
        **{f"text_model.{k}": v for k, v in text.items()},
        **{theirs: own[ours] for theirs, ours in _TOWERS.items()},
    }


def vision_config(trunk: Trunk, **changes: Any) -> dict[str, Any]:
    """Values of the `Aimv2VisionConfig` that fits a trunk."""
    return {
        "hidden_size": trunk.width,
        "intermediate_size": trunk.blocks[0].ffn.gate.out_features,  # type: ignore[union-attr]
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": trunk.heads,
        "num_channels": trunk.in_channels,
        "image_size": trunk.grid[0] * trunk.patch_size,
        "patch_size": trunk.patch_size,
        "use_head": False,
        "is_native": trunk.positions is None,
        **changes,
    }


def export_trunk(trunk: Trunk, folder: str | Path) -> None:
    """Write a trunk as a folder that `Aimv2VisionModel.from_pretrained` reads."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    model = Aimv2VisionModel(Aimv2VisionConfig(**vision_config(trunk)))
    model.load_state_dict(trunk_to_transformers(trunk))
    model.save_pretrained(folder)


def read_source(source: str) -> dict[str, Tensor]:
    """Weights from a file, a folder of transformers, or, if neither is there, a model of the hub by name."""
    path = Path(source).expanduser()
    if path.is_file():
        return read_weights(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"init_from: no *.safetensors in {path}")
        return {name: value for file in files for name, value in read_weights(file).items()}
    if source.startswith(("/", ".", "~")) or path.suffix in (".ckpt", ".pt", ".pth", ".safetensors"):
        raise FileNotFoundError(f"init_from: no file of weights at {path}")
    from transformers import AutoModel

    return AutoModel.from_pretrained(source).state_dict()


def load_trunk(trunk: Trunk, source: str) -> None:
    """Load a trunk from a checkpoint of this method or from transformers; positions are resized to its grid.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If names or shapes do not fit.
    """
    weights = read_source(source)
    own = _part(weights, "trunk.") or trunk_from_transformers(weights)
    positions = own.get("positions")
    if positions is not None and trunk.positions is not None:
        side = round(len(positions) ** 0.5)
        own["positions"] = resize_positions(positions, (side, side), trunk.grid)
    load_part(trunk, {f"trunk.{name}": value for name, value in own.items()}, "trunk")


def load_network(module: nn.Module, source: str) -> None:
    """Load trunk, decoder and towers of a checkpoint of this method, or those of LiT from an `Aimv2Model`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If names or shapes do not fit.
    """
    load_trunk(module.trunk, source)  # type: ignore[arg-type]
    weights = read_source(source)
    if any(name.startswith("text_model.") for name in weights):
        weights = {f"towers.{name}": value for name, value in towers_from_transformers(weights).items()}
    for part in ("decoder", "pixel_mlp", "towers"):
        if getattr(module, part) is not None:
            load_part(getattr(module, part), weights, part)
