"""Grids of cells: reading them, measuring what is missing, rows with speed, MFU, memory and tokens a dollar."""

from __future__ import annotations

import csv
import io
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from zoo.errors import UsageError, did_you_mean
from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.costs import GIB, SIZES, Shape
from zoo.methods.slm_bottlenecks.measure import Cell, Effort, run_cell
from zoo.runs import write_atomically

#: Columns of the table, in order.
COLUMNS = (
    *(f.name for f in fields(Cell)), "gpu", "repeat", "status", "tok_s_device", "tok_s_global", "tok_s_best",
    "step_ms_mean", "step_ms_std", "step_ms_p50", "tflops_device", "mfu", "mem_active_gib", "mem_reserved_gib",
    "mem_estimate_gib", "alloc_retries", "price", "tokens_per_dollar", "torch", "transformers", "note",
)  # fmt: skip
#: Rows that stand; the others are measured again.
FINAL = ("ok", "oom", "unsupported")
#: Plain values of a grid: type, least value, what is accepted in words.
_PLAIN = {
    "repeats": ("int", 1, "a whole number, 1 or more"),
    "max_memory_gib": ("float", 0, "a number, 0 for the data sheet's"),
    "force": ("bool", False, "true or false"),
}
_KEYS = ("axes", "sizes", "effort", "repeats", "gpu", "prices", "unit", "max_memory_gib", "force")


@dataclass(frozen=True)
class Grid:
    """What to measure, and what a second of the machine costs.

    Attributes:
        cells: The cells.
        shapes: Shapes of the models by name.
        effort: How long each is measured.
        repeats: How often; all cells once before any of them again, so that drifts of the machine hit all alike.
        gpu: Name of the device in the prices.
        prices: Price of a device by name.
        unit: `ratio` (to an A100-40GB) or `usd` (an hour).
        max_memory_gib: Memory of a device; cells that are estimated to need more are not started. 0: its data sheet.
        force: Start them nevertheless.
    """

    cells: tuple[Cell, ...]
    shapes: Mapping[str, Shape]
    effort: Effort = field(default_factory=Effort)
    repeats: int = 3
    gpu: str = "cpu"
    prices: Mapping[str, float] = field(default_factory=lambda: dict(costs.PAPER_RATIOS))
    unit: str = "ratio"
    max_memory_gib: float = 0.0
    force: bool = False

    @property
    def limit_bytes(self) -> float:
        """Memory of a device; infinite if it is not known."""
        known = costs.DEVICES.get(self.gpu)
        sheet = known.memory_bytes if known else float("inf")
        return self.max_memory_gib * GIB if self.max_memory_gib else sheet

    def estimate(self, cell: Cell) -> float:
        """Estimated peak memory of a cell on one device, bytes."""
        return memory_of(cell, self.shapes[cell.size])


def memory_of(cell: Cell, shape: Shape) -> float:
    """Estimated peak memory of a cell on one device, bytes."""
    return costs.memory_bytes(
        shape, cell.batch, cell.seq_len, cell.attention, cell.precision, cell.comm, cell.n_gpu, cell.loss_chunks,
        cell.checkpointing,
    )  # fmt: skip


def _reject(where: str, key: str, value: Any, accepted: str) -> UsageError:
    return UsageError(f"{where}: {key}: {value!r} is not accepted; {accepted}")


def read_shapes(given: Mapping[str, Any], where: str) -> dict[str, Shape]:
    """Return the paper's sizes and those of a grid, `{name: {width: 128, depth: 2, vocab_size: 2048}}`.

    Raises:
        UsageError: If a value is not accepted.
    """
    known = [f.name for f in fields(Shape)]
    shapes = dict(SIZES)
    for name, values in given.items():
        for key in values:
            if key not in known:
                raise _reject(where, f"sizes.{name}", key, did_you_mean(str(key), known))
        try:
            shapes[name] = Shape(**values)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}: sizes.{name}: {error}") from error
    return shapes


def expand(axes: Mapping[str, Any], where: str) -> list[Cell]:
    """Return all combinations of the values of axes, without those that mean nothing.

    One device communicates with nobody (`single`), several do.

    Raises:
        UsageError: If an axis or a value of it is not known, or nothing is left.
    """
    known = {f.name: f for f in fields(Cell)}
    allowed = {"attention": costs.ATTENTIONS, "comm": costs.COMMS, "precision": tuple(costs.PRECISIONS)}
    lists: dict[str, list[Any]] = {}
    for key, value in axes.items():
        if key not in known:
            raise _reject(where, "axes", key, did_you_mean(str(key), known))
        lists[key] = list(value) if isinstance(value, list | tuple) else [value]
        for item in lists[key]:
            kind = str(known[key].type)
            if not _is(item, kind) or (kind == "int" and item < (key != "loss_chunks")):
                raise _reject(where, f"axes.{key}", item, f"accepted: values of type {kind}, positive")
            if key in allowed and item not in allowed[key]:
                raise _reject(where, f"axes.{key}", item, did_you_mean(str(item), allowed[key]))
    if "size" not in lists:
        raise UsageError(f"{where}: axes.size is missing", "the names of the models, such as [100m, 1b]")
    cells = [Cell(**dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]
    kept = [cell for cell in cells if (cell.n_gpu == 1) == (cell.comm == "single")]
    if not kept:
        raise UsageError(
            f"{where}: axes: none of the {len(cells)} combinations can run",
            "one device goes with comm single, several with ddp, fsdp_full or fsdp_grad_op",
        )
    return kept


def _is(value: Any, kind: str) -> bool:
    """Whether a value read from YAML has the type of a field."""
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value).__name__ == kind


def read_effort(given: Any, where: str) -> Effort:
    """Read how long a cell is measured.

    Raises:
        UsageError: If a value is not accepted.
    """
    known = {f.name: str(f.type) for f in fields(Effort)}
    least = {"steps": 1, "timeout": 1}
    choices = {"device": ("cpu", "cuda"), "clock": ("wall", "cpu")}
    if not isinstance(given, Mapping):
        raise _reject(where, "effort", given, "accepted: {steps: 10, warmup: 3}")
    for key, value in given.items():
        if key not in known:
            raise _reject(where, "effort", key, did_you_mean(str(key), known))
        if key in choices and value not in choices[key]:
            raise _reject(where, f"effort.{key}", value, f"accepted: {', '.join(choices[key])}")
        if key not in choices and (not _is(value, known[key]) or value < least.get(key, 0)):
            raise _reject(where, f"effort.{key}", value, f"accepted: {known[key]}, {least.get(key, 0)} or more")
    return Effort(**given)


def read_grid(content: Any, where: str, here: bool = True, **changes: Any) -> Grid:
    """Read a grid from plain values.

    Args:
        content: A mapping with `axes` (option of `Cell` -> list of values) and, where they differ from the defaults,
            `sizes`, `effort`, `repeats`, `gpu`, `prices`, `unit`, `max_memory_gib`, `force`.
        where: File or option that it comes from, for errors.
        here: Whether the grid will be measured on this machine. Otherwise its device need not be there.
        changes: Replace values of `content`.

    Raises:
        UsageError: For the first mistake: key, value and what is accepted.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("axes"), Mapping):
        raise UsageError(f"{where}: axes is missing", "axes: {size: [100m], batch: [4, 8]}")
    content = {**content, **changes}
    for key in content:
        if key not in _KEYS:
            raise _reject(where, "grid", key, did_you_mean(str(key), _KEYS))
    shapes = read_shapes(content.get("sizes") or {}, where)
    cells = expand(content["axes"], where)
    for cell in cells:
        if cell.size not in shapes:
            raise _reject(where, "axes.size", cell.size, did_you_mean(cell.size, shapes))
    effort = read_effort(content.get("effort") or {}, where)
    if effort.clock == "cpu" and (effort.device, effort.threads, max(c.n_gpu for c in cells)) != ("cpu", 1, 1):
        raise _reject(where, "effort.clock", "cpu", "it goes with device cpu, threads 1 and n_gpu 1")
    for key, (kind, least, accepted) in _PLAIN.items():
        if key in content and (not _is(content[key], kind) or content[key] < least):
            raise _reject(where, key, content[key], f"accepted: {accepted}")
    gpu = content.get("gpu") or (this_device(effort.device, where) if here else "")
    prices = {**costs.PAPER_RATIOS, "cpu": 1.0} if content.get("prices") is None else dict(content["prices"])
    unit = content.get("unit", "ratio" if content.get("prices") is None else "usd")
    try:
        for name in [gpu] if gpu else prices:
            costs.tokens_per_dollar(1.0, 1, costs.price_of(name, prices), unit)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: {error}", "prices: {NAME: dollars an hour}, or gpu: NAME of one that has"
        ) from error
    rest = {key: content[key] for key in ("repeats", "max_memory_gib", "force") if key in content}
    return Grid(tuple(cells), shapes, effort, gpu=gpu, prices=prices, unit=unit, **rest)


def this_device(kind: str, where: str) -> str:
    """Return the name of this machine's device.

    Raises:
        UsageError: If it is asked for a GPU and has none.
    """
    if kind == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"{where}: effort.device: 'cuda' is not here", "effort: {device: cpu} measures the processor")
    sheet = torch.cuda.get_device_properties(0)
    return costs.device_of(sheet.name, sheet.total_memory)


def fill_row(cell: Cell, grid: Grid, repeat: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """Make a row of the table from what `run_cell` has returned; without a time all speeds are 0.

    A processor has no MFU, whatever name its price goes by.
    """
    shape, row = grid.shapes[cell.size], dict.fromkeys(COLUMNS)
    tokens = cell.batch * cell.seq_len
    flops = costs.flops_per_token(shape, cell.seq_len)
    known = {key: value for key, value in result.items() if key in COLUMNS}
    row |= {**asdict(cell), "gpu": grid.gpu, "repeat": repeat, **known, **_versions()}
    row["mem_estimate_gib"] = grid.estimate(cell) / GIB
    row |= dict.fromkeys(("tok_s_device", "tok_s_global", "tok_s_best"), 0.0)
    if result["status"] == "ok":
        steps = result["step_seconds"]
        device = costs.tokens_per_second(tokens * len(steps), result["seconds"])
        row |= {
            "tok_s_device": device,
            "tok_s_global": device * cell.n_gpu,
            "tok_s_best": tokens * cell.n_gpu / min(steps),
            "step_ms_mean": 1e3 * statistics.fmean(steps),
            "step_ms_std": 1e3 * (statistics.stdev(steps) if len(steps) > 1 else 0.0),
            "step_ms_p50": 1e3 * statistics.median(steps),
            "tflops_device": device * flops / 1e12,
            "mfu": costs.mfu(device, flops, grid.gpu, cell.precision) if grid.effort.device == "cuda" else None,
        }
    return priced(row, grid)


def priced(row: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """Return a row with the prices of a grid."""
    price = costs.price_of(grid.gpu, grid.prices)
    dollar = costs.tokens_per_dollar(row["tok_s_global"], row["n_gpu"], price, grid.unit)
    return {**row, "price": price, "tokens_per_dollar": dollar}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers")}


Runner = Callable[[Cell, Shape, Effort], Mapping[str, Any]]


def run_grid(
    grid: Grid,
    path: Path | None = None,
    report: Callable[[Mapping[str, Any]], None] = lambda row: None,
    run: Runner = run_cell,
) -> list[dict[str, Any]]:
    """Measure the cells of a grid that are not in the table yet.

    Args:
        grid: The grid.
        path: CSV file that takes each row as soon as it is measured and is read at the start; None keeps no file. Its
            rows of other cells and devices stay.
        report: Is told each new row.
        run: What measures a cell.

    Returns:
        All rows of the grid, those of earlier calls among them.

    Raises:
        UsageError: If not one cell can run.
    """
    fits = {cell: grid.force or grid.estimate(cell) <= grid.limit_bytes for cell in grid.cells}
    if not any(fits.values()):
        least = min(map(grid.estimate, grid.cells)) / GIB
        raise UsageError(
            f"no cell can run: the smallest is estimated at {least:.3g} GiB, {grid.gpu} has "
            f"{grid.limit_bytes / GIB:.3g} GiB",
            "smaller sizes or batches, or force (--force) to try nevertheless",
        )
    rows: dict[tuple[Cell, int], dict[str, Any]] = {}
    if path is not None:
        kept = [row for row in read_rows(path) if row["status"] in FINAL]
        write_rows(path, kept)  # also mends the half line that a kill has left
        rows = {(cell_of(row), row["repeat"]): priced(row, grid) for row in kept if row["gpu"] == grid.gpu}
    for repeat in range(grid.repeats):
        for cell in grid.cells:
            if (cell, repeat) in rows:
                continue
            earlier = rows.get((cell, 0))
            if not fits[cell]:
                result: Mapping[str, Any] = {"status": "oom", "note": "estimated, not started"}
            elif earlier is not None and earlier["status"] != "ok":
                result = {"status": earlier["status"], "note": "as the first time"}
            else:
                result = run(cell, grid.shapes[cell.size], replace(grid.effort, seed=grid.effort.seed + repeat))
            row = rows[cell, repeat] = fill_row(cell, grid, repeat, result)
            report(row)
            if path is not None:
                append_row(path, row)
    return [rows[cell, repeat] for repeat in range(grid.repeats) for cell in grid.cells]


def cell_of(row: Mapping[str, Any]) -> Cell:
    """Return the cell that a row belongs to."""
    return Cell(**{f.name: row[f.name] for f in fields(Cell)})


def _read_value(column: str, text: str) -> Any:
    if text == "":
        return None
    if column in ("compile", "fused", "checkpointing"):
        return text == "True"
    if column in ("size", "attention", "comm", "precision", "gpu", "status", "note", "torch", "transformers"):
        return text
    return int(text) if column in ("batch", "n_gpu", "seq_len", "loss_chunks", "repeat") else float(text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a table; empty if there is none.

    Raises:
        UsageError: If it is another table.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UsageError(f"{path} is no table of this version", "move it out of the way")
        # a killed process may leave half a line
        return [
            {column: _read_value(column, text) for column, text in line.items()}
            for line in reader
            if None not in line.values()
        ]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a table at once."""
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
        file.flush()
        os.fsync(file.fileno())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table: CSV, or parquet by its name (needs pyarrow, which the extra `data` brings)."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UsageError(f"{path}: parquet needs the extra data", "pip install 'method-zoo[data]'") from error
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def value_of(rows: Sequence[Mapping[str, Any]], column: str, **where: Any) -> float:
    """Best `column` over the repeats of the cells that match, 0 if none has run."""
    found = [row[column] for row in rows if all(row[k] == v for k, v in where.items()) and row["status"] == "ok"]
    return max(found, default=0.0)
