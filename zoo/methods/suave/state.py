"""What training remembers besides parameters: the queue of embeddings and the record of pseudo-label accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.nn.distributed import all_gather_rows, all_reduce_sum, rank, world_size


class EmbeddingQueue(nn.Module):
    """The last embeddings of each global view, so that a small batch can be assigned to many prototypes.

    It holds unit embeddings and not logits: they are scored with the prototypes of the moment. The queue is that of
    the global batch and the same on all ranks; each rank scores its share of the rows.

    Args:
        length: Embeddings kept for each view, over all ranks.
        dim: Dimension of the embeddings.
        views: Number of global views.
    """

    z: Tensor

    def __init__(self, length: int, dim: int, views: int = 2) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("z", torch.zeros(views, length, dim))
        self._full = False

    def full(self) -> bool:
        """Whether the last slot is in use; before that the queue takes no part."""
        if not self._full and self.length:
            self._full = bool((self.z[:, -1] != 0).any())
        return self._full

    def rows(self, view: int) -> Tensor:
        """This rank's share of the embeddings of one view, `[about length / ranks, dim]`; none while filling."""
        return self.z[view, rank() :: world_size()] if self.full() else self.z[view, :0]

    @torch.no_grad()
    def push(self, views: Sequence[Tensor]) -> None:
        """Put the newest embeddings of all ranks, each `[B, dim]`, in front and drop the oldest."""
        if self.length:
            for slot, z in zip(self.z, views, strict=True):
                slot.copy_(torch.cat([all_gather_rows(z.detach().float()), slot])[: self.length])


class QuarterlyAccuracy(nn.Module):
    """Accuracy of pseudo-labels in each quarter of training, over all ranks; part of the checkpoint."""

    hits: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hits", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(4))

    @torch.no_grad()
    def update(self, labels: Tensor, targets: Tensor, progress: float) -> Tensor:
        """Count pseudo-labels `[n]` against the hidden classes `[n]` and return their accuracy, a scalar.

        Args:
            labels: Pseudo-labels.
            targets: Classes that the method does not see.
            progress: Share of training done, in `[0, 1]`.
        """
        counts = torch.stack([(labels == targets).sum(), torch.tensor(len(targets), device=labels.device)]).float()
        hits, seen = all_reduce_sum(counts)
        quarter = min(int(4 * progress), 3)
        self.hits[quarter] += hits
        self.seen[quarter] += seen
        return hits / seen

    def compute(self) -> Tensor:
        """Accuracy of each quarter, `[4]`; NaN for one without pseudo-labels."""
        return self.hits / self.seen
