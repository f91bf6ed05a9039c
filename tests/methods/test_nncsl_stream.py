"""NNCSL over a whole stream of tasks: all arms, checkpoints in the middle of a task, tables, memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import zoo.main
from datamodules.class_incremental import ClassIncrementalImages
from tests.methods.nncsl_toy import ARMS, make_model
from zoo.methods.nncsl.metrics import accuracy_matrix, stream_metrics


def test_metrics_of_a_stream_by_hand():
    total = torch.tensor([10, 20, 10])
    correct = torch.tensor([[9, -1, -1], [5, 18, -1], [6, 10, 8]])
    got = stream_metrics(correct, total)
    assert got["A_T"] == pytest.approx(24 / 40)
    assert got["A_inc"] == pytest.approx((9 / 10 + 23 / 30 + 24 / 40) / 3)
    assert got["T1"] == pytest.approx(0.9)
    assert got["forgetting"] == pytest.approx(((0.9 - 0.6) + (0.9 - 0.5)) / 2)
    matrix = accuracy_matrix(correct, total)
    assert matrix[1].tolist()[:2] == pytest.approx([0.5, 0.9])
    assert matrix[0, 1:].isnan().all()
    partial = stream_metrics(torch.where(torch.arange(3)[:, None] == 1, correct, -1), total)
    assert partial == {"A_T": pytest.approx(23 / 30)}
    assert stream_metrics(torch.full((3, 3), -1), total) == {}
    assert set(stream_metrics(correct[:1, :1], total[:1])) == {"A_T", "A_inc", "T1"}


def make_data(**changes: Any) -> ClassIncrementalImages:
    arguments: dict[str, Any] = {"source": "digits", "num_tasks": 5, "labels_per_class": 4, "val_per_class": 10}
    arguments |= {"buffer_size": 20, "supports_per_class": 2, "batch_size": 16, "steps_per_epoch": 3}
    arguments |= {"views": [{"count": 2, "scale": [0.7, 1.0], "flip": 0.0}, {"size": 6, "flip": 0.0}]}
    return ClassIncrementalImages(**(arguments | changes))


def make_trainer(**changes: Any) -> Trainer:
    arguments: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 5}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    return Trainer(**(arguments | {"gradient_clip_val": 2.0} | changes))


@pytest.mark.parametrize("arm", [*ARMS, "joint"])
def test_every_arm_goes_through_the_stream(arm):
    seed_everything(0, verbose=False)
    views = {"views": []} if arm in ("er", "derpp", "finetune") else {}
    tasks = 1 if arm == "joint" else 5
    data = make_data(**views, num_tasks=tasks, buffer_size=0 if arm in ("finetune", "joint") else 20)
    model = make_model(num_classes=10, num_tasks=tasks, **ARMS.get(arm, {}))
    trainer = make_trainer(max_epochs=tasks)
    trainer.fit(model, data)
    assert (model.correct >= 0).sum() == tasks * (tasks + 1) // 2
    assert model.total.sum() == 359
    assert {"val/acc", "val/acc_new"} <= set(trainer.callback_metrics)
    metrics = trainer.test(model, data, verbose=False)[0]
    assert metrics["test/acc"] == pytest.approx(metrics["test/A_T"])
    assert metrics["test/A_T"] == pytest.approx((model.correct[-1].sum() / 359).item())
    assert ("test/forgetting" in metrics) == (arm != "joint")
    assert all(math.isfinite(value) for value in metrics.values())
    predictions = torch.cat(trainer.predict(model, data))  # type: ignore[arg-type]
    target = data.test[1]
    assert (predictions == target).float().mean().item() == pytest.approx(metrics["test/acc"])
    assert set(model.figures()) == {"accuracy_matrix"}


@pytest.mark.parametrize("arm", ["nncsl", "derpp"])
def test_a_run_goes_on_in_the_middle_of_a_task_or_is_extended(arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The smoke config has tasks of 8 steps in 2 epochs: 13 is in mid-epoch, 24 is the end of the third task."""
    monkeypatch.chdir(tmp_path)
    options = {f"model.init_args.{key}": value for key, value in ARMS[arm].items()}

    def final(**trainer: Any) -> Any:
        result = zoo.run("fit", config="nncsl/smoke", overrides=options | trainer)
        if trainer:
            result = zoo.run(
                "fit", resume=result.run_dir, overrides={"trainer.max_epochs": 10, "trainer.max_steps": -1}
            )
        return result

    whole = final()
    for stop in ({"trainer.max_steps": 13}, {"trainer.max_epochs": 6}):
        parts = final(**stop)
        for name, value in whole.model.state_dict().items():
            assert torch.equal(parts.model.state_dict()[name], value), (stop, name)
        assert (parts.run_dir / "metrics.csv").read_text() == (whole.run_dir / "metrics.csv").read_text()
        assert parts.model.task == 4
        assert torch.equal(parts.model.exemplars.index, whole.model.exemplars.index)
        assert torch.equal(parts.model.exemplars.logits, whole.model.exemplars.logits)
        assert all(seconds > 0 for seconds in parts.model.costs.seconds)


def test_a_resume_with_another_stream_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert zoo.main.main(["fit", "--config", "nncsl/smoke", "--trainer.max_epochs", "4", "--run_dir", "r"]) == 0
    words = ["fit", "--resume", "r", "--trainer.max_epochs", "10"]
    assert zoo.main.main([*words, "--data.class_order", "[1,0,2,3,4,5,6,7,8,9]"]) == 2
    err = capsys.readouterr().err
    assert "class_order: [1, 0, 2, 3, 4, 5, 6, 7, 8, 9] is not accepted: the checkpoint comes from a stream with" in err
    assert "Traceback" not in err


def test_loggers_of_tables_get_matrix_and_costs():
    model, tables = make_model(), {}
    model.correct[0, 0], model.correct[1, :2] = 3, torch.tensor([2, 1])
    model.total += 4
    model.costs.seconds[:2] = [1.5, 2.5]
    logger = type("Tables", (), {"log_table": lambda self, key, **table: tables.update({key: table})})()
    model._trainer = type("Stub", (), {"loggers": [logger]})()
    model._log_tables()
    table = tables["test/accuracy_matrix"]
    assert table["columns"][:4] == ["after task", "task 1", "task 2", "task 3"]
    assert [row[:5] for row in table["data"]] == [
        [1, 0.75, None, None, 1.5],
        [2, 0.5, 0.25, None, 2.5],
        [3, None, None, None, 0.0],
    ]


def test_memory_does_not_grow_with_the_tasks(tmp_path: Path):
    sizes = []
    for epochs in (2, 5):
        trainer = make_trainer(max_epochs=epochs)
        trainer.fit(make_model(num_classes=10, num_tasks=5), make_data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        sizes.append((tmp_path / "a.ckpt").stat().st_size)
    assert sizes[1] - sizes[0] < 1024
