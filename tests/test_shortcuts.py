"""The shortcuts around a step change no number, leave out no call, and are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.core import module

from zoo import run, shortcuts
from zoo.testing.compare import row_differences
from zoo.testing.subject import read_rows

SHORT = {"trainer.max_steps": 6, "trainer.val_check_interval": 3, "trainer.log_every_n_steps": 1}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Lightning as it was installed, until a test takes the shortcuts, and as it was before afterwards."""
    for owner, name, original, _ in shortcuts.PLACES:
        monkeypatch.setattr(owner, name, original)
    return monkeypatch


def rows(folder: Path, config: str = "suave/smoke") -> list[dict[str, str]]:
    run("fit", config=config, overrides=SHORT, run_dir=folder, wandb="disabled")
    return read_rows(folder)


def test_every_place_is_there_and_taken(plain: pytest.MonkeyPatch) -> None:
    shortcuts.install()
    for owner, name, original, ours in shortcuts.PLACES:
        assert original is not None, f"{name} is not where it was"
        assert getattr(owner, name) is ours
    shortcuts.uninstall()
    assert all(getattr(owner, name) is original for owner, name, original, _ in shortcuts.PLACES)


def test_metrics_are_the_same_and_hardly_anything_is_done_again(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    inspected: list[Any] = []

    def counted(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        logged.append(name)
        return shortcuts_log(self, name, *args, **kwargs)

    def noted(hook_fx: Any, *args: Any, **kwargs: Any) -> bool:
        inspected.append(hook_fx)
        return bool(inspect(hook_fx, *args, **kwargs))

    shortcuts_log, inspect = shortcuts._log, shortcuts._inspect
    plain.setattr(shortcuts, "_log", counted)
    plain.setattr(shortcuts, "_inspect", noted)
    shortcuts._signatures.clear()
    quick = rows(tmp_path / "quick")
    few, seldom = len(logged), len(inspected)
    shortcuts.uninstall()
    plain.setattr(LightningModule, "log", counted)
    plain.setattr(module, "is_param_in_hook_signature", noted)
    plain.setattr(shortcuts, "install", lambda: None)
    long = rows(tmp_path / "long")
    assert row_differences(quick, long) == []
    repeats = sum(max(0, logged[few:].count(name) - 1) for name in set(logged) if name.startswith("train/"))
    assert repeats >= 30
    assert few == len(logged) - few - repeats, "what a step logs goes the long way once"
    assert seldom == 2, "two questions about one function"
    assert len(inspected) - seldom > 20


class Logs(LightningModule):
    """Logs in every manner that a step can ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.weight * (batch_idx + 1.0)
        self.log("step", loss.detach())
        self.log("with_graph", loss)
        self.log("epoch", loss, on_epoch=True, on_step=False, batch_size=batch_idx + 1)
        self.log("both", loss, on_epoch=True, prog_bar=True)
        self.log("number", batch_idx)
        self.log("one_element", loss.detach().reshape(1))
        self.log("double", loss.detach().double())
        self.log("sum", loss, reduce_fx="sum", on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.calls: list[str] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.calls.append("class")
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder: Path, *callbacks: Callback, model: LightningModule | None = None, **options: Any) -> None:
    trainer = Trainer(
        max_epochs=3, default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        logger=False, enable_checkpointing=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(model or Logs(), torch.utils.data.DataLoader(range(4)))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_whatever_is_logged_reads_the_same_at_every_step(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    long, quick = Seen(), Seen()
    fit(tmp_path, long)
    shortcuts.install()
    fit(tmp_path, quick)
    assert quick.metrics == long.metrics
    assert {"step", "both_epoch", "sum"} <= set(quick.metrics[-1])
    assert len({row["step"] for row in quick.metrics}) > 3, "the values move"


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_logs_the_same(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    class Plain(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.weight * 2.0 + batch.sum()
            self.log("step", loss.detach())
            return loss

    shortcuts.install()
    eager, compiled = Seen(), Seen()
    fit(tmp_path, eager, model=Plain())
    model = Plain()
    model.training_step = torch.compile(model.training_step, backend="eager")  # type: ignore[method-assign]
    fit(tmp_path, compiled, model=model)
    assert compiled.metrics == eager.metrics


@pytest.mark.filterwarnings("ignore")
def test_the_stored_value_is_a_copy(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    class Reuses(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.weight * 1.0
            value = torch.full((), float(batch_idx))
            self.log("value", value)
            value.fill_(-1.0)
            return loss

    shortcuts.install()
    seen = Seen()
    fit(tmp_path, seen, model=Reuses())
    assert [row["value"] for row in seen.metrics[:4]] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("profiler", [None, "simple"])
def test_every_hook_that_is_there_is_called_in_order(
    tmp_path: Path, plain: pytest.MonkeyPatch, profiler: str | None
) -> None:
    shortcuts.install()
    calls: list[str] = []

    class ByClass(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            calls.append("class")

    class Silent(Callback):
        pass

    class Hooked(Logs):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            assert self._current_fx_name == "on_before_zero_grad"
            calls.append("module")

    fit(tmp_path, ByClass(), Silent(), LambdaCallback(on_train_batch_end=lambda *args: calls.append("assigned")),
        model=Hooked(), profiler=profiler, limit_train_batches=2)  # fmt: skip
    assert calls == ["module", "class", "assigned"] * 6


@pytest.mark.filterwarnings("ignore")
def test_logging_one_name_in_two_manners_is_still_refused(tmp_path: Path, plain: pytest.MonkeyPatch) -> None:
    class Twice(Logs):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.weight * 1.0
            self.log("loss", loss, prog_bar=batch_idx == 2)
            return loss

    shortcuts.install()
    with pytest.raises(Exception, match="twice in `training_step` with different arguments"):
        fit(tmp_path, model=Twice())


@pytest.mark.parametrize(
    ("held", "device", "moves"),
    [("cpu", "cpu", False), ("cpu", "meta", True), ("meta", "cpu", True)],
)
def test_what_is_elsewhere_is_moved(held: str, device: str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def long_way(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return self

    monkeypatch.setattr(shortcuts, "_move", long_way)

    class Held:
        value = torch.zeros((), device=held)
        _forward_cache = torch.zeros(())

    shortcuts._to(Held(), torch.device(device))
    assert bool(calls) is moves
    shortcuts._to(Held(), dtype=torch.float64)
    assert len(calls) == moves + 1, "other requests go the long way"


def test_signatures_are_told_apart() -> None:
    class One:
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

        def other(self, dataloader_iter: Any) -> None: ...

    class Two(One):
        def training_step(self, dataloader_iter: Any) -> None: ...  # type: ignore[override]

    ask = shortcuts._has_parameter
    for _ in range(2):
        assert not ask(One().training_step, "dataloader_iter", explicit=True)
        assert ask(Two().training_step, "dataloader_iter", explicit=True)
        assert ask(One().other, "dataloader_iter", explicit=True)
        assert ask(One().training_step, "nothing", min_args=2)
        assert not ask(One().training_step, "nothing", min_args=3)
