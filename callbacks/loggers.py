"""Loggers of a run: a CSV file that a resume continues, and W&B that never asks, hangs or stops the training."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from zoo.collector import paused_collector
from zoo.runs import RUN_DIR_VARIABLE, read_json, write_atomically


def run_directory(save_dir: str | None) -> Path:
    """Return `save_dir`, or the directory of the present run."""
    return Path(save_dir or os.environ.get(RUN_DIR_VARIABLE, "."))


class RunCSVLogger(Logger):
    """Writes `metrics.csv` with one row a logged step; a resumed run drops the rows after its checkpoint and goes on.

    Rows are kept in memory and written every `flush_every_n_rows` rows or `flush_every_seconds` seconds, before each
    checkpoint and at the end, so that the file on the disk never lags behind the newest checkpoint.

    Args:
        save_dir: Directory of the file; the run's directory if None.
        flush_every_n_rows: Rows between two writes at most.
        flush_every_seconds: Seconds between two writes at most, where there are new rows.
    """

    def __init__(
        self, save_dir: str | None = None, flush_every_n_rows: int = 200, flush_every_seconds: float = 5.0
    ) -> None:
        super().__init__()
        self._dir = run_directory(save_dir)
        self._every, self._seconds = flush_every_n_rows, flush_every_seconds
        self._flushed = 0.0
        self._rows: list[dict[str, float | int | str]] = []
        self._written = 0
        self._keys: list[str] = ["step"]
        self._loaded = False

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def path(self) -> Path:
        """The file."""
        return self._dir / "metrics.csv"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The config of the run is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._load()
        step = 0 if step is None else step
        row: dict[str, float | int | str] = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        self._keys += [key for key in row if key not in self._keys]
        self._rows.append(row)

    def _load(self) -> None:
        """Take over what an earlier part of this run, or its `fit`, has written."""
        if self._loaded:
            return
        self._loaded = True
        if not self.path.is_file():
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self._keys += [key for key in reader.fieldnames or [] if key not in self._keys]
            rows = [{k: v for k, v in row.items() if v} for row in reader]
        self._rows = [{**row, "step": int(row["step"])} for row in rows]
        self._written = len(self._rows)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows from `step` on, which the training is going to repeat, but not those of a test."""
        self._load()
        kept = [row for row in self._rows if int(row["step"]) < step or (step and _is_of_a_test(row))]
        if len(kept) != len(self._rows):
            self._rows, self._written = kept, -1

    @rank_zero_only
    def save(self) -> None:
        """Write all rows if that is due. Lightning calls it after each logged step: the whole file would be written."""
        due = len(self._rows) - self._written >= self._every
        if due or time.monotonic() - self._flushed >= self._seconds:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write all rows now; a full disk is reported and does not stop the training."""
        if self._written == len(self._rows) or not self._loaded:
            return
        self._flushed = time.monotonic()
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._keys, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, buffer.getvalue())
            self._written = len(self._rows)
        except OSError as error:
            print(f"warning: {self.path} could not be written ({error.strerror}); the rows are kept", file=sys.stderr)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Keep up with the checkpoints that Lightning's own callback writes, too."""
        self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()


def _is_of_a_test(row: Mapping[str, Any]) -> bool:
    return all(key in ("step", "epoch") or key.startswith("test/") for key in row)


#: Where W&B Launch keeps inputs that a program has staged for its next run.
_STAGED = "wandb.sdk.launch.inputs.internal"


def look_for_launch_inputs_where_there_are_any(run: Any) -> None:
    """Keep a class of W&B runs from importing W&B Launch to find nothing, most of a second at each start.

    Only a program that has imported it can have staged inputs. A release of W&B without that step is left as it is.

    Args:
        run: `wandb.sdk.wandb_run.Run`.
    """
    look = getattr(run, "_detect_and_apply_job_inputs", None)
    if look is None or getattr(look, "_looks_first", False):
        return

    def apply_staged(self: Any) -> None:
        if _STAGED in sys.modules:
            look(self)

    apply_staged._looks_first = True  # type: ignore[attr-defined]
    run._detect_and_apply_job_inputs = apply_staged


def run_facts(run_dir: Path) -> dict[str, Any]:
    """Return what a W&B run should be found by beside the method's options: config, seed, options of data and trainer.

    Read from the run's `config.yaml`; lists of callbacks and loggers are left out. Empty if there is no such file.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text("utf-8")) or {}
    facts: dict[str, Any] = {"seed": config.get("seed_everything")}
    if "data" in config:
        data = config["data"]
        facts["data"] = {"name": str(data.get("class_path", "")).rpartition(".")[2], **(data.get("init_args") or {})}
    trainer = config.get("trainer") or {}
    facts["trainer"] = {key: value for key, value in trainer.items() if key not in ("callbacks", "logger")}
    identity = read_json(run_dir / "run.json")
    return facts | {key: identity[key] for key in ("method", "config") if key in identity}


class RunWandbLogger(WandbLogger):
    """W&B in the directory of the run, offline unless `--wandb online` or `WANDB_MODE` says otherwise.

    The id is that of the run, so that a resume continues the same W&B run. Its config has the options of method, data
    and trainer, the name of the config, and the seed (`run_facts`). Nothing is asked, and neither a missing account nor
    an unreachable network stops the training: the data stay in `wandb/` for `wandb sync`.

    Args:
        project: W&B project.
        group: W&B group, e.g. the seeds of one experiment.
        tags: W&B tags.
        notes: W&B notes.
        mode: `online`, `offline` or `disabled`, beats `WANDB_MODE`; None follows it.
    """

    def __init__(
        self,
        project: str = "method-zoo",
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: str | None = None,
    ) -> None:
        self._run_dir = run_directory(None)
        identity = read_json(self._run_dir / "run.json")
        name = "-".join(str(identity[key]) for key in ("method", "config", "id") if key in identity) or None
        self._offline_reason = ""
        mode = mode or os.environ.get("WANDB_MODE", "offline")
        super().__init__(
            name=name, save_dir=str(self._run_dir), id=identity.get("id"), project=project, group=group, tags=tags,
            notes=notes, offline=mode == "offline", resume="allow" if mode == "online" else None,
        )  # fmt: skip
        self._mode = mode

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            with paused_collector():  # W&B imports a lot when it starts
                self._start()
                return super().experiment
        return self._experiment

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End the W&B run, so that another one can begin in this process."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=exit_code)
            self._experiment = None

    @rank_zero_only
    def discard(self) -> None:
        """End the W&B run of a resume that came to nothing, and delete its folder if nothing was to be sent."""
        if self._experiment is None:
            return
        folder = Path(self._experiment.settings.sync_dir)
        self.close(1)
        if not self._offline:
            return
        shutil.rmtree(folder, ignore_errors=True)
        others = sorted(path for path in folder.parent.glob("*run-*") if path.is_dir() and not path.is_symlink())
        for link in [path for path in folder.parent.iterdir() if path.is_symlink() and not path.exists()]:
            target = os.readlink(link)
            link.unlink()
            if others:
                link.symlink_to(target.replace(folder.name, others[-1].name))
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()

    def _start(self) -> None:
        """Start W&B; where online does not work, go on offline and say so."""
        import wandb

        look_for_launch_inputs_where_there_are_any(wandb.sdk.wandb_run.Run)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._wandb_init["mode"] = self._mode
        # Lightning passes it, W&B removed it
        self._wandb_init.pop("anonymous", None)
        settings = wandb.Settings(
            console="off", silent=True, init_timeout=30, disable_git=True, x_disable_stats=self._mode == "disabled"
        )
        self._wandb_init["settings"] = settings
        self._wandb_init["config"] = run_facts(self._run_dir)
        if self._mode != "online":
            return
        if not wandb.api.api_key:
            self._go_offline("no account is configured: wandb login")
            return
        try:
            self._experiment = wandb.init(**self._wandb_init)
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            wandb.teardown()  # its service holds the id of the run that did not start
            self._go_offline(str(error).splitlines()[0])

    def _go_offline(self, reason: str) -> None:
        print(
            f"warning: W&B is not reachable ({reason}); logging offline, "
            f"later: wandb sync {self._run_dir}/wandb/offline-run-*",
            file=sys.stderr,
        )
        self._wandb_init |= {"mode": "offline", "resume": None}
        self._offline = True
