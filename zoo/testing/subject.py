"""The method under test: its class, its smoke config, and the runs that checks share."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import os
import random
import socket
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule

import zoo.job  # noqa: F401 - the slow import, here and not in the time of the first check
from zoo import registry
from zoo.api import run, words
from zoo.card import Card
from zoo.children import Child
from zoo.config import load_layers, resolve_config
from zoo.errors import UsageError
from zoo.main import main
from zoo.runs import RunResult
from zoo.testing.compare import unmeasured
from zoo.testing.kit import Broken, Violation
from zoo.testing.probes import Recorder

#: A few steps, a little validation.
SHORT = {"trainer.max_steps": 3, "trainer.limit_val_batches": 1, "trainer.enable_model_summary": False}
CHILD_SECONDS = 300.0
#: What the runs without options of a check are kept by.
AS_SHIPPED = "[]"
#: Parts of a checkpoint that say how far the loops are; the metrics and steps show the same.
LOOPS = ("loops", "zoo", "pytorch-lightning_version")


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: Its directory.
        rows: Rows of `metrics.csv` when the training was over.
        result: What `zoo.run` returned; None for a child process.
        warnings: Warnings in the order in which they came.
        output: What was printed.
    """

    folder: Path
    rows: list[dict[str, str]]
    result: RunResult | None = None
    warnings: list[warnings.WarningMessage] = field(default_factory=list)
    output: str = ""

    def callback(self, kind: type[Callback]) -> Any:
        """The callback of a class in the trainer of this run."""
        return next(c for c in self.result.trainer.callbacks if isinstance(c, kind))  # type: ignore[union-attr]

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        from callbacks.checkpoint_files import checkpoints_newest_first

        return checkpoints_newest_first(self.folder)[0]

    def final(self) -> dict[str, Any]:
        """The newest checkpoint's content without counters of the loops, what names this run, and measured times."""
        content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        return unmeasured({key: value for key, value in content.items() if key not in LOOPS})


class Subject:
    """A registered method and a folder for its runs.

    Args:
        name: Name of the method.
        folder: Empty folder.
        golden: Folder of stored losses.
    """

    def __init__(self, name: str, folder: Path, golden: Path) -> None:
        self.name, self.folder, self.golden = name, folder.absolute(), golden.absolute()
        self.entry = registry.find("methods", name)
        self._count = 0
        self._options: dict[str, Any] = {}
        #: Whether the check in progress has made or asked for anything that its options change.
        self.options_used = False
        # by the options that they were made with
        self._bases: dict[str, Run | Broken | Violation] = {}
        self._evaluations: dict[str, dict[str, Run | Broken | Violation]] = {}

    @contextlib.contextmanager
    def under(self, check: str) -> Iterator[dict[str, Any]]:
        """For a while, let everything be made with the options that the card wants for a check; yields them."""
        card = getattr(self.cls, "card", None)
        self._options = dict(card.check_options.get(check, {})) if isinstance(card, Card) else {}
        self.options_used = False
        try:
            yield self._options
        finally:
            self._options = {}

    @property
    def options(self) -> dict[str, Any]:
        """Laid over every config that the check in progress makes, see `Card.check_options`."""
        self.options_used = True
        return self._options

    @property
    def _made_with(self) -> str:
        return repr(sorted(self.options.items()))

    @cached_property
    def cls(self) -> type[LightningModule]:
        """The class.

        Raises:
            Broken: If it cannot be imported or is not a method.
        """
        try:
            found = registry.load(self.entry)
        except UsageError as error:
            raise Broken("importable", str(error)) from error
        if not (isinstance(found, type) and issubclass(found, LightningModule)):
            raise Broken("importable", f"{self.entry.value} is not a LightningModule")
        return found

    @property
    def card(self) -> Card:
        """The card.

        Raises:
            Broken: If there is none.
        """
        card = getattr(self.cls, "card", None)
        if not isinstance(card, Card):
            raise Broken("card", f"{self.cls.__name__} has no class attribute card = Card(...)")
        return card

    @cached_property
    def smoke(self) -> Path:
        """File of the smoke config.

        Raises:
            Broken: If it is not shipped.
        """
        try:
            return resolve_config(f"{self.entry.name}/smoke")
        except UsageError as error:
            raise Broken("smoke", str(error)) from error

    @property
    def config(self) -> dict[str, Any]:
        """The smoke config with the options of the check in progress, names resolved."""
        given = [word.removeprefix("--").partition("=") for word in words((), self.options, {})]
        return load_layers([self.smoke], [(key, text) for key, _, text in given]).merged

    def new_folder(self, tag: str) -> Path:
        """A directory that is not there yet."""
        self._count += 1
        return self.folder / f"{self._count:02}-{tag}"

    def words(self, overrides: Mapping[str, Any], callbacks: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """Arguments of `zoo.run` for the smoke config with changes."""
        added = {"trainer.callbacks+": list(callbacks)} if callbacks else {}
        return {"config": [self.smoke], "overrides": {**overrides, **self.options, **added}}

    def fit(self, tag: str, overrides: Mapping[str, Any], callbacks: Sequence[dict[str, Any]] = ()) -> Run:
        """Train the smoke config with changes, in this process.

        Raises:
            Broken: If it is known already that the config cannot be trained as it is shipped.
        """
        self._refuse_if_broken()
        return in_process("fit", run_dir=self.new_folder(tag), **self.words(overrides, callbacks))

    def child(
        self,
        call: Mapping[str, Any],
        own: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        command: str = "fit",
    ) -> Child:
        """Start a command in a child process."""
        self._count += 1
        log = self.folder / f"{self._count:02}.log"
        argv = [command, *words(call["config"], call["overrides"], {**own, "wandb": "disabled"})]
        return Child(argv, cwd=self.folder, env={"OMP_NUM_THREADS": "1", **(env or {})}, log=log)

    def two_ranks(self, call: Mapping[str, Any], own: Mapping[str, Any], command: str = "fit") -> tuple[list[int], str]:
        """Run a command with two gloo processes; returns the exit codes and what they have printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        call = {**call, "config": [*call["config"], "hardware/ddp_cpu"]}
        ranks = [self.child(call, own, {**env, "LOCAL_RANK": str(rank)}, command) for rank in (0, 1)]
        try:
            return [rank.wait(CHILD_SECONDS) for rank in ranks], ranks[0].output() + ranks[1].output()
        finally:
            for rank in ranks:
                rank.kill()

    def _refuse_if_broken(self) -> None:
        known = self._bases.get(AS_SHIPPED)
        if isinstance(known, Broken):
            raise known

    def _problem(self, owner: str, text: str) -> Broken | Violation:
        """What does not work as shipped is the matter of one check; with options, of the check that has them."""
        if self.options:
            return Violation(f"the smoke config with the options of this check: {text}")
        return Broken(owner, text)

    @property
    def base(self) -> Run:
        """The smoke config, with the options of the check in progress, trained and watched; once for all with the same.

        Raises:
            Broken: If it cannot be trained as it is shipped.
            Violation: If it cannot be trained with the options.
        """
        self.card, self.smoke  # noqa: B018 - their absence is a matter of other checks
        self._refuse_if_broken()
        if self._made_with not in self._bases:
            try:
                found: Run | Broken | Violation = self.fit("smoke", {}, [probe(Recorder)])
            except Exception as error:
                found = self._problem(_owner(error), reason(error))
            self._bases[self._made_with] = found
        return _or_raised(self._bases[self._made_with])

    @property
    def recorder(self) -> Recorder:
        """What was seen in `base`."""
        return self.base.callback(Recorder)

    def _evaluated(self, command: str, folder: Path) -> Run | Broken | Violation:
        try:
            return in_process(command, run_dir=folder)
        except Exception as error:
            return self._problem("smoke", f"{command}: {reason(error)}")

    @property
    def evaluations(self) -> dict[str, Run]:
        """`validate`, `test` and, where the method has it, `predict` of `base`.

        Raises:
            Broken: If one of them does not run as it is shipped.
            Violation: If one of them does not run with the options of the check in progress.
        """
        folder = self.base.folder
        if self._made_with not in self._evaluations:
            commands = ["validate", "test"]
            if self.cls.predict_step is not LightningModule.predict_step:
                commands.append("predict")
            self._evaluations[self._made_with] = {command: self._evaluated(command, folder) for command in commands}
        return {command: _or_raised(found) for command, found in self._evaluations[self._made_with].items()}


def _or_raised(found: Run | Broken | Violation) -> Run:
    if isinstance(found, Run):
        return found
    raise found


def probe(kind: type[Callback], **options: Any) -> dict[str, Any]:
    """Return a callback of the kit as a config names it."""
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": options}


def reason(error: BaseException) -> str:
    """Return an error in a line or two, with the place where it was raised."""
    if isinstance(error, UsageError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{place}"


def _owner(error: BaseException) -> str:
    """Name the check whose matter it is that the smoke config does not train."""
    functions = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    return "checkpoint" if "check_plain" in functions else "smoke"


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of `metrics.csv`, none if there is no file."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def in_process(command: str, **call: Any) -> Run:
    """Run a command in this process, quietly; its warnings are kept."""
    with isolated(), captured() as (out, err), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(command, wandb="disabled", **call)
    if result.exit_code != 0:
        raise RuntimeError(f"{command} ended with exit code {result.exit_code}")
    return Run(result.run_dir, read_rows(result.run_dir), result, caught, out.getvalue() + err.getvalue())


def command_line(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run the command line in this process; returns exit code, standard output and standard error."""
    with isolated(), captured() as (out, err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    """Keep what is printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield out, err


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """One thread, as in the child processes; afterwards generators, environment and defaults are as before."""
    threads, environ, path = torch.get_num_threads(), dict(os.environ), list(sys.path)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype = torch.get_default_dtype()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:] = copy.copy(path)
