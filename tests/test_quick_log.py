"""The shortcuts in `self.log` change no number, and are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.core import module
from lightning.pytorch.trainer.connectors.logger_connector import result

from zoo import quick_log, run
from zoo.testing.compare import row_differences
from zoo.testing.subject import read_rows

SHORT = {"trainer.max_steps": 6, "trainer.val_check_interval": 3, "trainer.log_every_n_steps": 1}


def rows(folder: Path) -> list[dict[str, str]]:
    run("fit", config="suave/smoke", overrides=SHORT, run_dir=folder, wandb="disabled")
    return read_rows(folder)


def test_metrics_are_the_same_and_hardly_anything_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, inspected = [], []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(self.meta.name)
        return original(self, *args, **kwargs)

    def noted(hook_fx: Any, *args: Any, **kwargs: Any) -> bool:
        inspected.append(hook_fx)
        return bool(inspect(hook_fx, *args, **kwargs))

    original, inspect = quick_log._move, quick_log._inspect
    monkeypatch.setattr(quick_log, "_move", counted)
    monkeypatch.setattr(quick_log, "_inspect", noted)
    quick_log._signatures.clear()
    quick = rows(tmp_path / "quick")
    assert result._ResultMetric.to is quick_log._to
    assert module.is_param_in_hook_signature is quick_log._has_parameter  # type: ignore[attr-defined]
    few, seldom = len(moved), len(inspected)
    monkeypatch.setattr(result._ResultMetric, "to", counted)
    monkeypatch.setattr(module, "is_param_in_hook_signature", noted)
    monkeypatch.setattr(quick_log, "install", lambda: None)
    plain = rows(tmp_path / "plain")
    assert row_differences(quick, plain) == []
    assert few < (len(moved) - few) / 3, f"{few} moves with the shortcut, {len(moved) - few} without"
    assert seldom == 1, "one question about one function"
    assert len(inspected) - seldom > 20


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


def test_signatures_are_told_apart() -> None:
    class One:
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def other(self, dataloader_iter: Any) -> None: ...

    class Two(One):
        def training_step(self, dataloader_iter: Any) -> None: ...  # type: ignore[override]

    ask = quick_log._has_parameter
    for _ in range(2):
        assert not ask(One().training_step, "dataloader_iter", explicit=True)
        assert ask(Two().training_step, "dataloader_iter", explicit=True)
        assert ask(One().other, "dataloader_iter", explicit=True)
        assert ask(One().training_step, "nothing", min_args=2)
        assert not ask(One().training_step, "nothing", min_args=3)
