"""What Suave and Daino share around the training step: evaluation, optimiser, first weights, figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from zoo.methods.suave.mix import append_labelled_mix, draw_mix
from zoo.methods.suave.networks import PROBES, ClusteringNetwork, Embeddings, Probes
from zoo.methods.suave.state import QuarterlyAccuracy
from zoo.nn.optim import build_optimizer
from zoo.nn.pretrained import load_backbone, load_part, read_weights
from zoo.nn.schedules import total_steps, warmup_cosine

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from matplotlib.figure import Figure
    from torch.optim import Optimizer


def check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """Raise a `ValueError` that names the argument unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def check_positive(**values: float) -> None:
    """Raise a `ValueError` that names the first argument that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_fractions(**values: float) -> None:
    """Raise a `ValueError` that names the first argument that does not lie in [0, 1]."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


class ClusteringModule(LightningModule):
    """A `LightningModule` around a `ClusteringNetwork`; the training step and the hyper-parameters are the subclass's.

    Args:
        net: The network that is trained.
        num_classes: Number of classes `C`.
        num_prototypes: Number of prototypes `K`.
        hidden_dim: Width that the probe `proj1` sees.
        embed_dim: Width that the probe `proj2` sees.
    """

    usage: Tensor

    def __init__(
        self, net: ClusteringNetwork, num_classes: int, num_prototypes: int, hidden_dim: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.net = net
        self.probes = Probes((int(net.backbone.num_features), hidden_dim, embed_dim), num_classes)  # type: ignore[arg-type]
        self.pseudo_labels = QuarterlyAccuracy()
        self.accuracies = nn.ModuleDict(
            {name: MulticlassAccuracy(num_classes, average="micro") for name in ("prototypes", *PROBES)}
        )
        self.register_buffer("usage", torch.zeros(num_prototypes, num_classes), persistent=False)
        self.steps, self.switch_step = 0, 0
        # Convolutions of small images are faster in this layout on CPUs and GPUs alike.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def evaluated(self) -> ClusteringNetwork:
        """The network that makes predictions: the student here, Daino's teacher there."""
        return self.net

    # -- first weights and optimiser -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load `init_from` before training; a resumed run has its weights in the checkpoint."""
        if stage == "fit" and self.hparams["init_from"] and not self.trainer.ckpt_path:
            weights = read_weights(self.hparams["init_from"])
            if self.hparams["init_parts"] == "backbone":
                load_backbone(self.net.backbone, weights)
            else:
                parts = ["backbone", "projector", *(["prototypes"] if self.hparams["keep_prototypes"] else [])]
                for part in parts:
                    load_part(self.net.get_submodule(part), weights, f"net.{part}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser by name, with warm-up and cosine over all steps (and again over the fine-tuning steps)."""
        hp = self.hparams
        self.steps = total_steps(self.trainer)
        self.switch_step = round(self.steps * (1 - hp.get("finetune_fraction", 0.0)))
        optimizer = build_optimizer(
            [*self.net.parameters(), *self.probes.parameters()],
            hp["optimizer"],
            hp["lr"],
            weight_decay=hp["weight_decay"],
            nesterov=hp.get("nesterov", False),
            exclude_vectors=hp["exclude_vectors"],
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step over its peak."""
        hp = self.hparams
        final = hp["final_lr"] / hp["lr"]
        if step < self.switch_step or self.switch_step >= self.steps:
            return warmup_cosine(step, self.switch_step, hp["warmup_steps"], final)
        peak = (hp["finetune_lr"] or hp["lr"]) / hp["lr"]
        return peak * warmup_cosine(step - self.switch_step, self.steps - self.switch_step, 0, final)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Hold the prototypes still during the first `freeze_prototypes_steps`."""
        if self.global_step < self.hparams["freeze_prototypes_steps"]:
            for parameter in self.net.prototypes.parameters():
                parameter.grad = None

    # -- training ---------------------------------------------------------------------------------------------------

    def labelled_rows(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Labelled images `[n, c, H, W]` and their distributions `[n, C]`; twice as many rows with `mix_labelled`."""
        one_hot = nn.functional.one_hot(target, self.hparams["num_classes"]).float()
        if not self.hparams["mix_labelled"]:
            return images, one_hot
        return append_labelled_mix(images, one_hot, draw_mix(*images.shape[2:]))

    def probe_loss(self, e: Embeddings, target: Tensor) -> Tensor:
        """Sum of the probes' cross-entropies on the labelled rows that are not mixed: the first ones."""
        logits = self.probes(e, slice(len(target)))
        return torch.stack([nn.functional.cross_entropy(part.float(), target) for part in logits.values()]).sum()

    def count_pseudo_labels(self, assignments: list[Tensor], hidden: Tensor) -> Tensor:
        """Accuracy of the most likely assignments against the classes that training does not see, a scalar."""
        labels = torch.cat([q.argmax(dim=1) for q in assignments])
        return self.pseudo_labels.update(labels, hidden.repeat(len(assignments)), self.global_step / max(self.steps, 1))

    def on_train_epoch_end(self) -> None:
        """Log what the claim about pseudo-labels compares."""
        quarters = self.pseudo_labels.compute()
        if not quarters[0].isnan():
            last = quarters[~quarters.isnan()][-1]
            self.log_dict({"train/pseudo_acc_first_quarter": quarters[0], "train/pseudo_acc_last_quarter": last})

    # -- evaluation -------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Class probabilities `[n, C]` of images `[n, c, H, W]`, from the class prototypes."""
        net = self.evaluated()
        return torch.softmax(net.class_logits(net.encode([images]).z) / self.hparams["tau"], dim=1)

    def _evaluate(self, batch: dict[str, Any], stage: str) -> None:
        net, target = self.evaluated(), batch["target"]
        e = net.encode([batch["image"]])
        predictions = {"prototypes": net.class_logits(e.z), **self.probes(e)}
        metrics: dict[str, Any] = dict(self.accuracies.items())
        for name, logits in predictions.items():
            metrics[name].update(logits, target)
        place = net.prototypes(e.z).argmax(dim=1) * self.usage.shape[1] + target
        self.usage += torch.bincount(place, minlength=self.usage.numel()).view_as(self.usage)
        names = {name: f"{stage}/acc" if name == "prototypes" else f"{stage}/acc_{name}" for name in predictions}
        loss = nn.functional.cross_entropy(predictions["prototypes"] / self.hparams["tau"], target)
        self.log(f"{stage}/loss", loss, on_epoch=True, batch_size=len(target), sync_dist=True)
        self.log_dict({names[k]: metrics[k] for k in predictions}, on_epoch=True, batch_size=len(target))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log loss and accuracies of the prototypes and of the probes."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log loss and accuracies of the prototypes and of the probes."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Class probabilities `[n, C]`."""
        return self(batch["image"])

    def on_validation_epoch_start(self) -> None:
        """Forget which prototypes the last evaluation used."""
        self.usage.zero_()

    on_test_epoch_start = on_validation_epoch_start

    def figures(self) -> dict[str, Figure]:
        """Clusters against classes of the last evaluation, and the pseudo-labels' accuracy over training."""
        from zoo.methods.suave.figures import cluster_figure, pseudo_label_figure

        drawn = {"clusters": cluster_figure(self.usage)}
        quarters = self.pseudo_labels.compute()
        if not quarters[0].isnan():
            drawn["pseudo_labels"] = pseudo_label_figure(quarters)
        return drawn
