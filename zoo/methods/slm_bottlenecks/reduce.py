"""From rows of measurements to points of a figure: mean over repeats, best over what the figure does not show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

#: What tells one cell of a grid from another.
CELL_AXES = (
    "size", "gpu", "n_gpu", "comm", "attention", "batch", "seq_len", "precision", "compile", "fused", "loss_chunks",
    "checkpointing",
)  # fmt: skip


def over_repeats(rows: Sequence[Row], value: str = "tokens_per_dollar") -> list[dict[str, Any]]:
    """Join the repeats of each cell: mean of `value`, its standard deviation as `value_std`, their number `repeats`.

    A cell of which one repeat ran out of memory has run out of memory: 0. Repeats that were killed or have failed
    otherwise do not count; a cell without any other is left as it is.
    """
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row.get(axis) for axis in CELL_AXES), []).append(row)
    out = []
    for repeats in cells.values():
        counted = [row for row in repeats if row["status"] in ("ok", "oom")]
        first = next((row for row in counted if row["status"] == "oom"), (counted or repeats)[0])
        values = [float(row[value]) for row in counted] if first["status"] == "ok" else [0.0]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        out.append({**first, value: statistics.fmean(values), f"{value}_std": spread, "repeats": len(counted)})
    return out


def reduce_best(
    rows: Sequence[Row], axes: Sequence[str], value: str = "tokens_per_dollar"
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return for each combination of `axes` the row with the largest `value` over all that is not in `axes`.

    This is the paper's rule for every plotted point (Section 4). A group in which nothing could run stays, with 0.

    Args:
        rows: One row for each cell, see `over_repeats`.
        axes: Keys of the rows, `x` and legend of a figure.
        value: What is to be large.
    """
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(axis) for axis in axes)
        kept = {**row, value: float(row[value]) if row["status"] == "ok" else 0.0}
        if key not in best or kept[value] > best[key][value]:
            best[key] = kept
    return best
