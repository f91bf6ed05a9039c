"""Figures: reward over alpha and over the plane of three members, the course of a run, reward and KL; answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
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

    def mean(run: str, metric: str) -> float:
        return fmean(metrics[metric] for metrics in results["runs"][run].values())

    return {
        arm: [(beta, mean(run, "test/kl_sft"), mean(run, "test/reward")) for beta, run in runs.items()]
        for arm, runs in arms.items()
    }


def seeds_alpha_figure(results: Mapping[str, Any], run: str = "surface") -> Figure:
    """Reward over alpha in a results file: a thin line for each seed, their mean, and the means of three members."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    prefix, found = "test/reward_alpha_", list(results["runs"][run].values())
    labels = sorted((name for name in found[0] if name.startswith(prefix)), key=lambda n: float(n.removeprefix(prefix)))
    alphas = [float(label.removeprefix(prefix)) for label in labels]
    for metrics in found:
        axes.plot(alphas, [metrics[label] for label in labels], color="tab:blue", alpha=0.35, linewidth=1)
    axes.plot(alphas, [fmean(m[label] for m in found) for label in labels], marker="o", label="mean of seeds")
    three = fmean(m["test/reward_centroid"] for m in found)
    axes.axhline(three, color="tab:green", linestyle=":", label="mean of three members")
    axes.axvspan(0, 1, color="tab:blue", alpha=0.07)
    axes.set(xlabel="alpha (0: first member, 1: second)", ylabel="reward", title="Soups before any reinforcement")
    axes.legend(fontsize=8)
    return figure


def plane_of_runs(runs: Path, prompts: int = 2000) -> dict[str, Any]:
    """Mean reward over seeds on the plane of the three members that `zoo reproduce salsa` trained.

    Args:
        runs: Where its runs are, with `sft1`, `sft2` and `sft3`, a folder for each seed.
        prompts: Prompts of the test.
    """
    import torch

    from zoo import registry
    from zoo.methods.salsa.evaluation import plane_points
    from zoo.methods.salsa.frozen import member_states
    from zoo.methods.salsa.generation import InProcess, Sampling
    from zoo.methods.salsa.networks import load_lm, load_weights
    from zoo.methods.salsa.soup import soup

    data = registry.load(registry.find("datamodules", "reviews"))(test_rows=prompts)
    batches: Any = data.held_out_batches("test")
    engine = InProcess(Sampling(11, 1.0, data.eos_id, data.pad_id))
    points, sums = plane_points(), torch.zeros(len(plane_points()))
    seeds = sorted(path.name for path in (runs / "sft1").iterdir())
    for seed in seeds:
        members = [str(next((runs / f"sft{k}" / seed / "checkpoints").glob("*.ckpt"))) for k in (1, 2, 3)]
        states, _ = member_states(members, data.vocab_size)
        model, _ = load_lm(members[0], data.vocab_size)
        for place, point in enumerate(points):
            load_weights(model, soup(states, point), "soup")
            engine.sync(model)
            for number in range(len(batches)):
                batch = batches.batch(0, number)
                drawn = engine(batch["prompt_ids"], batch["prompt_mask"], batch["row"], 0)
                sums[place] += data.reward(batch["prompt_ids"], drawn.tokens, drawn.mask).sum()
    return {"points": points, "reward": (sums / (prompts * len(seeds))).tolist()}


def answers_page(runs: Path, arms: Mapping[str, str], seed: int = 0, rows: int = 10) -> str:
    """Answers of some arms (`{name: run}`) to the same prompts, with their rewards, as a Markdown table."""
    texts = {arm: (runs / run / str(seed) / "answers.jsonl").read_text("utf-8") for arm, run in arms.items()}
    found = {arm: [json.loads(line) for line in text.splitlines()[:rows]] for arm, text in texts.items()}
    lines = ["# Answers after the training, salsa, cpu scale", ""]
    lines += [
        "Made by `python -m zoo.methods.salsa.figures`; not to be edited. First prompts of the test, seed 0.",
        "",
    ]
    lines += [f"| prompt | {' | '.join(f'{arm} | reward' for arm in arms)} |", "| --- " * (1 + 2 * len(arms)) + "|"]
    for columns in zip(*found.values(), strict=True):
        cells = [f"{column['answer']} | {column['score']:.1f}" for column in columns]
        lines.append(f"| {columns[0]['prompt']} | {' | '.join(cells)} |".replace("<", "&lt;"))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Draw figures of what `zoo reproduce salsa` found: reward over alpha, over the plane, against KL; and answers."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("results/salsa.cpu.json"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"), help="folder for the figures")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce/salsa/cpu"), help="for plane and answers")
    args = parser.parse_args(argv)
    results = json.loads(args.results.read_text("utf-8"))
    arms = {
        name: {1.0: f"{run}_b1", 0.4: f"{run}_b04", 0.1: f"{run}_b01"}
        for name, run in (("PPO", "ppo"), ("SALSA", "salsa"))
    }
    figures = {"frontier": frontier_figure(frontier_points(results, arms)), "alpha": seeds_alpha_figure(results)}
    if args.runs.is_dir():
        figures["plane"] = plane_figure(plane_of_runs(args.runs))
        text = answers_page(args.runs, {name: runs[0.4] for name, runs in arms.items()})
        (args.out / "salsa.answers.md").write_text(text, encoding="utf-8")
    for name, figure in figures.items():
        figure.savefig(args.out / f"salsa.{name}.png", dpi=120)


if __name__ == "__main__":
    main()
