"""Grids: rows from times, what fails is a row too, a stopped grid goes on, bad input is named."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo.errors import UsageError
from zoo.main import main
from zoo.methods.slm_bottlenecks import costs, measure
from zoo.methods.slm_bottlenecks.checks import check_options
from zoo.methods.slm_bottlenecks.costs import GIB, Shape
from zoo.methods.slm_bottlenecks.grid import (
    COLUMNS,
    Grid,
    append_row,
    fill_row,
    read_grid,
    read_rows,
    run_grid,
    write_rows,
)
from zoo.methods.slm_bottlenecks.measure import Cell, Effort, classify, join_ranks, run_cell

TINY = Shape(64, 32, 1, head_dim=16)
CELLS = tuple(Cell("tiny", batch=batch, seq_len=16, precision="32-true") for batch in (1, 2, 4))
OK = {"status": "ok", "seconds": 2.0, "step_seconds": [0.2] * 10, "mem_active_gib": 1.0, "note": None}
AXES = {"axes": {"size": "1b", "batch": [4]}, "gpu": "H100-80GB"}


def grid_of(cells: tuple[Cell, ...] = CELLS, **changes: Any) -> Grid:
    return Grid(cells, {**costs.SIZES, "tiny": TINY}, **{"repeats": 2, "prices": {"cpu": 2.0}, **changes})


def test_row_from_times() -> None:
    cell = Cell("1b", "flash", batch=8, n_gpu=4, comm="ddp")
    grid = grid_of((cell,), gpu="H100-80GB", prices={"H100-80GB": 2.5}, effort=Effort("cuda"))
    row = fill_row(cell, grid, 0, {**OK, "step_seconds": [0.15, 0.25] * 5})
    assert tuple(row) == COLUMNS
    assert row["tok_s_device"] == pytest.approx(10 * 8 * 1024 / 2.0)
    assert row["tok_s_global"] == pytest.approx(4 * row["tok_s_device"])
    assert row["tok_s_best"] == pytest.approx(4 * 8 * 1024 / 0.15)
    assert row["tokens_per_dollar"] == pytest.approx(row["tok_s_device"] / 2.5)
    assert row["step_ms_mean"] == row["step_ms_p50"] == pytest.approx(200)
    assert row["step_ms_std"] == pytest.approx(1e3 * (10 * 0.05**2 / 9) ** 0.5)
    flops = costs.flops_per_token(costs.SIZES["1b"], 1024)
    assert 0 < row["mfu"] < 1
    assert row["mfu"] * 989e12 / flops == pytest.approx(row["tok_s_device"])
    assert row["tflops_device"] == pytest.approx(row["mfu"] * 989)


def test_a_processor_has_no_mfu() -> None:
    cell = Cell("1b")
    assert fill_row(cell, grid_of((cell,), gpu="H100-80GB", prices={"H100-80GB": 1.0}), 0, OK)["mfu"] is None


@pytest.mark.parametrize("status", ["oom", "unsupported", "failed", "killed"])
def test_what_did_not_run_costs_everything(status: str) -> None:
    row = fill_row(CELLS[0], grid_of(), 0, {"status": status, "note": "why"})
    assert row["tok_s_global"] == row["tokens_per_dollar"] == row["tok_s_best"] == 0
    assert (row["status"], row["note"], row["mfu"]) == (status, "why", None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("No viable backend for scaled_dot_product_attention was found."), "unsupported"),
        (NotImplementedError("reduce_scatter"), "unsupported"),
        (RuntimeError("shape '[2]' is invalid"), "failed"),
    ],
)
def test_classification(error: Exception, status: str) -> None:
    assert classify(error) == status


def test_warm_up_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, real = [0.0], measure.CausalLM.forward

    def forward(self: Any, *args: Any) -> torch.Tensor:
        now[0] += 1.0 if now[0] >= 200 else 100.0  # two slow steps, then a second each
        return real(self, *args)

    monkeypatch.setattr(measure.CausalLM, "forward", forward)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0))
    result = measure.measure(CELLS[0], TINY, Effort(steps=4, warmup=2))
    assert result["seconds"] == 4.0
    assert result["step_seconds"] == [1.0] * 4
    assert len(result["losses"]) == 6


def test_slowest_rank_counts() -> None:
    ranks: list[Mapping[str, Any]] = [
        {"seconds": s, "step_seconds": [s], "losses": [s], "mem_active_gib": 3 - s, "mem_reserved_gib": s}
        | {"alloc_retries": 0}
        for s in (1.0, 2.0)
    ]
    joined = join_ranks(ranks)
    assert (joined["seconds"], joined["mem_active_gib"], joined["mem_reserved_gib"]) == (2.0, 2.0, 2.0)
    assert joined["losses"] == [1.5]


class Machine:
    """Takes the place of `run_cell`: remembers what it was asked for."""

    def __init__(self, results: Mapping[Cell, Mapping[str, Any]] | None = None, stop_after: int = 99) -> None:
        self.results, self.stop_after, self.asked = results or {}, stop_after, list[tuple[Cell, int]]()

    def __call__(self, cell: Cell, shape: Shape, effort: Effort) -> Mapping[str, Any]:
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((cell, effort.seed))
        return self.results.get(cell, OK)


def test_all_cells_once_before_any_again() -> None:
    machine = Machine()
    run_grid(grid_of(), run=machine)
    assert machine.asked == [(cell, repeat) for repeat in range(2) for cell in CELLS]


def test_failures_are_rows_and_not_repeated() -> None:
    machine = Machine({CELLS[1]: {"status": "oom", "note": "CUDA out of memory"}})
    rows = run_grid(grid_of(), run=machine)
    assert len(rows) == 6
    assert [row["status"] for row in rows] == ["ok", "oom", "ok"] * 2
    assert len(machine.asked) == 5


def test_a_stopped_grid_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    first = Machine(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid_of(), path, run=first)
    with path.open("a") as file:
        file.write("tiny,sdpa,2,1")  # the kill came in the middle of a line
    second = Machine()
    rows = run_grid(grid_of(), path, run=second)
    assert first.asked + second.asked == [(cell, repeat) for repeat in range(2) for cell in CELLS]
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert run_grid(grid_of(), path, run=Machine(stop_after=0)) == rows  # nothing left to do


def test_killed_and_failed_cells_are_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    run_grid(grid_of(repeats=1), path, run=Machine({CELLS[0]: {"status": "killed", "note": "the process ended"}}))
    again = Machine()
    rows = run_grid(grid_of(repeats=1), path, run=again)
    assert again.asked == [(CELLS[0], 0)]
    assert len(read_rows(path)) == len(rows) == 3


def test_other_devices_and_prices(tmp_path: Path) -> None:
    path = tmp_path / "cells.csv"
    cheap = run_grid(grid_of(repeats=1), path, run=Machine())
    dear = run_grid(grid_of(repeats=1, prices={"cpu": 4.0}), path, run=Machine(stop_after=0))
    assert dear[0]["tokens_per_dollar"] == pytest.approx(cheap[0]["tokens_per_dollar"] / 2)
    other = Machine()
    run_grid(grid_of(repeats=1, gpu="A100-40GB", prices={"A100-40GB": 1.0}), path, run=other)
    assert len(other.asked) == 3  # a time of one device is none of another
    assert {row["gpu"] for row in read_rows(path)} == {"cpu", "A100-40GB"}


def test_what_does_not_fit_is_not_started() -> None:
    cells = (Cell("100m", batch=4), Cell("2b", batch=64))
    grid = grid_of(cells, gpu="A100-40GB", prices={"A100-40GB": 1.0}, repeats=1)
    machine = Machine()
    rows = run_grid(grid, run=machine)
    assert [cell for cell, _ in machine.asked] == [cells[0]]
    assert (rows[1]["status"], rows[1]["note"], rows[1]["tokens_per_dollar"]) == ("oom", "estimated, not started", 0)
    assert rows[1]["mem_estimate_gib"] > 40
    forced = Machine()
    run_grid(grid_of(cells, gpu="A100-40GB", prices={"A100-40GB": 1.0}, repeats=1, force=True), run=forced)
    assert len(forced.asked) == 2


def test_a_grid_without_a_cell_that_fits() -> None:
    grid = grid_of((Cell("2b", batch=64),), max_memory_gib=1.0)
    with pytest.raises(UsageError, match=r"no cell can run: the smallest is estimated at .* GiB, cpu has 1 GiB"):
        run_grid(grid, run=Machine())
    assert grid.limit_bytes == GIB


def test_tables_keep_types(tmp_path: Path) -> None:
    cell = Cell("tiny", batch=2, seq_len=16, compile=True, loss_chunks=2, checkpointing=True, precision="32-true")
    rows = [fill_row(cell, grid_of((cell,)), 1, OK), fill_row(cell, grid_of((cell,)), 0, {"status": "oom"})]
    write_rows(tmp_path / "cells.csv", rows[:1])
    append_row(tmp_path / "cells.csv", rows[1])
    assert read_rows(tmp_path / "cells.csv") == rows
    write_rows(tmp_path / "cells.parquet", rows)
    from pyarrow import parquet

    assert parquet.read_table(tmp_path / "cells.parquet").to_pylist() == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="is no table of this version"):
        read_rows(tmp_path / "other.csv")


def test_reading_a_grid() -> None:
    grid = read_grid({**AXES, "axes": {"size": ["100m", "1b"], "n_gpu": [1, 2], "batch": [4, 8],
                                       "comm": ["single", "ddp", "fsdp_full"]}}, "grid.yaml")  # fmt: skip
    # one device talks to nobody, two do
    assert len(grid.cells) == 2 * 2 * (1 + 2)
    assert (grid.unit, grid.prices["H100-80GB"], grid.gpu) == ("ratio", 2.53, "H100-80GB")
    usd = read_grid({**AXES, "prices": {"H100-80GB": 2.99}}, "grid.yaml")
    assert (usd.unit, usd.prices) == ("usd", {"H100-80GB": 2.99})
    own = read_grid({"axes": {"size": "s"}, "sizes": {"s": {"vocab_size": 64, "width": 64, "depth": 2}}}, "grid.yaml")
    assert own.gpu == "cpu"
    assert own.shapes["s"] == Shape(64, 64, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "grid.yaml: axes is missing"),
        ({"axes": {"batch": [4]}}, "axes.size is missing"),
        ({"axes": {"size": "7b"}}, "axes.size: '7b' is not accepted; accepted: 100m, 1b, 2b"),
        ({"axes": {"size": "1b", "atention": "eager"}}, "axes: 'atention' is not accepted; did you mean 'attention'"),
        ({"axes": {"size": "1b", "attention": "flash2"}}, "axes.attention: 'flash2' is not accepted; did you mean"),
        ({"axes": {"size": "1b", "batch": "4"}}, "axes.batch: '4' is not accepted; accepted: values of type int"),
        ({"axes": {"size": "1b", "batch": 0}}, "axes.batch: 0 is not accepted"),
        ({"axes": {"size": "1b", "compile": 1}}, "axes.compile: 1 is not accepted; accepted: values of type bool"),
        ({"axes": {"size": "1b", "n_gpu": 2}}, "none of the 1 combinations can run"),
        ({**AXES, "gird": 1}, "grid: 'gird' is not accepted"),
        ({**AXES, "gpu": "L4"}, "prices: there is none for 'L4'"),
        ({**AXES, "prices": {"H100-80GB": 0}}, "price: 0 is not accepted; accepted: a number above 0"),
        ({**AXES, "unit": "eur"}, "unit: 'eur' is not accepted"),
        ({**AXES, "repeats": 0}, "repeats: 0 is not accepted; accepted: a whole number, 1 or more"),
        ({**AXES, "max_memory_gib": "80"}, "max_memory_gib: '80' is not accepted; accepted: a number"),
        ({**AXES, "force": "yes"}, "force: 'yes' is not accepted; accepted: true or false"),
        ({**AXES, "effort": {"steps": 0}}, "effort.steps: 0 is not accepted; accepted: int, 1 or more"),
        ({**AXES, "effort": {"step": 5}}, "effort: 'step' is not accepted; did you mean 'steps'"),
        ({**AXES, "effort": {"device": "tpu"}}, "effort.device: 'tpu' is not accepted; accepted: cpu, cuda"),
        ({**AXES, "effort": {"clock": "cpu", "threads": 2}}, "effort.clock: 'cpu' is not accepted; it goes with"),
        ({**AXES, "sizes": {"s": {"widht": 64}}}, "sizes.s: 'widht' is not accepted; did you mean 'width'"),
        ({**AXES, "sizes": {"s": {"vocab_size": 9, "width": 65, "depth": 1}}}, "sizes.s: width: 65 is no multiple"),
    ],
)
def test_bad_grids(content: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_grid(content, "grid.yaml")
    assert message in str(caught.value)
    assert "grid.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"prices": {"cpu": "cheap"}}, "grid.prices.cpu: 'cheap' is not accepted; accepted: a number above 0"),
        ({"prices": {"cpu": True}}, "grid.prices.cpu: True is not accepted"),
        ({"prices": {"cpu": -1}}, "grid.prices.cpu: -1 is not accepted"),
        ({"prices": 2.5}, "grid.prices: 2.5 is not accepted; accepted: {NAME: dollars an hour}"),
        ({"gpu": 5}, "grid.gpu: 5 is not accepted; accepted: the name of a device"),
        ({"sizes": [64]}, "grid.sizes: [64] is not accepted"),
        ({"sizes": {"s": 64}}, "grid.sizes.s: 64 is not accepted"),
        ({"sizes": {"s": {"width": "64"}}}, "grid.sizes.s.width: '64' is not accepted; accepted: a whole number"),
    ],
)
def test_wrong_types_in_the_study_of_a_config(grid: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_options({"study": "attention", "grid": {**AXES, **grid}})
    check_options({})
    check_options({"grid": {**AXES, "prices": {"cpu": 2}, "sizes": {"s": {"width": 64}}}})


def test_a_text_for_a_price_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", "slm_bottlenecks/attention", "--model.grid.prices", "{cpu: cheap}"]) == 2
    error = capsys.readouterr().err
    assert "--model.grid.prices: model.init_args.grid.prices.cpu: 'cheap' is not accepted; accepted: a number" in error
    assert len(error.splitlines()) <= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here() -> None:
    content = {"axes": {"size": "1b"}, "effort": {"device": "cuda"}}
    with pytest.raises(UsageError, match="effort.device: 'cuda' is not here"):
        read_grid(content, "grid.yaml")
    assert read_grid(content, "grid.yaml", here=False).gpu == ""  # another machine will measure it


@pytest.fixture(scope="module")
def three_schemes() -> dict[str, dict[str, Any]]:
    """Losses of four steps on the same global batch: one process, and two with each scheme."""
    shape, effort = Shape(64, 32, 2, head_dim=16), Effort(steps=2, warmup=2, threads=1)
    common: dict[str, Any] = {"seq_len": 16, "precision": "32-true"}
    cells = {"single": Cell("s", batch=4, **common)}
    for comm in ("ddp", "fsdp_full", "fsdp_grad_op"):
        cells[comm] = Cell("s", batch=2, n_gpu=2, comm=comm, **common)
    return {name: run_cell(cell, shape, effort) for name, cell in cells.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over loopback is tested on Linux")
@pytest.mark.parametrize("comm", ["ddp", "fsdp_full", "fsdp_grad_op"])
def test_schemes_of_communication_do_the_same_maths(three_schemes: dict[str, dict[str, Any]], comm: str) -> None:
    one, two = three_schemes["single"], three_schemes[comm]
    assert one["status"] == two["status"] == "ok", (one, two)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert len({round(loss, 5) for loss in two["losses"]}) == 4  # the weights do change


def test_out_of_memory_in_a_real_process() -> None:
    result = run_cell(Cell("tiny", batch=2**42, seq_len=1, precision="32-true"), TINY, Effort(steps=1, warmup=0))
    assert result["status"] == "oom", result


def _die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(*args: Any) -> None:
    time.sleep(60)


def test_a_process_that_is_killed_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_rank", _die)
    assert run_cell(CELLS[0], TINY, Effort())["status"] == "killed"
    monkeypatch.setattr(measure, "_rank", _hang)
    assert run_cell(CELLS[0], TINY, Effort(timeout=0.2)) == {"status": "failed", "note": "no answer in 0.2 s"}


def test_cells_are_hashable_options() -> None:
    assert set(asdict(Cell("1b"))) <= set(COLUMNS)
