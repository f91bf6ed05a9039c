"""Leak probes: can the answer be read off something simple?

`python -m datamodules.scratchpad.probes --task rect_maze --output results/scratchpad_leaks` fits predictors that cannot
solve the problem on one half of the problems and reads their accuracy on the other half. Each symbolic cue is read by
the best rule that depends on it alone (the majority answer of each of its values); pixels are read by logistic
regression and by a small convolutional network. Cues called global tell the answer only to who has already traced the
connections; they are listed for completeness.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.scratchpad.catalogue import DEFAULTS, NAMES, SIZE_HELP, task_of
from datamodules.scratchpad.tasks import BLACK, PALETTE, Problems, Task, problem_pool, rows_of

#: What is probed besides with `--task all`, without predictors from pixels: other settings of the claims.
FURTHER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rect_maze", {"difficulty": [13, 20]}),
    ("circ_maze", {"size": 2, "image_size": 32, "difficulty": [3, 6]}),
    ("cycles", {"image_size": 24, "difficulty": [6, 6]}),
    ("cycles", {"image_size": 24, "difficulty": [8, 8]}),
)
_BINS = 20


def majority_accuracy(cue: NDArray, label: NDArray, fit: NDArray, read: NDArray) -> float:
    """Accuracy on the rows `read` of the majority answer, on the rows `fit`, of each value of a cue.

    Args:
        cue: Whole numbers, or real numbers, which are cut into 20 bins of equal size, `[n]`.
        label: 0 or 1, `[n]`.
        fit: Rows to count the answers on.
        read: Rows to read the accuracy on.
    """
    values = np.asarray(cue)
    if values.dtype.kind == "f":
        values = np.searchsorted(np.quantile(values[fit], np.linspace(0, 1, _BINS + 1)[1:-1]), values)
    kinds, code = np.unique(values, return_inverse=True)
    votes = np.zeros(len(kinds))
    np.add.at(votes, code[fit], 2.0 * label[fit] - 1)
    return float(((votes[code[read]] > 0) == (label[read] == 1)).mean())


def _small_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(len(PALETTE), 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 1),
    )


def _one_hot(canvas: NDArray[np.uint8]) -> Tensor:
    return F.one_hot(torch.from_numpy(canvas).long(), len(PALETTE)).movedim(-1, 1).float()


def pixel_accuracy(task: Task, problems: Problems, kind: str, fit: NDArray, read: NDArray, epochs: int = 3) -> float:
    """Accuracy on the rows `read` of a predictor from pixels, trained on the rows `fit` by AdamW.

    Args:
        task: What drew the problems.
        problems: All problems.
        kind: `linear` (logistic regression on the one-hot colours of the pixels) or `cnn` (two convolutions).
        fit: Rows to train on.
        read: Rows to read the accuracy on.
        epochs: Passes over the rows to train on.
    """
    pixels = len(PALETTE) * task.image_size**2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 1))
        net: nn.Module = linear if kind == "linear" else _small_conv()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1)
        order = np.random.default_rng(0)
        for _ in range(epochs):
            for rows in np.array_split(order.permutation(fit), max(1, len(fit) // 100)):
                chosen = rows_of(problems, rows)
                logits = net(_one_hot(task.sketch(chosen).canvas))[:, 0]
                loss = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(chosen["label"]).float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        right = 0
        with torch.no_grad():
            for rows in np.array_split(read, max(1, len(read) // 500)):
                chosen = rows_of(problems, rows)
                answer = net(_one_hot(task.sketch(chosen).canvas))[:, 0] > 0
                right += int((answer.numpy() == (chosen["label"] == 1)).sum())
    return right / len(read)


def probe(task: Task, low: int, high: int, samples: int, seed: int = 0, pixels: bool = True) -> list[dict[str, Any]]:
    """Probe `samples` problems; rows `{"cue", "reach", "accuracy"}`, `reach` being `local`, `pixels` or `global`."""
    problems = problem_pool(task, seed, "probe", samples, low, high)
    label = problems["label"]
    order = np.random.default_rng(seed).permutation(samples)
    fit, read = order[: samples // 2], order[samples // 2 :]
    canvas = np.concatenate([task.sketch(rows_of(problems, rows)).canvas for rows in np.array_split(order, 20)])
    ink = np.empty(samples, dtype=np.int64)
    ink[order] = (canvas == BLACK).sum(axis=(1, 2))
    rows: list[dict[str, Any]] = []
    for reach, cues in (("local", {"ink": ink, **task.local_cues(problems)}), ("global", task.global_cues(problems))):
        rows += [
            {"cue": name, "reach": reach, "accuracy": majority_accuracy(cue, label, fit, read)}
            for name, cue in cues.items()
        ]
    if pixels:
        rows += [
            {"cue": title, "reach": "pixels", "accuracy": pixel_accuracy(task, problems, kind, fit, read)}
            for kind, title in (("linear", "logistic regression"), ("cnn", "two convolutions"))
        ]
    return rows


def table(report: dict[str, Any]) -> str:
    """Markdown table of a report."""
    lines = [
        f"### {report['task']}: difficulty {report['difficulty'][0]} to {report['difficulty'][1]}, "
        f"{report['image_size']} pixels" + (f", size {report['size']}" if report["size"] else ""),
        "",
        f"Accuracy on {report['samples'] // 2} problems, standard error {report['standard_error']:.4f}.",
        "",
        "| cue | reach | accuracy |",
        "|---|---|---|",
    ]
    lines += [f"| {row['cue']} | {row['reach']} | {100 * row['accuracy']:.1f} % |" for row in report["probes"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Probe one task, or all of them, print the tables, and write them to `<output>.json` and `<output>.md`."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.scratchpad.probes", description=main.__doc__)
    parser.add_argument("--task", choices=(*NAMES, "all"), default="all")
    parser.add_argument("--size", type=int, help=SIZE_HELP)
    parser.add_argument("--image-size", type=int, help="pixels")
    parser.add_argument("--difficulty", type=int, nargs=2, metavar=("LOW", "HIGH"))
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pixels", action="store_true", help="leave out the predictors that are trained on pixels")
    parser.add_argument("--output", type=Path, help="path of the files, without extension")
    options = parser.parse_args(arguments)
    given = {"size": options.size, "image_size": options.image_size, "difficulty": options.difficulty}
    if options.task == "all" and any(value is not None for value in given.values()):
        parser.error("--size, --image-size and --difficulty go with one --task")
    if options.samples < 100 or options.samples % 2:
        parser.error(f"--samples {options.samples}: expected an even number of at least 100")
    reports = []
    wanted = [(options.task, {key: value for key, value in given.items() if value is not None})]
    for name, changes in [*((name, {}) for name in NAMES), *FURTHER] if options.task == "all" else wanted:
        chosen = DEFAULTS[name] | changes
        try:
            task = task_of(name, chosen["image_size"], chosen["size"])
            low, high = chosen["difficulty"]
            pixels = not options.no_pixels and (name, changes) not in FURTHER
            rows = probe(task, low, high, options.samples, options.seed, pixels)
        except ValueError as error:
            parser.error(str(error))
        error_of_half = 0.5 / (options.samples // 2) ** 0.5
        report = {"task": name, **chosen, "samples": options.samples, "seed": options.seed}
        reports.append(report | {"standard_error": error_of_half, "probes": rows})
        print(table(reports[-1]))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        text = "# Leak probes of the scratchpad tasks\n\n" + "\n".join(map(table, reports))
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
