"""Which configuration is cheapest: measured cells where there are any, a roofline fitted to them where there are not.

The time of a step is a sum of amounts of work, each at a rate of its own: latency of the blocks, operations of the
matrix products and of fused attention, bytes of activations, of eager attention's scores, of logits, of the weights'
states, and bytes sent to other devices. The rates are what makes the sum fit the measured cells (non-negative least
squares of the relative error). In units of a device's data sheet they are inverse efficiencies, which is how a device
that was not measured is predicted from one that was. What the sum leaves over, caches for example, is smooth: a cell is
corrected by the residuals of measured cells near it (Gaussian-process regression of their logarithms).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.costs import DEVICES, GIB, Shape
from zoo.methods.slm_bottlenecks.grid import cell_of, memory_of
from zoo.methods.slm_bottlenecks.measure import Cell

Row = Mapping[str, Any]

#: What a rate is divided by to be in units of the data sheet.
_SHEET = {"latency": "", "matmul": "peak_flops", "attention": "peak_flops", "communication": "link"}
#: A cell is predicted from cells that agree with it in these.
MODE = ("precision", "compile", "fused")


def work(cell: Cell, shape: Shape) -> dict[str, float]:
    """Amounts of work of a step on one device: FLOPs, bytes, and for `latency` the number of blocks and the loss."""
    tokens = cell.batch * cell.seq_len
    passes = 4 / 3 if cell.checkpointing else 1
    attention = 12 * shape.depth * shape.width * cell.seq_len * tokens * passes
    weights, gradients = costs.PRECISIONS[cell.precision][:2]
    eager = cell.attention == "eager"
    plain = costs.activation_bytes(shape, cell.batch, cell.seq_len, "flash", cell.precision)
    scores = costs.activation_bytes(shape, cell.batch, cell.seq_len, "eager", cell.precision) - plain
    parameters = shape.parameters
    return {
        "latency": (shape.depth + 1) * passes,
        "matmul": 6 * shape.matmul_parameters * tokens * passes,
        "attention": 0.0 if eager else attention,
        "scores": scores * passes if eager else 0.0,
        "activations": plain * passes,
        "logits": costs.logit_bytes(shape, cell.batch, cell.seq_len, cell.precision),
        "states": costs.state_bytes(parameters, cell.precision, cell.comm, cell.n_gpu),
        "communication": costs.communication_bytes(
            parameters * (weights + gradients) / 2, cell.comm, cell.n_gpu
        ),
    }  # fmt: skip


def sheet_seconds(cell: Cell, shape: Shape, gpu: str) -> dict[str, float]:
    """Work in seconds at the rates of a device's data sheet; in plain units for a device without one."""
    amounts = work(cell, shape)
    device = DEVICES.get(gpu)
    if device is None:
        return amounts
    rates = {kind: getattr(device, _SHEET.get(kind, "bandwidth"), 1.0) or 1.0 for kind in amounts}
    return {kind: amount / rates[kind] for kind, amount in amounts.items()}


#: Variance of a residual's noise relative to that of the residuals themselves.
NOISE = 0.2
#: A point that residuals belong to: cell, number of parameters, device.
Point = tuple[Cell, int, str]


def similarity(a: Point, b: Point) -> float:
    """Correlation of the residuals of two cells, 1 for the same one.

    It falls to `exp(-1/2)` with a factor of four in batch or parameters, of sixteen in length, or with another
    attention; cells of other devices and schemes have nothing in common.
    """
    (one, parameters, gpu), (two, others, other_gpu) = a, b
    if gpu != other_gpu or (one.comm, one.n_gpu) != (two.comm, two.n_gpu):
        return 0.0
    steps = (
        math.log(one.batch / two.batch, 4),
        math.log(parameters / others, 4),
        math.log(one.seq_len / two.seq_len, 16),
        float(one.attention != two.attention),
        float(one.checkpointing != two.checkpointing),
    )
    return math.exp(-0.5 * sum(step**2 for step in steps))


@dataclass(frozen=True)
class Roofline:
    """Fitted rates.

    Attributes:
        rates: Seconds for a unit of each kind of work.
        gpus: Devices whose cells it was fitted to.
        mode: Values of `MODE` of these cells.
        weights: Measured cells and the weights of their residuals.
    """

    rates: Mapping[str, float]
    gpus: tuple[str, ...]
    mode: tuple[Any, ...]
    weights: tuple[tuple[Point, float], ...] = ()

    def seconds(self, cell: Cell, shape: Shape, gpu: str) -> float:
        """Predicted time of a step.

        Raises:
            ValueError: If the device, or the mode of the cell, is too far from what was measured.
        """
        if gpu not in self.gpus and not (gpu in DEVICES and all(known in DEVICES for known in self.gpus)):
            raise ValueError(f"gpu: {gpu!r} cannot be predicted from cells of {', '.join(self.gpus)}: no data sheet")
        mode = tuple(getattr(cell, key) for key in MODE)
        if mode != self.mode:
            raise ValueError(f"{', '.join(MODE)}: {mode} cannot be predicted from cells with {self.mode}")
        amounts = sheet_seconds(cell, shape, gpu)
        plain = sum(self.rates[kind] * amount for kind, amount in amounts.items())
        here = (cell, shape.parameters, gpu)
        return plain * math.exp(sum(weight * similarity(here, point) for point, weight in self.weights))

    def tokens_per_second(self, cell: Cell, shape: Shape, gpu: str) -> float:
        """Predicted throughput of all devices together."""
        return cell.n_gpu * cell.batch * cell.seq_len / self.seconds(cell, shape, gpu)


def fit_roofline(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> Roofline:
    """Fit the rates to the measured cells (best repeat of each) of one mode.

    Raises:
        ValueError: If nothing was measured, or in several modes.
    """
    import numpy as np
    from scipy.optimize import nnls

    best = best_rows(rows)
    if not best:
        raise ValueError("rows: no cell has run, there is nothing to predict from")
    modes = {tuple(row[key] for key in MODE) for row in best}
    if len(modes) > 1:
        raise ValueError(f"rows: {', '.join(MODE)} must agree, got {sorted(modes)}")
    amounts = [sheet_seconds(cell_of(row), shapes[row["size"]], row["gpu"]) for row in best]
    seconds = np.array([row["n_gpu"] * row["batch"] * row["seq_len"] / row["tok_s_best"] for row in best])
    matrix = np.array([list(amount.values()) for amount in amounts]) / seconds[:, None]
    scale = np.maximum(matrix.max(axis=0), 1e-300)  # columns differ by many orders of magnitude
    rates = nnls(matrix / scale, np.ones(len(best)))[0] / scale
    points = [(cell_of(row), shapes[row["size"]].parameters, row["gpu"]) for row in best]
    covariance = np.array([[similarity(a, b) for b in points] for a in points]) + NOISE * np.eye(len(points))
    residuals = -np.log(np.maximum(matrix @ rates, 1e-300))
    weights = np.linalg.solve(covariance, residuals)
    return Roofline(
        dict(zip(amounts[0], rates.tolist(), strict=True)),
        tuple(sorted({row["gpu"] for row in best})),
        modes.pop(),
        tuple(zip(points, weights.tolist(), strict=True)),
    )


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The fastest repeat of each cell that has run."""
    best: dict[tuple[Cell, str], Row] = {}
    for row in rows:
        key = (cell_of(row), row["gpu"])
        if row["status"] == "ok" and (key not in best or row["tok_s_best"] > best[key]["tok_s_best"]):
            best[key] = row
    return list(best.values())


def leave_one_out(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> list[tuple[Row, float]]:
    """Pair each measured cell with the throughput that the other cells predict for it."""
    best = best_rows(rows)
    out = []
    for row in best:
        others = [other for other in best if other is not row]
        roofline = fit_roofline(others, shapes)
        out.append((row, roofline.tokens_per_second(cell_of(row), shapes[row["size"]], row["gpu"])))
    return out


def planner_error(pairs: Sequence[tuple[Row, float]]) -> float:
    """Median relative error of the predicted throughput."""
    return statistics.median(abs(predicted / row["tok_s_best"] - 1) for row, predicted in pairs)


def planner_regrets(rows: Sequence[Row], shapes: Mapping[str, Shape], folds: int = 4) -> list[float]:
    """How much more the chosen cell costs than the cheapest one, as a fraction, for each fold and size.

    A random quarter of the cells (with four folds) is left out and predicted from the others; the choice for a size is
    the best of measured and predicted cells, per device.
    """
    best = best_rows(rows)
    random.Random(0).shuffle(best)
    regrets = []
    for fold in range(folds):
        held_out = best[fold::folds]
        roofline = fit_roofline([row for row in best if row not in held_out], shapes)
        for size in {row["size"] for row in held_out}:
            pairs = []
            for row in (row for row in best if row["size"] == size):
                believed = row["tok_s_best"]
                if row in held_out:
                    believed = roofline.tokens_per_second(cell_of(row), shapes[size], row["gpu"])
                pairs.append((row["tok_s_best"] / row["n_gpu"], believed / row["n_gpu"]))
            regrets.append(max(pairs)[0] / max(pairs, key=lambda pair: pair[1])[0] - 1)
    return regrets


def plan(
    candidates: Sequence[tuple[Cell, str]],
    rows: Sequence[Row],
    shapes: Mapping[str, Shape],
    prices: Mapping[str, float],
    unit: str = "usd",
    memory_gib: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Rank configurations by price, the cheapest first; what does not fit the memory comes last.

    Args:
        candidates: Cells and the names of their devices.
        rows: Measured rows.
        shapes: Shapes of the sizes.
        prices: Price of each device.
        unit: Unit of the prices, see `tokens_per_dollar`.
        memory_gib: Memory of devices without a data sheet.

    Returns:
        One mapping for each candidate: the cell's options, `gpu`, `source` (`measured` or `predicted`), `tok_s_global`,
        `tokens_per_dollar`, `mem_estimate_gib`, `fits`.

    Raises:
        ValueError: If a price is missing or a candidate cannot be predicted.
    """
    measured = {(cell_of(row), row["gpu"]): row for row in best_rows(rows)}
    failed = {(cell_of(row), row["gpu"]) for row in rows if row["status"] == "oom"}
    rooflines: dict[tuple[Any, ...], Roofline] = {}
    out = []
    for cell, gpu in candidates:
        shape, price = shapes[cell.size], costs.price_of(gpu, prices)
        estimate = memory_of(cell, shape) / GIB
        sheet = DEVICES[gpu].memory_bytes / GIB if gpu in DEVICES else float("inf")
        limit = (memory_gib or {}).get(gpu, sheet)
        row = measured.get((cell, gpu))
        if row is not None:
            speed = row["tok_s_best"]
        else:
            mode = tuple(getattr(cell, key) for key in MODE)
            if mode not in rooflines:
                same = [r for r in rows if tuple(r[key] for key in MODE) == mode]
                rooflines[mode] = fit_roofline(same, shapes)
            speed = rooflines[mode].tokens_per_second(cell, shape, gpu)
        fits = row is not None or ((cell, gpu) not in failed and estimate <= limit)
        out.append(
            {
                **vars(cell),
                "gpu": gpu,
                "source": "measured" if row is not None else "predicted",
                "tok_s_global": speed,
                "tokens_per_dollar": costs.tokens_per_dollar(speed, cell.n_gpu, price, unit) if fits else 0.0,
                "mem_estimate_gib": estimate,
                "fits": fits,
            }
        )
    return sorted(out, key=lambda entry: -entry["tokens_per_dollar"])
