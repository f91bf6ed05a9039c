"""Figures over the runs of a campaign: sketches, accuracy against difficulty and against samples seen.

`python -m zoo.methods.visual_scratchpad.compare --runs runs/reproduce/visual_scratchpad/cpu` tests the newest
checkpoint of every run `<runs>/<name>/<seed>` again and writes `<output>_difficulty.png`, `<output>_rollouts.png`,
`<output>_samples.md` (samples seen until 90 % of held-out problems are answered) and `<output>_compare.json`. The runs
are only read. With `--cache DIR` what was measured is kept there, so that an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from zoo.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ENOUGH = 30  # problems of a difficulty

#: Run -> seed -> what was measured.
Measured = dict[str, dict[str, dict[str, Any]]]


def finished_runs(root: Path) -> dict[str, dict[str, Path]]:
    """Return the directories `root/<name>/<seed>` that hold a checkpoint, by name and seed.

    Raises:
        UsageError: If there are none.
    """
    found: dict[str, dict[str, Path]] = {}
    for folder in sorted(root.glob("*/*")):
        if (folder / "config.yaml").is_file() and list((folder / "checkpoints").glob("*.ckpt")):
            found.setdefault(folder.parent.name, {})[folder.name] = folder
    if not found:
        raise UsageError(f"--runs {root}: there is no run with a checkpoint in it", "zoo reproduce visual_scratchpad")
    return found


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint with the most steps."""
    return max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))


def remembered(run_dir: Path, cache: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `measure` does, from a file of `cache` if that is newer than the checkpoint."""
    import torch

    file = cache and cache / f"{run_dir.parent.name}.{run_dir.name}.pt"
    if file and file.is_file() and file.stat().st_mtime > newest_checkpoint(run_dir).stat().st_mtime:
        kept = torch.load(file, weights_only=True)
        return kept["facts"], kept["strips"]
    facts, strips = measure(run_dir)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"facts": facts, "strips": strips}, file)
    return facts, strips


def measure(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Test a run again, elsewhere; returns accuracies by difficulty and the learning curve, and the sketches.

    Raises:
        UsageError: If the test was interrupted.
    """
    from zoo.api import run

    with tempfile.TemporaryDirectory() as elsewhere:
        config = Path(elsewhere, "config.yaml")
        config.write_text((run_dir / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
        done = run(
            "test",
            config=config,
            overrides={"ckpt_path": str(newest_checkpoint(run_dir).absolute())},
            run_dir=Path(elsewhere, "run"),
            wandb="disabled",
        )
    evaluation = done.model.evaluation
    evaluation.add_point(int(done.model.samples_seen))  # the end of the curve, on the test problems
    data = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    levels = {str(level): list(value) for level, value in evaluation.by_difficulty().items()}
    expected = data["test_size"] * (1 if data.get("ood_difficulty") is None else 2)
    if (seen := sum(count for _, count in evaluation.by_difficulty().values())) != expected:
        raise UsageError(f"{run_dir}: the test ended after {seen} of {expected} problems", "run the command again")
    facts = {
        "task": ("traced " if "advance" in data else "") + data.get("task", "rect_maze"),
        "by_difficulty": levels,
        "curve": evaluation.curve,
        "trained_on": data["train_difficulty"],
    }
    return facts, evaluation._strips


def samples_until(curve: Sequence[Mapping[str, float]], key: str, accuracy: float = 0.9) -> float | None:
    """Samples seen at the first point of a learning curve with this accuracy; None if there is none."""
    return next((point["samples"] for point in curve if point.get(key, 0.0) >= accuracy), None)


def samples_table(measured: Measured) -> str:
    """Markdown: for each run and loader the samples until 90 %, seed by seed, and the samples seen in all."""
    lines = [
        "# Samples seen until 90 % of held-out problems are answered",
        "",
        "Made by `python -m zoo.methods.visual_scratchpad.compare`; not to be edited. A value for each seed, `-` where "
        "it is never reached. Looked at: the validations, once an epoch, and the test at the end of training.",
        "",
        "| task | run | problems | samples until 90 %, by seed | samples in all |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in measured.items():
        for key, title in (("id", "as in training"), ("ood", "harder")):
            known = [one for one in seeds.values() if any(key in point for point in one["curve"])]
            if not known:
                continue
            reached = [samples_until(one["curve"], key) for one in known]
            cells = ", ".join("-" if value is None else f"{value:.0f}" for value in reached)
            total = max(point["samples"] for one in known for point in one["curve"])
            lines.append(f"| {known[0]['task']} | {name} | {title} | {cells} | {total:.0f} |")
    return "\n".join(lines) + "\n"


def difficulty_figure(measured: Measured) -> Figure:
    """Accuracy against difficulty, median of the seeds, and against samples seen, every seed.

    A row for each task, a colour for each run of it. Difficulties of fewer than 30 problems, over all seeds, are left
    out.
    """
    from matplotlib.figure import Figure

    tasks: dict[str, Measured] = {}
    for name, seeds in measured.items():
        tasks.setdefault(next(iter(seeds.values()))["task"], {})[name] = seeds
    figure = Figure(figsize=(10, 3.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (left, right), (task, runs) in zip(axes, tasks.items(), strict=True):
        _draw_task(left, right, runs)
        left.set_ylabel(f"{task}: accuracy")
    return figure


def _draw_task(left: Any, right: Any, measured: Measured) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, seeds) in enumerate(measured.items()):
        colour = f"C{number}"
        known = [one["by_difficulty"] for one in seeds.values()]
        problems: Counter[int] = Counter()
        for one in known:
            problems.update({int(level): count for level, (_, count) in one.items()})
        levels = sorted(level for level, count in problems.items() if count >= _ENOUGH)
        values = [[one[str(level)][0] for one in known if str(level) in one] for level in levels]
        left.plot(levels, [median(row) for row in values], color=colour, marker="o", ms=3, label=name)
        left.fill_between(levels, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.2)
        for one in seeds.values():
            for key, style in (("id", "-"), ("ood", "--")):
                points = [(point["samples"], point[key]) for point in one["curve"] if key in point]
                if points:
                    right.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=".")
    low, high = next(iter(next(iter(measured.values())).values()))["trained_on"]
    left.axvspan(low - 0.5, high + 0.5, color="grey", alpha=0.15, label="trained on")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="difficulty", ylabel="accuracy", title="median of the seeds, least and largest")
    right.set(xlabel="samples seen", ylabel="accuracy", xlim=(0, None), title="each seed; dashed: out of distribution")
    for axis in (left, right):
        axis.axhline(0.5, color="grey", linestyle=":")
        axis.set_ylim(0, 1.05)
    left.legend(fontsize=8)


def rollout_figure(strips: Mapping[str, Any]) -> Figure:
    """Two problems of each kind: what the network drew above the truth."""
    from matplotlib.figure import Figure

    rows = [
        (f"{name}\n{title}", pictures[row])
        for name, pair in strips.items()
        for row in (0, 1)
        for title, pictures in zip(("drawn", "true"), pair, strict=True)
    ]
    columns = max(len(pictures) for _, pictures in rows)
    figure = Figure(figsize=(columns + 1, len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, pictures) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, picture in zip(line, pictures, strict=False):
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        line[0].set_ylabel(title.replace("_", "\n").replace(" ", "\n"), fontsize=6)
    axes[0][0].set_title("question", fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Test the runs again and write the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m zoo.methods.visual_scratchpad.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce/visual_scratchpad/cpu"))
    parser.add_argument("--output", type=Path, default=Path("results/visual_scratchpad"), help="how the files begin")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was measured, run by run")
    options = parser.parse_args(arguments)
    measured: Measured = {}
    strips: dict[str, Any] = {}
    try:
        for name, seeds in finished_runs(options.runs).items():
            for seed, run_dir in seeds.items():
                measured.setdefault(name, {})[seed], pictures = remembered(run_dir, options.cache)
                for loader, pair in pictures.items():
                    strips.setdefault(f"{name} {loader}", pair)
    except UsageError as error:
        parser.error(str(error))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    path = str(options.output)
    Path(f"{path}_compare.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    Path(f"{path}_samples.md").write_text(samples_table(measured), encoding="utf-8")
    difficulty_figure(measured).savefig(f"{path}_difficulty.png", dpi=100)
    if strips:
        rollout_figure(strips).savefig(f"{path}_rollouts.png", dpi=80)
    print(f"written: {path}_difficulty.png, {path}_rollouts.png, {path}_samples.md, {path}_compare.json")


if __name__ == "__main__":
    main()
