"""Figures of an analysis; the exact potential is drawn wherever it is known."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]
#: Curves in a figure.
_SHOWN = 6


def all_figures(rows: Mapping[str, Rows], without: Collection[str] = ()) -> dict[str, Figure]:
    """Figures that there are rows for, by name; those that are not wanted are not drawn."""
    makers = {
        "curves": ("curves", curves_figure),
        "mean_curve": ("curves", mean_figure),
        "events": ("curves", events_figure),
        "pass_at_k": ("pass_at_k", pass_figure),
        "transfer": ("transfer", transfer_figure),
        "optimised": ("optimise", optimise_figure),
    }
    return {
        name: draw(rows[study]) for name, (study, draw) in makers.items() if rows.get(study) and name not in without
    }


def png_images(rows: Mapping[str, Rows], dpi: int = 100) -> dict[str, bytes]:
    """The figures of the report, which shows the curves itself, as PNG images."""
    out = {}
    for name, figure in all_figures(rows, without=("curves",)).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        pyplot.close(figure)
        out[name] = buffer.getvalue()
    return out


def curves_figure(rows: Rows) -> Figure:
    """Some curves with their 95 % intervals, exact potentials and events; those with most events first."""
    shown = sorted(rows, key=lambda r: -(len(r["insights"]) + 2 * len(r["tangents"]) + 3 * r["late_guess"]))[:_SHOWN]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(8, 2.1 * len(shown)), squeeze=False, layout="constrained")
    for axis, row in zip(axes[:, 0], shown, strict=True):
        x = row["boundaries"]
        axis.fill_between(x, row["low"], row["high"], alpha=0.25, color="C0", linewidth=0)
        axis.plot(x, row["pot"], "o-", color="C0", markersize=3, label="estimate")
        if row["exact"]:
            axis.plot(x, row["exact"], "k--", linewidth=1, label="exact")
        for name, colour in (("insights", "C2"), ("tangents", "C3")):
            for k in row[name]:
                axis.axvspan(x[k], x[k + 1], color=colour, alpha=0.15, linewidth=0)
        for k, chunk in enumerate(row["chunks"]):
            text = chunk.removesuffix(" SEP")
            axis.text((x[k] + x[k + 1]) / 2, 1.04, text[:18], ha="center", va="bottom", fontsize=6, rotation=15)
        axis.set(ylim=(-0.03, 1.03), ylabel="potential")
    axes[0, 0].legend(fontsize=7, loc="lower right")
    axes[-1, 0].set_xlabel("tokens of the trace")
    return figure


def events_figure(rows: Rows) -> Figure:
    """All traces, chunk by chunk: gain as colour, insights and tangents as marks; what the events fell on, if known."""
    shown = sorted(rows, key=lambda r: (len(r["pot"]), r["late_guess"], r["insights"], r["tangents"]))
    most = max(len(row["pot"]) - 1 for row in shown)
    gains = [[b - a for a, b in pairwise(r["pot"])] + [math.nan] * (most + 1 - len(r["pot"])) for r in shown]
    kinds = sorted({kind for row in shown for kind in row["kinds"]} - {""})
    figure, axes = pyplot.subplots(
        1, 2 if kinds else 1, figsize=(9 if kinds else 6, 0.6 + max(2.4, min(7, 0.09 * len(shown)))),
        squeeze=False, layout="constrained", width_ratios=(3, 2) if kinds else None,
    )  # fmt: skip
    axis = axes[0, 0]
    image = axis.imshow(gains, aspect="auto", cmap="RdYlGn", vmin=-1, vmax=1, interpolation="nearest")
    marks = (("insights", "^", "insight"), ("tangents", "v", "tangent"))
    for name, mark, label in marks:
        spots = [(k, y) for y, row in enumerate(shown) for k in row[name]]
        axis.plot([k for k, _ in spots], [y for _, y in spots], mark, color="k", markersize=3, label=label)
    axis.set(xlabel="chunk", ylabel="trace", yticks=[])
    axis.legend(fontsize=7, loc="upper right")
    figure.colorbar(image, ax=axis, label="change of the potential")
    if kinds:
        bars = axes[0, 1]
        for shift, (name, _, label) in zip((-0.2, 0.2), marks, strict=True):
            hit = [row["kinds"][k] for row in shown for k in row[name]]
            bars.barh([i + shift for i in range(len(kinds))], [hit.count(kind) for kind in kinds], 0.4, label=label)
        bars.set_yticks(list(range(len(kinds))), kinds)
        bars.set_xlabel("events on chunks of a kind")
        bars.legend(fontsize=7)
    return figure


def mean_figure(rows: Rows) -> Figure:
    """Mean potential of correct traces by position; it rises by selection alone, also for noise."""
    figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    grid = [i / 20 for i in range(21)]
    for name, style in (("pot", "C0-"), ("exact", "k--")):
        known = [r for r in rows if r[name] and not any(math.isnan(v) for v in r[name])]
        if known:
            means = [sum(_at(r["boundaries"], r[name], share) for r in known) / len(known) for share in grid]
            axis.plot(grid, means, style, label={"pot": "estimate", "exact": "exact"}[name])
    axis.set(xlabel="share of the trace", ylabel="mean potential of correct traces", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    return figure


def _at(bounds: Sequence[int], values: Sequence[float], share: float) -> float:
    """Value at the last boundary that is not after a share of the trace."""
    return values[max(i for i, t in enumerate(bounds) if t <= share * bounds[-1] + 1e-9)]


def pass_figure(rows: Rows) -> Figure:
    """pass@k with and without late guesses."""
    from zoo.methods.cot_potential.metrics import KS, pass_metrics

    numbers = pass_metrics(rows)
    ks = [k for k in KS if f"pass_at_{k}" in numbers]
    figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    axis.plot(ks, [numbers[f"pass_at_{k}"] for k in ks], "o-", label="pass@k")
    axis.plot(ks, [numbers[f"corrected_pass_at_{k}"] for k in ks], "s--", label="without late guesses")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="k", ylabel="pass@k", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    return figure


def transfer_figure(rows: Rows) -> Figure:
    """Accuracy of the receiver by the share of a provider's trace."""
    from zoo.methods.cot_potential.metrics import mean

    shares = rows[0]["shares"]
    figure, axis = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    axis.plot(shares, [mean(r["pot"][i] for r in rows) for i in range(len(shares))], "o-", label="receiver")
    exact = [mean(r["exact"][i] for r in rows) for i in range(len(shares))]
    if not any(map(math.isnan, exact)):
        axis.plot(shares, exact, "k--", label="exact")
    foreign = mean(r["foreign"] for r in rows)
    if not math.isnan(foreign):
        axis.plot([0.2], [foreign], "x", color="C3", label="another problem's trace")
    axis.set(xlabel="share of the provider's trace", ylabel="accuracy", ylim=(0, 1.02))
    axis.legend(fontsize=8)
    return figure


def optimise_figure(rows: Rows) -> Figure:
    """Curves of optimised and of natural traces."""
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, arm in zip(axes, ("natural", "optimised"), strict=True):
        for row in rows:
            if row["arm"] == arm:
                axis.plot(row["boundaries"], row["pot"], "-", color="C0", alpha=0.4)
        axis.set(title=arm, xlabel="tokens", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("potential")
    return figure
