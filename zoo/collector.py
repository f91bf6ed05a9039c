"""Python's garbage collector while the heavy libraries are imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Collect no garbage meanwhile.

    Imports make about a million objects, which all stay. The collector would look through all of them again and again,
    a third of the time that Lightning's import takes (`benchmarks/fit_start.py`).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
