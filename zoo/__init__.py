"""A zoo of research methods for PyTorch Lightning, launched from one command line and open to plugins.

What a plugin may import is what this module names (`docs/plugins.md`); the rest may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from datamodules.loading import Batches, ResumableLoader, ZooDataModule, keyed_generator
    from zoo.api import run
    from zoo.card import ZOO_API, Card
    from zoo.errors import UsageError
    from zoo.runs import RunResult

#: Public name -> module that defines it; imported when first asked for, so that `import zoo` stays light.
_PUBLIC = {
    "Batches": "datamodules.loading",
    "Card": "zoo.card",
    "ResumableLoader": "datamodules.loading",
    "RunResult": "zoo.runs",
    "UsageError": "zoo.errors",
    "ZOO_API": "zoo.card",
    "ZooDataModule": "datamodules.loading",
    "keyed_generator": "datamodules.loading",
    "run": "zoo.api",
}

__all__ = [
    "ZOO_API",
    "Batches",
    "Card",
    "ResumableLoader",
    "RunResult",
    "UsageError",
    "ZooDataModule",
    "keyed_generator",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
