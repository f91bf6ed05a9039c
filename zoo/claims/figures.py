"""The figure of a results file: what each run reached, and by how much each claim holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.claims.judge import spread
from zoo.claims.results import metric_of

#: Rows of panels at most, unless the claims have more metrics.
PANELS = 8
ROW_INCHES = 0.26
WIDTH_INCHES = 10.0
DOTS_PER_INCH = 130
#: Values above zero that lie further apart than this are drawn on a logarithmic axis, if the largest is above 10: a
#: perplexity that ran away would flatten the others.
LOG_RATIO = 100.0
COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draw a row of panels for each metric that the claims compare, then of the reports, and save them as PNG.

    On the left every run: seeds as dots, the mean as a stroke, the standard deviation as a band, on a logarithmic axis
    where the values lie far apart (the band then ends at the least seed). On the right the claims on that metric:
    `left - right` of each seed as dots, what is judged as a stroke, the margin as a dashed line, green where the claim
    holds.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    panels = _panels(result)
    if not panels:
        return False
    heights = [max(len(runs), len(claims), 2) for runs, claims in panels.values()]
    size = (WIDTH_INCHES, 0.75 * len(panels) + ROW_INCHES * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": [h + 1.0 for h in heights]})
    for row, (metric, (runs, claims)) in zip(axes, panels.items(), strict=True):
        _draw_runs(row[0], metric, runs)
        _draw_claims(row[1], claims)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(aside, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    aside.replace(path)
    return True


def _panels(result: Mapping[str, Any]) -> dict[str, tuple[dict[str, list[float]], list[Mapping[str, Any]]]]:
    shown: dict[str, tuple[dict[str, list[float]], list[Mapping[str, Any]]]] = {}

    def add(run: str, metric: str, panel: str) -> None:
        values = [v[metric] for v in result["runs"].get(run, {}).values() if v.get(metric) is not None]
        label = run if panel == metric else f"{run} ({metric})"
        if values:
            shown.setdefault(panel, ({}, []))[0].setdefault(label, values)

    for claim in result["claims"]:
        panel = metric_of(claim)
        for side in (claim["left"], claim["right"]):
            if isinstance(side, Mapping):
                add(side["run"], side["metric"], panel)
        if panel in shown:
            shown[panel][1].append(claim)
    of_claims = len(shown)
    for report in result["reports"]:
        for value in report["values"]:
            add(value["run"], value["metric"], value["metric"])
    # the page has every number of the reports; a picture is for comparing runs
    compared = [name for name, (runs, claims) in shown.items() if claims or len(runs) > 1]
    return {name: shown[name] for name in compared[: max(of_claims, PANELS)]}


def _draw_runs(axes: Any, metric: str, runs: Mapping[str, list[float]]) -> None:
    log = far_apart([value for values in runs.values() for value in values])
    for y, values in enumerate(runs.values()):
        mean, std = spread(values)
        if mean is not None:
            low = mean - (std or 0)
            band = [max(low, min(values)) if log else low, mean + (std or 0)]
            axes.plot(band, [y, y], "-", color="tab:blue", alpha=0.3, linewidth=5)
            axes.plot([mean], [y], "|", color="black", markersize=10)
        axes.plot(values, [y] * len(values), "o", color="tab:blue", markersize=4, markeredgewidth=0)
    _style(axes, list(runs), f"{metric} (logarithmic)" if log else metric, log)


def far_apart(values: list[float]) -> bool:
    """Whether values need a logarithmic axis: all of them are above zero, and the largest is far above the least."""
    return bool(values) and min(values) > 0 and max(values) > max(10.0, LOG_RATIO * min(values))


def _draw_claims(axes: Any, claims: list[Mapping[str, Any]]) -> None:
    if not claims:
        axes.set_axis_off()
        return
    for y, claim in enumerate(claims):
        differences = [d for d in claim["per_seed"].values() if d is not None]
        colour = COLOURS[claim["holds"]]
        axes.plot(differences, [y] * len(differences), "o", color=colour, markersize=4, markeredgewidth=0)
        if claim["value"] is not None:
            axes.plot([claim["value"]], [y], "|", color="black", markersize=10)
        axes.plot([claim["margin"]] * 2, [y - 0.4, y + 0.4], "--", color=colour, linewidth=1.2)
    axes.axvline(0, color="black", linewidth=0.5, alpha=0.4)
    _style(axes, [claim["id"] for claim in claims], "left − right; dashed: the margin")


def _style(axes: Any, labels: list[str], title: str, log: bool = False) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8, length=0)
    if log:
        axes.set_xscale("log")
        axes.tick_params(axis="x", which="minor", bottom=False)
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
