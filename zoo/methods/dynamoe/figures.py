"""Pictures of where the width goes and what it buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

_STYLES: dict[str, dict[str, Any]] = {
    "router": {"color": "black", "marker": "o", "linewidth": 2},
    "oracle": {"color": "tab:green", "marker": "x", "linestyle": "--"},
    "layer_adaptive": {"color": "tab:orange", "marker": "s"},
    "token_table": {"color": "tab:purple", "marker": "d"},
    "static_width": {"color": "tab:gray", "marker": "^"},
    "shuffled": {"color": "tab:red", "marker": "."},
    "shuffled_in_class": {"color": "tab:pink", "marker": "."},
    "random_iid": {"color": "tab:brown", "marker": "*", "linestyle": "none"},
}


def curve_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], counts: Callable[[float], Mapping[str, float]]
) -> Figure:
    """Nats per token against active parameters (embeddings among them), with activity above.

    Args:
        curves: Activity and loss of each way of choosing widths.
        counts: Parameter counts at an activity.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    empty, full = (counts(a)["parameters_active"] / 1e6 for a in (0.0, 1.0))
    for name, points in curves.items():
        ordered = sorted(points)
        x = [empty + (full - empty) * a for a, _ in ordered]
        style: dict[str, Any] = {"markersize": 4, **_STYLES.get(name, {})}
        axes.plot(x, [y for _, y in ordered], label=name.replace("_", " "), **style)
    if "router" in curves:
        # controls may be far above: the region of the router's curve is what matters
        best, worst = min(y for _, y in curves["router"]), max(y for _, y in curves["router"])
        axes.set_ylim(best - 0.1 * (worst - best) - 1e-3, worst + 1.2 * (worst - best) + 1e-3)

    def to_activity(parameters: Any) -> Any:
        return (parameters - empty) / (full - empty)

    def to_parameters(active: Any) -> Any:
        return empty + (full - empty) * active

    axes.secondary_xaxis("top", functions=(to_activity, to_parameters)).set_xlabel("activity of the MLPs")
    axes.set(xlabel="active parameters (million)", ylabel="nats per token")
    axes.legend(fontsize=8)
    return figure


def usage_figure(usage: Tensor) -> Figure:
    """Share of the tokens with each expert, by layer; `usage` is `[L, E]`."""
    figure = Figure(figsize=(max(4.0, 0.4 * len(usage) + 2), 3.2), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(usage)
    experts = usage.shape[1]
    for e in range(experts):
        shares = usage[:, e].tolist()
        colour = str(0.9 - 0.8 * e / max(experts - 1, 1))
        axes.bar(range(len(usage)), shares, bottom=below, color=colour, label=f"expert {e}", edgecolor="white")
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axes.set(xlabel="layer", ylabel="share of tokens", xticks=range(len(usage)), ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tokens_figure(texts: Sequence[str], active: Tensor, columns: int = 100) -> Figure:
    """Tokens of a text on a background that is the darker the wider their MLPs are.

    Args:
        texts: Text of each token, `T`.
        active: Activity of each token, `[T]`.
        columns: Characters in a line.
    """
    from matplotlib import colormaps

    rows: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for text, value in zip(texts, active.tolist(), strict=True):
        shown = text.replace("\n", "⏎").replace("$", r"\$") or "·"
        if column + len(shown) > columns:
            rows.append([])
            column = 0
        rows[-1].append((column, shown, value))
        column += len(shown) + 1
    figure = Figure(figsize=(11, 0.3 * len(rows) + 0.6))
    axes = figure.subplots()
    axes.set(xlim=(0, columns), ylim=(len(rows), 0))
    axes.axis("off")
    colours = colormaps["YlOrRd"]
    for line, row in enumerate(rows):
        for start, shown, value in row:
            box = {"facecolor": colours(0.75 * value), "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
            axes.text(start, line + 0.5, shown, family="monospace", fontsize=8, va="center", bbox=box)
    axes.set_title("darker: wider experts", fontsize=9)
    return figure
