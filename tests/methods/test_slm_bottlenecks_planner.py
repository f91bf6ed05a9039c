"""The planner on machines whose rates are known, and the commands `zoo bench slm_bottlenecks --grid` and `--plan`."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from zoo.commands.bench import default_config
from zoo.main import main
from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.bench import log_table
from zoo.methods.slm_bottlenecks.costs import SIZES, Shape
from zoo.methods.slm_bottlenecks.grid import COLUMNS, Grid, fill_row, read_rows, write_rows
from zoo.methods.slm_bottlenecks.measure import Cell, Effort
from zoo.methods.slm_bottlenecks.planner import (
    fit_roofline,
    leave_one_out,
    plan,
    planner_error,
    planner_regrets,
    sheet_seconds,
    similarity,
    work,
)

#: Inverse efficiencies of a made-up stack: seconds for a second at the rates of the data sheet.
RATES = {"latency": 5e-4, "matmul": 2.0, "attention": 4.0, "scores": 1.5, "activations": 2.5, "logits": 3.0,
         "states": 1.2, "communication": 1.4}  # fmt: skip
CELLS = [
    Cell(size, attention, batch=batch, seq_len=seq_len)
    for size, attention, batch, seq_len in itertools.product(SIZES, ("eager", "flash"), (4, 8, 16, 32), (512, 1024))
]


def measured(cell: Cell, gpu: str = "A100-80GB", noise: float = 1.0) -> dict[str, Any]:
    """The row of a cell on the made-up stack."""
    amounts = sheet_seconds(cell, SIZES[cell.size], gpu)
    seconds = noise * sum(RATES[kind] * amount for kind, amount in amounts.items())
    grid = Grid((cell,), SIZES, Effort("cuda"), gpu=gpu, prices={gpu: 1.0})
    return fill_row(cell, grid, 0, {"status": "ok", "seconds": seconds, "step_seconds": [seconds]})


ROWS = [measured(cell) for cell in CELLS]


def test_work_by_hand() -> None:
    shape, cell = Shape(100, 64, 2, 128, head_dim=32), Cell("s", "eager", batch=3, seq_len=10, n_gpu=4, comm="ddp")
    amounts = work(cell, shape)
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 100 * 64
    assert amounts["matmul"] == 6 * matrices * 30
    assert amounts["attention"] == 0
    assert amounts["scores"] == 30 * 2 * 2 * 10 * (4 + 2)  # tokens, blocks, heads, keys, bytes
    assert amounts["communication"] == pytest.approx(2 * 2 * shape.parameters * 3 / 4)
    fused = work(Cell("s", "flash", batch=3, seq_len=10), shape)
    assert fused["attention"] == 12 * 2 * 64 * 10 * 30
    assert fused["scores"] == fused["communication"] == 0
    again = work(Cell("s", "flash", batch=3, seq_len=10, checkpointing=True), shape)
    assert again["matmul"] == pytest.approx(4 / 3 * fused["matmul"])
    # what is counted is what the FLOP rule counts
    tokens = cell.batch * cell.seq_len
    assert fused["matmul"] + fused["attention"] == tokens * costs.flops_per_token(shape, 10, "matmul")


def test_left_out_cells_are_predicted() -> None:
    assert planner_error(leave_one_out(ROWS, SIZES)) < 0.01
    assert max(planner_regrets(ROWS, SIZES)) < 0.01


def test_error_is_that_of_cells_that_were_not_seen() -> None:
    # one outlier among the cells: predicted from the others, which do not know of it
    rows = [measured(cell, noise=3.0 if i == 10 else 1.0) for i, cell in enumerate(CELLS)]
    off = {row["tok_s_best"]: predicted / row["tok_s_best"] for row, predicted in leave_one_out(rows, SIZES)}
    assert off[rows[10]["tok_s_best"]] == pytest.approx(3.0, rel=0.35)


def test_a_device_that_was_not_measured() -> None:
    roofline = fit_roofline(ROWS, SIZES)
    for cell in (CELLS[0], CELLS[-1]):
        truth = measured(cell, "H100-80GB")["tok_s_best"]
        assert roofline.tokens_per_second(cell, SIZES[cell.size], "H100-80GB") == pytest.approx(truth, rel=0.05)
    with pytest.raises(ValueError, match="'L4' cannot be predicted from cells of A100-80GB: no data sheet"):
        roofline.tokens_per_second(CELLS[0], SIZES["1b"], "L4")
    with pytest.raises(ValueError, match="cannot be predicted from cells with"):
        roofline.tokens_per_second(Cell("1b", compile=True), SIZES["1b"], "A100-80GB")


def test_similarity() -> None:
    here = (CELLS[0], 10**8, "cpu")
    assert similarity(here, here) == 1.0
    assert similarity(here, (CELLS[0], 10**8, "H200")) == 0.0
    assert similarity(here, (Cell("100m", "eager", 16, seq_len=512), 10**8, "cpu")) == pytest.approx(0.6065, abs=1e-3)


def test_nothing_to_predict_from() -> None:
    with pytest.raises(ValueError, match="no cell has run"):
        fit_roofline([{**ROWS[0], "status": "oom"}], SIZES)
    with pytest.raises(ValueError, match="precision, compile, fused must agree"):
        fit_roofline([ROWS[0], {**ROWS[1], "compile": True}], SIZES)


def test_plan_marks_measured_and_predicted_and_finds_the_cheapest() -> None:
    candidates = [(cell, gpu) for cell in CELLS for gpu in ("A100-80GB", "H100-80GB") if cell.size == "1b"]
    known = [row for i, row in enumerate(ROWS) if i % 3]
    prices = {"A100-80GB": 2.0, "H100-80GB": 3.0}
    ranked = plan(candidates, known, SIZES, prices)
    assert len(ranked) == len(candidates)
    seen = {(row["attention"], row["batch"], row["seq_len"]) for row in known if row["size"] == "1b"}
    for entry in ranked:
        here = entry["gpu"] == "A100-80GB" and (entry["attention"], entry["batch"], entry["seq_len"]) in seen
        assert entry["source"] == ("measured" if here else "predicted")
        expected = entry["tok_s_global"] * 3600 / prices[entry["gpu"]]
        assert entry["tokens_per_dollar"] == pytest.approx(expected if entry["fits"] else 0.0)
    values = [entry["tokens_per_dollar"] for entry in ranked]
    assert values == sorted(values, reverse=True)
    truth = {(c, gpu): measured(c, gpu)["tok_s_best"] / prices[gpu] for c, gpu in candidates}
    chosen = (Cell(**{key: ranked[0][key] for key in vars(CELLS[0])}), ranked[0]["gpu"])
    assert truth[chosen] >= max(truth.values()) / 1.05


def test_plan_refuses_what_does_not_fit() -> None:
    big = Cell("2b", "eager", batch=128)
    ranked = plan([(big, "A100-80GB"), (CELLS[0], "A100-80GB")], ROWS, SIZES, {"A100-80GB": 2.0})
    assert [entry["fits"] for entry in ranked] == [True, False]
    assert ranked[1]["tokens_per_dollar"] == 0
    assert ranked[1]["mem_estimate_gib"] > 80
    small = plan([(CELLS[0], "A100-80GB")], ROWS[1:], SIZES, {"A100-80GB": 2.0}, memory_gib={"A100-80GB": 0.5})
    assert not small[0]["fits"]
    # a cell that ran out of memory does not fit, whatever the estimate
    failed = {**ROWS[0], "status": "oom", "tok_s_best": 0.0}
    assert not plan([(CELLS[0], "A100-80GB")], [*ROWS[1:], failed], SIZES, {"A100-80GB": 2.0})[0]["fits"]
    with pytest.raises(ValueError, match="there is none for 'A100-80GB'"):
        plan([(CELLS[0], "A100-80GB")], ROWS, SIZES, {"H100-80GB": 2.0})


def write(path: Path, content: Mapping[str, Any]) -> str:
    path.write_text(yaml.safe_dump(dict(content)))
    return str(path)


PLAN: dict[str, Any] = {
    "axes": {"size": "1b", "attention": ["eager", "flash"], "batch": [4, 8, 64], "seq_len": 1024},
    "gpus": ["A100-80GB", "H100-80GB"],
    "prices": {"A100-80GB": 2.0, "H100-80GB": 3.0},
    "tokens": 20.0e9,
}


def test_plan_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "cells.csv", ROWS)
    file = write(tmp_path / "plan.yaml", PLAN)
    code = main(["bench", "slm_bottlenecks", "--plan", file, "--cells", str(tmp_path / "cells.csv"), "--out",
                 str(tmp_path / "out")])  # fmt: skip
    shown = capsys.readouterr().out
    assert code == 0
    assert "measured" in shown
    assert "predicted" in shown
    with (tmp_path / "out/plan.csv").open() as table:
        ranked = list(csv.DictReader(table))
    first = ranked[0]
    dollars = float(first["hours"]) * PLAN["prices"][first["gpu"]]
    assert float(first["cost"]) == pytest.approx(dollars) == pytest.approx(20e9 / float(first["tokens_per_dollar"]))
    assert len(ranked) == 12
    # to a loss instead of a number of tokens
    law = {"floor": 1.7, "scale": 1e9, "exponent": 0.2}
    changed = {**PLAN, "law": law, "target_loss": 2.7}
    file = write(tmp_path / "target.yaml", changed)
    main(["bench", "slm_bottlenecks", "--plan", file, "--cells", str(tmp_path / "cells.csv")])
    assert "for 1e+09 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prices": None}, "prices is missing"),
        ({"prices": {"A100-80GB": 2.0}}, "prices: there is none for 'H100-80GB'"),
        ({"prices": {"A100-80GB": 2.0, "H100-80GB": -1}}, "prices.H100-80GB: -1 is not accepted"),
        ({"prices": {"A100-80GB": "2 $", "H100-80GB": 1}}, "prices.A100-80GB: '2 $' is not accepted"),
        ({"prices": [2.0]}, "prices: [2.0] is not accepted"),
        ({"gpu": "A100-80GB"}, "'gpu' is not accepted; did you mean 'gpus'"),
        ({"axes": {"size": "7b"}}, "axes.size: '7b'"),
        ({"target_loss": 2.0}, "law and target_loss go together"),
        ({"target_loss": 1.0, "law": {"floor": 1.7, "scale": 1e9, "exponent": 0.2}}, "a loss of 1.0 is not reached"),
        ({"axes": {"size": "1b", "compile": True}}, "no cell has run"),
        ({"memory_gib": {"A100-80GB": 0.1, "H100-80GB": 0.1}, "axes": {"size": "1b", "batch": 128}},
         "no configuration fits its memory"),
    ],
)  # fmt: skip
def test_bad_plans(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "cells.csv", ROWS)
    content = {key: value for key, value in {**PLAN, **changes}.items() if value is not None}
    file = write(tmp_path / "plan.yaml", content)
    assert main(["bench", "slm_bottlenecks", "--plan", file, "--cells", str(tmp_path / "cells.csv")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["slm_bottlenecks", "--plan", "no_file.yaml"], "neither a file nor a shipped config"),
        (["slm_bottlenecks", "--grid", "slm_bottlenecks/replay"], "model.init_args.grid is missing"),
        (["slm_bottlenecks", "--grid", "slm_bottlenecks/batch", "--repeats", "0"], "--repeats 0: at least 1"),
        (["slm_bottlenecks", "--grid", "slm_bottlenecks/batch", "--cells", "a.csv"], "--cells goes with --plan"),
        (["suave", "--grid", "x.yaml"], "'suave' has no grids"),
        (["--grid", "x.yaml"], "the method comes first"),
        (["slm_botlenecks", "--grid", "x.yaml"], "did you mean 'slm_bottlenecks'"),
    ],
)
def test_bad_commands(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


GRID: dict[str, Any] = {
    "axes": {"size": "s", "attention": ["eager", "sdpa"], "batch": [1, 2], "seq_len": 16, "precision": "32-true"},
    "sizes": {"s": {"vocab_size": 64, "width": 32, "depth": 1, "head_dim": 16}},
    "effort": {"device": "cpu", "threads": 1, "steps": 2, "warmup": 1},
    "repeats": 1,
}


@pytest.mark.skipif(sys.platform != "linux", reason="processes are killed as Linux does it")
def test_grid_command_killed_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "grid.yaml", GRID), tmp_path / "out"
    argv = ["bench", "slm_bottlenecks", "--grid", file, "--out", str(out)]
    cells = out / "cells.csv"
    with subprocess.Popen([sys.executable, "-m", "zoo", *argv], stdout=subprocess.DEVNULL, start_new_session=True) as p:
        deadline = time.monotonic() + 300
        while not (cells.is_file() and read_rows(cells)):
            assert p.poll() is None, "ended before a cell was measured"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(p.pid, signal.SIGKILL)
    before = read_rows(cells)
    assert main(argv) == 0
    rows = read_rows(cells)
    assert rows[: len(before)] == before  # not measured again
    assert len(rows) == 4
    assert {row["status"] for row in rows} == {"ok"}
    assert all(row["mfu"] is None and row["tokens_per_dollar"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert "best for s" in shown
    assert {path.name for path in out.iterdir()} >= {"cells.csv", "cells.parquet", "best.csv", "attention.png"}
    best = read_rows(out / "best.csv")
    assert [row["tokens_per_dollar"] for row in best] == [max(row["tokens_per_dollar"] for row in rows)]


def test_the_table_goes_to_wandb(tmp_path: Path) -> None:
    rows = [dict.fromkeys(COLUMNS) | {"size": size, "tok_s_global": 5.0} for size in ("100m", "1b")]
    log_table(rows, tmp_path, "offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/cells*.json")
    table = json.loads(file.read_text())
    assert table["columns"] == list(COLUMNS)
    assert [dict(zip(COLUMNS, row, strict=True)) for row in table["data"]] == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the config for it is the default")
def test_bench_measures_a_training_by_default() -> None:
    assert default_config("slm_bottlenecks") == "slm_bottlenecks/text"  # not the first run, which trains nothing
    assert default_config("nncsl") == "nncsl/fashion_mnist"


def test_estimate_refuses_and_force_tries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {**GRID, "max_memory_gib": 1e-5, "axes": {**GRID["axes"], "attention": "sdpa", "batch": 1}}
    argv = ["bench", "slm_bottlenecks", "--grid", write(tmp_path / "g.yaml", content), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "no cell can run" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0
    assert read_rows(tmp_path / "out/cells.csv")[0]["status"] == "ok"
