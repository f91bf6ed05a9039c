"""Write problems and their step-by-step solutions to files.

`python -m datamodules.scratchpad.export --task rect_maze --format folders --samples 1000 --output mazes`. Problem `i`
of a split is the one that the datamodule of the same seed trains or tests on. Formats:

* `folders`: `<split>/<yes|no>/<index>.png`, which torchvision's `ImageFolder` and `datasets`' `imagefolder` read, and
  with `--frames` each step of the solution in `<split>_frames/<index>/<step>.png`;
* `huggingface`: a data set on disk for `datasets.load_from_disk`, frames included with `--frames`;
* `gif`: one animated picture of each solution.

Beside them `problems.jsonl` has a line for each problem, and `export.json` what the files were made from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datamodules.scratchpad.catalogue import DEFAULTS, NAMES, SIZE_HELP, frames_of, size_of, task_of
from datamodules.scratchpad.tasks import (
    CHUNK,
    PALETTE,
    Sketch,
    Task,
    num_frames,
    problem_pool,
    rgb,
    rows_of,
)

SPLITS = ("train", "val_id", "val_ood", "test_id", "test_ood")
ANSWERS = ("no", "yes")


@dataclass(frozen=True)
class Problem:
    """One problem, drawn.

    Args:
        index: Its number in the split.
        label: 1 for yes, 0 for no.
        difficulty: Length of the path, or number of nodes.
        frames: Palette indices of the question and of every step of the solution, uint8 `[T + 1, H, W]`.
    """

    index: int
    label: int
    difficulty: int
    frames: NDArray[np.uint8]

    def facts(self) -> dict[str, int]:
        """Return what is known beside the pixels."""
        return {
            "index": self.index,
            "label": self.label,
            "difficulty": self.difficulty,
            "num_frames": len(self.frames) - 1,
        }


def drawn_problems(
    task: Task, seed: int, split: str, samples: int, low: int, high: int, stride: int
) -> Iterator[Problem]:
    """Draw problems `0 .. samples - 1` of a split, a chunk at a time."""
    for start in range(0, samples, CHUNK):
        pool = problem_pool(task, seed, split, min(CHUNK, samples - start), low, high, start)
        last = num_frames(pool, stride)
        for row in range(len(last)):
            canvas, arrival = task.sketch(rows_of(pool, slice(row, row + 1)), stride)
            steps = np.arange(last[row] + 1)
            frames = frames_of(task, Sketch(canvas, arrival), steps)
            yield Problem(start + row, int(pool["label"][row]), int(pool["difficulty"][row]), frames)


def picture(indices: NDArray[np.uint8], scale: int = 1) -> Image.Image:
    """Return a picture with the task's palette, each pixel `scale` pixels wide."""
    image = Image.fromarray(np.ascontiguousarray(indices)).convert("P")
    image.putpalette((np.asarray(PALETTE) * 255).astype(np.uint8).ravel().tolist())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def write_folders(problems: Iterator[Problem], output: Path, split: str, frames: bool, scale: int) -> list[dict]:
    """Write one PNG for each question, and one for each step with `frames`; return the lines of `problems.jsonl`."""
    lines = []
    for answer in ANSWERS:
        (output / split / answer).mkdir(parents=True)
    for problem in problems:
        name = f"{split}/{ANSWERS[problem.label]}/{problem.index:07d}.png"
        picture(problem.frames[0], scale).save(output / name)
        lines.append({"file_name": name, **problem.facts()})
        if frames:
            folder = output / f"{split}_frames" / f"{problem.index:07d}"
            folder.mkdir(parents=True)
            for step, frame in enumerate(problem.frames):
                picture(frame, scale).save(folder / f"{step:03d}.png")
    return lines


def write_gifs(problems: Iterator[Problem], output: Path, split: str, scale: int, milliseconds: int) -> list[dict]:
    """Write one animated GIF for each solution, which shows the question and the end for longer."""
    lines = []
    (output / split).mkdir(parents=True)
    for problem in problems:
        name = f"{split}/{problem.index:07d}_{ANSWERS[problem.label]}.gif"
        first, *rest = (picture(frame, scale) for frame in problem.frames)
        hold = [4 * milliseconds, *[milliseconds] * (len(rest) - 1), 8 * milliseconds][: len(rest) + 1]
        first.save(output / name, save_all=True, append_images=rest, duration=hold, loop=0, optimize=False)
        lines.append({"file_name": name, **problem.facts()})
    return lines


def write_dataset(problems: Iterator[Problem], output: Path, split: str, frames: bool, scale: int) -> list[dict]:
    """Write a data set of the `datasets` library to `output/<split>`; columns `image`, `label` and what is known."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("--format huggingface needs datasets: pip install 'method-zoo[data]'") from error
    lines: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for problem in problems:
        row: dict[str, Any] = {"image": picture(problem.frames[0], scale).convert("RGB"), **problem.facts()}
        if frames:
            row["frames"] = [picture(frame, scale).convert("RGB") for frame in problem.frames]
        rows.append(row)
        lines.append(problem.facts())
    columns: dict[str, Any] = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(ANSWERS))}
    columns |= {key: datasets.Value("int32") for key in ("index", "difficulty", "num_frames")}
    if frames:
        columns["frames"] = [datasets.Image()]
    table = {key: [row[key] for row in rows] for key in columns}
    datasets.Dataset.from_dict(table, features=datasets.Features(columns)).save_to_disk(str(output / split))
    return lines


def export(
    task: Task,
    output: Path,
    form: str,
    split: str,
    samples: int,
    difficulty: list[int],
    stride: int = 1,
    seed: int = 0,
    frames: bool = False,
    scale: int = 1,
    milliseconds: int = 150,
) -> None:
    """Write problems `0 .. samples - 1` of a split.

    Args:
        task: What draws them.
        output: New folder.
        form: `folders`, `huggingface` or `gif`.
        split: One of `SPLITS`.
        samples: How many; an even number has equally many of both answers.
        difficulty: Least and largest difficulty.
        stride: Solver steps from one frame to the next.
        seed: `data_seed` of the datamodule.
        frames: Whether the steps of the solution are written too (`gif` always has them).
        scale: Side of a pixel in the files.
        milliseconds: Time that a step is shown for in a GIF.

    Raises:
        ValueError: If there is something at `output`, or such problems cannot be drawn.
    """
    for key, value in (("samples", samples), ("stride", stride), ("scale", scale), ("milliseconds", milliseconds)):
        if value < 1:
            raise ValueError(f"{key}={value}: expected at least 1")
    task.check(*difficulty)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is there already and not empty: choose another --output")
    problems = drawn_problems(task, seed, split, samples, difficulty[0], difficulty[1], stride)
    writers: dict[str, Callable[[], list[dict]]] = {
        "folders": lambda: write_folders(problems, output, split, frames, scale),
        "huggingface": lambda: write_dataset(problems, output, split, frames, scale),
        "gif": lambda: write_gifs(problems, output, split, scale, milliseconds),
    }
    lines = writers[form]()
    made_from = {
        "task": task.name, "size": size_of(task), "image_size": task.image_size,
        "difficulty": difficulty, "split": split, "samples": samples, "stride": stride, "seed": seed,
        "format": form, "scale": scale, "palette": rgb(np.arange(len(PALETTE), dtype=np.uint8)).tolist(),
    }  # fmt: skip
    (output / "export.json").write_text(json.dumps(made_from, indent=1) + "\n", encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "problems.jsonl").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write problems of one task to files."""
    parser = argparse.ArgumentParser(
        prog="python -m datamodules.scratchpad.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=NAMES, default="rect_maze")
    parser.add_argument("--size", type=int, help=SIZE_HELP)
    parser.add_argument("--image-size", type=int, help="pixels")
    parser.add_argument("--difficulty", type=int, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--format", choices=("folders", "huggingface", "gif"), default="folders")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--stride", type=int, default=1, help="solver steps from one frame to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", action="store_true", help="write the steps of the solutions too")
    parser.add_argument("--scale", type=int, default=1, help="side of a pixel in the files")
    parser.add_argument("--milliseconds", type=int, default=150, help="time of a step in a GIF")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args(arguments)
    given = {"size": options.size, "image_size": options.image_size, "difficulty": options.difficulty}
    chosen = DEFAULTS[options.task] | {key: value for key, value in given.items() if value is not None}
    try:
        task = task_of(options.task, chosen["image_size"], chosen["size"])
        export(
            task, options.output, options.format, options.split, options.samples, chosen["difficulty"],
            options.stride, options.seed, options.frames, options.scale, options.milliseconds,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
