"""Decoders: tokens in, logits of the next one out; for any model of `transformers`, and a shorter way for Llamas.

A step of a small model on a CPU is mostly overhead: mask and positions are made anew, norms and rotations take many
small operations, and queries, keys and values a product each. `LlamaDecoder` does without; `decoder_of` takes it where
it is exact, and the model's own forward everywhere else.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from zoo.methods.salsa.networks import positions
from zoo.nn.kv_cache import PreallocatedLayer, preallocated_cache

#: Rotations that do not depend on the length of the text.
FIXED_ROTATIONS = ("default", "linear", "llama3")


class Decoder(Protocol):
    """Reads a batch of texts piece by piece."""

    can_drop: bool
    """Whether rows can be dropped."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Read the next tokens of each row, int64 `[B, n]`; returns the logits after the last of them, `[B, V]`."""

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, int64 `[K]`."""


class ModelDecoder:
    """The model's own forward, with a cache that is allocated once, and no mask where no prompt is padded.

    Args:
        model: Causal language model of `transformers`.
        mask: bool `[B, P]` of the prompts, padded on the left.
        capacity: Most tokens of a row, prompt and answer.
    """

    def __init__(self, model: Any, mask: Tensor, capacity: int) -> None:
        self.model, self.cache = model, preallocated_cache(model.config, capacity)
        self.can_drop = all(isinstance(layer, PreallocatedLayer) for layer in self.cache.layers)
        self.mask = None if bool(mask.all()) else mask.long()
        # without padding all rows have the same positions
        self.positions = positions(mask[:1] if self.mask is None else mask)

    def __call__(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache, self.positions = output.past_key_values, self.positions[:, -1:] + 1
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1), value=1)
        return output.logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        layers: Any = self.cache.layers
        for layer in layers:
            layer.key_buffer, layer.value_buffer = layer.key_buffer[rows], layer.value_buffer[rows]
        if self.mask is not None:
            self.mask, self.positions = self.mask[rows], self.positions[rows]


class LlamaDecoder:
    """A Llama in float32 whose prompts have no padding, with products joined and the norms' weights inside of them.

    Logits are the model's own up to rounding. The weights are copied: make a new one when they change.

    Args:
        model: A model that `is_plain_llama`.
        rows: Rows of the batch.
        capacity: Most tokens of a row, prompt and answer.
    """

    can_drop = True

    def __init__(self, model: Any, rows: int, capacity: int) -> None:
        body = model.model
        config, first = body.config, body.layers[0].self_attn
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, first.head_dim
        self.eps, self.scale, self.length = config.rms_norm_eps, first.scaling, 0
        self.embedding = body.embed_tokens.weight
        self.layers = []
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            gated = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            buffers = [self.embedding.new_empty(rows, self.kv_heads, capacity, self.width) for _ in range(2)]
            weights = [
                joined * layer.input_layernorm.weight,
                attention.o_proj.weight,
                gated * layer.post_attention_layernorm.weight,
                mlp.down_proj.weight,
            ]
            self.layers.append(([weight.T.contiguous() for weight in weights], mlp.act_fn, buffers))
        self.head = (model.lm_head.weight * body.norm.weight).T.contiguous()
        places = torch.arange(capacity, device=self.embedding.device)
        cos, sin = body.rotary_emb(self.embedding, places[None])
        self.cos, self.sin = cos[0, :, None], sin[0, :, None].clone()
        self.sin[..., : self.width // 2] *= -1  # of x2 in (x1 cos - x2 sin, x2 cos + x1 sin)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps)

    def __call__(self, ids: Tensor) -> Tensor:
        """See `Decoder`."""
        rows, count = ids.shape
        begin, end = self.length, self.length + count
        both = self.heads + self.kv_heads
        cos, sin = self.cos[begin:end], self.sin[begin:end]
        x = F.embedding(ids.reshape(-1), self.embedding)
        for (joined, out, gated, down), activation, (keys, values) in self.layers:
            qkv = (self._norm(x) @ joined).view(rows, count, both + self.kv_heads, self.width)
            qk = qkv[:, :, :both]
            qk = torch.addcmul(qk * cos, qk.roll(self.width // 2, -1), sin)
            keys[:, :, begin:end] = qk[:, :, self.heads :].transpose(1, 2)
            values[:, :, begin:end] = qkv[:, :, both:].transpose(1, 2)
            mixed = F.scaled_dot_product_attention(
                qk[:, :, : self.heads].transpose(1, 2),
                keys[:, :, :end],
                values[:, :, :end],
                is_causal=count > 1,
                scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            )
            x = torch.addmm(x, mixed.transpose(1, 2).reshape(rows * count, -1), out)
            gate, up = (self._norm(x) @ gated).chunk(2, dim=-1)
            x = torch.addmm(x, activation(gate) * up, down)
        self.length = end
        return self._norm(x.view(rows, count, -1)[:, -1]) @ self.head

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self.layers = [
            (weights, activation, [part[rows] for part in buffers]) for weights, activation, buffers in self.layers
        ]


def is_plain_llama(model: Any) -> bool:
    """Whether `LlamaDecoder` can stand for a model: a whole Llama in float32 without adapters, biases or hooks."""
    from transformers.models.llama import modeling_llama as llama

    if type(model) is not llama.LlamaForCausalLM or model.model.rotary_emb.rope_type not in FIXED_ROTATIONS:
        return False
    parts = (llama.LlamaDecoderLayer, llama.LlamaAttention, llama.LlamaMLP, llama.LlamaRMSNorm, nn.Linear)
    known = (llama.LlamaForCausalLM, llama.LlamaModel, nn.ModuleList, nn.Embedding, *parts)
    for module in model.modules():
        if (module._parameters or module._modules) and type(module) not in known:
            return False
        if module._forward_hooks or module._forward_pre_hooks or getattr(module, "bias", None) is not None:
            return False
    device = model.lm_head.weight.device.type
    return not torch.is_autocast_enabled(device) and all(
        p.dtype == torch.float32 and not isinstance(p, DTensor) for p in model.parameters()
    )


def decoder_of(model: Any, mask: Tensor, capacity: int) -> Decoder:
    """The fastest decoder that computes what the model does.

    Args:
        model: Causal language model of `transformers`.
        mask: bool `[B, P]` of the prompts, padded on the left.
        capacity: Most tokens of a row, prompt and answer.
    """
    if bool(mask.all()) and is_plain_llama(model):
        return LlamaDecoder(model, len(mask), capacity)
    return ModelDecoder(model, mask, capacity)
