"""The language model that is tuned: whole or through low-rank adapters, and the likelihood it gives to sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.nn.lm import IGNORE, build_lm, token_logprobs


def build_network(
    lm: str | Mapping[str, Any],
    vocab_size: int | None = None,
    lora_rank: int = 0,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    lora_targets: Sequence[str] = (),
    four_bit: bool = False,
    gradient_checkpointing: bool = False,
) -> Any:
    """Build the model in training mode.

    Args:
        lm: See `zoo.nn.lm.build_lm`.
        vocab_size: Number of tokens of the data.
        lora_rank: Rank of the adapters; 0 trains all weights.
        lora_alpha: Scale of the adapters times their rank.
        lora_dropout: Dropout at the adapters' inputs.
        lora_targets: Names of the layers that get one; none for all linear layers but the head.
        four_bit: Load frozen weights in 4 bits (nf4) by `bitsandbytes`.
        gradient_checkpointing: Compute activations again in the backward pass.

    Raises:
        ValueError: If a target is not there, or 4 bits are asked for weights that are trained or not loaded.
    """
    if four_bit and (not isinstance(lm, str) or not lora_rank):
        raise ValueError(
            "four_bit: true needs a pre-trained model (lm: a name or path) and adapters (lora_rank of at least 1)"
        )
    model = load_four_bit(lm) if four_bit else build_lm(lm, vocab_size)  # type: ignore[arg-type]
    if gradient_checkpointing:
        # the first name came with transformers 5, the second goes with 6
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        targets = list(lora_targets) or linear_names(model)
        chosen = [part for name, part in model.named_modules() if name.rpartition(".")[2] in targets]
        config = LoraConfig(
            r=lora_rank,
            lora_alpha=lora_alpha,  # type: ignore[arg-type]
            lora_dropout=lora_dropout,
            target_modules=targets,
            fan_in_fan_out=all(type(part).__name__ == "Conv1D" for part in chosen),  # GPT-2 transposes its weights
        )
        model = inject_adapter_in_model(config, model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # small updates of bfloat16 weights are rounded away
                parameter.data = parameter.data.float()
    if four_bit:
        model.register_state_dict_post_hook(_adapters_only)
        model.register_load_state_dict_post_hook(_without_base)
    return model.train()


def _adapters_only(model: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leave weights in 4 bits out of a checkpoint: they do not load from one, and come from the model's files."""
    if any(".lora_" in name for name in state if name.startswith(prefix)):  # not once the adapters are merged
        for name in [name for name in state if name.startswith(prefix) and ".lora_" not in name]:
            del state[name]


def _without_base(model: Any, incompatible: Any) -> None:
    """Miss nothing but adapters in such a checkpoint."""
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if ".lora_" in name]


def linear_names(model: Any) -> list[str]:
    """Return the last parts of the names of all linear layers but the head."""
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, part in model.named_modules()
            if (isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D") and part is not head
        }
    )


def load_four_bit(name: str) -> Any:
    """Load a model in nf4, onto the current GPU where there is one, with bfloat16 arithmetic.

    Raises:
        ValueError: If `bitsandbytes` is not installed.
    """
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ValueError("four_bit: true needs the package bitsandbytes: pip install bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=False, quantization_config=config, device_map=device
    )
    part: Any
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # else an evaluation on such a CPU packs the weights for good: no gradient passes through them any more, and
            # state_dict() unpacks them with their scales transposed (bitsandbytes 0.50)
            part.support_avx512bf16_for_cpu = False
    return model


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Use the model as it was before its adapters, without dropout."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer)]
    training = model.training
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


def merge_adapters(model: Any) -> Any:
    """Merge adapters into the layers that they sit at, in place, and return the model.

    Weights in 4 bits come back whole: what an adapter adds is less than the steps between their values.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            if hasattr(base.weight, "quant_state"):
                base = _whole(base, adapter_weight(layer))
            else:
                layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, base)
    model.__dict__.pop("peft_config", None)
    if getattr(model, "is_quantized", False):
        for name, part in list(model.named_modules()):
            if hasattr(getattr(part, "weight", None), "quant_state"):  # a layer without an adapter
                model.set_submodule(name, _whole(part))
        model.hf_quantizer.remove_quantization_config(model)
    return model


def adapter_weight(layer: Any) -> Tensor:
    """What the adapters of a layer add to its weights, of their shape."""
    return torch.stack([layer.get_delta_weight(adapter) for adapter in layer.active_adapters]).sum(dim=0)


def _whole(base: Any, delta: Tensor | float = 0.0) -> nn.Linear:
    """A layer with its weights out of 4 bits, and `delta` added to them."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    with torch.device("meta"):
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None)
    linear.weight = nn.Parameter((weight.float() + delta).to(weight.dtype), requires_grad=False)
    linear.bias = base.bias
    return linear


def load_base(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights `lm.*` of another run into a model, below its adapters where it has some.

    Raises:
        ValueError: If names or shapes do not fit, naming the first few.
    """
    own = model.state_dict()
    places = {name.replace(".base_layer.", "."): name for name in own if ".lora_" not in name}
    given = {name.removeprefix("lm."): value for name, value in weights.items() if name.startswith("lm.")}
    wrong = [n for n in given.keys() & places.keys() if given[n].shape != own[places[n]].shape]
    if bad := sorted([*(given.keys() ^ places.keys()), *wrong]):
        raise ValueError(
            f"init_from: {len(bad)} weights do not fit the model: {', '.join(bad[:3])}; accepted: a checkpoint of the "
            "same model, trained whole"
        )
    model.load_state_dict({**own, **{places[name]: value for name, value in given.items()}})


def sentence_logprobs(
    model: Any, input_ids: Tensor, mask: Tensor, head_chunk: int = 0, sentence_chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token given those before it.

    Args:
        model: Causal language model of `transformers`.
        input_ids: int64 `[N, S]`, padded on either side.
        mask: bool `[N, S]`, true on tokens.
        head_chunk: Tokens for which logits are held at once; they are computed again in the backward pass. 0 holds all.
            The memory of `[N, S, V]` logits is what limits the number of sentences where the vocabulary is large. For
            models whose logits are a linear map of the last hidden states.
        sentence_chunk: Sentences that pass through the model at once; each such pass is made again in the backward
            pass, so that activations of so many sentences alone are held. 0 takes all at once. The objectives need
            no more than a number of each sentence, so nothing else of a pass has to stay (cf. arXiv 2101.06983).

    Returns:
        float32 `[N, S - 1]` in nats, and bool `[N, S - 1]`: which of them count, a token with a token before it.
    """
    if 0 < sentence_chunk < len(input_ids):
        parts = zip(input_ids.split(sentence_chunk), mask.split(sentence_chunk), strict=True)
        passes = [checkpoint(sentence_logprobs, model, *part, head_chunk, use_reentrant=False) for part in parts]
        return torch.cat([values for values, _ in passes]), torch.cat([there for _, there in passes])
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    counts = mask[:, 1:] & mask[:, :-1]
    labels = input_ids[:, 1:].masked_fill(~counts, IGNORE)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if not head_chunk:
        return token_logprobs(model(**inputs).logits[:, :-1], labels), counts
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1][counts]
    logprobs = chunked_logprobs(model.get_output_embeddings(), hidden, labels[counts], head_chunk)
    return torch.zeros(counts.shape, device=hidden.device).masked_scatter(counts, logprobs), counts


def chunked_logprobs(head: Any, hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Log-probability of labels, with the logits of `chunk` tokens at a time, in the backward pass too.

    Args:
        head: Maps hidden states to logits.
        hidden: Last hidden states `[N, D]`.
        labels: int64 `[N]`.
        chunk: Tokens for which logits are held at once, in their own type and in float32; 0 for all.

    Returns:
        float32 `[N]`, nats.
    """

    def of_chunk(part: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(head(part)[None], targets[None])[0]

    if not chunk:
        return of_chunk(hidden, labels)
    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.cat([checkpoint(of_chunk, part, targets, use_reentrant=False) for part, targets in parts])
