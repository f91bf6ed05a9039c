"""Commands of the zoo in child processes that start at once.

Importing Lightning takes seconds. A server process imports it one time and forks a child for each command, which is
otherwise a process of its own: it can be killed, it has its own memory, environment and output. It does not outlive the
process that started it: a run that went on would hold its directory against the next call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

#: What the server imports before it forks.
PRELOAD = ("zoo.preload",)


def _run(argv: list[str], cwd: str, env: dict[str, str], log: str | None) -> None:
    """Entry of the child: become a process group, redirect the output, run the command."""
    os.setpgrp()
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if log is not None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in env:  # it was imported with the threads of the server
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    # loader workers start as they do in a process of the shell
    multiprocessing.set_start_method(None, force=True)
    sys.argv = ["zoo", *argv]
    from zoo.main import main

    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """Kill this process group as soon as the parent is gone, however it ended; the last checkpoint stays."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # on a pipe, of which the parent has the other end
        os.killpg(0, signal.SIGKILL)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


def _call(function: Callable[..., Any], args: tuple[Any, ...], answer: Connection) -> None:
    try:
        answer.send((True, function(*args)))
    except BaseException as error:
        answer.send((False, f"{type(error).__name__}: {error}"))


def call(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Call a function in a child process that has imported nothing but the frame, and return its result.

    Args:
        function: A function of a module; it and `args` are pickled.
        args: Its arguments.
        timeout: Seconds.

    Raises:
        RuntimeError: If the function has raised; the text names the error.
        TimeoutError: If there is no answer in time; the child is killed.
    """
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = _context().Process(target=_call, args=(function, args, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            process.kill()
            raise TimeoutError(f"{function.__name__} gave no answer in {timeout} s")
        good, value = ours.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}") from error
    finally:
        process.join()
    if not good:
        raise RuntimeError(value)
    return value


class Child:
    """One command of the zoo in a child process.

    Args:
        argv: The words after `zoo`.
        cwd: Working directory; the present one if None.
        env: Changes to the environment; None as a value removes a variable.
        log: File that takes standard output and error; the parent's if None.
    """

    def __init__(
        self,
        argv: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        log: Path | None = None,
    ) -> None:
        merged: dict[str, str | None] = {**os.environ, **(env or {})}
        clean = {key: value for key, value in merged.items() if value is not None}
        where = str((cwd or Path.cwd()).absolute())
        target = (list(argv), where, clean, str(log.absolute()) if log else None)
        self.argv, self.log = target[0], log
        self.process: BaseProcess = _context().Process(target=_run, args=target)
        self.process.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return int(self.process.pid or 0)

    @property
    def exitcode(self) -> int | None:
        """Exit code, negative for a signal; None while the child runs."""
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal to the child."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the child and what it has started, by SIGKILL."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()
        self.process.join()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code; negative for a signal.

        Raises:
            TimeoutError: If it takes longer than `timeout` seconds; the child is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"no end after {timeout} s: zoo {' '.join(self.argv)}\n{self.output()[-2000:]}")
        return self.process.exitcode

    def wait_for(self, path: Path, timeout: float = 120.0) -> bool:
        """Wait until `path` exists; False if the child ended without it."""
        end = time.monotonic() + timeout
        while not path.exists():
            if self.process.exitcode is not None or time.monotonic() > end:
                return path.exists()
            time.sleep(0.01)
        return True

    def output(self) -> str:
        """What the child has printed so far, where it prints to a file."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log and self.log.is_file() else ""


def run(argv: Sequence[str], timeout: float | None = None, **kwargs: object) -> tuple[int, str]:
    """Run one command to its end; returns exit code and output (`log=` takes the file)."""
    child = Child(argv, **kwargs)  # type: ignore[arg-type]
    return child.wait(timeout), child.output()
