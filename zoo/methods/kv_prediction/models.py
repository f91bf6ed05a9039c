"""Where models come from: sizes as plain values, a checkpoint of this method, layers of another one, `transformers`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from zoo.methods.kv_prediction.losses import pruned_map
from zoo.methods.kv_prediction.networks import CausalLM, Shape
from zoo.methods.kv_prediction.openelm import find_openelm, load_openelm
from zoo.nn.lm import build_lm, lm_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Classes of `transformers` whose models are of this form.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Spec = str | dict[str, Any]


def shape_of(config: PretrainedConfig) -> Shape:
    """Read the sizes from a configuration of `transformers`.

    Raises:
        ValueError: If the family is another one, or has a feature that is missing here.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model_type: {family!r} is not of the form that is needed; accepted: {', '.join(FAMILIES)}")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    bias = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for key, value, good in (
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias or mlp_bias", bias, False),
        ("sliding_window", window, None),
    ):
        if value != good:
            raise ValueError(f"{key}: {value!r} of this {family} model is not supported; accepted: {good!r}")
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    return Shape(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        heads=(heads,) * depth,
        kv_heads=(config.num_key_value_heads,) * depth,
        mlp=(config.intermediate_size,) * depth,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        norm_eps=config.rms_norm_eps,
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
    )


def from_transformers(model: PreTrainedModel) -> CausalLM:
    """Copy a Llama, Mistral, Qwen2 or Qwen3; the logits are the same."""
    own = CausalLM(shape_of(model.config))
    own.load_state_dict({name.removeprefix("model."): value for name, value in model.state_dict().items()})
    return own


def keep_layers(model: CausalLM, layers: Sequence[int]) -> CausalLM:
    """Copy a model without its other layers.

    Raises:
        ValueError: If the layers do not rise from 0.
    """
    pruned_map(layers, model.shape.depth)
    kept = CausalLM(model.shape.keep(layers))
    own = model.state_dict()
    for name in list(own):
        if name.startswith("layers."):
            del own[name]
    for new, old in enumerate(layers):
        own |= {f"layers.{new}.{name}": value for name, value in model.layers[old].state_dict().items()}
    kept.load_state_dict(own)
    return kept


def _from_checkpoint(path: Path, key: str, tokenizer_id: str) -> CausalLM:
    if not path.is_file():
        raise ValueError(f"{key}: no checkpoint at {path}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    facts = content.get("kv_prediction", {})
    if facts.get("mode") != "alone":
        raise ValueError(
            f"{key}: {path} is no checkpoint of a model that was trained alone; accepted: one of kv_prediction with "
            "mode: alone"
        )
    if tokenizer_id and facts["tokenizer_id"] != tokenizer_id:
        raise ValueError(
            f"{key}: {path} was trained on tokens {facts['tokenizer_id']!r}, the data have {tokenizer_id!r}; accepted: "
            "models and data with one tokenizer"
        )
    model = CausalLM(Shape.from_plain(facts["shape"]))
    weights = content["state_dict"]
    model.load_state_dict({k.removeprefix("base."): v for k, v in weights.items() if k.startswith("base.")})
    return model


def build_model(
    spec: str | Mapping[str, Any], key: str, vocab_size: int, tokenizer_id: str = "", of: CausalLM | None = None
) -> CausalLM:
    """Build a model.

    Args:
        spec: `{model_type: llama, hidden_size: 64, ...}`: sizes as `transformers` names them, random weights.
            `path.ckpt`: a checkpoint of this method with `mode: alone`. Another path, or a name on the hub: a model of
            `transformers`, or an OpenELM. `{layers: [0, 2], of: SPEC}`: some layers of another model; `of` left out
            means the base.
        key: Argument that the errors name.
        vocab_size: Tokens of the data; 0 if unknown.
        tokenizer_id: What the tokens of the data mean; `""` if unknown.
        of: The base, for an auxiliary model.

    Raises:
        ValueError: If the values are not accepted or the tokens do not fit.
    """
    if isinstance(spec, str):
        if spec.endswith(".ckpt"):
            model = _from_checkpoint(Path(spec).expanduser(), key, tokenizer_id)
        else:
            folder = find_openelm(spec)
            model = from_transformers(build_lm(spec)) if folder is None else load_openelm(folder)
    elif "layers" in spec:
        unknown = sorted(set(spec) - {"layers", "of"})
        if unknown or ("of" not in spec and of is None):
            raise ValueError(f"{key}: {dict(spec)} is not accepted; accepted: {{layers: [0, 2, ...], of: MODEL}}")
        source = of if "of" not in spec else build_model(spec["of"], f"{key}.of", vocab_size, tokenizer_id)
        assert source is not None
        model = keep_layers(source, spec["layers"])
    else:
        model = CausalLM(shape_of(lm_config(spec, vocab_size or None)))
    if model.shape.vocab_size < vocab_size:
        raise ValueError(f"{key}: a model of {model.shape.vocab_size} tokens is too small for data of {vocab_size}")
    return model


def check_pair(base: CausalLM, auxiliary: CausalLM, base_spec: Spec, auxiliary_spec: Spec) -> None:
    """Check that two models read the same tokens.

    Raises:
        ValueError: If their vocabularies or the tokenizers beside them differ.
    """
    if base.shape.vocab_size != auxiliary.shape.vocab_size:
        raise ValueError(
            f"auxiliary: a vocabulary of {auxiliary.shape.vocab_size} tokens is not that of the base, "
            f"{base.shape.vocab_size}; accepted: models with one tokenizer"
        )
    vocabularies = [_vocabulary(spec) for spec in (base_spec, auxiliary_spec)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"auxiliary: the tokenizer of {auxiliary_spec} is not that of {base_spec}; accepted: models with one "
            "tokenizer"
        )


def _vocabulary(spec: Spec) -> dict[str, int] | None:
    """The tokens of a `transformers` model by path or name; None if it comes without a tokenizer."""
    if not isinstance(spec, str) or spec.endswith(".ckpt"):
        return None
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(spec, trust_remote_code=False).get_vocab())
    except (OSError, ValueError):
        return None


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights by name, hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def strip_base(checkpoint: dict[str, Any]) -> None:
    """Take the weights of the base out of a checkpoint."""
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in weights.items() if not name.startswith("base.")}


def restore_base(checkpoint: dict[str, Any], base: CausalLM, base_hash: str) -> None:
    """Put the base back where `strip_base` took it out.

    Raises:
        ValueError: If it is not the base that the checkpoint was trained with.
    """
    weights = checkpoint["state_dict"]
    if any(name.startswith("base.") for name in weights):
        return
    trained_with = checkpoint["kv_prediction"]["base_hash"]
    if trained_with != base_hash:
        raise ValueError(
            f"base: its weights (hash {base_hash[:12]}) are not those that the checkpoint was trained with "
            f"({trained_with[:12]}); accepted: the same base"
        )
    weights |= {f"base.{name}": value for name, value in base.state_dict().items()}
