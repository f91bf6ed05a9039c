"""Makes the runs of a plan in child processes: only what is missing or stale, and again from where it was killed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from zoo.claims.fingerprint import class_paths, code_files, digest
from zoo.claims.plan import PLACEHOLDER, Plan, Run
from zoo.config import load_layers, option_text
from zoo.errors import UsageError
from zoo.runs import read_json, write_atomically

#: File in a run's directory that says which run it is; without it a directory is never removed.
MARKER = "reproduce.json"
LOG = "output.log"
#: Threads of a run, unless told otherwise: the small networks of a claim gain little from more.
THREADS = 2
POLL_SECONDS = 0.1
#: How long a child may take to write a checkpoint after SIGTERM.
GRACE_SECONDS = 60.0


@dataclass(frozen=True, eq=False)
class Task:
    """One run with one seed.

    Attributes:
        run: The run.
        seed: The seed.
        directory: Where it is made.
        fingerprint: Hash of everything that its result depends on.
    """

    run: Run
    seed: int
    directory: Path
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.run.name} seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json` of the directory, `{}` before the first command ended."""
        return read_json(self.directory / "summary.json")

    @property
    def known(self) -> bool:
        """Whether the directory holds this very task."""
        return read_json(self.directory / MARKER).get("fingerprint") == self.fingerprint

    @property
    def resumed(self) -> int:
        """How often the run went on after it was stopped."""
        return len(list(self.directory.glob("config.resume-*.yaml")))

    def remaining(self) -> list[str]:
        """Commands that have not finished."""
        stages = self.summary.get("stages", {}) if self.known else {}
        return [c for c in self.run.commands if stages.get(c, {}).get("status") != "finished"]


def fingerprints(plan: Plan, seeds: Sequence[int]) -> dict[str, dict[int, str]]:
    """Return the hash of each run for each seed: config, options, code, and the runs that it needs.

    Raises:
        UsageError: If a config is missing or wrong.
    """
    out: dict[str, dict[int, str]] = {}
    for run in plan.runs.values():
        options = [option_text(key, value).partition("=") for key, value in run.overrides.items()]
        config = load_layers(run.configs, [(key, text) for key, _, text in options]).merged
        content = {
            "config": config,
            "commands": run.commands,
            "seed_keys": plan.seed_keys,
            "code": code_files(class_paths(config)),
        }
        out[run.name] = {
            seed: digest({**content, "seed": seed, "needs": [out[name][seed] for name in run.needs]}) for seed in seeds
        }
    return out


def plan_tasks(plan: Plan, seeds: Sequence[int], root: Path) -> list[Task]:
    """Return the tasks of a plan, all runs of a seed before the next seed, so that claims can be judged early."""
    hashes = fingerprints(plan, seeds)
    base = root / plan.method / plan.scale
    return [
        Task(run, seed, base / run.name / str(seed), hashes[run.name][seed])
        for seed in seeds
        for run in plan.runs.values()
    ]


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint of a run with the highest step."""
    from callbacks.checkpoint_files import recency

    return max((directory / "checkpoints").glob("*.ckpt"), key=recency, default=None)


class Observer(Protocol):
    """Is told what happens."""

    def started(self, task: Task, resumed: bool) -> None: ...

    def tick(self, active: Mapping[Task, float]) -> None:
        """Called often, with the seconds that each active task has been running."""

    def finished(self, task: Task) -> None: ...

    def failed(self, task: Task, reason: str) -> None: ...

    def stopping(self) -> None: ...


class Process(Protocol):
    """A command that runs; `zoo.children.Child` is one."""

    @property
    def exitcode(self) -> int | None: ...

    def send(self, number: int) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; kill it after `timeout` seconds and raise `TimeoutError`."""


#: Starts the words of a zoo command with changes to the environment; its output is appended to a file.
Start = Callable[[Sequence[str], Mapping[str, str], Path], Process]


def start_child(argv: Sequence[str], env: Mapping[str, str], log: Path) -> Process:
    """Start a command in a child process."""
    from zoo.children import Child

    return Child(argv, env=env, log=log)


@dataclass
class _Active:
    process: Process
    command: str
    resumed: bool
    since: float = field(default_factory=time.monotonic)


class Campaign:
    """Makes tasks, several at once if asked to.

    Args:
        tasks: Tasks in an order in which each comes after those that it needs.
        plan: The plan they belong to.
        observer: Is told what happens.
        jobs: How many at once.
        threads: Threads of each run; if None its share of the processor, at most `THREADS`.
        start: What starts a zoo command.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        plan: Plan,
        observer: Observer,
        jobs: int = 1,
        threads: int | None = None,
        start: Start = start_child,
    ) -> None:
        self.plan, self.observer, self.jobs, self.start = plan, observer, jobs, start
        self.tasks = {(task.run.name, task.seed): task for task in tasks}
        self.active: dict[Task, _Active] = {}
        self.failures: dict[Task, str] = {}
        self.threads = threads or max(1, min(THREADS, available_threads() // jobs))

    def make(self, wanted: Sequence[Task]) -> dict[Task, str]:
        """Make `wanted` and return those that failed, with the reason; a failure does not stop the others."""
        waiting = list(wanted)
        with stoppable():
            try:
                while waiting or self.active:
                    self._start(waiting)
                    time.sleep(POLL_SECONDS)
                    now = time.monotonic()
                    self.observer.tick({task: now - state.since for task, state in self.active.items()})
                    for task, state in list(self.active.items()):
                        if state.process.exitcode is not None:
                            self._ended(task, self.active.pop(task))
            finally:
                self._stop()
        return self.failures

    def _start(self, waiting: list[Task]) -> None:
        for task in list(waiting):
            failed = [name for name in task.run.needs if self.tasks[name, task.seed] in self.failures]
            if failed:
                waiting.remove(task)
                self._fail(task, f"needs {failed[0]}, which failed")
                continue
            unmet = any(self.tasks[name, task.seed].remaining() for name in task.run.needs)
            alone = task.run.alone or any(other.run.alone for other in self.active)
            if len(self.active) >= self.jobs or unmet or (alone and self.active):
                if task.run.alone and not unmet:
                    return  # later ones must not overtake it for ever
                continue
            waiting.remove(task)
            self._prepare(task)
            self._launch(task, task.remaining()[0])

    def _prepare(self, task: Task) -> None:
        """Keep what belongs to this task, remove what is stale."""
        if task.known:
            return
        if task.directory.exists():
            if not (task.directory / MARKER).is_file():
                raise UsageError(f"{task.directory} was not made by reproduce", "move it out of the way")
            shutil.rmtree(task.directory)
        task.directory.mkdir(parents=True)
        marker = {"fingerprint": task.fingerprint, "claims": {c.id: digest(c.terms) for c in self.plan.claims}}
        write_atomically(task.directory / MARKER, json.dumps(marker))

    def _launch(self, task: Task, command: str) -> None:
        resume = command == "fit" and (task.directory / "config.yaml").is_file()
        try:
            if fingerprints(self.plan, [task.seed])[task.run.name][task.seed] != task.fingerprint:
                raise UsageError("config or code has changed since this reproduce began", "call it again")
            words = [command, "--resume", str(task.directory)] if resume else self.words(task, command)
        except UsageError as error:
            self._fail(task, str(error))
            return
        environment = {"OMP_NUM_THREADS": str(self.threads), "WANDB_MODE": os.environ.get("WANDB_MODE", "disabled")}
        with (task.directory / LOG).open("a", encoding="utf-8") as log:
            log.write(f"$ zoo {' '.join(words)}\n")
        process = self.start(words, environment, task.directory / LOG)
        self.active[task] = _Active(process, command, resume)
        self.observer.started(task, resume)

    def words(self, task: Task, command: str) -> list[str]:
        """Return the command line of a task from the beginning.

        Raises:
            UsageError: If a run that it needs left no checkpoint.
        """
        overrides = {key: self._fill(value, task) for key, value in task.run.overrides.items()}
        overrides |= dict.fromkeys(self.plan.seed_keys, task.seed)
        checkpoint = newest_checkpoint(task.directory)
        if command != "fit" and checkpoint is not None:
            overrides.setdefault("ckpt_path", str(checkpoint))
        configs = [word for name in task.run.configs for word in ("--config", name)]
        options = [f"--{option_text(key, value)}" for key, value in overrides.items()]
        return [command, *configs, "--run_dir", str(task.directory), *options]

    def _fill(self, value: Any, task: Task) -> Any:
        """Put the facts of other runs in the place of `${run.checkpoint}` and `${run.run_dir}`."""
        if isinstance(value, dict):
            return {key: self._fill(item, task) for key, item in value.items()}
        if isinstance(value, list):
            return [self._fill(item, task) for item in value]
        if not isinstance(value, str):
            return value

        def fact(match: re.Match[str]) -> str:
            directory = self.tasks[match[1], task.seed].directory
            found = directory if match[2] == "run_dir" else newest_checkpoint(directory)
            if found is None:
                raise UsageError(f"{match[0]}: there is no checkpoint in {directory / 'checkpoints'}")
            return str(found)

        return PLACEHOLDER.sub(fact, value)

    def _ended(self, task: Task, state: _Active) -> None:
        code = state.process.exitcode
        remaining = task.remaining()
        if code or state.command in remaining:
            hint = f"\nremove {task.directory} to start it anew" if state.resumed else ""
            self._fail(task, f"{state.command} ended with code {code}\n{log_tail(task.directory / LOG)}{hint}")
        elif remaining:
            self._launch(task, remaining[0])
        else:
            self.observer.finished(task)

    def _fail(self, task: Task, reason: str) -> None:
        self.failures[task] = reason
        self.observer.failed(task, reason)

    def _stop(self) -> None:
        """Let the children write a checkpoint and end; they are in groups of their own, so no signal reached them."""
        if self.active:
            self.observer.stopping()
        for state in self.active.values():
            with suppress(ProcessLookupError):
                state.process.send(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for state in self.active.values():
            with suppress(TimeoutError):
                state.process.wait(max(0.0, deadline - time.monotonic()))
        self.active.clear()


def available_threads() -> int:
    """Threads that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def log_tail(path: Path, lines: int = 8) -> str:
    """Return the end of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that the children are ended too."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a directory against a second process.

    Raises:
        UsageError: If another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another reproduce is at work in {directory}", "wait for it") from error
        yield


def tasks_to_make(tasks: Sequence[Task], recorded: Callable[[Task], bool]) -> list[Task]:
    """Return the tasks without a result, and those of which only the number is left where a checkpoint is needed."""
    at = {(task.run.name, task.seed): task for task in tasks}
    wanted = {task for task in tasks if task.remaining() and not recorded(task)}
    for task in reversed(tasks):
        if task in wanted:
            wanted.update(other for name in task.run.needs if (other := at[name, task.seed]).remaining())
    return [task for task in tasks if task in wanted]
