"""The model with the levers of the study: attention, chunked loss, checkpointing, compilation, fused optimiser."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.errors import did_you_mean
from zoo.methods.slm_bottlenecks.costs import ATTENTIONS, Shape
from zoo.methods.slm_bottlenecks.losses import cross_entropy
from zoo.nn.lm import build_lm
from zoo.nn.optim import decay_groups

_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def attention_kernel(attention: str) -> AbstractContextManager[None]:
    """Context in which `scaled_dot_product_attention` uses the named kernel and no other; free for `sdpa`.

    A kernel that cannot do the work raises `RuntimeError`, so that no other one is timed in its place.
    """
    return sdpa_kernel(_KERNELS[attention]) if attention in _KERNELS else nullcontext()


def register_unmasked() -> str:
    """Register `scaled_dot_product_attention` under a name for which `transformers` makes no mask, and return it.

    All sequences are whole. For `sdpa` it looks for packed ones, which waits for the device in every step, and in a
    compiled model it makes a mask in any case, with which the fused kernels cannot work.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("zoo_unmasked", sdpa_attention_forward)
    return "zoo_unmasked"


class CausalLM(nn.Module):
    """Llama of `transformers` whose forward pass is the loss.

    Args:
        shape: Sizes.
        attention: `eager` makes scores `[B, H, T, T]`, masks them, and takes the softmax in float32. `flash` and
            `efficient` are the fused kernels of these names, `sdpa` whichever PyTorch picks.
        loss_chunks: Chunks of the cross-entropy, 0 for all tokens at once.
        checkpointing: Keep only the inputs of blocks and compute the rest again in the backward pass.

    Raises:
        ValueError: If `attention` is unknown.
    """

    def __init__(
        self, shape: Shape, attention: str = "sdpa", loss_chunks: int = 0, checkpointing: bool = False
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: {attention!r} is not accepted; {did_you_mean(attention, ATTENTIONS)}")
        self.attention, self.loss_chunks = attention, loss_chunks
        self.lm = build_lm(
            {
                "model_type": "llama",
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.width,
                "num_hidden_layers": shape.depth,
                "intermediate_size": shape.intermediate,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.heads,
                "max_position_embeddings": 131072,
                "tie_word_embeddings": False,
            }
        ).train()
        self.lm.set_attn_implementation("eager" if attention == "eager" else register_unmasked())
        if checkpointing:
            # transformers 5 calls it so, earlier releases knew the other name alone
            new = getattr(self.lm, "activation_checkpointing_enable", None)
            (new or self.lm.gradient_checkpointing_enable)({"use_reentrant": False})

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden states `[B, T, D]`, normalised, of tokens `[B, T]`."""
        with attention_kernel(self.attention):
            return self.lm.model(input_ids=input_ids, use_cache=False).last_hidden_state

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]`."""
        return self.lm.lm_head(self.hidden(input_ids))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats of shifted labels `[B, T]`."""
        return cross_entropy(self.hidden(input_ids), self.lm.lm_head.weight, labels, self.loss_chunks)


def build_adamw(
    net: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW with decay on matrices alone; one kernel for all of it (`fused`) or one for each operation (`foreach`)."""
    groups = decay_groups(net.parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=not fused)
