"""Figures of a run: sketches beside the truth, accuracy against difficulty and against samples seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor


def strip_figure(drawn: Tensor, true: Tensor) -> Figure:
    """Rows of frames: the network's roll-out above, the true solution below; `[S, C, 3, H, W]` each."""
    problems, columns = drawn.shape[:2]
    figure = Figure(figsize=(columns * 0.9 + 0.6, problems * 1.9), layout="constrained")
    axes = figure.subplots(2 * problems, columns, squeeze=False)
    for problem in range(problems):
        for row, (title, frames) in enumerate((("drawn", drawn), ("true", true))):
            for column in range(columns):
                axis = axes[2 * problem + row][column]
                axis.imshow(frames[problem, column].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
            axes[2 * problem + row][0].set_ylabel(title, fontsize=8)
    axes[0][0].set_title("question", fontsize=8)
    axes[0][-1].set_title("end", fontsize=8)
    return figure


def difficulty_figure(accuracies: Mapping[int, tuple[float, int]]) -> Figure:
    """Accuracy at each difficulty with two standard errors."""
    levels = list(accuracies)
    values = [accuracies[level][0] for level in levels]
    errors = [
        2 * (value * (1 - value) / accuracies[level][1]) ** 0.5 for level, value in zip(levels, values, strict=True)
    ]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(levels, values, yerr=errors, marker="o", capsize=2)
    axis.axhline(0.5, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="difficulty", ylabel="accuracy", ylim=(0, 1.05))
    axis.legend()
    return figure


def curve_figure(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Accuracy of each loader against samples seen."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name in (key for key in curve[-1] if key != "samples"):
        points = [(point["samples"], point[name]) for point in curve if name in point]
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.axhline(0.5, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="samples seen", ylabel="accuracy", ylim=(0, 1.05))
    axis.legend()
    return figure
