"""Ridge regression on features that arrive in batches: a linear probe in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.nn.distributed import all_gather_rows


class RidgeProbe(nn.Module):
    """Ridge regression of `C` outputs on standardised features, from sums over the batches seen.

    Every rank keeps the sums over all ranks.

    Args:
        width: Features `D`.
        outputs: Outputs `C`.
        penalty: Weight of the squared coefficients, times the number of rows.
        per_class: Most rows of each class that count, the first ones; 0 for all.
    """

    gram: Tensor
    cross: Tensor
    x_sum: Tensor
    y_sum: Tensor
    counts: Tensor

    def __init__(self, width: int, outputs: int, penalty: float, per_class: int = 0) -> None:
        super().__init__()
        self.penalty, self.per_class = penalty, per_class
        shapes = {"gram": (width, width), "cross": (width, outputs), "x_sum": (width,), "y_sum": (outputs,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(max(outputs, 1), dtype=torch.int64))

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows: features `[n, D]` and outputs `[n, C]`, one-hot where `per_class` is set."""
        x, y = all_gather_rows(x.double().contiguous()), all_gather_rows(y.double().contiguous())
        if self.per_class:
            before = self.counts + y.cumsum(dim=0) - y  # rows of each class before this one
            keep = ((before < self.per_class) & (y > 0)).any(dim=1).double()[:, None]
            x, y = x * keep, y * keep
            self.counts += y.sum(dim=0).long()
        else:
            self.counts[0] += len(x)
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.x_sum += x.sum(dim=0)
        self.y_sum += y.sum(dim=0)

    @torch.no_grad()
    def solve(self) -> tuple[Tensor, Tensor]:
        """Coefficients `[D, C]` and intercept `[C]`, for features as they are; float32."""
        n = self.counts.sum().clamp(min=1)
        mean, offset = self.x_sum / n, self.y_sum / n
        std = (self.gram.diagonal() / n - mean**2).clamp(min=1e-12).sqrt()
        covariance = (self.gram / n - mean[:, None] * mean) / (std[:, None] * std)
        right = (self.cross / n - mean[:, None] * offset) / std[:, None]
        eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        weight = torch.linalg.solve(covariance + self.penalty * eye, right) / std[:, None]
        return weight.float(), (offset - mean @ weight).float()
