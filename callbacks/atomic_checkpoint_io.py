"""Checkpoint files that are whole or not there, and that are read without running code."""

from __future__ import annotations

import os
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from zoo.errors import UsageError

_LEAVES = (int, float, str, bool, bytes, bytearray, complex, type(None), torch.Size, torch.device, torch.dtype)
_PREFIX, _SUFFIX = ".writing-", ".tmp"


def check_plain(value: Any, where: str = "checkpoint") -> None:
    """Check that `torch.load(weights_only=True)` will load what is going to be saved; tensors are not looked into.

    Raises:
        TypeError: Naming the key that holds an object of another class.
    """
    kind = type(value)
    if isinstance(value, torch.Tensor) or kind in _LEAVES:
        return
    if kind in (dict, OrderedDict, Counter):
        for key, item in value.items():
            if type(key) not in _LEAVES and type(key) is not tuple:
                raise TypeError(f"{where}: a key is a {_name(type(key))}; use strings or numbers")
            check_plain(item, f"{where}[{key!r}]")
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif kind not in torch.serialization.get_safe_globals():
        raise TypeError(
            f"{where} is a {_name(kind)}, which cannot be loaded safely again; "
            "a checkpoint holds tensors, numbers, strings, None, lists, tuples and dicts"
        )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class AtomicCheckpointIO(CheckpointIO):
    """Writes aside, to the disk, then renames; reads with `weights_only=True`, local files only.

    A write that fails or is killed leaves the earlier file as it was. Its remains are deleted, at the latest by the
    next write into the directory. Only one run at a time may write into a directory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            TypeError: If something in it could not be loaded safely, naming the key.
            OSError: If it cannot be written.
        """
        if storage_options is not None:
            raise TypeError(f"storage_options has no meaning for a local file, got {storage_options!r}")
        check_plain(checkpoint)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for litter in path.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
            litter.unlink(missing_ok=True)
        aside = path.with_name(f"{_PREFIX}{path.name}{_SUFFIX}")
        try:
            with aside.open("wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            _sync_directory(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; `weights_only=False` is not obeyed.

        Raises:
            UsageError: If it is no local file, is damaged, or holds objects whose loading would run code.
        """
        if "://" in str(path):
            raise UsageError(f"checkpoint {path}: only local files are read", "download it first")
        if not Path(path).is_file():
            raise UsageError(f"checkpoint {path}: no such file")
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"checkpoint {path}: it holds objects whose loading could run code, or is damaged",
                "a checkpoint of the zoo holds tensors, numbers, strings, lists and dicts only",
                detail=str(error),
            ) from error
        except (RuntimeError, EOFError) as error:
            raise UsageError(
                f"checkpoint {path}: damaged or not a checkpoint", "use the one before it", detail=str(error)
            ) from error

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer reports a full disk as a failure of its own archive
        cause = error.__context__
        if isinstance(cause, OSError):
            raise cause from error
        if "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise OSError(str(error).split("\n")[0]) from error
        raise


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse; the file itself is on the disk
    finally:
        os.close(handle)
