"""Folders that distributions are put into for a test."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo import registry


@contextlib.contextmanager
def on_the_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder and put it on `sys.path`; what was imported from it is forgotten afterwards."""
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    registry.refresh()
