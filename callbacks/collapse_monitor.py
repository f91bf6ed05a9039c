"""Tells a clustering method that has collapsed from one that learns slowly."""

from __future__ import annotations

import math
import warnings
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.nn.distributed import all_reduce_mean


@runtime_checkable
class HasAssignments(Protocol):
    """What a method offers to be monitored; a method may offer `embeddings` too, in the same way."""

    def assignments(self) -> Tensor | None:
        """Probabilities `[n, K]` of the last training batch over K clusters, or None."""


def entropy(p: Tensor) -> Tensor:
    """Entropy of distributions along the last dimension, in nats; `[..., K] -> [...]`."""
    return torch.special.entr(p).sum(-1)


def feature_spread(z: Tensor) -> Tensor:
    """Standard deviation of l2-normalised features `[n, d]` per dimension, times sqrt(d): 0 collapsed, 1 spread."""
    z = torch.nn.functional.normalize(z, dim=-1)
    return z.std(0, correction=0).mean() * math.sqrt(z.shape[-1])


class CollapseMonitor(Callback):
    """Logs how a clustering method uses its clusters, and says in plain words when it does not.

    A module takes part by a method `assignments() -> Tensor [n, K] | None`, the probabilities of its last training
    batch, and/or `embeddings() -> Tensor [n, d] | None`, its last features (keep detached tensors in plain
    attributes). Logged:

    * `monitor/assignment_entropy`: entropy of the mean assignment over all ranks, divided by ln K. 1: all clusters
      are used alike; near 0: everything is in one cluster, the usual collapse.
    * `monitor/sample_entropy`: mean entropy of single assignments, divided by ln K. 1: no row is assigned to anything.
    * `monitor/feature_spread`: see `feature_spread`. Near 0: all features are the same.

    One warning each: when the first falls below `warn_below`, or when the loss has stayed at ln K (within 1 %) for
    `patience` looks, which is the loss of uniform predictions: nothing is being learned.

    Args:
        every_n_steps: Batches between two looks.
        warn_below: Share of ln K.
        patience: Looks in a row with the loss at ln K before the warning.

    Raises:
        ValueError: If `every_n_steps` or `patience` is below 1, or `warn_below` is not in [0, 1].
    """

    def __init__(self, every_n_steps: int = 50, warn_below: float = 0.3, patience: int = 10) -> None:
        super().__init__()
        for name, value in (("every_n_steps", every_n_steps), ("patience", patience)):
            if value < 1:
                raise ValueError(f"collapse_monitor: {name} must be at least 1, got {value}")
        if not 0 <= warn_below <= 1:
            raise ValueError(f"collapse_monitor: warn_below must be in [0, 1], got {warn_below}")
        self.every_n_steps, self.warn_below, self.patience = every_n_steps, warn_below, patience
        self._at_log_k = 0
        self._warned: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"at_log_k": self._at_log_k, "warned": sorted(self._warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._at_log_k, self._warned = state_dict["at_log_k"], set(state_dict["warned"])

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps:
            return
        values: dict[str, Tensor] = {}
        p = pl_module.assignments() if isinstance(pl_module, HasAssignments) else None
        if p is not None and p.shape[-1] > 1:
            p = p.detach().float()
            log_k = math.log(p.shape[-1])
            values["monitor/assignment_entropy"] = entropy(all_reduce_mean(p.mean(0))) / log_k
            values["monitor/sample_entropy"] = all_reduce_mean(entropy(p).mean()) / log_k
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            if isinstance(loss, Tensor) and pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # Lightning hands over the share in the sum of gradients
            self._judge(float(values["monitor/assignment_entropy"]), loss, p.shape[-1], trainer)
        offered = getattr(pl_module, "embeddings", None)
        z = offered() if callable(offered) else None
        if isinstance(z, Tensor):
            values["monitor/feature_spread"] = all_reduce_mean(feature_spread(z.detach().float()))
        if values:
            pl_module.log_dict(values, on_step=True, on_epoch=False)

    def _judge(self, share: float, loss: Any, clusters: int, trainer: Trainer) -> None:
        log_k = math.log(clusters)
        at_log_k = isinstance(loss, Tensor) and abs(float(loss) - log_k) < 0.01 * log_k
        self._at_log_k = self._at_log_k + 1 if at_log_k else 0
        if share < self.warn_below:
            self._warn(
                "clusters",
                f"at step {trainer.global_step} nearly all rows are in few of {clusters} clusters (entropy of the "
                f"mean assignment {share:.2f} ln K): the clustering has collapsed. Usual remedies: a larger batch or a "
                "queue, more Sinkhorn iterations or a larger epsilon, a lower learning rate",
            )
        if self._at_log_k >= self.patience:
            self._warn(
                "loss",
                f"at step {trainer.global_step} the loss has stayed at ln {clusters} = {log_k:.2f}, that of uniform "
                "predictions: nothing is being learned. Usual remedies: a lower temperature, a larger batch or a "
                "queue, prototypes that are not frozen",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=3)
