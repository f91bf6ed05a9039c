"""The equations of AIMv2 and of the objectives it is compared with, as pure functions (arXiv 2411.14402).

Letters: `B` images, `I` patches of an image in raster order, `P` values of a patch, `T` tokens of a caption with its
padding, `V` words of the vocabulary, `M` patches of the prefix. An image is a sequence of patches; those of its prefix
are seen by every token and are never predicted.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.distributed import all_reduce_mean

PixelNorm = Literal["official", "paper"]


def prefix_mask(prefix_len: Tensor, patches: int) -> Tensor:
    """Attention of the encoder, Section 3.2: `allowed(q, k) = (k < M) or (k <= q)`.

    Args:
        prefix_len: `M` of each image, int64 `[B]`.
        patches: `I`.

    Returns:
        bool `[B, I, I]`, rows are queries, true where a query may attend to a key. No row is empty.
    """
    place = torch.arange(patches, device=prefix_len.device)
    return (place < prefix_len[:, None])[:, None] | (place <= place[:, None])


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images `[B, c, H, W]` into patches `[B, I, P]`, `P = patch_size² c`, values ordered row, column, channel."""
    batch, channels, height, width = images.shape
    p = patch_size
    grid = images.reshape(batch, channels, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches `[B, I, P]` together to images `[B, c, height, width]`; the inverse of `patchify`."""
    p = patch_size
    grid = patches.reshape(len(patches), height // p, width // p, p, p, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, height, width)


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Targets of the pixel loss: each patch less its mean, over the root of its unbiased variance plus `eps`; float32.

    Args:
        patches: `[B, I, P]` of images that are normalised by the mean and deviation of the data set already.
        eps: Added to the variance; a constant patch becomes zeros.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + eps)


def real_patches(grid: Tensor, count: int) -> Tensor:
    """Which of `count` places of a sequence hold a patch, for grids `[B, 2]` of rows and columns; bool `[B, count]`."""
    return torch.arange(count, device=grid.device) < grid.prod(dim=1, keepdim=True)


def pixel_errors(
    predicted: Tensor, target: Tensor, prefix_len: Tensor, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Squared error of each predicted patch, the mean over its values (Section 3.1).

    The output at patch `j` predicts patch `j + 1`; that of the last patch predicts nothing.

    Args:
        predicted: Outputs at all patches `[B, I, P]`.
        target: Normalised patches `[B, I, P]`.
        prefix_len: `M` of each image `[B]`.
        real: Which patches are of the image and no padding, bool `[B, I]`; None for all.

    Returns:
        Errors of patches `1 .. I - 1`, float32 `[B, I - 1]`, and which of them count: bool `[B, I - 1]`, those that are
        not in the prefix.
    """
    errors = (predicted[:, :-1].float() - target[:, 1:].float()).square().mean(dim=-1)
    place = torch.arange(1, target.shape[1], device=target.device)
    counted = place >= prefix_len[:, None]
    return errors, counted if real is None else counted & real[:, 1:]


def token_errors(logits: Tensor, text: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each token of a caption (Section 3.1).

    Args:
        logits: `[B, T, V]`; the first row, at the start token, predicts the first token.
        text: Tokens, int64 `[B, T]`, padded on the right.
        pad_id: The padding, which does not count.

    Returns:
        Errors in nats, float32 `[B, T]`, and which of them count, bool `[B, T]`.
    """
    errors = F.cross_entropy(logits.float().flatten(0, 1), text.flatten(), reduction="none")
    return errors.view_as(text), text != pad_id


def pooled_mean(errors: Tensor, counted: Tensor, norm: PixelNorm = "official") -> Tensor:
    """Mean of what counts in the whole batch, over all ranks: one division, no means of samples.

    Args:
        errors: `[B, N]`.
        counted: bool `[B, N]`.
        norm: `official` divides by how many count; `paper` by `B (N + 1)`, all patches, as the paper's formula does.

    Returns:
        A float32 scalar; its mean over ranks is the value for the global batch.

    Departures:
        The released code divides by the count of each rank, which weighs the samples of ranks unequally.
    """
    total = counted.sum() if norm == "official" else torch.tensor(len(errors) * (errors.shape[1] + 1))
    total = all_reduce_mean(total.to(errors.device, torch.float32))
    return (errors * counted).sum() / total.clamp(min=1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of CLIP (arXiv 2103.00020, Figure 3): an image and its caption against all others.

    Args:
        image: Embeddings of unit length `[n, d]`.
        text: Embeddings of the captions in the same order `[n, d]`.
        scale: Factor of the cosines, a scalar.
    """
    logits = scale * image.float() @ text.float().T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
