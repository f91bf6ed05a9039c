"""The multimodal decoder, and AIMv1's head that takes its place for patches alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.methods.aimv2.layers import EPS, RMSNorm, blocks, check_keys, head_linear


class Decoder(nn.Module):
    """The multimodal decoder: one causal transformer over the image's features and the caption.

    Args:
        in_width: Channels of the encoder.
        width: Channels of the decoder.
        depth: Number of blocks.
        heads: Attention heads.
        patch_values: Values `P` of a patch that the image part predicts; 0 for no pixel head.
        vocab_size: Tokens `V` that the text part predicts; 0 for no text at all.
        context_length: Longest caption.
        multiple_of: See `Trunk`.
        order: `image_text` or `text_image`: what the decoder reads first.
        pad_id: Padding of the captions.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        depth: int,
        heads: int,
        patch_values: int,
        vocab_size: int,
        context_length: int,
        multiple_of: int = 256,
        order: str = "image_text",
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.order, self.pad_id = order, pad_id
        self.project = nn.Linear(in_width, width)
        self.blocks = blocks(width, depth, heads, multiple_of)
        self.norm = RMSNorm(width)
        self.pixel_head = head_linear(width, patch_values, depth) if patch_values else None
        self.text_head = head_linear(width, vocab_size, depth) if vocab_size else None
        if vocab_size:
            self.embedding = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.start = nn.Parameter(torch.randn(width) * 0.02)
            self.positions = nn.Parameter(torch.randn(context_length + 1, width) * 0.01)

    def text_tokens(self, text: Tensor) -> Tensor:
        """Start token and embedded tokens with their positions, `[B, N + 1, D]`, of tokens `[B, N]`."""
        start = self.start.expand(len(text), 1, -1)
        return torch.cat([start, self.embedding(text)], dim=1) + self.positions[: text.shape[1] + 1]

    def forward(
        self, features: Tensor, text: Tensor | None, real: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predict patches and tokens.

        Args:
            features: Output of the encoder `[B, I, D]`.
            text: Tokens, int64 `[B, T]`, padded on the right; None reads the image alone.
            real: Which features are of the image, bool `[B, I]`; the caption does not see the others, which come last.
                None for all.

        Returns:
            Predictions at every patch `[B, I, P]` and logits of each token `[B, T, V]`; None for a head that is not
            there.
        """
        image = self.project(features)
        count = image.shape[1]
        mask = None
        if text is None or self.text_head is None:
            x = image
        elif self.order == "image_text":
            # the last token is not read: it has nothing to predict and comes after all others
            x = torch.cat([image, self.text_tokens(text[:, :-1])], dim=1)
            if real is not None:
                mask = causal_mask(F.pad(real, (0, text.shape[1]), value=True))
        else:
            x = torch.cat([self.text_tokens(text), image], dim=1)
            mask = causal_mask(F.pad(text != self.pad_id, (1, count), value=True))
        for block in self.blocks:
            x = block(x, mask, causal=mask is None)
        x = self.norm(x)
        if text is None or self.text_head is None:
            seen, said = x, None
        elif self.order == "image_text":
            seen, said = x[:, :count], x[:, count:]
        else:
            seen, said = x[:, text.shape[1] + 1 :], x[:, : text.shape[1]]
        pixels = None if self.pixel_head is None else self.pixel_head(seen)
        return pixels, None if said is None or self.text_head is None else self.text_head(said)

    @torch.no_grad()
    def caption(self, features: Tensor, eos_id: int, longest: int, real: Tensor | None = None) -> Tensor:
        """Most likely captions, token by token, int64 `[B, N]`; padding after the end.

        Args:
            features: Output of the encoder `[B, I, D]`.
            eos_id: The token that ends a caption.
            longest: Most tokens of a caption.
            real: See `forward`.
        """
        text = torch.full((len(features), 0), self.pad_id, device=features.device)
        done = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        for _ in range(longest):
            # a last token of any kind: its logits are those of what follows the tokens before it
            _, logits = self(features, F.pad(text, (0, 1), value=eos_id), real)
            token = logits[:, -1].argmax(dim=1).masked_fill(done, self.pad_id)
            text = torch.cat([text, token[:, None]], dim=1)
            done |= token == eos_id
            if bool(done.all()):
                break
        return text


def causal_mask(real: Tensor) -> Tensor:
    """Causal mask `[B, N, N]` in which nothing sees the places that are not real, bool `[B, N]`."""
    return real[:, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()


class ResidualMLP(nn.Module):
    """AIMv1's head: residual MLP blocks without attention, LayerNorm, and a linear layer (arXiv 2401.08541).

    Args:
        in_width: Channels of the encoder.
        patch_values: Values `P` of a patch.
        width: Channels of the head.
        depth: Number of blocks.
    """

    def __init__(self, in_width: int, patch_values: int, width: int, depth: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, eps=EPS),
                nn.Linear(width, 4 * width, bias=False),
                nn.GELU(),
                nn.Linear(4 * width, width, bias=False),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out = head_linear(width, patch_values, depth)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, I, D]` to predictions at every patch `[B, I, P]`."""
        x = self.project(features)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm(x))


def build_decoder(
    spec: Mapping[str, Any], in_width: int, patch_values: int, vocab_size: int, image_head: str, **text: Any
) -> tuple[Decoder | None, ResidualMLP | None]:
    """Build the decoder and, with `image_head: aimv1_mlp`, the head that predicts patches in its place.

    Args:
        spec: `width`, `depth`, `heads`, `multiple_of` of the decoder; `mlp_width`, `mlp_depth` of AIMv1's head.
        in_width: Channels of the encoder.
        patch_values: Values of a patch, 0 if none are predicted.
        vocab_size: Tokens, 0 if none are predicted.
        image_head: `linear` or `aimv1_mlp`.
        text: `context_length`, `order` and `pad_id`, see `Decoder`.

    Raises:
        ValueError: If a key or a value is not accepted.
    """
    check_keys(spec, ("width", "depth", "heads", "multiple_of", "mlp_width", "mlp_depth"), "decoder")
    own = {"width": 1024, "depth": 12, "heads": 8, **{k: v for k, v in spec.items() if not k.startswith("mlp_")}}
    mlp = None
    if patch_values and image_head == "aimv1_mlp":
        mlp = ResidualMLP(in_width, patch_values, spec.get("mlp_width", 2048), spec.get("mlp_depth", 12))
        patch_values = 0
    if not (patch_values or vocab_size):
        return None, mlp
    return Decoder(in_width, patch_values=patch_values, vocab_size=vocab_size, **own, **text), mlp
