"""PPO with sharded networks (FSDP2) gives what one process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo.testing.subject import Run, Subject, read_rows


def test_two_sharded_processes_train_as_one(tmp_path: Path) -> None:
    subject = Subject("salsa", tmp_path, tmp_path)
    # SGD-like steps: Adam turns rounding noise of tiny gradients into full steps
    short = {"trainer.max_steps": 4, "trainer.limit_val_batches": 1, "model.init_args.adam_eps": 1.0}
    one = subject.fit("one", short)
    strategy = {"class_path": "zoo.nn.fsdp2.FullyShardedStrategy", "init_args": {"min_parameters": 100}}
    folder = subject.new_folder("two")
    call = {"config": [subject.smoke], "overrides": {**short, "trainer.strategy": strategy, "trainer.plugins": []}}
    codes, output = subject.two_ranks(call, {"run_dir": folder})
    assert codes == [0, 0], output[-2000:]
    two = Run(folder, read_rows(folder))
    for name in ("train/score", "train/kl", "train/entropy", "train/value_loss", "val/reward"):
        left, right = ([float(row[name]) for row in run.rows if row.get(name)] for run in (one, two))
        assert left == pytest.approx(right, rel=1e-3, abs=1e-4), name
    a, b = (torch.load(run.checkpoint, weights_only=True)["state_dict"] for run in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)
