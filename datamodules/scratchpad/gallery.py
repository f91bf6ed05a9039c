"""A picture of each task at several difficulties: questions with either answer, and the ends of their solutions.

`python -m datamodules.scratchpad.gallery --output results/scratchpad_tasks.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from datamodules.scratchpad.catalogue import frames_of, task_of
from datamodules.scratchpad.tasks import Task, num_frames, rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Image size, size of the task, and difficulties that the picture shows.
SHOWN: dict[str, tuple[tuple[int, int | None, tuple[int, int]], ...]] = {
    "rect_maze": ((24, 6, (5, 10)), (24, 6, (13, 20)), (64, 16, (45, 60))),
    "circ_maze": ((42, 3, (4, 9)), (42, 3, (11, 16)), (84, 6, (20, 30))),
    "cycles": ((64, None, (6, 6)), (96, None, (12, 12)), (160, None, (24, 24))),
    "strings": ((64, None, (8, 8)), (96, None, (12, 12)), (160, None, (20, 20))),
    "traced_cycles": ((48, 6, (12, 12)), (96, 10, (16, 16))),
    "traced_strings": ((48, 6, (8, 8)), (96, 10, (12, 12))),
}


def examples(task: Task, low: int, high: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """Return question, middle and end of one problem with the answer no and one with yes, as 8-bit RGB."""
    problems = task.draw(2, low, high, np.random.default_rng(seed))
    sketch, last = task.sketch(problems), num_frames(problems)
    pictures = []
    for row, answer in enumerate(("no", "yes")):
        for title, step in (
            (f"question ({answer})", 0),
            (f"step {last[row] // 2}", last[row] // 2),
            ("end", last[row]),
        ):
            pictures.append((title, rgb(frames_of(task, sketch, step))[row]))
    return pictures


def gallery(seed: int = 0) -> Figure:
    """Draw all tasks; a row for each difficulty."""
    from matplotlib.figure import Figure

    rows = [(name, *setting) for name, settings in SHOWN.items() for setting in settings]
    figure = Figure(figsize=(9.5, 1.65 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 6)
    for line, (name, image_size, size, (low, high)) in zip(axes, rows, strict=True):
        difficulty = f"{low} to {high}" if low < high else f"{low}"
        for axis, (title, picture) in zip(
            line, examples(task_of(name, image_size, size), low, high, seed), strict=True
        ):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set(xticks=[], yticks=[])
        what = "path" if "maze" in name else "nodes"
        line[0].set_ylabel(f"{name}\n{image_size} px, {what} {difficulty}", fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture and write it."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.scratchpad.gallery", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/scratchpad_tasks.png"))
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    gallery(options.seed).savefig(options.output, dpi=130, metadata={"Software": ""})
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
