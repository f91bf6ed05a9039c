"""A small classifier with an averaged copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo import Card
from zoo.nn.ema import ema_update, frozen_copy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Exemplary(LightningModule):
    """Two layers and an exponential moving average of them.

    Args:
        num_classes: Classes, from the data.
        lr: Learning rate.
        width: Hidden units.
    """

    card = Card(
        title="How to keep a contract",
        summary="A small classifier with an averaged copy",
        batch="exemplary.data.PointBatch",
        links={"num_classes": "num_classes"},
        compiles=True,
    )

    def __init__(self, num_classes: int, lr: float = 0.1, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, num_classes))
        self.teacher = frozen_copy(self.net)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.save_hyperparameters()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["y"])
        self.log_dict({"train/loss": loss.detach()}, on_step=True, on_epoch=False, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average."""
        super().optimizer_step(*args, **kwargs)
        ema_update(self.teacher, self.net, 0.9)
        self.seen += 1

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy of the averaged copy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracy of the averaged copy."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Classes `[B]`."""
        return self.teacher(batch["x"]).argmax(1)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        right = (self.teacher(batch["x"]).argmax(1) == batch["y"]).float().mean()
        self.log_dict({f"{stage}/acc": right}, on_epoch=True, batch_size=len(batch["x"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.net.parameters(), lr=self.hparams["lr"])

    def figures(self) -> dict[str, Figure]:
        """The weights of the first layer."""
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().imshow(self.net[0].weight.detach().numpy())
        return {"weights": figure}
