"""The studies behind the claims: a grid is measured (or the published points are read) and becomes a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.grid import Grid, value_of
from zoo.methods.slm_bottlenecks.planner import leave_one_out, planner_error, planner_regret
from zoo.methods.slm_bottlenecks.replay import findings

Rows = Sequence[Mapping[str, Any]]


def attention(rows: Rows, grid: Grid) -> dict[str, float]:
    """Speed of every attention over that of `eager`, by size; the best batch of each where there are several."""
    out = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        eager = value_of(rows, "tok_s_best", size=size, attention="eager")
        for name in dict.fromkeys(cell.attention for cell in grid.cells):
            if name != "eager" and eager:
                out[f"{name}_speedup_{size}"] = value_of(rows, "tok_s_best", size=size, attention=name) / eager
    return out


def batch(rows: Rows, grid: Grid) -> dict[str, float]:
    """What the largest batch gains over a quarter of it: in speed, and in estimated memory without the weights."""
    out = {}
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
    out = {}
    for size in dict.fromkeys(cell.size for cell in grid.cells):
        ddp = value_of(rows, "tok_s_best", size=size, comm="ddp")
        for name in ("fsdp_full", "fsdp_grad_op"):
            other = value_of(rows, "tok_s_best", size=size, comm=name)
            if ddp and other:
                out[f"ddp_over_{name}_{size}"] = ddp / other
    return out


def planner(rows: Rows, grid: Grid) -> dict[str, float]:
    """Error of the predicted speed of cells that were left out, and what a choice by predictions costs too much."""
    pairs = leave_one_out(rows, grid.shapes)
    return {"planner_error": planner_error(pairs), "planner_regret": planner_regret(pairs)}


def replay(rows: Rows, grid: Grid) -> dict[str, float]:
    """The paper's findings on its own points."""
    return findings()


#: Name -> numbers of the rows of a grid.
STUDIES: dict[str, Callable[[Rows, Grid], dict[str, float]]] = {
    "attention": attention, "batch": batch, "comm": comm, "planner": planner, "replay": replay,
}  # fmt: skip
