"""The paper's four figures for any rows, the planner's check, and the loss curve with its law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from zoo.methods.slm_bottlenecks.losses import LossLaw
from zoo.methods.slm_bottlenecks.reduce import reduce_best

Rows = Sequence[Mapping[str, Any]]

#: Figure of the paper -> x axis, legend, title.
FIGURES = {
    1: ("global_batch", "attention", "attention"),
    2: ("n_gpu", "gpu", "hardware"),
    3: ("nodes", "comm", "communication"),
    4: ("global_batch", "comm", "batch"),
}
#: Column -> what an axis says.
AXES = {"n_gpu": "GPUs", "nodes": "nodes of 8 GPUs", "global_batch": "global batch (sequences)"}


def best_figure(rows: Rows, x: str, legend: str, value: str = "tokens_per_dollar", ylabel: str = "") -> Figure:
    """A panel for each size: the best `value` over all that is not shown against `x`, a line for each `legend`.

    Points at 0 are cells that ran out of memory; error bars are the standard deviation of the repeats.
    """
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(3.2 * len(sizes) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    for axis, size in zip(axes, sizes, strict=True):
        best = reduce_best([row for row in rows if row["size"] == size], (legend, x), value)
        ticks = sorted({key[1] for key in best})
        for name in dict.fromkeys(row[legend] for row in rows):
            points = sorted((key[1], row) for key, row in best.items() if key[0] == name)
            xs, ys = [p[0] for p in points], [p[1][value] for p in points]
            errors = [p[1].get(f"{value}_std") or 0.0 for p in points]
            line = axis.errorbar(xs, ys, yerr=errors if any(errors) else None, marker="o", markersize=4, capsize=2,
                                 label=name)  # fmt: skip
            for tick in (tick for tick, y in zip(xs, ys, strict=True) if y == 0):
                text = axis.annotate("out of memory", (tick, 0), (-8, 6), textcoords="offset points", fontsize=8,
                                     ha="right", color=line[0].get_color())  # fmt: skip
                text.set_in_layout(False)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.set(title=size, xlabel=AXES.get(x, x))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel or value.replace("_", " "))
    axes[-1].legend(fontsize=8)
    return figure


def paper_figures(rows: Rows) -> dict[str, Figure]:
    """The figures that rows have something for, by name; measured rows get `global_batch`, of one node."""
    out = {}
    for number, (x, legend, name) in FIGURES.items():
        own = [row for row in rows if row.get("figure", number) == number and row["status"] in ("ok", "oom")]
        own = [{**row, "global_batch": row["batch"] * row["n_gpu"]} if "batch" in row else dict(row) for row in own]
        own = [row for row in own if row.get(x) is not None and row.get(legend) is not None]
        if len({row[x] for row in own}) > 1 or len({row[legend] for row in own}) > 1:
            out[name] = best_figure(own, x, legend)
    return out


def planner_figure(pairs: Sequence[tuple[Mapping[str, Any], float]]) -> Figure:
    """Predicted against measured throughput of cells that were left out, with a band of 20 %."""
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axis = figure.subplots()
    for size in dict.fromkeys(row["size"] for row, _ in pairs):
        own = [(row["tok_s_best"], predicted) for row, predicted in pairs if row["size"] == size]
        axis.plot(*zip(*own, strict=True), "o", label=size)
    low, high = (f(row["tok_s_best"] for row, _ in pairs) for f in (min, max))
    ends = [low / 1.3, high * 1.3]
    axis.plot(ends, ends, color="grey", linewidth=1)
    axis.fill_between(ends, [0.8 * e for e in ends], [1.2 * e for e in ends], color="grey", alpha=0.15)
    axis.set(xscale="log", yscale="log", xlabel="measured tokens/s", ylabel="predicted without this cell (tokens/s)")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        side.set_major_formatter(EngFormatter(sep=""))
        side.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=8)
    return figure


def loss_figure(curve: Sequence[tuple[float, float]], law: LossLaw | None) -> Figure:
    """Validation loss against tokens, and the law that was fitted to it."""
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axis = figure.subplots()
    tokens, losses = zip(*curve, strict=True)
    axis.plot(tokens, losses, "o", label="validation")
    if law is not None:
        first, last = min(tokens), max(tokens)
        text = f"{law.floor:.2f} + ({law.scale:.2g} / n)^{law.exponent:.2f}"
        for start, ratio, style, label in ((first, last / first, "-", text), (last, 10.0, "--", "extrapolated")):
            grid = [start * ratio ** (i / 60) for i in range(61)]
            axis.plot(grid, [law.loss(n) for n in grid], color="grey", linestyle=style, label=label)
    axis.set(xscale="log", xlabel="tokens", ylabel="loss (nats)")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure
