"""The life of a plugin: the shipped example and the package that `zoo new` writes, installed, used and removed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.sites import on_the_path
from zoo import registry
from zoo.main import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "zoo-simsiam"


def run(*words: str) -> int:
    return main([*words])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Path]]:
    """Return a function that installs a package into a folder on `sys.path`."""
    site = tmp_path / "site"
    monkeypatch.chdir(tmp_path)

    def pip(source: Path) -> Path:
        copy = tmp_path / "source" / source.name  # pip builds in the source folder
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        words = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site), str(copy)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
        registry.refresh()
        return site

    with on_the_path(site, monkeypatch):
        yield pip


def test_the_example_is_used_like_a_built_in_method(
    install: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    site = install(EXAMPLE)
    assert run("list", "--json") == 0
    rows = {(row["group"], row["name"]): row for row in json.loads(capsys.readouterr().out)["entries"]}
    assert rows["methods", "simsiam"]["dist"] == "zoo-simsiam"
    assert rows["methods", "simsiam"]["problem"] == ""
    assert ("commands", "simsiam-features") in rows
    assert run("info", "simsiam") == 0
    assert "stop_gradient: bool = True" in capsys.readouterr().out

    assert run("fit", "--config", "simsiam/smoke", "--run_dir", "r", "--trainer.max_steps", "12") == 0
    assert run("fit", "--resume", "r", "--trainer.max_steps", "16") == 0
    assert run("test", "--resume", "r") == 0
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["stages"]["fit"]["step"] == 16
    assert "test/spread" in summary["metrics"]
    assert run("simsiam-features", "r") == 0
    assert Path("r/features.pt").exists()

    assert run("check", "simsiam", "--only", "smoke", "--only", "resume") == 0
    claims = next(site.glob("zoo_simsiam/configs/simsiam/claims.yaml")).read_text()
    small = claims.replace("simsiam/fashion_mnist", "simsiam/smoke").replace("max_steps: 300", "max_steps: 6")
    Path("claims.yaml").write_text(small.replace("seeds: [0, 1, 2]", "seeds: [0]"))
    assert run("reproduce", "claims.yaml") in (0, 1)  # six steps prove nothing
    result = json.loads(Path("results/simsiam.cpu.json").read_text())
    assert {claim["id"] for claim in result["claims"]} == {
        "stop-gradient-keeps-the-spread",
        "stop-gradient-keeps-the-features",
    }

    shutil.rmtree(site)
    site.mkdir()
    registry.refresh()
    capsys.readouterr()
    assert run("fit", "--config", "simsiam/smoke") == 2
    assert run("info", "simsiam") == 2
    assert "simsiam" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_keeps_the_whole_contract(
    install: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    install(EXAMPLE)
    assert run("check", "simsiam") == 0, capsys.readouterr().out


def test_a_new_package_passes_the_check_as_it_is(
    install: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("new", "two-spirals", "--path", str(tmp_path / "fresh")) == 0
    install(tmp_path / "fresh" / "two-spirals")
    capsys.readouterr()
    assert run("check", "two_spirals") == 0
    out = capsys.readouterr().out
    assert "passed  resume" in out
    assert "passed  ranks" in out


def test_a_new_package_is_typed_and_tidy(tmp_path: Path) -> None:
    assert run("new", "two_spirals", "--path", str(tmp_path)) == 0
    folder = tmp_path / "two-spirals"
    for tool in (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "--line-length", "120", "."],
        ["mypy", "two_spirals"],
    ):
        done = subprocess.run([sys.executable, "-m", *tool], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [("Two-Spirals", "cannot name a Python package"), ("class", "cannot name"), ("suave", "taken"), ("zoo", "taken")],
)
def test_names_that_cannot_be_are_refused(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("new", name) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two-spirals").mkdir()
    assert run("new", "two_spirals", "--path", str(tmp_path)) == 2
    assert "is there already" in capsys.readouterr().err
