"""The trained predictor as a safetensors file that says which models it belongs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.methods.kv_prediction.models import build_model, check_pair, weights_hash
from zoo.methods.kv_prediction.networks import CausalLM, KVPredictor, Shape

if TYPE_CHECKING:
    from zoo.methods.kv_prediction.module import KVPrediction

_FORMAT = "kv_prediction 1"


class Loaded(NamedTuple):
    """Base, auxiliary and the maps between them, in evaluation mode."""

    base: CausalLM
    auxiliary: CausalLM
    predictor: KVPredictor


def save_predictor(path: str | Path, module: KVPrediction) -> None:
    """Write the linear maps and the auxiliary, which was trained with them, to one file.

    The header names base and auxiliary (path, name or sizes), the hash of the base's weights, the auxiliary's sizes and
    the layer map, as JSON. The base is not in it.

    Args:
        path: A .safetensors file.
        module: In `mode: predict`.
    """
    from safetensors.torch import save_file

    auxiliary, predictor = module.pair
    parts = {"auxiliary": auxiliary, "predictor": predictor}
    # a tied output layer is the embedding: it is written once
    weights = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, inner in parts.items()
        for name, value in inner.state_dict().items()
        if not (part == "auxiliary" and name == "lm_head.weight" and auxiliary.shape.tied)
    }
    facts = {
        "format": _FORMAT,
        "base": module.hparams["base"],
        "base_hash": module.base_hash,
        "base_shape": module.base.shape.plain(),
        "auxiliary": module.hparams["auxiliary"],
        "auxiliary_shape": auxiliary.shape.plain(),
        "layer_map": predictor.layer_map,
        "tokenizer_id": module.hparams["tokenizer_id"],
    }
    save_file(weights, path, metadata={name: json.dumps(value) for name, value in facts.items()})


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read the header of an exported predictor.

    Raises:
        ValueError: If it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"predictor: {path} cannot be read: {error}") from error
    if json.loads(header.get("format", "null")) != _FORMAT:
        raise ValueError(f"predictor: {path} is not a predictor of this method; accepted: what a fit exports")
    return {name: json.loads(value) for name, value in header.items()}


def load_predictor(path: str | Path, base: str | None = None) -> Loaded:
    """Read an exported predictor with its auxiliary, and the base that it was trained for.

    Args:
        path: The file.
        base: Where the base is now; None for where it was.

    Raises:
        ValueError: If the file is not accepted, or the base has other weights.
    """
    from safetensors.torch import load_file

    facts = read_facts(path)
    spec = facts["base"] if base is None else base
    if not isinstance(spec, str):
        raise ValueError("base: the predictor was trained for random weights that are nowhere kept; name the base")
    model = build_model(spec, "base", 0)
    if weights_hash(model) != facts["base_hash"]:
        raise ValueError(f"base: {spec} has not the weights that {path} was trained for; accepted: the same base")
    auxiliary = CausalLM(Shape.from_plain(facts["auxiliary_shape"]))
    predictor = KVPredictor(auxiliary.shape, model.shape, facts["layer_map"])
    if isinstance(facts["auxiliary"], str):
        check_pair(model, auxiliary, spec, facts["auxiliary"])
    weights = load_file(path)
    if auxiliary.shape.tied:
        weights["auxiliary.lm_head.weight"] = weights["auxiliary.embed_tokens.weight"]
    for name, part in (("auxiliary", auxiliary), ("predictor", predictor)):
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
    return Loaded(model.eval(), auxiliary.eval(), predictor.eval())
