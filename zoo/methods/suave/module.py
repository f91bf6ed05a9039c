"""Suave as a LightningModule, with the baselines it is compared with as values of `objective`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.card import Card
from zoo.methods.suave.base import ClusteringModule, check_choice, check_fractions, check_positive
from zoo.methods.suave.losses import (
    MixWeight,
    confident_pseudo_labels,
    cross_entropy,
    frequency_weights,
    mixed_rows,
    supervised_contrastive,
    swapped_prediction,
)
from zoo.methods.suave.mix import Mix, draw_mix
from zoo.methods.suave.networks import ClusteringNetwork
from zoo.methods.suave.state import EmbeddingQueue
from zoo.nn.ema import ema_update, frozen_copy
from zoo.nn.sinkhorn import sinkhorn

#: Objectives whose prototypes are the classes, and those with free prototypes and a classifier beside them.
SHARED, UNSHARED = ("suave", "supervised", "fixmatch"), ("swav", "unshared", "supcon")


class Suave(ClusteringModule):
    """Semi-supervised learning with self-supervised clustering (arXiv 2306.07483).

    One cross-entropy pulls labelled images to the prototype of their class and unlabelled views to the balanced
    assignment of another view of the same image. The prototypes are shared: they are the classifier.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        backbone: `name` and options of a backbone: `small_conv` (`channels`), `wide_resnet` (`depth`, `width`),
            `resnet18_cifar`, or `timm:<model>`.
        hidden_dim: Hidden width of the projector.
        embed_dim: Dimension of the embeddings.
        objective: What is trained. `suave`: the method. `supervised`: the labels alone. `swav`: clustering alone, with
            a classifier that looks on. `unshared`: Suave with a classifier of its own beside free prototypes. `supcon`:
            clustering and a supervised contrastive loss, with a classifier that looks on. `fixmatch`: confident
            predictions on the first view are labels of the others.
        num_prototypes: Number of prototypes; None for one a class. Objectives that share prototypes take no other.
        tau: Temperature of all predictions.
        epsilon: Entropy weight of the assignments (Sinkhorn-Knopp).
        sinkhorn_iterations: Iterations of the assignments.
        queue_length: Embeddings of earlier batches that take part in the assignment, for each global view and over all
            ranks; 0 for none.
        label_smoothing: Label smoothing of the labelled loss.
        mix_labelled: Append a MixUp or CutMix copy of the labelled batch.
        mix_unlabelled: Append a mixed view of the unlabelled batch.
        mix_weight: Weight of the mixed view: `paper` counts its rows, `official` counts it once, as the released code.
        ema_momentum: Momentum of an averaged network that makes the assignments; 0 for none, as in the recipe.
        threshold: Confidence that `fixmatch` asks for.
        finetune_fraction: Share of the steps, at the end, that trains on the labels alone.
        finetune_lr: Peak learning rate of these steps; None for `lr`.
        optimizer: `sgd`, `lars` or `adamw`.
        lr: Peak learning rate.
        final_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay.
        nesterov: Nesterov momentum (SGD and LARS; momentum is 0.9).
        exclude_vectors: No weight decay and no LARS adaptation for biases and norms.
        freeze_prototypes_steps: Steps at the start in which the prototypes stay as they are.
        init_from: File of weights to start from: a checkpoint of this module or a published backbone.
        init_parts: `backbone`: load that alone. `network`: projector and prototypes too, for a second phase.
        keep_prototypes: Whether `network` includes the prototypes.

    Departures:
        * `keep_prototypes` defaults to the paper's intent; the released loader always drops them.
        * Mixing pairs images of one rank; the released code does the same.
    """

    card = Card(
        title="Semi-supervised learning made simple with self-supervised clustering",
        summary="Clusters are classes: one cross-entropy for labels and for balanced cluster assignments",
        arxiv="2306.07483",
        year=2023,
        batch="datamodules.images.SemiSupervisedBatch",
        kind="vision, semi-supervised",
        links={"num_classes": "num_classes", "in_channels": "in_channels"},
        check_options={
            "ranks": {"model.mix_labelled": False, "model.mix_unlabelled": False},
            "sharded": {"model.mix_labelled": False, "model.mix_unlabelled": False},
        },
        skip_checks={"accumulation": "assignments are balanced over the whole batch, which halves are not"},
        search={
            "lr": {"min": 0.02, "max": 0.5, "log": True},
            "tau": {"min": 0.05, "max": 0.3, "log": True},
            "epsilon": {"values": [0.02, 0.05, 0.1]},
        },
        objective="maximize val/acc",
    )

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        backbone: dict[str, Any] | None = None,
        hidden_dim: int = 2048,
        embed_dim: int = 128,
        objective: str = "suave",
        num_prototypes: int | None = None,
        tau: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_length: int = 0,
        label_smoothing: float = 0.01,
        mix_labelled: bool = True,
        mix_unlabelled: bool = True,
        mix_weight: MixWeight = "paper",
        ema_momentum: float = 0.0,
        threshold: float = 0.95,
        finetune_fraction: float = 0.0,
        finetune_lr: float | None = None,
        optimizer: str = "lars",
        lr: float = 0.4,
        final_lr: float = 0.001,
        warmup_steps: int = 0,
        weight_decay: float = 1e-6,
        nesterov: bool = False,
        exclude_vectors: bool = False,
        freeze_prototypes_steps: int = 0,
        init_from: str | None = None,
        init_parts: str = "backbone",
        keep_prototypes: bool = True,
    ) -> None:
        prototypes = num_classes if num_prototypes is None else num_prototypes
        check_choice("objective", objective, (*SHARED, *UNSHARED))
        check_choice("mix_weight", mix_weight, ("paper", "official"))
        check_choice("init_parts", init_parts, ("backbone", "network"))
        if objective in SHARED and prototypes != num_classes:
            raise ValueError(
                f"objective {objective!r} has one prototype a class: num_prototypes must be {num_classes} or null,"
                f" got {prototypes}"
            )
        check_positive(tau=tau, epsilon=epsilon, sinkhorn_iterations=sinkhorn_iterations, lr=lr)
        check_fractions(ema_momentum=ema_momentum, label_smoothing=label_smoothing, threshold=threshold)
        if not 0.0 <= finetune_fraction < 1.0:
            raise ValueError(f"finetune_fraction must lie in [0, 1), got {finetune_fraction}")
        net = ClusteringNetwork(
            backbone or {"name": "small_conv"},
            in_channels,
            num_classes,
            prototypes,
            hidden_dim,
            embed_dim,
            shared=objective in SHARED,
        )
        super().__init__(net, num_classes, prototypes, hidden_dim, embed_dim)
        self.teacher = frozen_copy(net) if ema_momentum > 0 else None
        self.queue = EmbeddingQueue(queue_length, embed_dim)
        self.save_hyperparameters()

    def on_fit_start(self) -> None:
        """A fresh run's averaged network starts where the network starts (after `init_from`)."""
        if self.teacher is not None and not self.trainer.ckpt_path:
            self.teacher.load_state_dict(self.net.state_dict())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One pass over labelled rows, all views and the mixed view; each loss weighs as much as it has rows."""
        objective = self.hparams["objective"] if self.global_step < self.switch_step else "supervised"
        views = [] if objective == "supervised" else list(batch["views"])
        labelled, soft_target = self.labelled_rows(batch["labelled"], batch["target"])
        mix = self.draw_unlabelled_mix(objective, views)
        mixed = [] if mix is None else [mix.images(views[0], views[1].flip(0))]

        images = [labelled, *views, *mixed]
        e = self.net.encode(images)
        z_labelled, *z_views = e.z.split([len(part) for part in images])

        losses, rows = self.labelled_losses(objective, z_labelled, soft_target, batch["target"])
        if objective == "fixmatch":
            losses |= self.confident_loss(z_views, batch["unlab_target"])
        elif views:
            losses |= self.unlabelled_losses(views, z_views, mix, batch["unlab_target"])
        losses["probes"] = self.probe_loss(e, batch["target"])
        rows |= {"unlabelled": sum(map(len, views)), "probes": len(batch["target"])}
        if mix is not None:
            rows["mixed"] = mixed_rows(len(views[0]), 1, self.hparams["mix_weight"])

        # FixMatch adds its two losses as they are
        weights = dict.fromkeys(losses, 1.0) if objective == "fixmatch" else frequency_weights(rows)
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        if objective != self.hparams["objective"]:
            loss = loss + 0.0 * self.net.prototypes.weight.sum()  # DDP wants a gradient for every parameter
        logged = {f"train/loss_{name}": value.detach() for name, value in losses.items()}
        self.log_dict({"train/loss": loss.detach(), **logged}, on_step=True, on_epoch=False)
        return loss

    def labelled_losses(
        self, objective: str, z: Tensor, soft_target: Tensor, target: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """The losses of the labelled rows and how many rows they count for."""
        learns = objective not in ("swav", "supcon")
        logits = self.net.class_logits(z if learns else z.detach())
        loss = cross_entropy(logits, soft_target, self.hparams["tau"], self.hparams["label_smoothing"])
        if learns:
            return {"labelled": loss}, {"labelled": len(z)}
        if objective == "swav":
            return {"classifier": loss}, {"classifier": len(z)}
        contrastive = supervised_contrastive(z[: len(target)], target, self.hparams["tau"])
        return {"labelled": contrastive, "classifier": loss}, {"labelled": len(z), "classifier": len(z)}

    def draw_unlabelled_mix(self, objective: str, views: list[Tensor]) -> Mix | None:
        """How to mix the two global views in this step, if at all."""
        if not self.hparams["mix_unlabelled"] or not views or objective == "fixmatch":
            return None
        return draw_mix(*views[0].shape[2:])

    def unlabelled_losses(
        self, views: list[Tensor], z_views: list[Tensor], mix: Mix | None, hidden: Tensor
    ) -> dict[str, Tensor]:
        """Swapped prediction between the views, and the mixed view against its mixed assignment."""
        tau = self.hparams["tau"]
        logits = self.net.prototypes(torch.cat(z_views)).split(len(views[0]))
        assignments = self.assign(views[:2], logits, z_views)
        losses = {"unlabelled": swapped_prediction(logits[: len(views)], assignments, tau)}
        if mix is not None:
            q1, q2 = assignments
            losses["mixed"] = cross_entropy(logits[-1], mix.targets(q1, q2.flip(0)), tau)
        if self.net.classifier is None:
            self.log("train/pseudo_label_acc", self.count_pseudo_labels(assignments, hidden))
        return losses

    @torch.no_grad()
    def assign(self, views: list[Tensor], logits: Sequence[Tensor], z_views: list[Tensor]) -> list[Tensor]:
        """Balanced assignments `[B, K]` of the two global views; the queue takes part and then takes them in."""
        net, z, scores = self.net, z_views[:2], list(logits[:2])
        if self.teacher is not None:
            net = self.teacher
            z = list(net.encode(views).z.split(len(views[0])))
            scores = [net.prototypes(part) for part in z]
        assignments = []
        for view, score in enumerate(scores):
            joined = torch.cat([net.prototypes(self.queue.rows(view)), score]) if self.queue.full() else score
            q = sinkhorn(joined, self.hparams["epsilon"], self.hparams["sinkhorn_iterations"])
            assignments.append(q[-len(score) :])
        self.queue.push(z)
        return assignments

    def confident_loss(self, z_views: list[Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """FixMatch: the first view labels the others where it is confident."""
        weak, *strong = [self.net.class_logits(z) for z in z_views]
        results = [
            confident_pseudo_labels(weak, view, self.hparams["tau"], self.hparams["threshold"]) for view in strong
        ]
        self.log_dict(
            {"train/confident": results[0][1], "train/pseudo_label_acc": self.count_pseudo_labels([weak], hidden)}
        )
        return {"unlabelled": torch.stack([loss for loss, _ in results]).mean()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the averaged network."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            ema_update(self.teacher, self.net, self.hparams["ema_momentum"])
