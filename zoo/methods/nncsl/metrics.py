"""Numbers of a class-incremental run from its counts, and their picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def accuracy_matrix(correct: Tensor, total: Tensor) -> Tensor:
    """Return R `[T, T]`: accuracy on the images of task `j` after task `t`; NaN where it was not measured.

    Args:
        correct: Right answers `[T, T]`, int64, negative where not measured.
        total: Images of each task `[T]`, int64.
    """
    return torch.where(correct >= 0, correct / total.clamp_min(1), torch.nan)


def stream_metrics(correct: Tensor, total: Tensor) -> dict[str, float]:
    """Return what the counts up to the last measured task allow.

    `A_T` accuracy over all images of the classes seen so far, after the last task; `A_inc` the mean of these accuracies
    over the tasks; `forgetting` the mean over the earlier tasks `j` of `max_t<T R[t, j] - R[T, j]`; `T1` accuracy of
    the first task right after it. Absent: what needs a task that was not measured, and the forgetting of a single task.

    Args:
        correct: Right answers `[T, T]`, negative where not measured.
        total: Images of each task `[T]`.
    """
    measured = [t for t in range(len(total)) if (correct[t, : t + 1] >= 0).all()]
    if not measured:
        return {}
    last = measured[-1]
    after = {t: (correct[t, : t + 1].sum() / total[: t + 1].sum()).item() for t in measured}
    metrics = {"A_T": after[last]}
    if measured == list(range(last + 1)):
        r = accuracy_matrix(correct, total)[: last + 1, : last + 1]
        metrics |= {"A_inc": sum(after.values()) / len(after), "T1": r[0, 0].item()}
        if last:
            best = torch.stack([r[j:last, j].max() for j in range(last)])
            metrics["forgetting"] = (best - r[last, :last]).mean().item()
    return metrics


def matrix_figure(matrix: Tensor) -> Figure:
    """Return a heat-map of R `[T, T]` in percent."""
    from matplotlib.figure import Figure

    tasks = len(matrix)
    figure = Figure(figsize=(1.5 + 0.6 * tasks, 1.2 + 0.55 * tasks), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * matrix.numpy(), vmin=0, vmax=100, cmap="viridis")
    for t, j in torch.nonzero(matrix.isfinite()).tolist():
        value = matrix[t, j].item()
        axes.text(j, t, f"{100 * value:.0f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set(xlabel="task", ylabel="after task", xticks=range(tasks), yticks=range(tasks))
    axes.set_xticklabels([str(j + 1) for j in range(tasks)])
    axes.set_yticklabels([str(t + 1) for t in range(tasks)])
    figure.colorbar(image, ax=axes, label="accuracy (%)")
    return figure
