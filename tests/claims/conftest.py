"""A small world for `reproduce`: a claims file, configs, a method to hash, and a fake zoo that takes milliseconds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

FAKE_ZOO = Path(__file__).with_name("fake_zoo.py")

METHOD = {
    "__init__.py": "",
    "method.py": "from fakepkg import losses\n\nclass Method:\n    rate = losses.RATE\n",
    "losses.py": "RATE = 1\n",
    "data.py": "class Data:\n    pass\n",
    "unrelated.py": "x = 1\n",
}


def claim(claim_id: str = "a-beats-b", **changes: Any) -> dict[str, Any]:
    """Return a claim of the file below."""
    base = {
        "id": claim_id,
        "statement": "A beats B.",
        "paper": "Table 1: 2 against 1",
        "left": {"run": "a", "metric": "test/acc"},
        "right": {"run": "b", "metric": "test/acc"},
        "margin": 0.1,
    }
    return base | changes


class FakeChild:
    """What `zoo.children.Child` is to the campaign, for the fake zoo."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as output:
            words = [sys.executable, "-S", str(FAKE_ZOO), *argv]
            self.process = subprocess.Popen(words, env={**os.environ, **env}, stdout=output, stderr=output)
        self.send = self.process.send_signal

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout: float | None = None) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            self.process.wait()
            raise TimeoutError from error


class World:
    """Files of one test and ways to run it."""

    def __init__(self, root: Path) -> None:
        self.root, self.results, self.runs = root, root / "results", root / "runs"
        self.claims = root / "claims.yaml"
        self.package = root / "site" / "fakepkg"
        self.package.mkdir(parents=True)
        for name, text in METHOD.items():
            (self.package / name).write_text(text)
        config = {"model": {"class_path": "fakepkg.method.Method"}, "data": {"class_path": "fakepkg.data.Data"}}
        (root / "base.yaml").write_text(yaml.safe_dump(config))
        base = str(root / "base.yaml")
        self.body: dict[str, Any] = {
            "seeds": [0, 1],
            "runs": {
                "a": {"config": base, "overrides": {"model.init_args.acc": 0.7}},
                "b": {"config": base, "overrides": {"model.init_args.acc": 0.5}},
            },
            "claims": [claim()],
        }
        self.write()

    def write(self, **changes: Any) -> Path:
        """Write the claims file, with top-level keys of its scale changed."""
        self.body |= changes
        self.claims.write_text(yaml.safe_dump({"method": "fake", "scales": {"cpu": self.body}}, sort_keys=False))
        return self.claims

    def reproduce(self, seeds: int | None = None, only: tuple[str, ...] = (), jobs: int = 1, **options: Any) -> int:
        """Run `reproduce` with the fake zoo."""
        from zoo.claims.reader import load_plan
        from zoo.commands.reproduce import reproduce

        plan = load_plan(self.claims)
        options = {"start": FakeChild, **options}
        return reproduce(plan, plan.seeds[:seeds], only, jobs, self.results, self.runs, **options)

    def command(self, *words: str) -> int:
        """Call the command line."""
        from zoo.main import main

        return main(["reproduce", *words, "--results", str(self.results), "--runs", str(self.runs)])

    @property
    def json(self) -> dict[str, Any]:
        return json.loads((self.results / "fake.cpu.json").read_text())

    def calls(self) -> list[str]:
        """Return what the fake zoo was asked for, `a/0 fit`, in order."""
        log = self.root / "calls.log"
        return log.read_text().splitlines() if log.is_file() else []


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take longer than everything else."""
    monkeypatch.setattr("zoo.claims.figures.draw", lambda result, path: False)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("zoo.claims.campaign.POLL_SECONDS", 0.01)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.log"))
    made = World(tmp_path)
    importlib.invalidate_caches()
    return made


@pytest.fixture
def make_claim() -> Callable[..., dict[str, Any]]:
    return claim
