"""Shared fixtures: fake distributions, quiet W&B, one thread."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.support.sites import on_the_path
from zoo import registry

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture
def make_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that puts a fake installed distribution on `sys.path`."""
    site = tmp_path / "site"

    def make(
        name: str,
        points: dict[str, dict[str, str]],
        files: dict[str, str] | None = None,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
    ) -> Path:
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {r}\n" for r in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        text = "".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for g, p in points.items())
        (info / "entry_points.txt").write_text(text)
        for path, source in (files or {}).items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(source)
        registry.refresh()
        return site

    with on_the_path(site, monkeypatch):
        yield make
