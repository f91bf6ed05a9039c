"""A run lives in one directory: `runs/<method>/<config>/<time>-<id>/`.

It holds `config.yaml` (replays the run), `run.json` (identity), `metrics.csv`, `summary.json`, `checkpoints/`,
`figures/` and `wandb/`. All ranks agree on it, two jobs never write to the same one, and a resume goes on in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from zoo.errors import UsageError

#: Set by the first process for the ranks that it launches.
RUN_DIR_VARIABLE = "ZOO_RUN_DIR"

SCHEMA_VERSION = 1

REPORTED_VERSIONS = ("method-zoo", "torch", "torchvision", "lightning", "transformers", "timm", "torchmetrics", "numpy")


@dataclass
class RunResult:
    """What a finished command leaves.

    Attributes:
        run_dir: Directory of the run.
        metrics: Final metrics by name, as in `summary.json`.
        model: The LightningModule, where the run happened in this process.
        trainer: The Trainer, likewise.
        exit_code: 0, or the exit code that the command line gives.
    """

    run_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    model: Any = None
    trainer: Any = None
    exit_code: int = 0


def slug(name: str) -> str:
    """Return `name` as one harmless path component."""
    return re.sub(r"[^A-Za-z0-9_+=.-]+", "_", name).strip("._") or "run"


def global_rank() -> int:
    """Rank of this process as the launcher announced it; 0 for a process that nobody launched."""
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        # an interactive SLURM shell also has SLURM_PROCID, but no tasks
        if variable in os.environ and (variable != "SLURM_PROCID" or os.environ.get("SLURM_NTASKS", "1") != "1"):
            return int(os.environ[variable])
    return 0


def shared_id() -> str | None:
    """An id that all processes of one externally launched job can compute for themselves, or None.

    Raises:
        UsageError: Under a multi-node torchrun without `--rdzv-id`.
    """
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '0')}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run_id = os.environ["TORCHELASTIC_RUN_ID"]
        if run_id != "none":
            return f"torchrun-{slug(run_id)}"
        if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "several nodes need a name for the run that all of them know", "give --run_dir, or torchrun --rdzv-id"
            )
        return f"torchrun-{os.getppid()}-{os.environ.get('MASTER_PORT', '0')}"
    return None


def restarts() -> int:
    """How often the launcher has started this job before: SLURM after a requeue, torchrun after a failure."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return max(int(count) if count.isdigit() else 0 for count in counts)


def newest_config(run_dir: Path) -> Path:
    """Return the config that the run in a directory was last started with: of its last resume, or of its beginning."""
    return max(run_dir.glob("config.resume-*.yaml"), key=_resume_number, default=run_dir / "config.yaml")


def _resume_number(path: Path) -> int:
    number = path.stem.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def choose_run_dir(method: str, config: str) -> Path:
    """Return the directory of a new run; ranks started by a launcher all get the same one."""
    if RUN_DIR_VARIABLE in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    name = shared_id() or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    return Path("runs") / slug(method) / slug(config) / name


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, `{}` where there is none.

    Raises:
        UsageError: If the file is not a JSON mapping.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a mapping")
    return content


def write_atomically(path: Path, text: str) -> None:
    """Write `text` aside and rename it, so that a reader or a kill never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


#: Locks that this process holds. A forked loader worker would hold them on after a SIGKILL of this process, and the
#: run could not be resumed for seconds.
_HELD: set[IO[str]] = set()


def _let_go_after_fork() -> None:
    for lock in _HELD:
        lock.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_after_fork)


class RunDirectory:
    """The directory of one run, claimed by one job.

    Args:
        path: The directory; created by rank zero.

    Attributes:
        was_unused: Whether the claimed run had been started before, and had not come to its first step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.was_unused = False
        self._lock: IO[str] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What `run.json` says."""
        return read_json(self.path / "run.json")

    @property
    def unused(self) -> bool:
        """Whether the run in it has ended before its first step, so that another one may take its place."""
        return bool(self.identity.get("unused")) and not any((self.path / "checkpoints").glob("*"))

    def mark_unused(self) -> None:
        """Note that the run has ended before its first step; on a full disk the directory just stays taken."""
        with contextlib.suppress(OSError):
            self._identify({**self.identity, "unused": True})

    def _identify(self, identity: Mapping[str, Any]) -> None:
        write_atomically(self.path / "run.json", json.dumps(identity, indent=1) + "\n")

    def _clear(self) -> None:
        """Delete what a run that has taken no step has left; its identity last, so that a kill does no harm."""
        shutil.rmtree(self.path / "wandb", ignore_errors=True)
        for path in (*self.path.glob("config*.yaml"), self.path / "metrics.csv", self.path / "summary.json"):
            path.unlink(missing_ok=True)
        (self.path / "run.json").unlink()

    def claim(self, method: str, config: str, resume: bool, command: str = "fit", replace: bool = False) -> None:
        """Create or take over the directory for this process.

        Args:
            method: Name of the method.
            config: Name of the config.
            resume: Whether to go on with the run in it.
            command: What a new run begins with.
            replace: Whether the caller counts on a run in it that is unused.

        Raises:
            UsageError: If it holds another run, or another process is using it, or it cannot be written.
        """
        known = self.identity
        if known and not (resume or self.unused) and (known["method"], known["config"]) != (method, config):
            raise UsageError(
                f"run directory {self.path} belongs to {known['method']} with config {known['config']}, "
                f"not to {method} with {config}",
                "choose another --run_dir",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise self._given_up(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another job is running in {self.path}", "choose another --run_dir, or wait for it"
            ) from error
        _HELD.add(self._lock)
        try:
            self._take(method, config, resume, command, replace)
        except OSError as error:
            raise self._given_up(error) from error

    def _given_up(self, error: OSError) -> UsageError:
        """Release the directory, and return what to say."""
        self.release()
        return UsageError(
            f"cannot write to run directory {self.path}: {error.strerror}",
            "make room on the disk, or choose another --run_dir",
        )

    def _take(self, method: str, config: str, resume: bool, command: str, replace: bool) -> None:
        """Do the part of `claim` that comes after the lock."""
        if replace and not self.unused:  # another job was faster
            self.release()
            raise UsageError(f"{self.path} already holds a run", "choose another --run_dir")
        if not resume and self.unused:
            self._clear()
        known = self.identity
        if known.pop("unused", False):  # from now on it may take steps, and be killed
            self.was_unused = True
            self._identify(known)
        if not known:
            identity = {"schema": SCHEMA_VERSION, "id": secrets.token_hex(4), "method": method, "config": config}
            identity["begun_by"] = command
            identity["created"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._identify(identity)

    def release(self) -> None:
        """Let another job use the directory; a killed process releases it as well."""
        if self._lock is not None:
            _HELD.discard(self._lock)
            self._lock.close()
            self._lock = None

    def save_config(self, text: str, resume: bool) -> Path:
        """Write the config that replays this run: `config.yaml`, on a resume `config.resume-<n>.yaml`.

        Raises:
            UsageError: If it cannot be written; the directory is released.
        """
        path = self.path / "config.yaml"
        if resume:
            n = 1 + max(map(_resume_number, self.path.glob("config.resume-*.yaml")), default=0)
            path = self.path / f"config.resume-{n}.yaml"
        try:
            write_atomically(path, text)
        except OSError as error:
            raise self._given_up(error) from error
        return path

    def add_summary(self, stage: str, status: str, metrics: dict[str, float], facts: dict[str, Any]) -> None:
        """Merge the outcome of one stage into `summary.json`."""
        summary = read_json(self.path / "summary.json")
        summary |= {k: v for k, v in self.identity.items() if k in ("method", "config", "id")}
        summary["metrics"] = {**summary.get("metrics", {}), **metrics}
        summary["stages"] = {**summary.get("stages", {}), stage: {"status": status, **facts}}
        summary["seconds"] = sum(s.get("seconds", 0.0) for s in summary["stages"].values())
        summary |= {"versions": versions(), "commit": commit(), "hardware": hardware()}
        write_atomically(self.path / "summary.json", json.dumps(summary, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    out = {"python": platform.python_version()}
    for name in REPORTED_VERSIONS:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str:
    """Commit of the checkout that the code runs from, with `+` if files differ from it; `""` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return ""  # installed into an environment below somebody else's checkout
        return git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""


def hardware() -> dict[str, Any]:
    """Processor, cores and accelerators of this machine."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE)
        model = names[0] if names else model
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
