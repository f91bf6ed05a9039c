"""Floating-point operations of a training step, by formula; a multiply-add counts two."""

from __future__ import annotations

from typing import Any

from zoo.methods.aimv2.decoder import Decoder
from zoo.methods.aimv2.encoder import Trunk


def block_flops(tokens: int, width: int, hidden: int) -> int:
    """One block over a sequence, forward: `2 N (4 D² + 3 D H) + 4 N² D`.

    Attention counts all pairs, whatever the mask, as usual for a model FLOPs utilisation.
    """
    return 2 * tokens * (4 * width**2 + 3 * width * hidden) + 4 * tokens**2 * width


def step_flops(trunk: Trunk, decoder: Decoder, images: int, caption: int) -> int:
    """Forward and backward of patches and captions, without recomputation; norms and elementwise work do not count.

    The backward pass costs twice the forward pass, but for the first layer, whose input needs no gradient.

    Args:
        trunk: The encoder.
        decoder: The decoder, with the heads that it has.
        images: Images in the batch, of the size that the encoder is made for.
        caption: Tokens `T` of each caption, padding among them.
    """
    patches, values = trunk.num_patches, trunk.patch_size**2 * trunk.in_channels
    width, own = trunk.width, decoder.project.out_features
    text = 0 if decoder.text_head is None else caption
    encoder_block: Any = trunk.blocks[0]
    decoder_block: Any = decoder.blocks[0]
    embed = 2 * patches * values * width
    encoder = len(trunk.blocks) * block_flops(patches, width, encoder_block.ffn.gate.out_features)
    decoding = 2 * patches * width * own
    decoding += len(decoder.blocks) * block_flops(patches + text, own, decoder_block.ffn.gate.out_features)
    decoding += 0 if decoder.pixel_head is None else 2 * patches * own * values
    decoding += 0 if decoder.text_head is None else 2 * text * own * decoder.text_head.out_features
    return images * (3 * (encoder + decoding) + 2 * embed)
