"""Quality against the cost of the first token."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from zoo.methods.kv_prediction.evaluation import PRUNING

_LABELS = {"": "KV prediction", "base": "base", "auxiliary": "auxiliary alone", "no_prompt": "no prompt"}


def pareto_figure(points: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw quality against operations (left) and measured time (right), both as fractions of the base's.

    Args:
        points: Metrics of each way to the first token: `cost`, `ttft_ms`, and `acc` for short answers or `nll_1`.
    """
    metric = "nll_16" if "nll_16" in points[""] else "acc"
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, by_time in zip(axes, (False, True), strict=True):

        def place(name: str, by_time: bool = by_time) -> tuple[float, float]:
            own = points[name]
            x = own["ttft_ms"] / points["base"]["ttft_ms"] if by_time else own["cost"]
            return x, own["nll_1" if metric == "nll_16" else metric]

        for name, label in _LABELS.items():
            marker, size = ("*", 180) if name == "" else ("o", 45)
            axis.scatter(*place(name), s=size, marker=marker, label=label, zorder=3)
        for method in PRUNING:
            own = sorted(place(name) for name in points if name == method or name.startswith(f"{method}_"))
            axis.plot(*zip(*own, strict=True), marker=".", label=method)
        axis.set_xlabel("time to first token / base's" if by_time else "operations to first token / base's")
        axis.grid(alpha=0.3)
    if metric == "nll_16":
        axes[0].invert_yaxis()
    axes[0].set_ylabel("NLL of the first token (nats)" if metric == "nll_16" else "exact match")
    axes[1].legend(fontsize="small")
    return figure
