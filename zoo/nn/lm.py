"""Causal language models of `transformers` from plain values or by name, and the log-likelihood of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Label of a position that does not count.
IGNORE = -100


def lm_config(spec: Mapping[str, Any], vocab_size: int | None = None) -> PretrainedConfig:
    """Read the configuration of a language model from plain values.

    Args:
        spec: `model_type` as `transformers` names it (`llama`, `gpt2`, `qwen3`, ...) and values of its configuration:
            `{model_type: llama, hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, ...}`. What is left out
            has the default of that class, but special tokens, which are none.
        vocab_size: Number of tokens of the data; taken where `spec` does not name one, which may be larger.

    Raises:
        ValueError: If `model_type` or a key is unknown, or the vocabulary is smaller than that of the data.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    values = dict(spec)
    model_type = values.pop("model_type", None)
    if model_type not in CAUSAL:
        asked = "is missing" if model_type is None else f"{model_type!r} is not a causal language model"
        raise ValueError(f"model_type: {asked}; {did_you_mean(str(model_type), CAUSAL)}")
    empty = AutoConfig.for_model(model_type)
    known = {*empty.to_dict(), *empty.attribute_map}
    for key in values:
        if key not in known:
            raise ValueError(f"{key}: {values[key]!r} is no value of a {model_type} model; {did_you_mean(key, known)}")
    if vocab_size is not None and values.setdefault("vocab_size", vocab_size) < vocab_size:
        raise ValueError(f"vocab_size: {values['vocab_size']} is less than the {vocab_size} tokens of the data")
    special: dict[str, Any] = {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in known}
    return AutoConfig.for_model(model_type, **{**special, **values})


def build_lm(spec: str | Mapping[str, Any], vocab_size: int | None = None) -> PreTrainedModel:
    """Build a causal language model, in float32 and evaluation mode as `transformers` returns it.

    Args:
        spec: Values of a configuration, see `lm_config`: random weights from torch's global generator. Or a path or
            a name on the hub: its weights; code that comes with them is never run.
        vocab_size: Number of tokens of the data, see `lm_config`.

    Raises:
        ValueError: If the values are not accepted, no model is found there, or its vocabulary is smaller than that of
            the data.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(spec, str):
        return AutoModelForCausalLM.from_config(lm_config(spec, vocab_size)).eval()
    local = Path(spec).expanduser()
    if not local.exists() and spec.startswith((".", "/", "~")):
        raise ValueError(f"no model at {local}; accepted: a folder that save_pretrained wrote, or a name on the hub")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(local) if local.exists() else spec, trust_remote_code=False, dtype=torch.float32
        )
    except OSError as error:
        raise ValueError(f"the model {spec!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.num_embeddings
    if vocab_size is not None and size < vocab_size:
        raise ValueError(f"the model {spec!r} has {size} tokens, the data {vocab_size}: it needs the model's tokenizer")
    return model.eval()


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, in nats: `log softmax(logits[b, t])[labels[b, t]]`.

    Args:
        logits: `[B, T, V]`, any float type; computed in float32.
        labels: int64 `[B, T]`, already shifted: `labels[:, t]` is what follows the inputs up to `t`. `IGNORE` (-100)
            gives 0.

    Returns:
        float32 `[B, T]`.
    """
    return -F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).reshape(labels.shape)


def sequence_nll(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each sequence in nats, summed over the tokens that count.

    Args:
        logits: `[B, T, V]`.
        labels: int64 `[B, T]`, already shifted as in `token_logprobs`; `IGNORE` never counts.
        mask: `[B, T]`, true or 1 where a token counts; None for all.

    Returns:
        float32 `[B]`; divide by the number of tokens for a mean.
    """
    logprobs = token_logprobs(logits, labels)
    return -(logprobs if mask is None else logprobs * mask).sum(dim=1)
