"""Errors that the command line prints without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UsageError(Exception):
    """Something the user can mend: printed in a few lines, exit code 2.

    Args:
        message: What was wrong: key, value and what is accepted.
        hint: What to do about it, on a line of its own.
        detail: Raw text that `--debug` shows.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message, self.hint, self.detail = message, hint, detail

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RunError(UsageError):
    """A run that had started failed for a reason that can be named: printed in the same way, exit code 1."""

    exit_code = 1


def did_you_mean(word: str, choices: Iterable[str], show: int = 12) -> str:
    """Return `did you mean 'x'?` followed by what is accepted, in one line."""
    options = sorted(choices)
    close = get_close_matches(word, options, n=2, cutoff=0.6)
    guess = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    shown = ", ".join(options[:show]) + (f", ... ({len(options)} in all)" if len(options) > show else "")
    return f"{guess}accepted: {shown or 'nothing is registered'}"
