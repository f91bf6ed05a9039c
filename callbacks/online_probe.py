"""What the features of a method are good for, measured while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from zoo.nn.distributed import all_gather_rows


def knn_scores(features: Tensor, bank: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float) -> Tensor:
    """Votes of the k nearest neighbours (cosine), weighted by `exp(similarity / temperature)`.

    Args:
        features: `[n, d]`, l2-normalised. bank: `[m, d]`, likewise. labels: `[m]`, int64.

    Returns:
        `[n, num_classes]`, not normalised.

    Source: Wu et al., arXiv 1805.01978, Sec. 3.4.
    """
    similarity, index = (features @ bank.T).topk(min(k, len(bank)), dim=1)
    votes = torch.zeros(len(features), num_classes, device=features.device)
    return votes.scatter_add_(1, labels[index], (similarity / temperature).exp().float())


class OnlineProbe(Callback):
    """A linear and a k-nearest-neighbour classifier on `pl_module.features(images)`, beside the training.

    Every `every_n_steps` batches the features of the labelled training rows (label >= 0) of all ranks are computed
    anew, in evaluation mode and without gradients, to train the linear head by one step and to fill the neighbours'
    bank. After a validation `val/probe_linear_acc` and `val/probe_knn_acc` are logged.

    The head, its optimiser and the bank are part of the checkpoint. The training itself is the same with and without
    the probe, bit for bit: gradients, buffers and global random numbers are left as they are.

    Args:
        num_classes: Number of classes.
        image_key: Key of the images in training and validation batches.
        label_key: Key of the labels `[n]`, negative for unlabelled rows.
        kinds: `linear`, `knn` or both.
        every_n_steps: Batches between two updates; 1 costs one more forward pass a batch.
        lr: Learning rate of the head (Adam).
        bank_size: Rows that the bank holds, the newest.
        k: Neighbours.
        temperature: Of the neighbours' votes.
        seed: Of the head's initialisation.

    Raises:
        ValueError: For values outside these descriptions, or a module without `features`.
    """

    def __init__(
        self, num_classes: int, image_key: str = "image", label_key: str = "label", kinds: list[str] | None = None,
        every_n_steps: int = 1, lr: float = 1e-3, bank_size: int = 4096, k: int = 20, temperature: float = 0.07,
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kinds = ["linear", "knn"] if kinds is None else kinds
        if not self.kinds or set(self.kinds) - {"linear", "knn"}:
            raise ValueError(f"online_probe: kinds accepts linear and knn, got {self.kinds}")
        least = {"num_classes": (num_classes, 2), "every_n_steps": (every_n_steps, 1), "bank_size": (bank_size, 1),
                 "k": (k, 1)}  # fmt: skip
        for name, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"online_probe: {name} must be at least {bound}, got {value}")
        self.num_classes, self.image_key, self.label_key = num_classes, image_key, label_key
        self.every_n_steps, self.lr, self.bank_size = every_n_steps, lr, bank_size
        self.k, self.temperature, self.seed = k, temperature, seed
        self._head: nn.Linear | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._bank: Tensor | None = None
        self._labels = torch.empty(0, dtype=torch.int64)
        self._loaded: dict[str, Any] | None = None
        self._accuracy = {kind: MulticlassAccuracy(num_classes, average="micro") for kind in self.kinds}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not callable(getattr(pl_module, "features", None)):
            raise ValueError(f"online_probe: {type(pl_module).__name__} has no method features(images)")

    def state_dict(self) -> dict[str, Any]:
        if self._head is None or self._optimizer is None:
            return self._loaded or {}
        state: dict[str, Any] = {"head": self._head.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {**state, "bank": self._bank, "labels": self._labels}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self._head = state_dict or None, None

    @contextmanager
    def _aside(self, module: LightningModule) -> Iterator[None]:
        """Evaluation mode, no gradients, random numbers of its own; everything as before afterwards."""
        modes = [(part, part.training) for part in module.modules()]
        devices = [module.device] if module.device.type == "cuda" else []
        module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                torch.manual_seed(self.seed)
                yield
        finally:
            for part, training in modes:
                part.training = training

    def _features(self, module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """Features `[n, d]` and labels `[n]` of the labelled rows."""
        images, labels = batch[self.image_key], batch[self.label_key]
        with self._aside(module):
            known = labels >= 0
            features = module.features(images[known]) if bool(known.any()) else None  # type: ignore[operator]
            if features is None:
                features = module.features(images[:1])[:0]  # type: ignore[operator]
        return features.detach().float().flatten(1), labels[known]

    def _build(self, features: Tensor) -> tuple[nn.Linear, torch.optim.Optimizer]:
        if self._head is None or self._optimizer is None:
            devices = [features.device] if features.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed)
                self._head = nn.Linear(features.shape[1], self.num_classes).to(features.device)
            self._optimizer = torch.optim.Adam(self._head.parameters(), lr=self.lr)
            self._bank = features.new_zeros(0, features.shape[1])
            self._labels = self._labels.new_zeros(0).to(features.device)
            if self._loaded is not None:
                self._head.load_state_dict(self._loaded["head"])
                self._optimizer.load_state_dict(self._loaded["optimizer"])
                self._bank = self._loaded["bank"].to(features.device)
                self._labels = self._loaded["labels"].to(features.device)
        return self._head, self._optimizer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps:
            return
        features, labels = (all_gather_rows(part) for part in self._features(pl_module, batch))
        if len(labels) == 0:
            return
        head, optimizer = self._build(features)
        if "linear" in self.kinds:
            with torch.enable_grad():
                loss = F.cross_entropy(head(features), labels)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        if "knn" in self.kinds and self._bank is not None:
            self._bank = torch.cat([F.normalize(features, dim=1), self._bank])[: self.bank_size]
            self._labels = torch.cat([labels, self._labels])[: self.bank_size]

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if trainer.sanity_checking or (self._head is None and self._loaded is None):
            return
        features, labels = self._features(pl_module, batch)
        head, _ = self._build(features)
        if len(labels) == 0:
            return
        for kind, metric in self._accuracy.items():
            metric.to(features.device)
            if kind == "linear":
                metric.update(head(features).detach(), labels)
            elif self._bank is not None and len(self._bank):
                unit = F.normalize(features, dim=1)
                scores = knn_scores(unit, self._bank, self._labels, self.num_classes, self.k, self.temperature)
                metric.update(scores, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self._head is None:
            return
        for kind, metric in self._accuracy.items():
            pl_module.log(f"val/probe_{kind}_acc", metric.compute())
            metric.reset()
