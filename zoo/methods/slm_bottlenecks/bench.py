"""`zoo bench slm_bottlenecks --grid` measures a grid of configurations, `--plan` ranks configurations by price."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.config import load_layers, parse_yaml, resolve_config
from zoo.errors import UsageError, did_you_mean
from zoo.methods.slm_bottlenecks.checks import check_grid
from zoo.methods.slm_bottlenecks.costs import tokens_per_dollar
from zoo.methods.slm_bottlenecks.grid import (
    COLUMNS,
    Grid,
    expand,
    read_grid,
    read_rows,
    read_shapes,
    run_grid,
    write_rows,
)
from zoo.methods.slm_bottlenecks.losses import LossLaw
from zoo.methods.slm_bottlenecks.planner import best_rows, plan
from zoo.methods.slm_bottlenecks.reduce import over_repeats, reduce_best

DESCRIPTION = """\
--grid: train every cell of a grid for a few steps in fresh processes; write cells.csv (and .parquet where pyarrow is
there), the paper's figures and best.csv. The same command goes on where one was stopped. The grid is a file with
`axes`, or a config with one: slm_bottlenecks/attention.
--plan: run nothing; rank the configurations of a file by price, from the cells of earlier grids.
"""
PLAN_KEYS = ("axes", "sizes", "gpus", "prices", "unit", "memory_gib", "tokens", "law", "target_loss")
#: Columns of a plan that are shown.
SHOWN = ("size", "gpu", "n_gpu", "comm", "attention", "batch")


def main(argv: Sequence[str]) -> int:
    """Answer `zoo bench slm_bottlenecks` with `--grid` or `--plan`."""
    parser = argparse.ArgumentParser(prog="zoo bench slm_bottlenecks", description=DESCRIPTION, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", metavar="GRID", help="YAML file or config: what to measure")
    what.add_argument("--plan", metavar="PLAN", help="YAML file: what to choose from")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/slm_bottlenecks/grids/NAME")
    parser.add_argument("--force", action="store_true", help="start cells that are estimated not to fit the memory")
    parser.add_argument("--repeats", type=int, metavar="N", help="instead of the grid's")
    parser.add_argument("--wandb", choices=["offline", "online", "disabled"], help="log the table (default: disabled)")
    parser.add_argument("--cells", type=Path, action="append", metavar="CSV", help="measured cells; may be repeated")
    args = parser.parse_args(argv)
    if args.plan is not None:
        return show_plan(args.plan, args.cells or [], args.out)
    if args.cells:
        raise UsageError("--cells goes with --plan", "--out DIR continues the grid of that folder")
    changes = {key: value for key, value in (("force", args.force), ("repeats", args.repeats)) if value}
    if args.repeats is not None and args.repeats < 1:
        raise UsageError(f"--repeats {args.repeats}: at least 1")
    grid = load_grid(args.grid, changes)
    out = args.out or Path("runs/slm_bottlenecks/grids", Path(args.grid).stem)
    rows = measure_grid(grid, out)
    if args.wandb not in (None, "disabled"):
        log_table(rows, out, args.wandb)
    return 0


def read_mapping(name: str) -> tuple[dict[str, Any], Path]:
    """Read a YAML file that is no config.

    Raises:
        UsageError: If it is not there or no mapping.
    """
    path = resolve_config(name)
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a mapping is expected", "axes: {size: [100m], batch: [4, 8]}")
    return content, path


def load_grid(name: str, changes: Mapping[str, Any]) -> Grid:
    """Read a grid from its own file or from the study of a config.

    Args:
        name: Path or name.
        changes: Values instead of the file's.

    Raises:
        UsageError: If there is none, or a value is not accepted.
    """
    content, path = read_mapping(name)
    if "model" in content or "config" in content:
        model = load_layers([path], []).merged.get("model") or {}
        content = (model.get("init_args") or {}).get("grid") or {}
        if not content:
            raise UsageError(f"{path}: model.init_args.grid is missing", "the paper's points: zoo test --config "
                             "slm_bottlenecks/replay")  # fmt: skip
    check_values(content, path)
    return read_grid(content, str(path), **changes)


def check_values(content: Mapping[str, Any], where: Path) -> None:
    """See that nested values have the right types.

    Raises:
        UsageError: If one has not.
    """
    try:
        check_grid(content)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def measure_grid(grid: Grid, out: Path) -> list[dict[str, Any]]:
    """Measure what is missing in a folder, print rows as they come, write tables and figures there."""
    out.mkdir(parents=True, exist_ok=True)
    total, path = len(grid.cells) * grid.repeats, out / "cells.csv"

    print(f"{len(grid.cells)} cells, {grid.repeats} times each, on {grid.gpu}; {path} keeps what is measured")
    counted = [0]

    def report(row: Mapping[str, Any]) -> None:
        counted[0] += 1
        print(f"[{counted[0]} new of {total}] {describe(row)}", flush=True)

    rows = run_grid(grid, path, report)

    try:
        write_rows(out / "cells.parquet", rows)
    except UsageError:
        print("no cells.parquet: pyarrow is not installed (extra data)")
    best = list(reduce_best(over_repeats(rows), ("size",)).values())
    write_rows(out / "best.csv", [{column: row.get(column) for column in COLUMNS} for row in best])
    for row in best:
        print(f"best for {describe(row)}  {row['tokens_per_dollar']:,.0f} tokens a dollar ({grid.unit})")
    from zoo.methods.slm_bottlenecks.figures import paper_figures

    for name, figure in paper_figures(over_repeats(rows)).items():
        figure.savefig(out / f"{name}.png", dpi=150)
    print(f"written: {out}")
    return rows


def describe(row: Mapping[str, Any]) -> str:
    """One line about a row."""
    cell = f"{row['size']} {row['attention']} batch {row['batch']} x {row['n_gpu']} {row['comm']}: {row['status']}"
    if row["status"] != "ok":
        return f"{cell} {row['note'] or ''}".rstrip()
    mfu = f", MFU {row['mfu']:.1%}" if row["mfu"] else ""
    memory = f", {row['mem_active_gib']:.1f} GiB" if row["mem_active_gib"] else ""
    return f"{cell} {row['tok_s_global']:,.0f} tokens/s, {row['step_ms_p50']:.1f} ms{mfu}{memory}"


def log_table(rows: Sequence[Mapping[str, Any]], out: Path, mode: str) -> None:
    """Log the rows as a W&B table."""
    import wandb

    run = wandb.init(
        project="slm_bottlenecks", name=out.name, dir=os.fspath(out), mode="online" if mode == "online" else "offline"
    )
    data = [[row[column] for column in COLUMNS] for row in rows]
    run.log({"cells": wandb.Table(columns=list(COLUMNS), data=data)})
    run.finish()


def read_plan(name: str) -> dict[str, Any]:
    """Read what to choose from.

    Raises:
        UsageError: For the first mistake.
    """
    content, path = read_mapping(name)
    for key in content:
        if key not in PLAN_KEYS:
            raise UsageError(f"{path}: {key!r} is not accepted; {did_you_mean(str(key), PLAN_KEYS)}")
    for key in ("axes", "gpus", "prices"):
        if not content.get(key):
            examples = {"axes": "{size: [1b], batch: [8, 16]}", "gpus": "[H100-80GB]", "prices": "{H100-80GB: 2.5}"}
            raise UsageError(f"{path}: {key} is missing", f"{key}: {examples[key]}")
    check_values(content, path)
    law = content.get("law")
    if (law is None) != (content.get("target_loss") is None):
        raise UsageError(f"{path}: law and target_loss go together", "law: {floor: 1.7, scale: 1.0e+9, exponent: 0.2}")
    where = str(path)
    shapes = read_shapes(content.get("sizes") or {}, where)
    cells = expand(content["axes"], where)
    for cell in cells:
        if cell.size not in shapes:
            raise UsageError(f"{where}: axes.size: {cell.size!r}; {did_you_mean(cell.size, shapes)}")
    try:
        tokens = float(content.get("tokens") or 0)
        if law is not None:
            tokens = LossLaw(**{key: float(value) for key, value in law.items()}).tokens_to(
                float(content["target_loss"])
            )
        memory = {gpu: float(gib) for gpu, gib in (content.get("memory_gib") or {}).items()}
        prices = {gpu: float(content["prices"][gpu]) for gpu in content["gpus"]}
        for price in prices.values():
            tokens_per_dollar(1.0, 1, price, content.get("unit", "usd"))
    except KeyError as error:
        raise UsageError(f"{where}: prices: there is none for {error}", "prices: {NAME: dollars an hour}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error
    candidates = [(cell, gpu) for cell in cells for gpu in content["gpus"]]
    read = {"candidates": candidates, "shapes": shapes, "prices": prices, "tokens": tokens, "memory_gib": memory}
    return {**content, **read}


def show_plan(name: str, tables: Sequence[Path], out: Path | None) -> int:
    """Rank the configurations of a file, print the first ones and write plan.csv where `out` is given."""
    wanted = read_plan(name)
    rows = [row for path in tables for row in read_rows(path)]
    if not best_rows(rows):
        raise UsageError("--cells: no measured cells to predict from", "zoo bench slm_bottlenecks --grid GRID")
    unknown = {row["size"] for row in rows} - set(wanted["shapes"])
    if unknown:
        raise UsageError(f"{name}: sizes: {min(unknown)!r} of the measured cells is not there", "copy it from the grid")
    unit = wanted.get("unit", "usd")
    try:
        ranked = plan(wanted["candidates"], rows, wanted["shapes"], wanted["prices"], unit, wanted["memory_gib"])
    except ValueError as error:
        raise UsageError(f"{name}: {error}", "measure cells of that kind, or leave the candidate out") from error
    for entry in ranked:
        fits = entry["fits"] and wanted["tokens"]
        entry["hours"] = wanted["tokens"] / entry["tok_s_global"] / 3600 if fits else None
        entry["cost"] = wanted["tokens"] / entry["tokens_per_dollar"] if fits else None
    show_ranked(ranked, unit, wanted["tokens"])
    if not any(entry["fits"] for entry in ranked):
        raise UsageError(f"{name}: no configuration fits its memory", "smaller batches, sharding, or other gpus")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "plan.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(ranked[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(ranked)
        print(f"written: {out / 'plan.csv'}")
    return 0


def show_ranked(ranked: Sequence[Mapping[str, Any]], unit: str, tokens: float, first: int = 20) -> None:
    """Print the cheapest configurations, and how many were left out."""
    from rich.console import Console
    from rich.table import Table

    money = "dollars" if unit == "usd" else "A100-40GB seconds"
    table = Table(title=f"for {tokens:.3g} tokens" if tokens else None)
    for column in (*SHOWN, "source", "tokens/s", f"tokens per {money.removesuffix('s')}", "GiB"):
        table.add_column(column)
    for column in ("hours", money) if tokens else ():
        table.add_column(column)
    fitting = [entry for entry in ranked if entry["fits"]]
    for entry in fitting[:first]:
        cost = [f"{entry['hours']:,.2f}", f"{entry['cost']:,.2f}"] if tokens else []
        table.add_row(
            *(str(entry[key]) for key in SHOWN), entry["source"], f"{entry['tok_s_global']:,.0f}",
            f"{entry['tokens_per_dollar']:,.0f}", f"{entry['mem_estimate_gib']:.2f}", *cost,
        )  # fmt: skip
    Console(width=None if os.isatty(1) else 140).print(table)
    print(f"{len(fitting)} configurations fit, {len(ranked) - len(fitting)} do not fit their memory")
