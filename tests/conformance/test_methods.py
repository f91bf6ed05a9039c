"""Every registered method keeps the contract."""

from __future__ import annotations

from collections.abc import Callable


def test_contract(zoo_check: Callable[[], None]) -> None:
    zoo_check()
