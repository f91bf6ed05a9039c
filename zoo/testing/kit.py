"""What a check is and how it can end; nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zoo.testing.subject import Subject

#: What a check says when it is content, or None.
Verdict = str | None
Status = Literal["passed", "failed", "skipped", "blocked"]


class Violation(Exception):
    """The method does not keep the promise; the text says what was seen and what was expected."""


class NotApplicable(Exception):
    """The promise says nothing about this method, with the reason in words."""


class Broken(Exception):
    """Something that many checks build on does not work; only the check `owner` fails of it.

    Args:
        owner: Name of the check whose matter it is.
        message: What was seen.
    """

    def __init__(self, owner: str, message: str) -> None:
        super().__init__(message)
        self.owner = owner


@dataclass(frozen=True)
class Check:
    """One promise of the contract and the function that tests it.

    Attributes:
        name: Short name, as in `card.skip_checks` and in the table.
        statement: The sentence of `docs/contract.md`.
        function: Raises `Violation` or `NotApplicable`, or returns a note for the table.
        full: Only with `--full`: takes long.
    """

    name: str
    statement: str
    function: Callable[[Subject], Verdict]
    full: bool = False

    def __call__(self, subject: Subject) -> Verdict:
        return self.function(subject)


def check(name: str, statement: str, full: bool = False) -> Callable[[Callable[[Subject], Verdict]], Check]:
    """Make a `Check` of a function."""

    def make(function: Callable[[Subject], Verdict]) -> Check:
        return Check(name, statement, function, full)

    return make


@dataclass(frozen=True)
class Outcome:
    """How one check ended.

    Attributes:
        check: The check.
        status: `passed`, `failed`, `skipped` (with the reason), or `blocked` by the failure of another check.
        seconds: Time it took, with the runs that it was the first to need.
        text: Note, reason or what was wrong.
    """

    check: Check
    status: Status
    seconds: float
    text: str = ""


@dataclass(frozen=True)
class Report:
    """The outcomes of one method's checks."""

    method: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing has failed or was blocked."""
        return all(outcome.status in ("passed", "skipped") for outcome in self.outcomes)

    def named(self, *status: Status) -> list[str]:
        """Names of the checks that ended so."""
        return [outcome.check.name for outcome in self.outcomes if outcome.status in status]

    def __str__(self) -> str:
        lines = [
            f"  {o.status:<8}{o.check.name:<24}{o.seconds:6.1f} s  {o.text}".rstrip().replace("\n", "\n" + " " * 43)
            for o in self.outcomes
        ]
        counts = {status: len(self.named(status)) for status in ("passed", "failed", "skipped", "blocked")}  # type: ignore[arg-type]
        summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        seconds = sum(o.seconds for o in self.outcomes)
        return "\n".join([self.method, *lines, f"  {summary}; {seconds:.0f} s"])
