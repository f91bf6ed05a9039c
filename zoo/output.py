"""Standard output and error of a run, which must not end it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of a table that goes into a file or a log; a terminal has a width of its own.
_COLUMNS = 160


def table_console() -> Console:
    """A console for tables, outside a terminal wide enough not to break cells, unless `COLUMNS` says otherwise."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_COLUMNS)


def short(value: float) -> str:
    """A number for people: counts whole, others with four significant digits."""
    if 1000 <= abs(value) < 1e12:
        return f"{value:.0f}"
    return f"{value:.4g}"


class UnstoppableStream:
    """A text stream whose failures do not matter: a log file on a full disk must not end a training.

    What could not be written is written as soon as that is possible again.

    Args:
        stream: The stream behind it.
        keep: Characters to keep at most; the newest stay.
    """

    def __init__(self, stream: TextIO, keep: int = 10_000) -> None:
        self._stream, self._keep, self._late = stream, keep, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or keep the text for later."""
        late, self._late = self._late + text, ""
        try:
            self._stream.write(late)
        except OSError:
            self._late = late[-self._keep :]
        return len(text)

    def flush(self) -> None:
        """Flush if it is possible."""
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def unstoppable_output() -> Iterator[None]:
    """Let standard output and error fail silently for a while."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (UnstoppableStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
