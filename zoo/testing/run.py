"""Run the checks on a method."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

from zoo.card import Card
from zoo.errors import UsageError, did_you_mean
from zoo.testing.catalogue import CHECKS
from zoo.testing.kit import Broken, Check, NotApplicable, Outcome, Report, Violation
from zoo.testing.subject import Subject, reason

#: Where the losses of the built-in methods are stored.
GOLDEN = Path("tests/golden")


def check_method(
    name: str,
    full: bool = False,
    only: Collection[str] = (),
    golden: Path = GOLDEN,
    told: Callable[[Outcome], None] | None = None,
) -> Report:
    """Check a registered method.

    Args:
        name: Its name.
        full: Run the slow checks too.
        only: Names of the checks to run; all if empty.
        golden: Folder of stored losses.
        told: Called with each outcome as soon as it is known.

    Returns:
        The outcomes; `report.ok` says whether the method keeps the contract.

    Raises:
        UsageError: If there is no such method, or no such check.
    """
    known = [one.name for one in CHECKS]
    for wanted in only:
        if wanted not in known:
            raise UsageError(f"only: there is no check {wanted!r}", did_you_mean(wanted, known, show=len(known)))
    folder = Path(tempfile.mkdtemp(prefix="zoo-check-"))
    try:
        subject = Subject(name, folder, golden)
        outcomes = []
        for one in CHECKS:
            if one.name in only or (not only and (full or not one.full)):
                outcomes.append(outcome(one, subject))
                if told is not None:
                    told(outcomes[-1])
        return Report(name, tuple(outcomes))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def outcome(one: Check, subject: Subject) -> Outcome:
    """Run one check; whatever it raises is its outcome."""
    started = time.perf_counter()

    def ended(status: str, text: str = "") -> Outcome:
        return Outcome(one, status, time.perf_counter() - started, text)  # type: ignore[arg-type]

    try:
        card = getattr(subject.cls, "card", None)
        if isinstance(card, Card) and one.name in card.skip_checks:
            return ended("skipped", card.skip_checks[one.name])
        with subject.under(one.name) as options:
            note = one(subject)
        how = "with" if subject.options_used else "nothing here depends on"
        return ended("passed", "; ".join(filter(None, [note, *(f"{how} {k} {v}" for k, v in options.items())])))
    except NotApplicable as found:
        return ended("skipped", str(found))
    except Violation as found:
        return ended("failed", str(found))
    except Broken as found:
        return ended("failed" if found.owner == one.name else "blocked", str(found))
    except Exception as error:
        return ended("failed", reason(error))
