"""Completions on disk, each once, one line for the rows of a boundary: what a killed analysis has drawn is not lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class SampleStore:
    """A JSONL file of completions.

    Lines are `{"trace": .., "cut": .., "boundary": .., "rows": [..], "samples": [[..], ..]}`.
    A line that a crash has cut off is dropped, and written over by what comes next.

    Args:
        path: The file; None keeps completions in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, int, int], dict[int, Any]] = {}
        #: Completions that were found on disk.
        self.found = 0
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self._keep(row["trace"], row["cut"], row["boundary"], row["rows"], row["samples"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no line of completions ({error}); remove the file") from error
            self.found += len(row["rows"])
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole) if content[: len(whole)] == whole else 0)

    def _keep(self, trace: str, cut: int, boundary: int, rows: Sequence[int], samples: Sequence[Any]) -> None:
        self._known.setdefault((trace, boundary, cut), {}).update(zip(rows, samples, strict=True))

    def get(self, trace: str, cut: int, boundary: int) -> Mapping[int, Any]:
        """Completions of a boundary that are there, by row."""
        return self._known.get((trace, boundary, cut), {})

    def take(self, job: Any, rows: Sequence[int], samples: Sequence[Any]) -> None:
        """Keep completions of a job of an engine."""
        self.add(job.opened.key, job.cut, job.boundary, rows, samples)

    def add(self, trace: str, cut: int, boundary: int, rows: Sequence[int], samples: Sequence[Any]) -> None:
        """Keep completions; they are on disk when this returns."""
        self._keep(trace, cut, boundary, rows, samples)
        if self.path is not None and len(rows):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = {"trace": trace, "cut": cut, "boundary": boundary, "rows": list(rows), "samples": list(samples)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, separators=(",", ":")) + "\n")


def fingerprint(model: Any, *facts: Any) -> str:
    """Name weights and settings, so that completions of other weights are never taken for those of these.

    Args:
        model: A module, or None.
        facts: Anything with a stable `repr`.
    """
    digest = hashlib.sha256(repr(facts).encode())
    if model is not None:
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
