"""OpenELM in the format that its publisher ships: `config.json` and safetensors, read without running its code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.methods.kv_prediction.networks import CausalLM, Shape

_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.out_proj.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "ffn.proj_2.weight": "mlp.down_proj.weight",
}
_TOP = {"token_embeddings.weight": "embed_tokens.weight", "norm.weight": "norm.weight"}


def openelm_shape(config: Mapping[str, Any]) -> Shape:
    """Read the sizes from a `config.json` of OpenELM, whose heads and hidden units differ between layers.

    Raises:
        ValueError: If a key is missing, or the model has a feature that is missing here.
    """
    keys = ("vocab_size", "model_dim", "head_dim", "num_query_heads", "num_kv_heads", "ffn_multipliers")
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing; accepted: the config of an OpenELM")
    for key, good in (
        ("ffn_with_glu", True),
        ("share_input_output_layers", True),
        ("activation_fn_name", "swish"),
        ("normalization_layer_name", "rms_norm"),
    ):
        if config.get(key, good) != good:
            raise ValueError(f"{key}: {config[key]!r} of this openelm model is not supported; accepted: {good!r}")
    divisor, width = config.get("ffn_dim_divisor", 256), config["model_dim"]
    return Shape(
        vocab_size=config["vocab_size"],
        width=width,
        head_dim=config["head_dim"],
        heads=tuple(config["num_query_heads"]),
        kv_heads=tuple(config["num_kv_heads"]),
        mlp=tuple(_divisible(multiplier * width, divisor) for multiplier in config["ffn_multipliers"]),
        rope_theta=float(config.get("rope_freq_constant", 10000)),
        norm_eps=1e-6,
        qk_norm=config.get("normalize_qk_projections", True),
        tied=True,
        context=config.get("max_context_length", 0),
    )


def _divisible(value: float, divisor: int) -> int:
    """Nearest multiple of `divisor`, at least one, not more than a tenth below `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def convert_openelm(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Give the weights of OpenELM our names; its joint projections are taken apart.

    Raises:
        ValueError: If a name is unknown.
    """
    own: dict[str, Tensor] = {}
    for name, value in weights.items():
        short = name.removeprefix("transformer.")
        if short in _TOP:
            own[_TOP[short]] = value
            continue
        if short in ("lm_head.weight", "causal_mask"):
            continue
        _, layer, part = short.split(".", 2) if short.startswith("layers.") else ("", "", "")
        prefix = f"layers.{layer}."
        if part in _BLOCK:
            own[prefix + _BLOCK[part]] = value
        elif part == "attn.qkv_proj.weight":
            heads, kv, d = shape.heads[int(layer)], shape.kv_heads[int(layer)], shape.head_dim
            for key, rows in zip("qkv", value.split([heads * d, kv * d, kv * d]), strict=True):
                own[f"{prefix}self_attn.{key}_proj.weight"] = rows
        elif part == "ffn.proj_1.weight":
            own[prefix + "mlp.gate_proj.weight"], own[prefix + "mlp.up_proj.weight"] = value.chunk(2)
        else:
            raise ValueError(f"{name}: no weight of an OpenELM")
    own["lm_head.weight"] = own["embed_tokens.weight"]
    return {name: value.float() for name, value in own.items()}


def find_openelm(spec: str) -> Path | None:
    """Return the folder of an OpenELM, a local one or that of a name on the hub, fetched if needed; None if it is none.

    Only names with `OpenELM` in them are looked for on the hub; code that comes with the weights is never run.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir() and "openelm" in spec.lower() and not spec.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(spec, allow_patterns=["config.json", "*.safetensors"]))
    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "openelm":
        return folder
    return None


def load_openelm(folder: Path) -> CausalLM:
    """Load an OpenELM from the folder of its files.

    Raises:
        ValueError: If sizes or weights do not fit.
    """
    from safetensors.torch import load_file

    shape = openelm_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {folder}; accepted: the folder of an OpenELM")
    weights = {name: value for file in files for name, value in load_file(file).items()}
    model = CausalLM(shape)
    try:
        model.load_state_dict(convert_openelm(weights, shape))
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} are not those of its config.json: {error}") from error
    return model
