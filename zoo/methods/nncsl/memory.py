"""What a run keeps beside its weights: logits of exemplars for DER++, and what each task cost."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import Tensor


class ExemplarLogits:
    """Logits of the exemplars in the replay buffer, as the network gave them at the end of their task.

    Args:
        num_classes: Logits of an exemplar.
    """

    def __init__(self, num_classes: int) -> None:
        self.index = torch.empty(0, dtype=torch.long)
        self.logits = torch.empty(0, num_classes)

    def store(self, index: Tensor, logits: Tensor) -> None:
        """Keep exactly the exemplars `index`: known ones with the logits they had, new ones with `logits`.

        Args:
            index: Training indices of the exemplars, int64 `[n]`.
            logits: Their present logits `[n, C]`.
        """
        stored, known = self.lookup(index)
        self.index, order = index.sort()
        self.logits = torch.where(known[:, None], stored, logits)[order]

    def lookup(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored logits `[n, C]` (0 where there are none) and whether there are any `[n]`."""
        self.index, self.logits = self.index.to(index.device), self.logits.to(index.device)
        if len(self.index) == 0:
            return self.logits.new_zeros(len(index), self.logits.shape[1]), torch.zeros_like(index, dtype=torch.bool)
        place = torch.searchsorted(self.index, index).clamp_max(len(self.index) - 1)
        known = self.index[place] == index
        return self.logits[place] * known[:, None], known

    def state_dict(self) -> dict[str, Tensor]:
        """Indices and logits."""
        return {"index": self.index, "logits": self.logits}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over indices and logits."""
        self.index, self.logits = state["index"], state["logits"]


class TaskCosts:
    """Seconds and peak memory of each task, its evaluation included.

    Args:
        num_tasks: Tasks of the stream.
    """

    def __init__(self, num_tasks: int) -> None:
        self.seconds = [0.0] * num_tasks
        self.peak_bytes = [0] * num_tasks
        self._started = time.perf_counter()

    def start(self) -> None:
        """Start the clock of an epoch."""
        self._started = time.perf_counter()

    def stop(self, task: int, device: torch.device) -> None:
        """Add the epoch to its task. Memory is that of tensors on a GPU, of the whole process on a CPU."""
        self.seconds[task] += time.perf_counter() - self._started
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10  # given in KiB
        self.peak_bytes[task] = max(self.peak_bytes[task], peak)

    def state_dict(self) -> dict[str, Any]:
        """Seconds and bytes of each task."""
        return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self.seconds, self.peak_bytes = list(state["seconds"]), list(state["peak_bytes"])
