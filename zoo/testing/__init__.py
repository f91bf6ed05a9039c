"""The conformance kit: every promise of `docs/contract.md`, tested on one method.

One implementation for `zoo check NAME`, for Python and for pytest:

    from zoo.testing import check_method

    report = check_method("suave")
    assert report.ok, report

In a test suite, a test that takes the fixture `zoo_check` runs once for each check of each method, see
`zoo.testing.plugin`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.testing.catalogue import CHECKS
    from zoo.testing.kit import Check, NotApplicable, Outcome, Report, Violation, check
    from zoo.testing.run import check_method

_PUBLIC = {
    "CHECKS": "zoo.testing.catalogue",
    "Check": "zoo.testing.kit",
    "NotApplicable": "zoo.testing.kit",
    "Outcome": "zoo.testing.kit",
    "Report": "zoo.testing.kit",
    "Violation": "zoo.testing.kit",
    "check": "zoo.testing.kit",
    "check_method": "zoo.testing.run",
}

__all__ = ["CHECKS", "Check", "NotApplicable", "Outcome", "Report", "Violation", "check", "check_method"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'zoo.testing' has no attribute {name!r}")
