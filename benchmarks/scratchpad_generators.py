"""Problems a second of the scratchpad generators, against a plain Python version and against `maze-dataset`.

The plain version (`scratchpad_plain.py`) does one problem after the other by the same rules: Python loops for the tree
or the loop, for the search and for the matching of both ends, PIL for every frame. Both deliver the question and all
frames of the solution as palette indices, at the same size and without anti-aliasing. Numbers are problems per second
of processor time of one thread.

    python benchmarks/scratchpad_generators.py [--seconds 3] [--maze-dataset FOLDER] [--out DIR]

`--maze-dataset` takes a folder with that package, kept apart from everything else; it makes mazes and their solutions,
without pictures:

    pip install --no-deps --target FOLDER maze-dataset==1.4.2 'muutils<0.9' jaxtyping zanj wadler-lindig
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scratchpad_plain import plain_cycle, plain_maze, plain_string

from datamodules.scratchpad.circ_maze import CircMaze
from datamodules.scratchpad.datamodule import make_task
from datamodules.scratchpad.rect_maze import RectMaze
from datamodules.scratchpad.tasks import Sketch, Task, frame_indices, num_frames
from zoo.bench.report import comparison, write_bench

#: Name -> task, size, image size, least and largest difficulty, problems a second that are aimed at (0: no aim).
CASES: dict[str, tuple[str, int | None, int, int, int, int]] = {
    "rect_maze_6": ("rect_maze", 6, 24, 5, 10, 4000),
    "rect_maze_16": ("rect_maze", 16, 64, 10, 40, 600),
    "circ_maze_3": ("circ_maze", 3, 42, 4, 9, 0),
    "cycles_24": ("cycles", None, 96, 24, 24, 1500),
    "strings_12": ("strings", None, 96, 12, 12, 0),
}

MAZE_DATASET = """
import time
from maze_dataset.generation import LatticeMazeGenerators
import numpy as np
rate = {}
for size in (6, 16):
    shape, count, start = np.array([size, size]), 0, time.process_time()
    while time.process_time() - start < SECONDS:
        maze = LatticeMazeGenerators.gen_dfs(shape)
        maze.find_shortest_path((0, 0), (size - 1, size - 1))
        count += 1
    rate[f"rect_maze_{size}"] = count / (time.process_time() - start)
import json
from importlib.metadata import version
print(json.dumps([rate, {name: version(name) for name in ("maze-dataset", "muutils")}]))
"""


def rate(make: Callable[[], int], seconds: float, rounds: int = 3) -> float:
    """Return problems per second of processor time, the median of rounds; `make` returns how many it made."""
    make()
    rates = []
    for _ in range(rounds):
        count, start = 0, time.process_time()
        while time.process_time() - start < seconds / rounds:
            count += make()
        rates.append(count / (time.process_time() - start))
    return statistics.median(rates)


def batched(task: Task, low: int, high: int, all_frames: bool, size: int = 256) -> Callable[[], int]:
    """Return a function that makes `size` problems; `all_frames` writes every frame out, as the plain version does."""
    rng = np.random.default_rng(0)

    def make() -> int:
        problems = task.draw(size, low, high, rng)
        sketch = task.sketch(problems)
        if all_frames:
            for row, last in enumerate(num_frames(problems)):
                one = Sketch(sketch.canvas[row : row + 1], sketch.arrival[row : row + 1])
                frame_indices(one, np.arange(last + 1))
        return size

    return make


def measure(seconds: float, maze_dataset: str) -> dict[str, dict[str, Any]]:
    """Measure every case."""
    foreign: dict[str, float] = {}
    versions: dict[str, str] = {}
    if maze_dataset:
        code = MAZE_DATASET.replace("SECONDS", str(seconds))
        words, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": maze_dataset}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        foreign, versions = json.loads(done.stdout.splitlines()[-1])
    found = {}
    for name, (kind, size, image_size, low, high, aim) in CASES.items():
        task = make_task(kind, image_size, size)
        one: dict[str, Any] = {"task": kind, "size": size, "image_size": image_size, "difficulty": [low, high]}
        one["problems_per_second"] = rate(batched(task, low, high, all_frames=False), seconds)
        one["aim_per_second"] = aim or None
        ours = rate(batched(task, low, high, all_frames=True), seconds)
        if isinstance(task, RectMaze | CircMaze):
            plain = plain_maze(task, low, high)
        else:
            plain = (plain_cycle if kind == "cycles" else plain_string)(high, image_size)
        theirs = rate(plain, seconds)
        one |= {"all_frames_per_second": ours, "plain_per_second": theirs, "over_plain": ours / theirs}
        if name in foreign:
            one["maze_dataset_per_second"] = foreign[name]
            one["over_maze_dataset"] = ours / foreign[name]
            one["maze_dataset_versions"] = versions
        found[name] = one
        print(name, json.dumps(one), flush=True)
    return found


def main() -> None:
    """Measure, print and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="processor time of each measurement")
    parser.add_argument("--maze-dataset", default="", metavar="FOLDER", help="folder with maze-dataset")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    args = parser.parse_args()
    cases = measure(args.seconds, args.maze_dataset)
    details = {"cases": cases, "clock": "processor time of one thread"}
    ratio = min(one["over_plain"] for one in cases.values())
    what = "scratchpad problems with all frames a second, over plain Python with PIL; the least of five cases"
    write_bench(
        args.out / "scratchpad_generators.json",
        comparison("scratchpad_generators", what, ratio, "", ">=", 10.0, details),
    )
    share = min(one["all_frames_per_second"] / one["aim_per_second"] for one in cases.values() if one["aim_per_second"])
    what = (
        "scratchpad problems with all frames a second over what is aimed at "
        "(4,000 mazes of 6 x 6, 600 of 16 x 16, 1,500 cycles of 24 nodes at 96 pixels)"
    )
    write_bench(args.out / "scratchpad_rates.json", comparison("scratchpad_rates", what, share, "", ">=", 1.0, details))


if __name__ == "__main__":
    main()
