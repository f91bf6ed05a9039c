"""Finding the checkpoints of a run and telling the intact from the damaged."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import torch

_NAME = re.compile(r"step=(\d+)\.ckpt")


def resume_files(directory: Path) -> list[Path]:
    """Return the files `step=<n>.ckpt` of a directory, the last written one first."""
    found = [(path, match) for path in directory.glob("step=*.ckpt") if (match := _NAME.fullmatch(path.name))]
    found.sort(key=lambda item: (item[0].stat().st_mtime_ns, int(item[1].group(1))), reverse=True)
    return [path for path, _ in found]


def checkpoints_newest_first(run_dir: str | Path) -> list[Path]:
    """Return the resume checkpoints `<run_dir>/checkpoints/step=<n>.ckpt`, the last written one first."""
    return resume_files(Path(run_dir) / "checkpoints")


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the last written resume checkpoint that can be read, or None."""
    return next((path for path in checkpoints_newest_first(run_dir) if is_readable(path)), None)


def is_readable(path: str | Path) -> bool:
    """Whether a checkpoint is complete, its checksums hold, and it loads with `weights_only=True`."""
    path = Path(path)
    if path.is_dir():  # written shard by shard; the last file of it is this one
        return (path / "meta.pt").is_file()
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
