"""The figure of a results file: what each run reached, and by how much each claim holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.claims.judge import spread
from zoo.claims.results import metric_of

ROW_INCHES = 0.32
COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draw a row of panels for each metric that the claims compare or the reports show, and save them as PNG.

    On the left every run: seeds as dots, mean and standard deviation as a bar. On the right the claims on that metric:
    `left - right` of each seed as dots, the margin as a line, green where the claim holds.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    panels = _panels(result)
    if not panels:
        return False
    heights = [max(len(runs), len(claims), 2) for runs, claims in panels.values()]
    figure = Figure(figsize=(11, 0.9 * len(panels) + ROW_INCHES * sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw={"height_ratios": [h + 1.5 for h in heights]})
    for row, (metric, (runs, claims)) in zip(axes, panels.items(), strict=True):
        _draw_runs(row[0], metric, runs)
        _draw_claims(row[1], claims)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(aside, format="png", dpi=110, metadata={"Software": None})
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
    for report in result["reports"]:
        for value in report["values"]:
            add(value["run"], value["metric"], value["metric"])
    return shown


def _draw_runs(axes: Any, metric: str, runs: Mapping[str, list[float]]) -> None:
    for y, values in enumerate(runs.values()):
        mean, std = spread(values)
        axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
        axes.errorbar([mean], [y], xerr=None if std is None else [std], fmt="|", color="black", capsize=3)
    axes.set_yticks(range(len(runs)), list(runs), fontsize=8)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set_title(metric, fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def _draw_claims(axes: Any, claims: list[Mapping[str, Any]]) -> None:
    if not claims:
        axes.set_axis_off()
        return
    for y, claim in enumerate(claims):
        differences = [d for d in claim["per_seed"].values() if d is not None]
        axes.plot(differences, [y] * len(differences), "o", color=COLOURS[claim["holds"]], alpha=0.6, markersize=4)
        axes.plot([claim["margin"]] * 2, [y - 0.35, y + 0.35], "-", color="black", linewidth=1)
    axes.axvline(0, color="black", linewidth=0.5, alpha=0.4)
    axes.set_yticks(range(len(claims)), [claim["id"] for claim in claims], fontsize=8)
    axes.set_ylim(len(claims) - 0.5, -0.5)
    axes.set_title("left − right, margin as a line", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
