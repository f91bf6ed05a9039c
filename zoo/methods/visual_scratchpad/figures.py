"""Figures of a run: sketches beside the truth, accuracy against difficulty and against samples seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
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


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share seen in `n` trials, 95 % by default; of some width at 0 and 1 too (Wilson, 1927)."""
    centre, width = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    return (centre - width) / (1 + z * z / n), (centre + width) / (1 + z * z / n)


def difficulty_figure(accuracies: Mapping[int, tuple[float, int]]) -> Figure:
    """Accuracy at each difficulty with its 95 % interval."""
    levels = list(accuracies)
    values = [share for share, _ in accuracies.values()]
    ends = [wilson_interval(share, n) for share, n in accuracies.values()]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(levels, values, yerr=[below, above], marker="o", capsize=2, label="roll-outs, 95 % interval")
    axis.axhline(0.5, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="difficulty", ylabel="accuracy", ylim=(0, 1.05))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
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
