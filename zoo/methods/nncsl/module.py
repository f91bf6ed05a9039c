"""NNCSL (arXiv 2212.05102) and what it is compared with, as one LightningModule.

Longer than other files: the options of ten arms and their explanation are a quarter of it, and what the arms share (the
clock of tasks, the buffer, the teacher) is state that Lightning saves with the one module. Equations, networks, memory
and metrics are beside it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from zoo.card import Card
from zoo.methods.nncsl import losses
from zoo.methods.nncsl.memory import ExemplarLogits, TaskCosts
from zoo.methods.nncsl.metrics import accuracy_matrix, matrix_figure, stream_metrics
from zoo.methods.nncsl.networks import Network, parameter_groups
from zoo.nn.distributed import all_gather_rows
from zoo.nn.ema import frozen_copy
from zoo.nn.schedules import cosine_ramp, linear_ramp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from datamodules.class_incremental import ClassIncrementalBatch
    from datamodules.images import ImageBatch


class Encoded(NamedTuple):
    """The global batch as one network sees it; float32."""

    z: list[Tensor]
    """Embeddings of each unlabelled view, `[B, D]`: two global ones, then the small crops."""
    logits: list[Tensor]
    """Linear logits of each unlabelled view, `[B, C]`."""
    support_z: Tensor
    """Embeddings of the supports, one view below the other, `[V S, D]`."""
    support_logits: Tensor
    """Linear logits of the supports, `[V S, C]`."""


class NNCSL(pl.LightningModule):
    """Continual semi-supervised learning with soft nearest neighbours.

    One fit runs through the whole stream. At the first batch of a task the network is copied into the teacher and the
    learning-rate schedule starts again on the live optimiser. The loss is

        `w_paws L_SNN + w_me L_MEM + w_lin L_LIN + w_dist (alpha L_FEAT + (1 - alpha) L_NND) + w_replay L_DER`

    and its flags give the arms of the comparison: `nncsl` (the defaults), `csl` (`w_dist: 0`), `paws` (`w_dist: 0`,
    `mask: false`, `detach: true`), `paws_attached` (`paws` with `detach: false`), `csl_logit_kd` (`distill: logits`),
    `csl_feat_kd` (`alpha: 1`), `er` (`w_paws`, `w_me` and `w_dist` 0), `derpp` (`er` with `w_replay: 0.5`), `finetune`
    (`er` without a buffer, BN in train mode) and `joint` (`csl` on a stream of one task).

    Args:
        num_classes: Classes of the whole stream, renumbered in the order of their arrival.
        num_tasks: Tasks that divide the classes.
        in_channels: Channels of the images.
        backbone: `name` and options of a backbone (`{name: small_conv, channels: [16, 32, 64]}`); null is the official
            ResNet-18 with its stem for 32-pixel images.
        projector: Layers of the projector whose output the neighbours compare.
        w_paws: Weight of L_SNN, consistency between views.
        w_me: Weight of L_MEM, which spreads the mean prediction.
        w_lin: Weight of L_LIN, cross-entropy of the linear head on all supports. 0.005 is for LARS, which rescales each
            layer; with SGD it starves the head, use 1.
        w_dist: Weight of the distillation from the model of the previous task.
        alpha: Part of the distillation that is on features (squared error); the rest is on predictions.
        distill: Predictions that are distilled: `neighbours` (L_NND) or `logits` of the head for the old classes.
        w_replay: Weight of DER++'s squared error to the logits stored with the exemplars.
        mask: Whether the neighbours of L_SNN and L_MEM are supports of the current task only (the filter of CSL).
        detach: Whether the linear head is a probe that sends no gradient into the backbone.
        tau: Temperature of the neighbours.
        sharpening: Temperature `T` of the targets.
        smoothing: Label smoothing of the supports.
        bn_after_first_task: `frozen` uses the batch-norm statistics of the first task from then on, as the published
            runs did; `train` keeps updating them.
        optimizer: `lars` or `sgd`, both with momentum.
        lr: Peak learning rate.
        start_lr: Learning rate of the first step of a task.
        final_lr: Learning rate that the cosine of a task ends with.
        lr_classifier: Peak rate of the linear head, scaled by the same schedule; null is `lr`.
        warmup_steps: Steps of the linear warm-up of each task.
        momentum: Momentum.
        weight_decay: L2 weight decay of the matrices and kernels outside the head.

    Departures:
        Evaluation always uses eval mode; the official code validates the first task in train mode, so that test images
        enter its BN statistics. All ranks compute the loss of the global batch; the official code averages
        per-rank losses over gathered supports.
    """

    card = Card(
        title="A soft nearest-neighbor framework for continual semi-supervised learning",
        summary="Class-incremental learning with few labels: nearest-neighbour consistency and distillation",
        arxiv="2212.05102",
        year=2023,
        batch="datamodules.class_incremental.ClassIncrementalBatch",
        kind="vision, class-incremental",
        links={"num_classes": "num_classes", "num_tasks": "num_tasks", "in_channels": "in_channels"},
        skip_checks={"accumulation": "rows are compared with the supports of the whole batch, which halves are not"},
        search={
            "lr": {"min": 0.01, "max": 0.2, "log": True},
            "w_dist": {"values": [0.0, 0.2, 1.0, 2.0]},
            "tau": {"min": 0.05, "max": 0.3, "log": True},
        },
        objective="maximize val/acc",
    )

    def __init__(
        self,
        num_classes: int = 10,
        num_tasks: int = 5,
        in_channels: int = 3,
        backbone: dict[str, Any] | None = None,
        projector: list[int] | None = None,
        w_paws: float = 1.0,
        w_me: float = 1.0,
        w_lin: float = 0.005,
        w_dist: float = 0.2,
        alpha: float = 0.0,
        distill: str = "neighbours",
        w_replay: float = 0.0,
        mask: bool = True,
        detach: bool = False,
        tau: float = 0.1,
        sharpening: float = 0.25,
        smoothing: float = 0.1,
        bn_after_first_task: str = "frozen",
        optimizer: str = "lars",
        lr: float = 0.4,
        start_lr: float = 0.08,
        final_lr: float = 0.032,
        lr_classifier: float | None = 0.12,
        warmup_steps: int = 190,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_tasks < 1 or num_classes % num_tasks:
            raise ValueError(f"num_tasks: {num_tasks} tasks do not divide {num_classes} classes")
        for key, value, accepted in (
            ("distill", distill, ("neighbours", "logits")),
            ("bn_after_first_task", bn_after_first_task, ("frozen", "train")),
            ("optimizer", optimizer, ("lars", "sgd")),
        ):
            if value not in accepted:
                raise ValueError(f"{key}: {value!r} is not accepted; accepted: {', '.join(accepted)}")
        for key, number in (("tau", tau), ("sharpening", sharpening), ("lr", lr)):
            if number <= 0:
                raise ValueError(f"{key}: {number} is not accepted; accepted: a number above 0")
        for key, number in (("alpha", alpha), ("smoothing", smoothing)):
            if not 0 <= number <= 1:
                raise ValueError(f"{key}: {number} is not accepted; accepted: a number in [0, 1]")
        self.save_hyperparameters()
        self.classes_per_task = num_classes // num_tasks
        self.uses_unlabelled = bool(w_paws or w_me or w_dist)
        widths = [512, 512, 128] if projector is None else projector
        if not widths:
            raise ValueError("projector: an empty list is not accepted; accepted: the widths of at least one layer")
        self.net = Network(
            num_classes, in_channels, backbone, widths if self.uses_unlabelled else [], bool(w_dist and alpha)
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = frozen_copy(self.net) if w_dist else None

        # Task that is being learnt; -1 before the first batch.
        self.task = -1
        self.exemplars = ExemplarLogits(num_classes)
        self.costs = TaskCosts(num_tasks)
        self.correct: Tensor
        self.total: Tensor
        self.register_buffer("correct", torch.full((num_tasks, num_tasks), -1))
        self.register_buffer("total", torch.zeros(num_tasks, dtype=torch.long))
        self.val_confusion = MulticlassConfusionMatrix(num_classes)
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    @property
    def seen(self) -> int:
        """Classes seen so far; all of them before any training."""
        return self.num_classes if self.task < 0 else (self.task + 1) * self.classes_per_task

    @property
    def num_classes(self) -> int:
        """Classes of the whole stream."""
        return self.net.classifier.out_features

    # -- training

    def training_step(self, batch: ClassIncrementalBatch, batch_idx: int) -> Tensor:
        """One step of PAWS on the current task, the linear head on all seen classes, distillation of the old ones."""
        hp = self.hparams
        if batch["task"] != self.task:
            self._begin_task(batch)
        rate = self._set_learning_rate(batch["step"], batch["steps"])
        first, seen = self.task * self.classes_per_task, self.seen
        y = all_gather_rows(batch["support_y"]).repeat(len(batch["supports"]))
        student = self._encode(self.net, batch)

        with torch.autocast(self.device.type, enabled=False):
            loss_lin = F.cross_entropy(student.support_logits[:, :seen], y)
            loss = hp["w_lin"] * loss_lin
            logged = {"train/linear": loss_lin}
            if hp["w_paws"] or hp["w_me"]:
                start = first if hp["mask"] else 0
                rows = (y >= start).nonzero().flatten()
                labels = losses.label_matrix(y[rows], start, seen - start, hp["smoothing"])
                loss_snn, loss_mem = losses.paws_losses(
                    student.z, student.support_z[rows], labels, hp["tau"], hp["sharpening"]
                )
                loss = loss + hp["w_paws"] * loss_snn + hp["w_me"] * loss_mem
                logged |= {"train/snn": loss_snn, "train/me_max": loss_mem}
            if self.teacher is not None:
                loss_dist = self._distillation(student, batch, y, first)
                loss = loss + hp["w_dist"] * loss_dist
                logged["train/distillation"] = loss_dist
            if hp["w_replay"]:
                loss_replay = self._replay(student.support_logits, batch)
                loss = loss + hp["w_replay"] * loss_replay
                logged["train/replay"] = loss_replay
        logged = {"train/loss": loss} | logged
        self.log_dict(
            {key: value.detach() for key, value in logged.items()} | {"train/lr": rate, "train/task": float(self.task)},
            on_step=True,
            on_epoch=False,
        )
        return loss

    def _begin_task(self, batch: ClassIncrementalBatch) -> None:
        """Copy the network into the teacher, store the logits of new exemplars and set the modes of batch norm."""
        previous, self.task = self.task, batch["task"]
        if previous >= 0 and self.teacher is not None:
            self.teacher.load_state_dict(self.net.state_dict())
        if self.hparams["w_replay"]:
            self._store_logits(batch)
        self.train()

    def train(self, mode: bool = True) -> NNCSL:
        """Set the mode: the teacher stays in eval mode, the student too where its statistics are frozen."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.task > 0 and self.hparams["bn_after_first_task"] == "frozen":
            self.net.eval()
        return self

    def on_train_start(self) -> None:
        """A resumed run has a task already."""
        self.train()

    def _encode(self, net: Network, batch: ClassIncrementalBatch) -> Encoded:
        """Run supports and global views in one pass and the small crops in another; gather the rows of all ranks."""
        supports, views = batch["supports"], batch["views"] if self.uses_unlabelled else []
        zs: list[Tensor] = []
        logits: list[Tensor] = []
        for images in ([*supports, *views[:2]], views[2:]):
            if images:
                features, z = net(torch.cat(images).contiguous(memory_format=torch.channels_last))
                sizes = [len(image) for image in images]
                zs += z.float().split(sizes)
                logits += net.classifier(features.detach() if self.hparams["detach"] else features).float().split(sizes)
        number = len(supports)

        def gathered(tensors: list[Tensor]) -> list[Tensor]:
            return list(all_gather_rows(torch.stack(tensors, dim=1)).unbind(dim=1)) if tensors else []

        return Encoded(
            gathered(zs[number:]),
            gathered(logits[number:]),
            torch.cat(gathered(zs[:number])),
            torch.cat(gathered(logits[:number])),
        )

    def _distillation(self, student: Encoded, batch: ClassIncrementalBatch, y: Tensor, first: int) -> Tensor:
        """Distillation of the previous model; in the first task a 0 that reaches the feature projector."""
        teacher, alpha = self.teacher, self.hparams["alpha"]
        z = torch.cat([*student.z, student.support_z])
        projected = None if self.net.feature_projector is None else self.net.feature_projector(z)
        if first == 0 or teacher is None:
            return z.new_zeros(()) if projected is None else 0.0 * projected.sum()
        with torch.no_grad():
            old = self._encode(teacher, batch)
        feature_loss = z.new_zeros(())
        if projected is not None:
            feature_loss = F.mse_loss(projected, torch.cat([*old.z, old.support_z]))
        if alpha == 1:
            return feature_loss
        if self.hparams["distill"] == "logits":
            logits, targets = torch.cat(student.logits), torch.cat(old.logits)
            loss = losses.logit_distillation(logits[:, :first], targets[:, :first])
        else:
            rows = (y < first).nonzero().flatten()
            if len(rows) == 0:
                raise ValueError("w_dist: there are no supports of old classes to distil; give a buffer_size above 0")
            loss = losses.nnd_loss(
                torch.cat(student.z),
                student.support_z[rows],
                torch.cat(old.z),
                old.support_z[rows],
                losses.label_matrix(y[rows], 0, first, self.hparams["smoothing"]),
                self.hparams["tau"],
            )
        return alpha * feature_loss + (1 - alpha) * loss

    @torch.no_grad()
    def _store_logits(self, batch: ClassIncrementalBatch) -> None:
        """Keep the logits of the clean exemplars: new ones from the present network, the others as they are."""
        if len(batch["exemplars"]):
            self.net.eval()
            logits = [self.net.classifier(self.net(part)[0]).float() for part in batch["exemplars"].split(256)]
            self.exemplars.store(batch["exemplar_index"], torch.cat(logits))

    def _replay(self, logits: Tensor, batch: ClassIncrementalBatch) -> Tensor:
        """DER++ on the supports whose logits were stored."""
        stored, known = self.exemplars.lookup(all_gather_rows(batch["support_index"]))
        views = len(batch["supports"])
        return losses.replay_loss(logits, stored.repeat(views, 1), known.repeat(views))

    # -- optimisation

    def _learning_rate(self, step: int, steps: int) -> float:
        """Return the rate at `step` of a task of `steps`: linear from `start_lr` to `lr`, then cosine to `final_lr`."""
        hp = self.hparams
        warmup = min(hp["warmup_steps"], steps)
        if step < warmup:
            return linear_ramp(step, warmup, hp["start_lr"], hp["lr"])
        return cosine_ramp(step - warmup, max(steps - warmup, 1), hp["lr"], hp["final_lr"])

    def _set_learning_rate(self, step: int, steps: int) -> float:
        """Set the rate of all groups for this step, that of the head in proportion; return it."""
        rate = self._learning_rate(step, steps)
        if self._trainer is None:
            return rate
        peak = self.hparams["lr"]
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (self._head_rate / peak if group["name"] == "classifier" else 1.0)
        return rate

    @property
    def _head_rate(self) -> float:
        rate = self.hparams["lr_classifier"]
        return float(self.hparams["lr"] if rate is None else rate)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """LARS or SGD over the official groups; the rates are set in each step from the position in the task."""
        hp = self.hparams
        groups: list[dict[str, Any]] = [
            {"name": name, "params": parameters, "weight_decay": hp["weight_decay"] if name == "weights" else 0.0}
            for name, parameters in parameter_groups(self.net).items()
            if parameters
        ]
        for group in groups:
            group["lr"] = self._head_rate if group["name"] == "classifier" else hp["lr"]
        if hp["optimizer"] == "sgd":
            return torch.optim.SGD(groups, lr=hp["lr"], momentum=hp["momentum"])
        from timm.optim import Lars

        for group in groups:
            group["always_adapt"] = group["name"] == "classifier"  # weights adapt because they decay
        if hp["weight_decay"] == 0:
            groups[0]["always_adapt"] = True
        return Lars(groups, lr=hp["lr"], momentum=hp["momentum"], trust_coeff=0.001)

    # -- evaluation

    def _count(self, batch: ImageBatch, confusion: MulticlassConfusionMatrix) -> None:
        """Count answers for images of seen classes; the others are not looked at. The task is not told."""
        seen = batch["target"] < self.seen
        logits = self.net.classifier(self.net.backbone(batch["image"][seen]))
        confusion.update(logits[:, : self.seen].argmax(dim=1), batch["target"][seen])

    def _task_counts(self, confusion: MulticlassConfusionMatrix) -> tuple[Tensor, Tensor]:
        """Return right answers and images of each task `[T]`, over all ranks, and forget the counts."""
        matrix = confusion.compute().long()
        confusion.reset()
        return (
            matrix.diagonal().reshape(-1, self.classes_per_task).sum(dim=1),
            matrix.sum(dim=1).reshape(-1, self.classes_per_task).sum(dim=1),
        )

    def _record(self, correct: Tensor, total: Tensor) -> None:
        """Fill the row of the present task in the accuracy matrix."""
        known = slice(0, self.task + 1)
        if self.task >= 0 and bool((total[known] > 0).all()):
            self.correct[self.task, known], self.total[known] = correct[known], total[known]

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loader 0 has the test images, for the matrix; loader 1, if any, a split of the training images."""
        self._count(batch, self.val_confusion if dataloader_idx else self.test_confusion)

    def on_validation_epoch_end(self) -> None:
        """Log accuracies on the validation split; keep those on the test images for the end of the stream."""
        if self.trainer.sanity_checking:
            self.test_confusion.reset()
            self.val_confusion.reset()
            return
        self._record(*self._task_counts(self.test_confusion))
        if not self.val_confusion.update_called:
            return
        correct, total = self._task_counts(self.val_confusion)
        now = max(self.task, 0)
        metrics = {"val/acc": correct.sum() / total.sum(), "val/acc_new": correct[now] / total[now]}
        if now:
            metrics["val/acc_old"] = correct[:now].sum() / total[:now].sum()
        self.log_dict({key: value.float() for key, value in metrics.items()}, sync_dist=True)

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Count answers on the test images."""
        self._count(batch, self.test_confusion)

    def on_test_epoch_end(self) -> None:
        """Log the accuracy on the classes seen and, from the rows measured during the stream, its metrics."""
        correct, total = self._task_counts(self.test_confusion)
        self._record(correct, total)
        metrics = {"acc": (correct.sum() / total.sum()).item()} | stream_metrics(self.correct.cpu(), self.total.cpu())
        self.log_dict({f"test/{key}": value for key, value in metrics.items()}, sync_dist=True)
        self._log_tables()

    def _log_tables(self) -> None:
        """Give loggers that take tables (W&B) the accuracy matrix, and seconds and memory of each task."""
        matrix = accuracy_matrix(self.correct, self.total).tolist()
        tasks = range(self.hparams["num_tasks"])
        rows: list[list[Any]] = [
            [t + 1, *(None if math.isnan(r) else r for r in matrix[t]), self.costs.seconds[t], self.costs.peak_bytes[t]]
            for t in tasks
        ]
        columns = ["after task", *(f"task {j + 1}" for j in tasks), "seconds", "peak bytes"]
        for logger in self.loggers:
            if hasattr(logger, "log_table"):
                logger.log_table("test/accuracy_matrix", columns=columns, data=rows)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the predicted class of each image `[n]`, among the classes seen so far."""
        return self.net.classifier(self.net.backbone(batch["image"]))[:, : self.seen].argmax(dim=1)

    def figures(self) -> dict[str, Figure]:
        """Return the accuracy matrix as a heat-map, once a row of it is measured."""
        matrix = accuracy_matrix(self.correct, self.total).cpu()
        return {"accuracy_matrix": matrix_figure(matrix)} if matrix.isfinite().any() else {}

    # -- cost of a task, and what a checkpoint needs beside the weights

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self.costs.start()

    def on_train_epoch_end(self) -> None:
        """Add the epoch to the cost of its task."""
        self.costs.stop(self.task, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the position in the stream, stored logits and costs."""
        checkpoint["nncsl"] = {
            "task": self.task,
            "exemplars": self.exemplars.state_dict(),
            "costs": self.costs.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        state = checkpoint["nncsl"]
        self.task = state["task"]
        self.exemplars.load_state_dict(state["exemplars"])
        self.costs.load_state_dict(state["costs"])
