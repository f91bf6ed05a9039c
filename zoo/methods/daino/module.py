"""Daino as a LightningModule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.card import Card
from zoo.methods.daino.losses import teacher_assignment, updated_centre
from zoo.methods.suave.base import ClusteringModule, check_choice, check_fractions, check_positive
from zoo.methods.suave.losses import cross_entropy, frequency_weights, swapped_prediction
from zoo.methods.suave.networks import ClusteringNetwork
from zoo.nn.ema import ema_update, frozen_copy
from zoo.nn.schedules import cosine_ramp, linear_ramp


class Daino(ClusteringModule):
    """Semi-supervised self-distillation with class prototypes (arXiv 2306.07483, Eqs. 7-9).

    An averaged teacher assigns the global views to class prototypes; the student predicts the assignments from the
    other views and the labels from labelled images, with one cross-entropy and one set of prototypes.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        backbone: `name` and options of a backbone: `small_conv` (`channels`), `wide_resnet` (`depth`, `width`),
            `resnet18_cifar`, or `timm:<model>`.
        head: `dino`: three layers with GELU and a scaled last layer. `suave`: Suave's projector and unit prototypes.
        hidden_dim: Hidden width of the head.
        embed_dim: Dimension of the embeddings.
        tau: Temperature of the student, for labels too.
        teacher_temperature: Temperature of the teacher at the end of its warm-up.
        warmup_teacher_temperature: Temperature of the teacher at the start.
        warmup_teacher_steps: Steps over which it rises in a straight line.
        ema_momentum: Momentum of the teacher at the start; it rises to 1 on a cosine.
        ema_momentum_end: Momentum of the teacher at the end.
        centre_momentum: Momentum of the centre.
        label_smoothing: Label smoothing of the labelled loss.
        mix_labelled: Append a MixUp or CutMix copy of the labelled batch.
        optimizer: `adamw`, `sgd` or `lars`.
        lr: Peak learning rate.
        final_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay at the start.
        weight_decay_end: Weight decay at the end of its cosine; None for a constant.
        nesterov: Nesterov momentum (SGD and LARS; momentum is 0.9).
        exclude_vectors: No weight decay for biases and norms.
        freeze_prototypes_steps: Steps at the start in which the prototypes stay as they are.
        init_from: File of weights to start from: a checkpoint of this module or a published backbone.
        init_parts: `backbone`: load that alone. `network`: head and prototypes too.
        keep_prototypes: Whether `network` includes the prototypes.

    Departures:
        The released script leaves the student in evaluation mode after its first validation, which switches its
        drop-path off. Here the mode is right, and the configs leave drop-path at 0.
    """

    card = Card(
        title="Semi-supervised learning made simple with self-supervised clustering",
        summary="Suave with an averaged teacher: centred, sharpened assignments to class prototypes",
        arxiv="2306.07483",
        year=2023,
        batch="datamodules.images.SemiSupervisedBatch",
        kind="vision, semi-supervised",
        links={"num_classes": "num_classes", "in_channels": "in_channels"},
        skip_checks={
            "falls": "the targets come from a teacher that moves and from a centre that starts at zero: the loss rises "
            "until they spread over the classes",
            "accumulation": "batch norm and the centre take the whole batch, which halves are not",
        },
        check_options={"ranks": {"model.mix_labelled": False}, "sharded": {"model.mix_labelled": False}},
        search={
            "lr": {"min": 0.02, "max": 0.5, "log": True},
            "tau": {"min": 0.05, "max": 0.3, "log": True},
            "ema_momentum": {"values": [0.98, 0.99, 0.996]},
        },
        objective="maximize val/acc",
    )

    centre: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        backbone: dict[str, Any] | None = None,
        head: str = "dino",
        hidden_dim: int = 2048,
        embed_dim: int = 256,
        tau: float = 0.1,
        teacher_temperature: float = 0.07,
        warmup_teacher_temperature: float = 0.04,
        warmup_teacher_steps: int = 0,
        ema_momentum: float = 0.99,
        ema_momentum_end: float = 1.0,
        centre_momentum: float = 0.9,
        label_smoothing: float = 0.01,
        mix_labelled: bool = True,
        optimizer: str = "adamw",
        lr: float = 9.6e-4,
        final_lr: float = 1e-5,
        warmup_steps: int = 0,
        weight_decay: float = 0.04,
        weight_decay_end: float | None = None,
        nesterov: bool = False,
        exclude_vectors: bool = True,
        freeze_prototypes_steps: int = 0,
        init_from: str | None = None,
        init_parts: str = "backbone",
        keep_prototypes: bool = True,
    ) -> None:
        check_choice("head", head, ("dino", "suave"))
        check_choice("init_parts", init_parts, ("backbone", "network"))
        check_positive(tau=tau, teacher_temperature=teacher_temperature, lr=lr)
        check_positive(warmup_teacher_temperature=warmup_teacher_temperature)
        check_fractions(
            ema_momentum=ema_momentum, ema_momentum_end=ema_momentum_end, centre_momentum=centre_momentum,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        net = ClusteringNetwork(
            backbone or {"name": "small_conv"},
            in_channels,
            num_classes,
            num_classes,
            hidden_dim,
            embed_dim,
            dino_head=head == "dino",
        )
        super().__init__(net, num_classes, num_classes, hidden_dim, embed_dim)
        self.teacher = frozen_copy(net)
        self.register_buffer("centre", torch.zeros(num_classes))
        self.save_hyperparameters()

    def evaluated(self) -> ClusteringNetwork:
        """The teacher makes the predictions."""
        return self.teacher

    def on_fit_start(self) -> None:
        """A fresh run's teacher starts where the student starts (after `init_from`)."""
        if not self.trainer.ckpt_path:
            self.teacher.load_state_dict(self.net.state_dict())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The student learns the labels and the teacher's assignments of the global views; then the centre moves."""
        hp = self.hparams
        views = list(batch["views"])
        labelled, soft_target = self.labelled_rows(batch["labelled"], batch["target"])
        with torch.no_grad():
            taught = self.teacher.prototypes(self.teacher.encode(views[:2]).z)
            temperature = linear_ramp(
                self.global_step,
                hp["warmup_teacher_steps"],
                hp["warmup_teacher_temperature"],
                hp["teacher_temperature"],
            )
            assignments = list(teacher_assignment(taught, self.centre, temperature).split(len(views[0])))

        e = self.net.encode([labelled, *views])
        logits = self.net.prototypes(e.z)
        losses = {
            "labelled": cross_entropy(logits[: len(labelled)], soft_target, hp["tau"], hp["label_smoothing"]),
            "unlabelled": swapped_prediction(logits[len(labelled) :].split(len(views[0])), assignments, hp["tau"]),
            "probes": self.probe_loss(e, batch["target"]),
        }
        rows = {"labelled": len(labelled), "unlabelled": sum(map(len, views)), "probes": len(batch["target"])}
        weights = frequency_weights(rows)
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()

        self.centre.copy_(updated_centre(self.centre, taught, hp["centre_momentum"]))
        logged = {f"train/loss_{name}": value.detach() for name, value in losses.items()}
        logged["train/pseudo_label_acc"] = self.count_pseudo_labels(assignments, batch["unlab_target"])
        self.log_dict({"train/loss": loss.detach(), **logged}, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Raise the weight decay along its cosine; groups without weight decay stay without."""
        end = self.hparams["weight_decay_end"]
        if end is not None:
            decay = cosine_ramp(self.global_step, self.steps, self.hparams["weight_decay"], end)
            for group in self.trainer.optimizers[0].param_groups:
                if group["weight_decay"] > 0:
                    group["weight_decay"] = decay

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the teacher: `phi <- eta phi + (1 - eta) theta`, eta rising on a cosine."""
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        hp = self.hparams
        ema_update(self.teacher, self.net, cosine_ramp(step, self.steps, hp["ema_momentum"], hp["ema_momentum_end"]))
