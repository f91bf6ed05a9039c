"""Networks sharded over two processes (FSDP2) give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.testing.subject import Run, Subject, read_rows

STRATEGY = {"class_path": "zoo.nn.fsdp2.FullyShardedStrategy", "init_args": {"min_parameters": 100}}


def one_and_two(method: str, folder: Path, overrides: dict[str, Any]) -> tuple[Run, Run]:
    """Train the smoke config in one process, and sharded over two."""
    subject = Subject(method, folder, folder)
    short = {"trainer.max_steps": 4, "trainer.limit_val_batches": 1, **overrides}
    one = subject.fit("one", short)
    run_dir = subject.new_folder("two")
    call = {"config": [subject.smoke], "overrides": {**short, "trainer.strategy": STRATEGY, "trainer.plugins": []}}
    codes, output = subject.two_ranks(call, {"run_dir": run_dir})
    assert codes == [0, 0], output[-2000:]
    return one, Run(run_dir, read_rows(run_dir))


def states(*runs: Run) -> list[dict[str, Tensor]]:
    return [torch.load(run.checkpoint, weights_only=True)["state_dict"] for run in runs]


def test_two_sharded_processes_train_as_one(tmp_path: Path) -> None:
    # SGD-like steps: Adam turns rounding noise of tiny gradients into full steps
    one, two = one_and_two("salsa", tmp_path, {"model.init_args.adam_eps": 1.0})
    for name in ("train/score", "train/kl", "train/entropy", "train/value_loss", "val/reward"):
        left, right = ([float(row[name]) for row in run.rows if row.get(name)] for run in (one, two))
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4), name
    a, b = states(one, two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_sharded_reward_model_is_shifted_as_one(tmp_path: Path) -> None:
    one, two = one_and_two("reward_model", tmp_path, {})
    a, b = states(one, two)
    assert float(a["shift"]) != 0
    assert float(a["shift"]) == pytest.approx(float(b["shift"]), rel=1e-3, abs=1e-4)
