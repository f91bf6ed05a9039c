"""One run from its checked config to its summary: directory, LightningCLI, trainer, outcome.

Longer than other files: all ways in which a run can end (finished, stopped, interrupted, failed) share its state.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from zoo import runs, shortcuts
from zoo.card import ZOO_API
from zoo.cli import config_name, display_name, links, replayable
from zoo.collector import paused_collector
from zoo.config import Layers
from zoo.errors import RunError, UsageError
from zoo.evaluation import print_results, untrained_note
from zoo.new_options import NewOptions
from zoo.options import Options
from zoo.output import short, unstoppable_output

#: Functions of torch that take a batch over from a loader process.
FETCHING = ("rebuild_storage_fd", "rebuild_storage_filename")

#: Strategies of Lightning that write a checkpoint in shards, by themselves; `zoo.nn.fsdp2` assembles one file.
SHARDED = ("'fsdp", "deepspeed", "DeepSpeed", "ModelParallel", "FSDPStrategy")

#: Errors of a disk on which nothing can be written any more.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

#: Metrics worth a line at the end of a command.
RESULTS = {"fit": ("val/", "train/"), "validate": ("val/",), "test": ("test/",), "predict": ("predict/",)}


class Stamp(pl.Callback):
    """Writes into every checkpoint what it belongs to, so that it can be used without its config file.

    Args:
        config: The replayable config of the run.
        method: Registered name of the method.

    Attributes:
        stepped: Whether a step of the training may have changed anything.
        place: Step and epoch of the checkpoint that is evaluated.
    """

    def __init__(self, config: Mapping[str, Any], method: str) -> None:
        self.config, self.method, self.stepped = config, method, False
        self.place: dict[str, int] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let what is evaluated be logged at its step; Lightning's counters stay, methods may draw by them."""
        if trainer.state.fn != "fit":
            from callbacks.boundaries import log_at

            self.place = {"step": int(checkpoint.get("global_step", 0)), "epoch": int(checkpoint.get("epoch", 0))}
            log_at(trainer, checkpoint)

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.stepped = True

    def on_train_batch_end(self, *args: Any) -> None:
        self.stepped = True

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = json.loads(json.dumps({key: self.config[key] for key in ("model", "data")}))
        version = int(getattr(pl_module, "version", 1))
        checkpoint["zoo"] = {"api": ZOO_API, "method": self.method, "method_version": version, "config": kept}


class SameStart(pl.Callback):
    """Gives the generators the state that they had when it was made, in every process.

    Strategies with several processes seed them again when they connect, after the networks were built; a single process
    does not. Without this, draws during the training would depend on the number of processes.
    """

    def __init__(self) -> None:
        from callbacks.rng import rng_state

        self.state = rng_state()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        from callbacks.rng import set_rng_state

        set_rng_state(self.state)


class ZooCLI(LightningCLI):
    """LightningCLI for classes that are known already and a config that is checked already."""

    def __init__(
        self, command: str, config: Mapping[str, Any], classes: Mapping[str, type], extra: list[pl.Callback]
    ) -> None:
        self.command, self.extra = command, extra
        self.run_dir = Path(os.environ[runs.RUN_DIR_VARIABLE])
        parsed = {
            "seed_everything": config["seed_everything"],
            "trainer": config["trainer"],
            "model": config["model"].get("init_args", {}),
            "data": config["data"].get("init_args", {}),
        }
        super().__init__(
            model_class=classes["model"],
            datamodule_class=classes["data"],
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, command: {"exit_on_error": False}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args={"subcommand": command, command: parsed},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for argument, fact in links(self._model_class).items():
            parser.link_arguments(f"data.{fact}", f"model.{argument}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_object(args)

    def _parse_ckpt_path(self) -> None:
        """The checkpoint is a layer of the config already, below everything the user gave."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = self._get(self.config_init, "trainer")
        plugins = trainer.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(word in repr(trainer.get("strategy")) for word in SHARDED):
            from callbacks.atomic_checkpoint_io import AtomicCheckpointIO

            plugins = [*plugins, AtomicCheckpointIO()]
        root = str(self.run_dir)
        if os.environ.get("WANDB_MODE") == "disabled" and isinstance(trainer.get("logger"), list):
            trainer["logger"] = [item for item in trainer["logger"] if not isinstance(item, WandbLogger)]
        built = super().instantiate_trainer(default_root_dir=root, plugins=plugins or None, **kwargs)
        built.callbacks.extend(self.extra)  # type: ignore[attr-defined]
        return built

    def _run_subcommand(self, subcommand: str) -> None:
        """The job runs it, with the trainer at hand when it fails."""


class Job:
    """One call of a trainer command.

    Args:
        options: The call.
        layers: The checked config.
        classes: Model and data class.
        checkpoint: Checkpoint to start from.
    """

    def __init__(self, options: Options, layers: Layers, classes: Mapping[str, type], checkpoint: Path | None) -> None:
        self.options, self.layers, self.classes, self.checkpoint = options, layers, classes, checkpoint
        self.config = replayable(layers.merged)
        self.method = display_name("methods", self.config["model"]["class_path"])
        self.cli: ZooCLI | None = None
        self.stamp = Stamp(self.config, self.method)
        self.replaces = False

    def run(self) -> runs.RunResult:
        """Run it; the directory and the environment are released whatever happens."""
        path, continues = self._directory()
        directory = runs.RunDirectory(path)
        rank_zero, written = runs.global_rank() == 0, None
        if rank_zero:
            written = self._claim(directory, continues)
        mode = self.options.wandb or os.environ.get("WANDB_MODE") or "offline"
        quieten()
        shortcuts.install()
        try:
            with unstoppable_output(), environment({runs.RUN_DIR_VARIABLE: str(directory.path), "WANDB_MODE": mode}):
                return self._run_in(directory, rank_zero, continues, written)
        finally:
            directory.release()

    def _claim(self, directory: runs.RunDirectory, continues: bool) -> Path | None:
        """Take the directory and write the config into it; returns the config of a resume."""
        name = self._config_name(directory)
        directory.claim(self.method, name, continues, self.options.command, self.replaces)
        if continues and self.options.command != "fit":
            return None
        resumed = continues and (directory.path / "config.yaml").exists()
        saved = directory.save_config(yaml.safe_dump(self.config, sort_keys=False), resumed)
        return saved if resumed else None

    def _directory(self) -> tuple[Path, bool]:
        """Return the directory of the run and whether the run exists already."""
        options = self.options
        if options.resume is not None:
            if options.run_dir is not None and Path(options.run_dir).resolve() != Path(options.resume).resolve():
                raise UsageError("--resume goes on in the directory of the run", "leave out --run_dir")
            return Path(options.resume), True
        if options.run_dir is not None:
            known = self._is_taken(Path(options.run_dir))
            return Path(options.run_dir), known and not self.replaces
        if options.command != "fit" and self.checkpoint is not None:
            owner = self.checkpoint.resolve().parent.parent
            if (owner / "run.json").is_file():
                return owner, True
        chosen = runs.choose_run_dir(self.method, self._config_name(None))
        if runs.RUN_DIR_VARIABLE not in os.environ:  # it is named by the job, which may have been started before
            self._is_taken(chosen)
        return chosen, False

    def _is_taken(self, path: Path) -> bool:
        """Whether a run has begun in a directory; notes in `replaces` if another one may take its place.

        Raises:
            UsageError: If a fit must not.
        """
        known = (path / "config.yaml").is_file()
        if known and self.options.command == "fit" and runs.global_rank() == 0:
            if not runs.RunDirectory(path).unused:
                raise UsageError(
                    f"{path} already holds a run", f"go on with it by --resume {path}, or choose another --run_dir"
                )
            self.replaces = True
        return known

    def _config_name(self, directory: runs.RunDirectory | None) -> str:
        known = directory.identity.get("config") if directory else None
        if known and (self.options.resume or self.options.command != "fit"):
            return str(known)
        return config_name(self.options)

    def _run_in(
        self, directory: runs.RunDirectory, rank_zero: bool, continues: bool, resumed_config: Path | None
    ) -> runs.RunResult:
        """Run it in a claimed directory; `continues` is whether the run was there, `resumed_config` what to undo."""
        started, status, code, refused = time.perf_counter(), "failed", 1, False
        earlier = (directory.path / "summary.json").is_file()
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            with paused_collector():
                self._build()
            if rank_zero:
                self._announce(directory)
            self._call()
            status, code = "finished", 0
            code = int(getattr(self.cli.trainer, "zoo_exit_code", 0)) if self.cli else 0
            status = "stopped" if code else status
        except KeyboardInterrupt:
            status, code = "stopped", 130
            self._say_stopped(directory)
        except SystemExit as stop:
            # Lightning turns a keyboard interrupt into an exit
            status, code = "stopped", 130 if stop.code in (1, None) else int(stop.code or 0)
            if isinstance(stop.__context__, KeyboardInterrupt):
                self._say_stopped(directory)
        except UsageError as error:
            refused = not isinstance(error, RunError)
            raise
        except Exception as error:
            try:
                self._explain(error, directory)
            except UsageError as explained:
                refused = not isinstance(explained, RunError)
                raise
        finally:
            if on_interrupt is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)  # Lightning may leave it ignored
            seconds = time.perf_counter() - started
            if rank_zero:
                idle = not self.stamp.stepped and (refused or status == "stopped")
                untouched = idle and continues  # a resume that came to nothing leaves no trace
                if not untouched and not (refused and earlier):
                    self._summarise(directory, status, seconds)
                for logger in getattr(getattr(self.cli, "trainer", None), "loggers", ()):
                    if untouched and hasattr(logger, "discard"):
                        logger.discard()
                    elif hasattr(logger, "close"):
                        logger.close(code)
                if untouched and resumed_config is not None:
                    resumed_config.unlink(missing_ok=True)
                began = self.options.command != "fit" or self.stamp.stepped or status == "finished"
                if not began and (directory.was_unused or not continues):
                    directory.mark_unused()
        trainer, model = (
            (self.cli.trainer, self.cli.model) if self.cli and hasattr(self.cli, "trainer") else (None, None)
        )
        metrics = runs.read_json(directory.path / "summary.json").get("metrics", {})
        return runs.RunResult(directory.path, metrics, model, trainer, code)

    def _build(self) -> None:
        try:
            self.cli = ZooCLI(self.options.command, self.config, self.classes, [self.stamp])
        except UsageError:
            raise
        except Exception as error:
            message = str(error).split("\n")[0]
            if not isinstance(error, ValueError | TypeError | FileNotFoundError | RuntimeError):
                message = f"{type(error).__name__}: {message}"  # a KeyError says nothing but the key
            raise UsageError(
                f"{self.method}: {message}", "nothing was started", detail=traceback.format_exc()
            ) from error

    def _call(self) -> None:
        if self.cli is None:
            raise RuntimeError("the trainer was not built")
        kwargs: dict[str, Any] = {"model": self.cli.model, "datamodule": self.cli.datamodule}
        if self.checkpoint is not None:
            kwargs["ckpt_path"] = str(self.checkpoint)
        self.cli.trainer.callbacks.insert(0, SameStart())  # type: ignore[attr-defined]
        changed = any(key.startswith("model.init_args.") for key in self.layers.changed)
        if self.options.command == "fit" and self.checkpoint is not None and changed:
            self.cli.trainer.callbacks.append(NewOptions())  # type: ignore[attr-defined]
        results = self.options.command in ("validate", "test")
        if results:
            kwargs["verbose"] = False  # Lightning's table has a column for each loader and cuts names
        outcome = getattr(self.cli.trainer, self.options.command)(**kwargs)
        if results and self.cli.trainer.is_global_zero:
            from callbacks.boundaries import shown_step

            step = shown_step(self.cli.trainer)
            title = self.options.command if self.checkpoint is None else f"{self.options.command}, step {step}"
            print_results(title, outcome or ())

    def _explain(self, error: Exception, directory: runs.RunDirectory) -> None:
        """Turn what the user can mend into a sentence; raise everything else as it is."""
        first = str(error).split("\n")[0]
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in first:
            sizes = {k: v for k, v in self.config["data"].get("init_args", {}).items() if "batch_size" in k}
            raise RunError(
                f"out of memory with data.init_args {sizes}: {first}",
                "halve them and add --trainer.accumulate_grad_batches 2, or use --trainer.precision bf16-mixed",
            ) from error
        if isinstance(error, RuntimeError) and "loading state_dict" in first:
            detail = str(error).split("\n")
            raise UsageError(
                f"{self.checkpoint} does not fit this config: {detail[1].strip() if len(detail) > 1 else first}",
                "use the options that the checkpoint was trained with", detail=str(error),
            ) from error  # fmt: skip
        go_on = f"then go on with --resume {os.path.relpath(directory.path)}"
        if isinstance(error, OSError) and error.errno in DISK:
            raise RunError(
                f"{error.strerror or first}", f"make room on the disk, {go_on}", detail=traceback.format_exc()
            ) from error
        # a process that dies while a batch of it is being fetched leaves a connection that ends
        cut_off = isinstance(error, EOFError | ConnectionError) and _raised_in(error.__traceback__, FETCHING)
        if cut_off or (isinstance(error, RuntimeError) and "DataLoader worker" in first):
            raise RunError(
                f"a loader process has died: {first.strip() or 'a worker was cut off'}",
                f"if memory was short, use fewer data.init_args.num_workers; {go_on}",
                detail=traceback.format_exc(),
            ) from error
        if isinstance(error, FileNotFoundError | ValueError):
            if _raised_in(error.__traceback__, ("prepare_data", "setup", "load_state_dict")):
                raise UsageError(f"{self.method}: {first}", "", detail=traceback.format_exc()) from error
            in_worker = "in DataLoader worker process" in first  # the message holds the traceback of the worker
            if in_worker or _raised_in(error.__traceback__, ("batch",)):
                cause = str(error).strip().splitlines()[-1].partition(": ")[2] if in_worker else first
                raise RunError(
                    f"reading a batch failed: {cause}",
                    f"mend the data, {go_on}",
                    detail=traceback.format_exc(),
                ) from error
        raise error

    def _announce(self, directory: runs.RunDirectory) -> None:
        print(f"run directory: {os.path.relpath(directory.path)}", file=sys.stderr)
        if self.cli is not None and self.options.command == "fit":
            sizes = [(p.numel(), p.requires_grad) for p in self.cli.model.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)
            print(f"{self.method}: {total:,} parameters, {trained:,} trained", file=sys.stderr)
        if self.checkpoint:
            print(f"starting from: {os.path.relpath(self.checkpoint)}", file=sys.stderr)
        elif self.cli is not None and self.options.command != "fit":
            options = self.config["model"].get("init_args", {})
            note = untrained_note(self.options.command, self.cli.model, options)
            if note:
                print(note, file=sys.stderr)

    def _say_stopped(self, directory: runs.RunDirectory) -> None:
        """Say what a Ctrl-C that left no time for a checkpoint has left."""
        from callbacks.checkpoint_files import checkpoints_newest_first

        if runs.global_rank() != 0:
            return
        text, go_on = "stopped", f"zoo fit --resume {os.path.relpath(directory.path)}"
        if self.options.command == "fit":
            found = checkpoints_newest_first(directory.path)
            stepped = getattr(getattr(self.cli, "trainer", None), "global_step", 0)
            if found:
                text = f"stopped at once; the last checkpoint is {found[0].name}; go on: {go_on}"
            elif stepped:
                text = f"stopped at once, at step {stepped}, without a checkpoint; from the beginning: {go_on}"
            else:
                text = "stopped before the first step"
        print(text, file=sys.stderr)

    def _summarise(self, directory: runs.RunDirectory, status: str, seconds: float) -> None:
        metrics: dict[str, float] = {}
        facts: dict[str, Any] = {"seconds": round(seconds, 3)}
        trainer = getattr(self.cli, "trainer", None)
        if trainer is not None:
            metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
            facts |= {"step": trainer.global_step, "epoch": trainer.current_epoch, **self.stamp.place}
            for callback in trainer.callbacks:
                if hasattr(callback, "facts"):
                    facts |= callback.facts()
        if status == "finished":
            shown = sorted((k for k in metrics if k.startswith(RESULTS[self.options.command])), key=len)[:4]
            text = "  ".join(f"{key} {short(metrics[key])}" for key in sorted(shown))
            print(f"{self.options.command} finished after {seconds:.0f} s  {text}", file=sys.stderr)
        try:
            directory.add_summary(self.options.command, status, metrics, facts)
        except OSError as error:
            print(f"warning: summary.json could not be written: {error.strerror}", file=sys.stderr)


def quieten() -> None:
    """Leave out what Lightning prints about itself; its warnings stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # Lightning calls what torch deprecated; nothing that a user could change
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    # batches are built from memory in the main process, or the config says how many workers it wants
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # a datamodule without validation images gives an empty list
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")


def _raised_in(trace: TracebackType | None, functions: tuple[str, ...]) -> bool:
    while trace is not None:
        if trace.tb_frame.f_code.co_name in functions and "lightning" not in trace.tb_frame.f_globals.get(
            "__name__", ""
        ):
            return True
        trace = trace.tb_next
    return False


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; child processes see them."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, old in before.items():
            if old is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = old
