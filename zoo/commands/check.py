"""test a method against the contract"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo import registry
from zoo.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from zoo.testing.kit import Outcome

DESCRIPTION = """\
Test a method, built in or of a plugin, against docs/contract.md. The exit code is 0 if every check has passed or was
skipped with a reason.
"""


def main(argv: list[str]) -> int:
    """Print the table of checks of one or all methods; exit code 1 if one has failed."""
    parser = argparse.ArgumentParser(prog="zoo check", description=DESCRIPTION)
    parser.add_argument("name", nargs="?", help="a method of `zoo list`; all of them if left out")
    parser.add_argument("--full", action="store_true", help="the slow checks too")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="only this check; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the checks and stop")
    parser.add_argument("--golden", type=Path, metavar="DIR", help="folder of stored losses (default: tests/golden)")
    parser.add_argument("--update-golden", type=Path, metavar="DIR", help="store the first losses in DIR and stop")
    args = parser.parse_args(argv)
    names = [args.name] if args.name else sorted({e.name for e in registry.entries("methods") if not e.problem})
    for name in names:
        registry.find("methods", name)

    from zoo.testing.catalogue import CHECKS
    from zoo.testing.run import GOLDEN, check_method

    known = [one.name for one in CHECKS]
    unknown = [name for name in args.only if name not in known]
    if unknown:
        raise UsageError(f"--only {unknown[0]}", did_you_mean(unknown[0], known, show=len(known)))
    if args.list:
        for one in CHECKS:
            print(f"  {one.name:<20}{'--full  ' if one.full else '        '}{one.statement}")
        return 0
    if args.update_golden is not None:
        return update(names, args.update_golden)
    good = True
    for name in names:
        report = check_method(name, args.full, args.only, args.golden or GOLDEN, show_progress)
        print(report)
        good = good and report.ok
    return 0 if good else 1


def show_progress(outcome: Outcome) -> None:
    """Tell a person at a terminal what has ended."""
    if sys.stderr.isatty():
        print(f"{outcome.status:<8}{outcome.check.name}", file=sys.stderr)


def update(names: list[str], folder: Path) -> int:
    """Store the first losses of methods."""
    import tempfile

    from zoo.testing.golden import write_golden
    from zoo.testing.subject import Subject

    for name in names:
        with tempfile.TemporaryDirectory() as runs:
            print(write_golden(Subject(name, Path(runs), folder)))
    return 0
