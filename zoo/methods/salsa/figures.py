"""Figures: reward over alpha and over the plane of three members, the course of a run, the frontier over beta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor


def alpha_figure(surface: Mapping[str, Tensor]) -> Figure:
    """Mean reward of `(1 - alpha) sft1 + alpha sft2` with standard errors; `{alpha: rewards [N]}`, and `centroid`."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    labels = [label for label in surface if label != "centroid"]
    means = [float(surface[label].mean()) for label in labels]
    errors = [float(surface[label].std() / max(len(surface[label]), 1) ** 0.5) for label in labels]
    axes.errorbar([float(label) for label in labels], means, errors, marker="o", capsize=3)
    if "centroid" in surface:
        axes.axhline(float(surface["centroid"].mean()), color="tab:green", linestyle=":", label="mean of all members")
        axes.legend(fontsize=8)
    axes.axvspan(0, 1, color="tab:blue", alpha=0.07)
    axes.set(xlabel="alpha (0: first member, 1: second)", ylabel="reward", title="Soups before any reinforcement")
    return figure


def plane_figure(plane: Mapping[str, Any]) -> Figure:
    """Mean reward over barycentric coordinates of three members: `points` and `reward`."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    corners = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.75**0.5))
    xs, ys = (
        [sum(w * corner[axis] for w, corner in zip(point, corners, strict=True)) for point in plane["points"]]
        for axis in (0, 1)
    )
    contour = axes.tricontourf(xs, ys, plane["reward"], levels=12)
    axes.plot(*zip(*corners, corners[0], strict=True), color="white")
    axes.plot(xs, ys, "k.", markersize=2)
    for number, (x, y) in enumerate(corners, start=1):
        axes.annotate(f"sft{number}", (x, y), color="white", fontweight="bold")
    axes.set(xticks=[], yticks=[], aspect="equal", title="Reward over the plane of three members")
    figure.colorbar(contour, label="reward")
    return figure


def course_figure(course: Sequence[Mapping[str, float]]) -> Figure:
    """Reward against the KL to the first member at each validation of a run."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    name = "reward" if "reward" in course[0] else "score"
    kl = "kl_sft" if "kl_sft" in course[0] else "kl"
    axes.plot([point[kl] for point in course], [point[name] for point in course], marker="o")
    axes.set(xlabel=f"{kl} (nats per answer)", ylabel=name, title="Course of the training")
    return figure


def drawn_figures(course: Sequence[Mapping[str, float]], drawn: Mapping[str, Any]) -> dict[str, Figure]:
    """Those of the figures above that there is something for: the course of a run, and what its test drew."""
    found = {}
    if len(course) > 1:
        found["course"] = course_figure(course)
    if "surface" in drawn:
        found["reward_over_alpha"] = alpha_figure(drawn["surface"])
    if drawn.get("plane"):
        found["reward_plane"] = plane_figure(drawn["plane"])
    return found


def frontier_figure(arms: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Reward against KL, a line for each arm over its values of beta: `{arm: [(beta, kl, reward), ...]}`."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for arm, points in arms.items():
        ordered = sorted(points, key=lambda point: -point[0])
        axes.plot([p[1] for p in ordered], [p[2] for p in ordered], marker="o", label=arm)
        for beta, kl, reward in ordered:
            axes.annotate(f"{beta:g}", (kl, reward), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="KL to the first member (nats per answer)", ylabel="reward", title="Reward and KL over beta")
    axes.legend(fontsize=8)
    return figure


def frontier_points(results: Mapping[str, Any], arms: Mapping[str, Mapping[float, str]]) -> dict[str, list[Any]]:
    """Means over seeds of KL and reward of runs in a results file: `{arm: [(beta, kl, reward), ...]}`.

    Args:
        results: Content of `results/salsa.cpu.json`.
        arms: Of each arm, its run for each beta.
    """
    from statistics import fmean

    def mean(run: str, metric: str) -> float:
        return fmean(metrics[metric] for metrics in results["runs"][run].values())

    return {
        arm: [(beta, mean(run, "test/kl_sft"), mean(run, "test/reward")) for beta, run in runs.items()]
        for arm, runs in arms.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the frontier of reward and KL from the results of `zoo reproduce salsa`."""
    import argparse
    import json
    from pathlib import Path

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results/salsa.cpu.json"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("results/salsa.frontier.png"))
    args = parser.parse_args(argv)
    arms = {
        name: {1.0: f"{run}_b1", 0.4: f"{run}_b04", 0.1: f"{run}_b01"}
        for name, run in (("PPO", "ppo"), ("SALSA", "salsa"))
    }
    points = frontier_points(json.loads(args.results.read_text("utf-8")), arms)
    frontier_figure(points).savefig(args.out, dpi=120)


if __name__ == "__main__":
    main()
