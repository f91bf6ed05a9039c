"""Quality against the cost of the first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from zoo.methods.kv_prediction.evaluation import PRUNING

#: Ways that are one point each, by folder of metrics; the method is a star.
LABELS = {
    "": "KV prediction",
    "layers": "KV prediction, layers of the base",
    "base": "base",
    "auxiliary": "auxiliary alone",
    "layers_alone": "layers of the base alone",
    "no_prompt": "no prompt",
}
_STARS = ("", "layers")


def quality_of(points: Mapping[str, Mapping[str, float]]) -> tuple[str, bool]:
    """Return the metric that quality is measured by, and whether more of it is better."""
    return ("nll_1", False) if "nll_16" in points[""] else ("acc", True)


def pareto_figure(points: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw quality against operations (left) and measured time (right), both as fractions of the base's.

    Args:
        points: Metrics of each way to the first token: `cost`, `ttft_ms`, and `acc` for short answers or `nll_1`.
    """
    metric, more = quality_of(points)
    colours = {name: f"C{number}" for number, name in enumerate((*LABELS, *PRUNING))}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, by_time in zip(axes, (False, True), strict=True):

        def place(name: str, by_time: bool = by_time) -> tuple[float, float]:
            own = points[name]
            return own["ttft_ms"] / points["base"]["ttft_ms"] if by_time else own["cost"], own[metric]

        for name in filter(points.__contains__, LABELS):
            star = name in _STARS
            x, y = place(name)
            look: dict[str, Any] = (
                {"s": 180, "marker": "*", "zorder": 4} if star else {"s": 45, "marker": "o", "zorder": 3}
            )
            axis.scatter(x, y, color=colours[name], label=LABELS[name], **look)
        for method in PRUNING:
            own = sorted(place(name) for name in points if name == method or name.startswith(f"{method}_"))
            if own:
                label = method.replace("_", " ")
                axis.plot(*zip(*own, strict=True), marker=".", linewidth=1, color=colours[method], label=label)
        axis.set_xlabel("time to first token / base's" if by_time else "operations to first token / base's")
        axis.set_xlim(left=-0.03)
        axis.grid(alpha=0.3)
    if not more:
        axes[0].invert_yaxis()
    axes[0].set_ylabel("exact match" if more else "NLL of the first token (nats), better upwards")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure
