"""The four trainer commands: what wins, what is written, what a mistake answers.

Longer than other files: one toy run stands behind all of them.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from tests.support import toy
from zoo.main import main

TOY = str(Path(__file__).parent / "support" / "toy.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((run_dir / "checkpoints").glob("*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]))
    return torch.load(newest, weights_only=True)["state_dict"]


def fit(**overrides: Any) -> zoo.RunResult:
    return zoo.run("fit", config=TOY, overrides={key.replace("__", "."): value for key, value in overrides.items()})


def test_a_run_leaves_all_that_is_promised() -> None:
    result = fit()
    assert result.exit_code == 0
    assert result.run_dir.parent.parent.parent == Path("runs").absolute()
    assert result.run_dir.parent.name == "toy"
    summary = zoo.runs.read_json(result.run_dir / "summary.json")
    assert summary["stages"]["fit"]["status"] == "finished"
    assert summary["stages"]["fit"]["step"] == 10
    assert set(summary) >= {"metrics", "versions", "commit", "hardware", "seconds", "method", "config"}
    assert 0 <= result.metrics["val/acc"] <= 1
    assert [int(r["step"]) for r in rows(result.run_dir) if r["train/loss"]] == list(range(10))
    assert (result.run_dir / "config.yaml").is_file()
    assert list((result.run_dir / "checkpoints").glob("*.ckpt"))


def test_the_saved_config_replays_the_run() -> None:
    first = fit()
    again = zoo.run("fit", config=first.run_dir / "config.yaml")
    assert again.run_dir != first.run_dir
    assert rows(again.run_dir) == rows(first.run_dir)
    assert all(torch.equal(v, weights(first.run_dir)[k]) for k, v in weights(again.run_dir).items())


def test_print_config_runs_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "--config", TOY, "--model.lr", "0.2", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["init_args"]["lr"] == 0.2
    assert not (tmp_path / "runs").exists()
    (tmp_path / "printed.yaml").write_text(printed)
    again = zoo.run("fit", config=tmp_path / "printed.yaml")
    assert rows(again.run_dir) == rows(fit(model__lr=0.2).run_dir)


def test_the_seed_decides() -> None:
    losses = [[r["train/loss"] for r in rows(fit(seed_everything=seed).run_dir)] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_command_line_beats_config_beats_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    trained = fit(model__lr=0.7)
    checkpoint = str(next((trained.run_dir / "checkpoints").glob("step=10.ckpt")))
    capsys.readouterr()
    bare = zoo.run("fit", overrides={"ckpt_path": checkpoint, "trainer.max_epochs": 3, "trainer.log_every_n_steps": 1})
    assert bare.model.hparams.lr == 0.7
    assert bare.trainer.global_step == 15
    from_config = zoo.run("fit", config=TOY, overrides={"ckpt_path": checkpoint, "trainer.max_epochs": 3})
    assert from_config.model.hparams.lr == 0.05
    assert "model.init_args.lr: 0.7 -> 0.05" in capsys.readouterr().err
    typed = zoo.run("fit", config=TOY, overrides={"ckpt_path": checkpoint, "trainer.max_epochs": 3, "model.lr": 0.3})
    assert typed.model.hparams.lr == 0.3


def test_resume_goes_on_in_the_same_directory_and_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    whole = fit(trainer__max_epochs=4)
    half = fit(trainer__max_epochs=2)
    capsys.readouterr()
    resumed = zoo.run("fit", resume=half.run_dir, overrides={"trainer.max_epochs": 4})
    assert "trainer.max_epochs: 2 -> 4" in capsys.readouterr().err
    assert resumed.run_dir == half.run_dir
    assert (half.run_dir / "config.resume-1.yaml").is_file()
    assert yaml.safe_load((half.run_dir / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert rows(resumed.run_dir) == rows(whole.run_dir)
    assert all(torch.equal(v, weights(whole.run_dir)[k]) for k, v in weights(resumed.run_dir).items())


def test_a_resume_without_a_checkpoint_starts_the_metrics_again(capsys: pytest.CaptureFixture[str]) -> None:
    whole = fit()
    run_dir = fit(trainer__max_steps=7).run_dir
    shutil.rmtree(run_dir / "checkpoints")
    zoo.run("fit", resume=run_dir, overrides={"trainer.max_steps": -1})
    assert "has no checkpoint yet; starting from the beginning" in capsys.readouterr().err
    assert rows(run_dir) == rows(whole.run_dir)


def test_evaluating_a_run_uses_its_newest_checkpoint_and_adds_to_its_summary() -> None:
    trained = fit(trainer__max_epochs=6)
    tested = zoo.run("test", run_dir=trained.run_dir)
    assert tested.metrics["test/acc"] == trained.metrics["val/acc"]
    assert tested.metrics["val/acc"] == trained.metrics["val/acc"]
    by_path = zoo.run("test", overrides={"ckpt_path": str(trained.run_dir / "checkpoints" / "step=30.ckpt")})
    assert by_path.run_dir == trained.run_dir
    assert by_path.metrics["test/acc"] == tested.metrics["test/acc"]
    before = sorted(p.name for p in (trained.run_dir / "checkpoints").iterdir())
    assert zoo.run("predict", run_dir=trained.run_dir).exit_code == 0
    assert sorted(p.name for p in (trained.run_dir / "checkpoints").iterdir()) == before


def test_a_test_is_recorded_at_the_step_of_its_checkpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(trainer__max_epochs=3)
    run_dir = fit(trainer__max_steps=7).run_dir
    seen: list[int] = []
    step = toy.Toy.test_step
    logged: list[tuple[int | None, set[str]]] = []

    def log_metrics(self: Any, metrics: dict[str, float], step: int | None = None) -> None:
        logged.append((step, set(metrics)))

    def test_step(self: Any, *args: Any) -> Any:
        seen.append(self.global_step)
        return step(self, *args)

    monkeypatch.setattr(toy.Toy, "test_step", test_step)
    capsys.readouterr()
    monkeypatch.setattr("callbacks.loggers.RunWandbLogger.log_metrics", log_metrics)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tested = zoo.run("test", resume=run_dir)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert capsys.readouterr().out.startswith("test, step 7 ")
    assert logged == [(7, {"epoch", "test/acc"})]
    assert set(seen) == {0}, "what a method draws by its counters stays as it was"
    last = rows(run_dir)[-1]
    assert (last["step"], last["epoch"], float(last["test/acc"])) == ("7", "1.0", tested.metrics["test/acc"])
    stage = zoo.runs.read_json(run_dir / "summary.json")["stages"]["test"]
    assert (stage["step"], stage["epoch"]) == (7, 1)
    assert set(tested.metrics) == {"train/loss", "val/acc", "test/acc"}
    zoo.run("fit", resume=run_dir, overrides={"trainer.max_steps": -1, "trainer.max_epochs": 3})
    kept = rows(run_dir)
    assert [row for row in kept if row["test/acc"]] == [last], "a resume does not repeat the test"
    for row in kept:
        del row["test/acc"]
    assert [row for row in kept if row["train/loss"]] == [row for row in rows(whole.run_dir) if row["train/loss"]]


def test_links_bring_facts_of_the_data() -> None:
    assert fit(trainer__max_steps=1).model.net.out_features == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "suavee"], "did you mean 'suave'"),
        (["--model.lrr", "1"], "Toy has no option 'lrr'\ndid you mean 'lr'?"),
        (["--model.lr", "fast"], "--model.lr: model.init_args.lr: expected float, got 'fast'"),
        (["--model.num_classes", "3"], "set by the data, not by hand"),
        (["--model.activation", "gelu"], "activation: 'gelu' is unknown; accepted: relu"),
        (["--data.count", "0"], "count must be at least 1, got 0"),
        (["--data.missing", "true"], "no points in /nowhere; get them with apt install points"),
        (["--trainer.max_epoch", "3"], "did you mean 'max_epochs'"),
        (["--trainer.max_epochs", "many"], "trainer.max_epochs: expected"),
        (["--trainr.max_epochs", "3"], "did you mean 'trainer'"),
        (["--trainer.callbacks+=progres"], "did you mean 'progress'"),
        (["--config", "no/such"], "neither a file nor a shipped config"),
        (["--seed_everything", "-1"], "expected a whole number >= 0, got -1"),
        (["--ckpt_path", "none.ckpt"], "there is no such file"),
        (["--resume", "nowhere"], "not the directory of a run"),
        (["--wandb", "ofline"], "did you mean 'offline'"),
        (["stray"], "'stray' is not an option of fit"),
        (["--run_dir"], "--run_dir needs a value"),
        (["--trainer.logger", "tensorbord"], "accepted: csv, wandb"),
        (["--model", "json.JSONDecoder"], "is not a LightningModule"),
        (["--model", "no.such.Class"], "there is no class 'no.such.Class'"),
    ],
)
def test_a_mistake_is_answered_in_five_lines(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", TOY, *words]) == 2
    err = capsys.readouterr().err
    shown = [line for line in err.splitlines() if not line.startswith(("Seed set", "run directory"))]
    assert message in err
    assert len(shown) <= 5, err
    assert "Traceback" not in err


def test_config_before_the_command_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", TOY, "fit"]) == 2
    assert "the command comes first: zoo fit --config" in capsys.readouterr().err


def test_a_second_fit_never_touches_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    first = zoo.run("fit", config=TOY, run_dir="here")
    before = {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()}
    assert main(["fit", "--config", TOY, "--run_dir", "here"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in first.run_dir.rglob("*") if p.is_file()} == before


def files(folder: Path) -> dict[str, Any]:
    """All files with what is in them, those of W&B (which goes on writing its own log) with where links lead."""
    found = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    ours = {str(path): path.read_bytes() for path in found if "wandb" not in path.parts}
    return ours | {str(path): path.is_symlink() and os.readlink(path) for path in found if "wandb" in path.parts}


@pytest.mark.parametrize("words", [["--model.activation", "gelu"], ["--data.missing", "true"]])
def test_a_start_that_failed_leaves_the_directory_free(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["fit", "--config", TOY, "--run_dir", "r", *words]) in (1, 2)
    failed = zoo.runs.read_json(Path("r/run.json"))
    assert failed["unused"]
    assert main(["fit", "--resume", "r", "--data.missing", "true"]) == 2
    assert zoo.runs.read_json(Path("r/run.json"))["unused"], "as free as before"
    capsys.readouterr()
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 0
    new = zoo.runs.read_json(Path("r/run.json"))
    assert "unused" not in new
    assert new["id"] != failed["id"]
    assert yaml.safe_load(Path("r/config.yaml").read_text())["model"]["init_args"] == {"lr": 0.05}
    assert list(zoo.runs.read_json(Path("r/summary.json"))["stages"]) == ["fit"]
    assert len(list(Path("r/wandb").glob("offline-run-*"))) == 1
    assert not list(Path("r").glob("config.resume-*"))
    before = files(Path("r"))
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert files(Path("r")) == before


def test_a_run_that_took_a_step_is_never_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "--config", TOY, "--run_dir", "r", "--checkpoint.every_n_steps", "0"]
    assert main([*words, "--model.explode_at", "1"]) == 1
    shutil.rmtree("r/checkpoints", ignore_errors=True)
    assert main(["fit", "--resume", "r", "--data.missing", "true"]) == 2
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [row["step"] for row in rows(Path("r"))] == ["0"]


def test_a_run_that_a_kill_may_have_ended_after_a_step_is_never_replaced() -> None:
    assert main(["fit", "--config", TOY, "--run_dir", "r", "--data.missing", "true"]) == 2
    directory = zoo.runs.RunDirectory(Path("r"))
    for resume in (True, False):
        assert directory.unused
        directory.claim("other", "toy", resume, replace=not resume)
        assert not directory.unused, "a kill now leaves it taken"
        directory.release()
        if resume:
            assert directory.was_unused
            directory.mark_unused()
    with pytest.raises(zoo.errors.UsageError, match="already holds a run"):
        zoo.runs.RunDirectory(Path("r")).claim("other", "toy", False, replace=True)


@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_refused_resume_leaves_no_trace(
    runs_before: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline" if runs_before else "disabled")
    run_dir = fit(trainer__max_steps=3).run_dir
    monkeypatch.setenv("WANDB_MODE", "offline")

    before = files(run_dir)
    assert main(["fit", "--resume", str(run_dir), "--data.missing", "true"]) == 2
    assert "no points in /nowhere" in capsys.readouterr().err
    assert files(run_dir) == before
    (run_dir / "summary.json").unlink()  # as after a kill
    before = files(run_dir)
    assert main(["fit", "--resume", str(run_dir), "--data.missing", "true"]) == 2
    assert files(run_dir) == before


def test_checkpoint_of_another_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    trained = fit(trainer__max_steps=1)
    checkpoint = next((trained.run_dir / "checkpoints").glob("*.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    content["zoo"]["config"]["model"]["class_path"] = "zoo.methods.suave.module.Suave"
    torch.save(content, "other.ckpt")
    assert main(["fit", "--config", TOY, "--ckpt_path", "other.ckpt"]) == 2
    assert "is of suave" in capsys.readouterr().err


def test_a_file_that_is_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.ckpt").write_text("{}")
    assert main(["fit", "--config", TOY, "--ckpt_path", "notes.ckpt"]) == 2
    assert "--ckpt_path notes.ckpt: not a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["fit", "--resume"], ["test", "--run_dir"], ["test", "--resume"]])
def test_a_run_of_another_method_is_refused_and_stays_as_it_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = fit(trainer__max_steps=1).run_dir
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert main([*words, str(run_dir), "--config", "suave/smoke"]) == 2
    error = capsys.readouterr().err
    assert "is of tests.support.toy.Toy, the config is of suave" in error
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before


def test_misuse_that_the_weights_show_leaves_the_summary_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = zoo.run("fit", config="suave/smoke", overrides={"trainer.max_steps": 1}).run_dir
    before = (run_dir / "summary.json").read_bytes()
    assert main(["fit", "--resume", str(run_dir), "--model.embed_dim", "8"]) == 2
    assert "does not fit this config: size mismatch" in capsys.readouterr().err
    assert (run_dir / "summary.json").read_bytes() == before


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_truncated_image_is_named(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in [f"{part}/{kind}/{i}.jpg" for part in ("train", "val") for kind in ("cat", "dog") for i in range(4)]:
        path = Path("folders", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 90).convert("RGB").save(path)
    broken = Path("folders/train/cat/2.jpg")
    broken.write_bytes(broken.read_bytes()[:-200])
    data = {"image_size": 8, "labels_per_class": None, "batch_size": 8, "labelled_batch_size": 8, "eval_batch_size": 8}
    options = [f"--data.{key}={'null' if value is None else value}" for key, value in data.items()]
    words = ["--model", "suave", "--model.backbone", "{name: small_conv, channels: [4]}", "--model.hidden_dim", "8"]
    words += ["--model.embed_dim", "4", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    words += ["--trainer.log_every_n_steps", "1"]
    words += ["--data", "image_folder", "--data.root", "folders", "--data.num_workers", workers]
    assert main(["fit", *words, *options, "--run_dir", "r"]) == 1
    error = capsys.readouterr().err
    assert "reading a batch failed: image folders/train/cat/2.jpg is damaged" in error
    assert "then go on with --resume r" in error
    assert "Traceback" not in error


def test_damaged_checkpoint_falls_back_to_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = fit(trainer__max_epochs=3).run_dir
    (run_dir / "checkpoints" / "step=15.ckpt").write_bytes(b"half a file")
    resumed = zoo.run("fit", resume=run_dir)
    assert "step=15.ckpt is damaged; trying the one before" in capsys.readouterr().err
    assert resumed.trainer.global_step == 15
    assert [int(r["step"]) for r in rows(run_dir) if r["train/loss"]] == list(range(15))


def test_nan_stops_the_run_with_step_and_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", TOY, "--model.explode_at", "7", "--run_dir", "r"]) == 1
    err = capsys.readouterr().err
    assert "step 7" in err
    assert "loss" in err
    assert list(Path("r/checkpoints").glob("step=5.ckpt"))
    assert zoo.runs.read_json(Path("r/summary.json"))["stages"]["fit"]["status"] == "failed"


def test_a_failure_before_the_setup_has_no_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare_data(self: Any) -> None:
        raise FileNotFoundError("no points")

    monkeypatch.setattr(toy.ToyData, "prepare_data", prepare_data)
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 2
    stage = zoo.runs.read_json(Path("r/summary.json"))["stages"]["fit"]
    assert stage["status"] == "failed"
    assert stage.get("fit/seconds", 0.0) <= stage["seconds"]
    for name in ("summary.json", "run.json"):
        assert Path("r", name).read_text().endswith("}\n")


def ctrl_c(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("module", "method"), [(toy.ToyData, "setup"), (toy.Toy, "configure_optimizers")])
def test_ctrl_c_before_the_first_step_says_so(
    module: type, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, method, ctrl_c, raising=False)
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped before the first step"
    assert zoo.runs.read_json(Path("r/summary.json"))["stages"]["fit"]["status"] == "stopped"
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_keeps_the_run_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit(trainer__max_epochs=4)
    step = toy.Toy.training_step
    asked = iter(range(8))

    def training_step(self: Any, *args: Any) -> Any:
        if next(asked, None) == 6:
            ctrl_c()
        return step(self, *args)

    monkeypatch.setattr(toy.Toy, "training_step", training_step)
    words = ["--trainer.max_epochs", "4", "--checkpoint.every_n_epochs", "0"]
    assert main(["fit", "--config", TOY, "--run_dir", "r", *words]) == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "stopped at step 7; go on: zoo fit --resume r"
    assert [int(row["step"]) for row in rows(Path("r")) if row["train/loss"]] == list(range(7))
    assert zoo.runs.read_json(Path("r/summary.json"))["stages"]["fit"]["status"] == "stopped"
    assert main(lines[-1].partition("zoo ")[2].split()) == 0
    assert rows(Path("r")) == rows(whole.run_dir)
    assert all(torch.equal(v, weights(whole.run_dir)[k]) for k, v in weights(Path("r")).items())


def test_ctrl_c_twice_names_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(self: Any, *args: Any) -> Any:
        for _ in range(self.global_step // 7 * 2):
            ctrl_c()
        return step(self, *args)

    step = toy.Toy.training_step
    monkeypatch.setattr(toy.Toy, "training_step", training_step)
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "stopped at once; the last checkpoint is step=5.ckpt; go on: zoo fit --resume r"
    assert [path.name for path in Path("r/checkpoints").iterdir()] == ["step=5.ckpt"]


def test_a_removed_parameter_in_a_checkpoint_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = next((fit(trainer__max_steps=1).run_dir / "checkpoints").glob("*.ckpt"))
    content = torch.load(checkpoint, weights_only=True)
    content["zoo"]["config"]["model"]["init_args"]["old_name"] = 1
    torch.save(content, "old.ckpt")
    assert main(["fit", "--config", TOY, "--ckpt_path", "old.ckpt"]) == 2
    assert "'old_name', which Toy no longer has" in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", TOY, "--model.activation", "gelu", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
