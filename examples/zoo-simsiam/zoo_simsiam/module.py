"""SimSiam as a LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from zoo import Card
from zoo_simsiam.losses import negative_cosine, spread

if TYPE_CHECKING:
    from zoo import ImageBatch, SemiSupervisedBatch


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Halve the resolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class SimSiam(pl.LightningModule):
    """Siamese networks that predict each other's view of an image; only the stop-gradient keeps them from collapsing.

    A linear classifier on detached features of labelled images looks on and gives the accuracies.

    Args:
        num_classes: Classes of the linear classifier.
        in_channels: Channels of the images.
        channels: Channels of the convolutional blocks, each of which halves the resolution.
        dim: Dimension of the projections.
        predictor_dim: Hidden width of the predictor, a bottleneck.
        stop_gradient: Whether the projection that is predicted is a constant; false shows the collapse.
        lr: Learning rate of SGD, constant for the predictor, on a cosine for the rest.
        weight_decay: Weight decay.
    """

    card = Card(
        title="Exploring simple Siamese representation learning",
        summary="Self-supervised images without negatives: predict the other view, stop the gradient",
        arxiv="2011.10566",
        year=2021,
        batch="datamodules.images.SemiSupervisedBatch",
        kind="vision, self-supervised",
        links={"num_classes": "num_classes", "in_channels": "in_channels"},
        skip_checks={
            "accumulation": "batch norm takes the whole batch, which halves are not",
            "ranks": "batch norm is that of each process; --trainer.sync_batchnorm true makes it that of all",
        },
    )

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        channels: list[int] | None = None,
        dim: int = 128,
        predictor_dim: int = 32,
        stop_gradient: bool = True,
        lr: float = 0.1,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__()
        widths = [32, 64, 128] if channels is None else channels
        if not widths:
            raise ValueError("channels: an empty list is not accepted; accepted: at least one number of channels")
        if dim < 2 or predictor_dim < 1:
            raise ValueError(f"dim, predictor_dim: {dim}, {predictor_dim} are not accepted; accepted: 2 and 1 or more")
        self.save_hyperparameters()
        blocks = [conv_block(a, b) for a, b in zip([in_channels, *widths[:-1]], widths, strict=True)]
        self.backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(
            nn.Linear(widths[-1], dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, predictor_dim, bias=False), nn.BatchNorm1d(predictor_dim), nn.ReLU(inplace=True),
            nn.Linear(predictor_dim, dim),
        )  # fmt: skip
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, d]` of images `[B, c, H, W]`."""
        return self.backbone(images)

    def training_step(self, batch: SemiSupervisedBatch, batch_idx: int) -> Tensor:
        """Both views predict each other; the classifier learns from labelled images without touching the features."""
        first, second = batch["views"][:2]
        h = self.backbone(torch.cat([first, second, batch["labelled"]]))
        h_views, h_labelled = h[: 2 * len(first)], h[2 * len(first) :]
        z = self.projector(h_views)
        (z1, z2), (p1, p2) = z.chunk(2), self.predictor(z).chunk(2)
        stop = self.hparams["stop_gradient"]
        similarity = (negative_cosine(p1, z2, stop) + negative_cosine(p2, z1, stop)) / 2
        probe = F.cross_entropy(self.classifier(h_labelled.detach()), batch["target"])
        logged = {"train/loss": similarity, "train/probe_loss": probe, "train/spread": spread(z1)}
        self.log_dict({name: value.detach() for name, value in logged.items()}, on_step=True, on_epoch=False)
        return similarity + probe

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Accuracy of the linear classifier."""
        self.val_acc(self.classifier(self(batch["image"])), batch["target"])
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True, batch_size=len(batch["target"]))

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Accuracy of the linear classifier, and the spread of the projections."""
        h = self(batch["image"])
        self.test_acc(self.classifier(h), batch["target"])
        self.log("test/acc", self.test_acc, on_step=False, on_epoch=True, batch_size=len(batch["target"]))
        self.log("test/spread", spread(self.projector(h)), batch_size=len(h), sync_dist=True)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Features `[B, d]`."""
        return self(batch["image"])

    def configure_optimizers(self) -> Any:
        """SGD; the predictor's learning rate stays, as in the paper (Section 4.2)."""
        lr = self.hparams["lr"]
        rest = [p for part in (self.backbone, self.projector, self.classifier) for p in part.parameters()]
        optimizer = torch.optim.SGD(
            [{"params": rest}, {"params": list(self.predictor.parameters())}],
            lr=lr,
            momentum=0.9,
            weight_decay=self.hparams["weight_decay"],
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.cos(torch.arange(steps + 1) * (torch.pi / steps)).add(1).div(2).tolist()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step: cosine[min(step, steps)], lambda step: 1.0]
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
