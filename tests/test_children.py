"""Child processes do not outlive the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo import children

#: A plugin's command that needs no training: writes its process id and waits.
SLEEPER = """
import os, time
def main(words):
    open("pid", "w").write(str(os.getpid()))
    time.sleep(60)
"""
#: A parent that is killed later; its children import nothing before they run.
PARENT = """
from zoo import children
children.PRELOAD = ()
if __name__ == "__main__":
    children.Child(["sleeper"]).wait()
"""


@pytest.fixture
def sleeper(make_distribution: Callable[..., Path]) -> Path:
    """The folder of a distribution with the command `sleeper`."""
    points = {"zoo.commands": {"sleeper": "sleeper_command"}, "zoo.api": {"1": "sleeper_command"}}
    return make_distribution("sleeper", points, {"sleeper_command.py": SLEEPER})


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_does_not_outlive_a_killed_parent(sleeper: Path, tmp_path: Path, number: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(sleeper), str(Path(children.__file__).parents[1])])
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    written = tmp_path / "pid"
    try:
        assert until(lambda: written.is_file() and written.read_text() != "")
        child = int(written.read_text())
        assert alive(child)
        parent.send_signal(number)
        # the parent is not waited for: a dead process that nobody reaps still has its number
        assert until(lambda: not alive(child), 10)
    finally:
        parent.kill()
        parent.wait()
