"""Probes on a frozen encoder: the attentive probe of the paper, and linear ones in closed form beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex, MulticlassAccuracy

from zoo.card import Card
from zoo.methods.aimv2.encoder import build_trunk
from zoo.methods.aimv2.losses import patchify
from zoo.methods.aimv2.pooling import AttentiveClassifier
from zoo.methods.aimv2.ridge import RidgeProbe
from zoo.methods.aimv2.weights import load_trunk
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import total_steps, warmup_cosine_lr

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from matplotlib.figure import Figure


class AIMv2Probe(LightningModule):
    """What the features of an encoder are good for: probes on a frozen trunk (arXiv 2411.14402, Section 4.1).

    An attentive probe is trained for each learning rate on the same features, and the one that validates best is
    reported. Beside them stand ridge regressions on the mean token, on the mean token of a few images of each class,
    and, with `foreground`, from each token to whether its own patch is foreground.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        trunk: The encoder, as in `aimv2`.
        init_from: Weights of the encoder, as in `aimv2`; null for random ones.
        freeze_trunk: Whether the encoder stays as it is; else all of it is trained with the first learning rate, on the
            labels, and there are no linear probes.
        layers: Blocks whose mean output is probed, evenly spread; 1 is the last alone.
        lrs: Peak learning rates.
        final_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Decoupled weight decay of AdamW.
        penalty: Penalty of the ridge regressions on all images.
        few_labels: Images of each class that the few-label probe sees.
        few_penalty: Its penalty.
        foreground: Value above which a (normalised) pixel is foreground; null for no such probe.
    """

    card = Card(
        title="Multimodal autoregressive pre-training of large vision encoders: probes",
        summary="Attentive and linear probes on the frozen encoder of AIMv2",
        arxiv="2411.14402",
        year=2025,
        batch="datamodules.images.SemiSupervisedBatch",
        kind="vision, evaluation",
        links={"num_classes": "num_classes", "in_channels": "in_channels", "image_size": "image_size"},
        skip_checks={"accumulation": "the probe's batch norm sees half the images"},
    )

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 224,
        trunk: dict[str, Any] | None = None,
        init_from: str | None = None,
        freeze_trunk: bool = True,
        layers: int = 1,
        lrs: list[float] | None = None,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.05,
        penalty: float = 1e-3,
        few_labels: int = 10,
        few_penalty: float = 0.1,
        foreground: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lrs = [1e-3] if lrs is None else lrs
        if not self.lrs or min(self.lrs) <= 0:
            raise ValueError(f"lrs: {lrs} is not accepted; accepted: a list of positive numbers")
        self.trunk = build_trunk(trunk or {"size": "large"}, image_size, in_channels).requires_grad_(not freeze_trunk)
        if not 1 <= layers <= len(self.trunk.blocks):
            raise ValueError(f"layers: {layers} is not accepted; accepted: 1 to {len(self.trunk.blocks)}")
        width = self.trunk.width
        self.heads: Any = nn.ModuleList(AttentiveClassifier(width, self.trunk.heads, num_classes) for _ in self.lrs)
        self.ridges: Any = nn.ModuleDict()
        if freeze_trunk:
            self.ridges["linear"] = RidgeProbe(width, num_classes, penalty)
            self.ridges["few"] = RidgeProbe(width, num_classes, few_penalty, few_labels)
            if foreground is not None:
                self.ridges["foreground"] = RidgeProbe(width, 1, penalty)
        metrics: dict[str, Metric] = {name: MulticlassAccuracy(num_classes, average="micro") for name in self.names()}
        if "foreground" in self.ridges:
            metrics["foreground"] = BinaryJaccardIndex()
        self.metrics: Any = nn.ModuleDict(metrics)
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))
        self.best: Tensor
        self.solved: dict[str, tuple[Tensor, Tensor]] = {}
        self.curve: list[dict[str, float]] = []
        self.shown: Tensor | None = None

    def names(self) -> list[str]:
        """Names of the classifiers."""
        return [*(f"attentive_{i}" for i in range(len(self.lrs))), *(k for k in self.ridges if k != "foreground")]

    def tokens(self, images: Tensor) -> Tensor:
        """Features `[B, I, D]`; no gradient reaches a frozen encoder."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hparams["freeze_trunk"]):
            return self.trunk.layers(images, self.hparams["layers"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of every attentive probe on the same tokens; the ridge regressions take the batch in."""
        images, target = batch["labelled"], batch["target"]
        tokens = self.tokens(images)
        losses = torch.stack([F.cross_entropy(head(tokens).float(), target) for head in self.heads])
        one_hot = F.one_hot(target, self.hparams["num_classes"])
        for name, ridge in self.ridges.items():
            if name == "foreground":
                ridge.update(tokens.detach().flatten(0, 1), self.is_foreground(images).flatten()[:, None])
            else:
                ridge.update(tokens.detach().float().mean(dim=1), one_hot)
        self.log_dict({"train/loss": losses.detach().sum()}, on_step=True, on_epoch=False)
        return losses.sum()

    def is_foreground(self, images: Tensor) -> Tensor:
        """Whether more than half of the pixels of a patch are foreground in some channel, bool `[B, I]`."""
        bright = (images > self.hparams["foreground"]).any(dim=1, keepdim=True)
        return patchify(bright, self.trunk.patch_size).float().mean(dim=2) > 0.5

    def on_validation_epoch_start(self) -> None:
        """Solve the ridge regressions for what was seen so far."""
        self.solved = {name: ridge.solve() for name, ridge in self.ridges.items()}

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        images, target = batch["image"], batch["target"]
        tokens = self.tokens(images)
        pooled = tokens.float().mean(dim=1)
        for i, head in enumerate(self.heads):
            self.metrics[f"attentive_{i}"].update(head(tokens), target)
        for name, (weight, offset) in self.solved.items():
            if name == "foreground":
                said = (tokens.float() @ weight + offset)[..., 0] > 0.5
                self.metrics[name].update(said, self.is_foreground(images))
            else:
                self.metrics[name].update(pooled @ weight + offset, target)
        if batch_idx == 0:
            self.shown = images[:8]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count what the probes get right."""
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count what the probes get right."""
        self._evaluate(batch, batch_idx)

    def _values(self) -> dict[str, Tensor]:
        values = {name: metric.compute() for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        return values

    def _log(self, values: dict[str, Tensor], stage: str) -> None:
        single = len(self.lrs) == 1
        shown = {
            ("iou_foreground" if k == "foreground" else f"acc_{k}"): v
            for k, v in values.items()
            if not (single and k.startswith("attentive"))
        }
        shown["acc_attentive"] = values[f"attentive_{int(self.best)}"]
        self.log_dict({f"{stage}/{name}": value for name, value in shown.items()}, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and note which attentive probe is the best."""
        values = self._values()
        self.best.fill_(torch.stack([values[f"attentive_{i}"] for i in range(len(self.lrs))]).argmax())
        self._log(values, "val")
        if not self.trainer.sanity_checking:
            point = {name: float(value) for name, value in values.items() if name != "foreground"}
            self.curve.append({"step": float(self.global_step), **point})

    def on_test_epoch_end(self) -> None:
        """Log the metrics; the attentive probe is the one that validated best."""
        self._log(self._values(), "test")

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, C]` of the best attentive probe."""
        return self.heads[int(self.best)](self.tokens(images))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Class probabilities `[B, C]`."""
        return self(batch["image"]).float().softmax(dim=1)

    def figures(self) -> dict[str, Figure]:
        """Accuracy over training, and where the attentive probe looks."""
        from zoo.methods.aimv2.figures import attention_figure, probe_figure

        drawn = {}
        if self.curve:
            curves = {name: [point[name] for point in self.curve] for name in self.names()}
            drawn["probes"] = probe_figure(curves, [int(point["step"]) for point in self.curve])
        if self.shown is not None:
            head = self.heads[int(self.best)]
            p = self.trunk.patch_size
            grid = (self.shown.shape[2] // p, self.shown.shape[3] // p)
            training = head.training
            with torch.no_grad():
                weights = head.eval().attention(self.tokens(self.shown))
            head.train(training)
            drawn["attention"] = attention_figure(self.shown, weights, grid)
        return drawn

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the curve."""
        checkpoint["aimv2_probe_curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the curve."""
        self.curve = checkpoint.get("aimv2_probe_curve", [])

    def setup(self, stage: str) -> None:
        """Load the encoder before training; a resumed run has it in the checkpoint."""
        if stage == "fit" and self.hparams["init_from"] and not self.trainer.ckpt_path:
            load_trunk(self.trunk, self.hparams["init_from"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a learning rate for each attentive probe, warm-up and cosine."""
        hp = self.hparams
        groups: list[dict[str, Any]] = []
        for head, lr in zip(self.heads, self.lrs, strict=True):
            groups += [{**group, "lr": lr} for group in decay_groups(head.parameters(), hp["weight_decay"])]
        if not hp["freeze_trunk"]:
            groups += [{**g, "lr": self.lrs[0]} for g in decay_groups(self.trunk.parameters(), hp["weight_decay"])]
        optimizer = torch.optim.AdamW(groups, lr=self.lrs[0])
        steps = total_steps(self.trainer)
        scheduler = warmup_cosine_lr(optimizer, steps, hp["warmup_steps"], hp["final_lr"] / max(self.lrs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
