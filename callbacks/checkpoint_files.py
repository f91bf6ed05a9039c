"""Finding the checkpoints of a run and telling the intact from the damaged."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

_NAME = re.compile(r"step=\d+\.ckpt")
_STEP = re.compile(r"step=(\d+)")


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint, `<...>step=<n><...>.ckpt`, or -1."""
    found = _STEP.search(path.stem)
    return int(found.group(1)) if found else -1


def recency(path: Path) -> tuple[int, int, str]:
    """Return what the checkpoints of a run are ordered by: the greatest is the newest.

    That is the step; copying, unpacking or downloading a directory changes the times of its files. The time only
    decides between files of one step or of none.
    """
    return step_of(path), path.stat().st_mtime_ns, path.name


def resume_files(directory: Path) -> list[Path]:
    """Return the files `step=<n>.ckpt` of a directory, that of the highest step first."""
    found = [path for path in directory.glob("step=*.ckpt") if _NAME.fullmatch(path.name)]
    return sorted(found, key=recency, reverse=True)


def checkpoints_newest_first(run_dir: str | Path) -> list[Path]:
    """Return the resume checkpoints `<run_dir>/checkpoints/step=<n>.ckpt`, that of the highest step first."""
    return resume_files(Path(run_dir) / "checkpoints")


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the resume checkpoint of the highest step that can be read, or None."""
    return next((path for path in checkpoints_newest_first(run_dir) if is_readable(path)), None)


def is_readable(path: str | Path) -> bool:
    """Whether a checkpoint is complete, its checksums hold, and it loads with `weights_only=True`."""
    path = Path(path)
    if path.is_dir():  # written shard by shard; the last file of it is this one
        return (path / "meta.pt").is_file()
    import torch  # here, since a campaign only asks which file is the newest

    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        return "state_dict" in torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a damaged file makes the readers raise, it cannot be used
        return False


def remove(path: Path) -> None:
    """Delete a checkpoint, be it a file or a directory of shards."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
