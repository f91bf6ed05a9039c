"""The studies behind the claims: a grid is measured (or the published points are read) and becomes a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.grid import Grid, value_of
from zoo.methods.slm_bottlenecks.planner import leave_one_out, planner_error, planner_regrets
from zoo.methods.slm_bottlenecks.replay import findings

Rows = Sequence[Mapping[str, Any]]


def attention(rows: Rows, grid: Grid) -> dict[str, float]:
    """Speed of every attention over that of `eager` and the largest batch that runs, by size.

    Speeds are those of the best batch of each where there are several.
    """
    out: dict[str, float] = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        eager = value_of(rows, "tok_s_best", size=size, attention="eager")
        for name in dict.fromkeys(cell.attention for cell in grid.cells):
            if name != "eager" and eager:
                out[f"{name}_speedup_{size}"] = value_of(rows, "tok_s_best", size=size, attention=name) / eager
            out[f"{name}_largest_batch_{size}"] = value_of(rows, "batch", size=size, attention=name)
    return out


def batch(rows: Rows, grid: Grid) -> dict[str, float]:
    """What the largest batch gains over a quarter of it: in speed, and in estimated memory without the weights."""
    out: dict[str, float] = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        cells = [cell for cell in grid.cells if cell.size == size]
        most = max(cells, key=lambda cell: cell.batch)
        quarter = next(cell for cell in cells if cell.batch == most.batch // 4)
        speeds = [value_of(rows, "tok_s_best", size=size, batch=cell.batch) for cell in (most, quarter)]
        states = costs.state_bytes(grid.shapes[size].parameters, most.precision)
        memory = [grid.estimate(cell) - states for cell in (most, quarter)]
        out |= {f"saturation_{size}": speeds[0] / speeds[1], f"memory_growth_{size}": memory[0] / memory[1]}
    return out


def comm(rows: Rows, grid: Grid) -> dict[str, float]:
    """Speed of `ddp` over that of each other scheme that runs here."""
    out: dict[str, float] = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        ddp = value_of(rows, "tok_s_best", size=size, comm="ddp")
        for name in ("fsdp_full", "fsdp_grad_op"):
            other = value_of(rows, "tok_s_best", size=size, comm=name)
            if ddp and other:
                out[f"ddp_over_{name}_{size}"] = ddp / other
    return out


def levers(rows: Rows, grid: Grid) -> dict[str, float]:
    """The fastest cell of each size, and how much faster it is than the plain one: eager, not compiled, foreach."""
    out: dict[str, float] = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        best = value_of(rows, "tok_s_best", size=size)
        plain = value_of(rows, "tok_s_best", size=size, attention="eager", compile=False, fused=False)
        out[f"best_tokens_per_second_{size}"] = best
        if plain:
            out[f"tuned_speedup_{size}"] = best / plain
        if any(row["mfu"] for row in rows if row["size"] == size):
            out[f"best_mfu_{size}"] = value_of(rows, "mfu", size=size)
    return out


def planner(rows: Rows, grid: Grid) -> dict[str, float]:
    """Error of the predicted speed of cells that were left out, and what a choice by predictions costs too much."""
    regrets = planner_regrets(rows, grid.shapes)
    error = planner_error(leave_one_out(rows, grid.shapes))
    return {"planner_error": error, "planner_regret": fmean(regrets), "planner_regret_worst": max(regrets)}


def replay(rows: Rows, grid: Grid) -> dict[str, float]:
    """The paper's findings on its own points."""
    return findings()


#: Name -> numbers of the rows of a grid.
STUDIES: dict[str, Callable[[Rows, Grid], dict[str, float]]] = {
    "attention": attention, "batch": batch, "comm": comm, "levers": levers, "planner": planner, "replay": replay,
}  # fmt: skip
