"""The shortcut in `self.log` changes no number, and is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector import result

from zoo import quick_log, run
from zoo.testing.compare import row_differences
from zoo.testing.subject import read_rows

SHORT = {"trainer.max_steps": 6, "trainer.val_check_interval": 3, "trainer.log_every_n_steps": 1}


def rows(folder: Path) -> list[dict[str, str]]:
    run("fit", config="suave/smoke", overrides=SHORT, run_dir=folder, wandb="disabled")
    return read_rows(folder)


def test_metrics_are_the_same_and_hardly_anything_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(self.meta.name)
        return original(self, *args, **kwargs)

    original = quick_log._move
    monkeypatch.setattr(quick_log, "_move", counted)
    quick = rows(tmp_path / "quick")
    assert result._ResultMetric.to is quick_log._to
    few = len(moved)
    monkeypatch.setattr(result._ResultMetric, "to", counted)
    monkeypatch.setattr(quick_log, "install", lambda: None)
    plain = rows(tmp_path / "plain")
    assert row_differences(quick, plain) == []
    assert few < (len(moved) - few) / 3, f"{few} moves with the shortcut, {len(moved) - few} without"


@pytest.mark.parametrize(
    ("held", "device", "moves"),
    [("cpu", "cpu", False), ("cpu", "meta", True), ("meta", "cpu", True)],
)
def test_what_is_elsewhere_is_moved(held: str, device: str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(quick_log, "_move", lambda self, *args, **kwargs: calls.append(args) or self)

    class Held:
        value = torch.zeros((), device=held)
        _forward_cache = torch.zeros(())

    quick_log._to(Held(), torch.device(device))
    assert bool(calls) is moves
    quick_log._to(Held(), dtype=torch.float64)
    assert len(calls) == moves + 1, "other requests go the long way"
