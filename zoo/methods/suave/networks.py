"""The network of Suave and Daino: backbone, head, prototypes that are classes, and probes that only look on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.convnets import build_backbone

#: Where the probes look; also the suffixes of their metrics.
PROBES = ("backbone", "proj1", "proj2")


@dataclass(frozen=True)
class Embeddings:
    """What the encoder computes for `n` images.

    Args:
        features: Backbone output `[n, d]`.
        hidden: First layer of the head `[n, h]`.
        projected: Last layer of the head, before the norm, `[n, m]`.
        z: `projected` with unit L2 norm, float32 `[n, m]`.
    """

    features: Tensor
    hidden: Tensor
    projected: Tensor
    z: Tensor


class Projector(nn.Module):
    """Suave's head: Linear, BatchNorm, ReLU, Linear.

    Args:
        in_dim: Features of the backbone.
        hidden_dim: Width of the hidden layer.
        out_dim: Dimension of the embedding.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True))
        self.last = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[n, d]` to the hidden layer `[n, h]` and the output `[n, m]`."""
        hidden = self.first(x)
        return hidden, self.last(hidden)


class DinoHead(nn.Module):
    """DINO's head: three linear layers with GELU and without normalisation (arXiv 2104.14294, Section 3).

    Args:
        in_dim: Features of the backbone.
        hidden_dim: Width of the two hidden layers.
        out_dim: Dimension of the embedding.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU())
        self.last = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, out_dim))
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `[n, d]` to the hidden layer `[n, h]` and the output `[n, m]`."""
        hidden = self.first(x)
        return hidden, self.last(hidden)


class Prototypes(nn.Module):
    """A bias-free linear layer whose rows have unit norm, so that logits are cosines in `[-1, 1]`.

    Args:
        dim: Dimension `m` of the embeddings.
        num_prototypes: Number `K` of rows.
        scaled: Multiply each logit by a trainable gain that starts at 1, which is a weight-normed layer with
            `norm_last_layer=False` in DINO's words. Without it the rows are projected onto the sphere before every
            training forward, as SwAV does. Evaluation changes nothing in place.
    """

    def __init__(self, dim: int, num_prototypes: int, scaled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_prototypes, dim), dim=1))
        self.gain = nn.Parameter(torch.ones(num_prototypes)) if scaled else None

    @torch.no_grad()
    def normalise_(self) -> None:
        """Give each row unit norm, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, z: Tensor) -> Tensor:
        """Map unit embeddings `[n, m]` to logits `[n, K]`, computed in float32."""
        with torch.autocast(z.device.type, enabled=False):
            if self.gain is not None:
                return F.linear(z.float(), F.normalize(self.weight, dim=1) * self.gain[:, None])
            return F.linear(z.float(), self.weight if self.training else F.normalize(self.weight, dim=1))


class ClusteringNetwork(nn.Module):
    """Encoder `f = p . norm . h . g`: backbone g, head h, prototypes p (arXiv 2306.07483, Section 3).

    Args:
        backbone: Plain description for `zoo.nn.convnets.build_backbone`.
        in_channels: Channels of the images.
        num_classes: Number of classes `C`.
        num_prototypes: Number of prototypes `K`.
        hidden_dim: Hidden width of the head.
        embed_dim: Dimension `m` of the embeddings.
        shared: Whether the prototypes are the classifier (`K = C`). Otherwise the classifier has rows of its own.
        dino_head: Use DINO's head and scaled prototypes.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        in_channels: int,
        num_classes: int,
        num_prototypes: int,
        hidden_dim: int,
        embed_dim: int,
        shared: bool = True,
        dino_head: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, in_channels)
        dim = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projector = (DinoHead if dino_head else Projector)(dim, hidden_dim, embed_dim)
        self.prototypes = Prototypes(embed_dim, num_prototypes, scaled=dino_head)
        self.classifier = None if shared else Prototypes(embed_dim, num_classes)

    def encode(self, views: Sequence[Tensor]) -> Embeddings:
        """Embed several batches of images with one pass of the backbone for each resolution.

        Args:
            views: Batches `[n_v, c, H_v, W_v]`.

        Returns:
            Embeddings of all rows, in the order of `views`. Rows of one resolution share batch statistics.
        """
        if self.training:
            for layer in (self.prototypes, self.classifier):
                if layer is not None and layer.gain is None:
                    layer.normalise_()
        features: list[Tensor] = [torch.empty(0)] * len(views)
        for size in {tuple(view.shape[2:]): None for view in views}:
            places = [i for i, view in enumerate(views) if tuple(view.shape[2:]) == size]
            images = torch.cat([views[i] for i in places]) if len(places) > 1 else views[places[0]]
            outputs = self.backbone(images).split([len(views[i]) for i in places])
            for i, output in zip(places, outputs, strict=True):
                features[i] = output
        joined = torch.cat(features) if len(features) > 1 else features[0]
        hidden, projected = self.projector(joined)
        return Embeddings(joined, hidden, projected, F.normalize(projected.float(), dim=1))

    def class_logits(self, z: Tensor) -> Tensor:
        """Cosines with the class prototypes, `[n, m] -> [n, C]`."""
        return self.prototypes(z) if self.classifier is None else self.classifier(z)


class Probes(nn.ModuleDict):
    """Linear classifiers on detached activations of the encoder; nothing of them reaches the encoder.

    Args:
        dims: Width of the activations that each of `PROBES` sees.
        num_classes: Number of classes.
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__({name: nn.Linear(dim, num_classes) for name, dim in zip(PROBES, dims, strict=True)})

    def forward(self, e: Embeddings, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Logits `[n, C]` of each probe for some rows of the embeddings."""
        inputs = dict(zip(PROBES, (e.features, e.hidden, e.projected), strict=True))
        return {name: self[name](inputs[name][rows].detach()) for name in PROBES}
