"""Wheel and source distribution, installed into empty environments, work outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest


def call(*words: str | Path, cwd: Path) -> str:
    """Run a program in another directory, without our working tree on its path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of what git tracks, and the wheel that is made from the sdist."""
    base = tmp_path_factory.mktemp("dist")
    root = Path(__file__).parents[1]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    for name in (part.decode() for part in tracked if part):
        if not name.startswith(("tests/", "results/", "docs/")) and (root / name).exists():
            (base / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            if (root / name).is_symlink():
                (base / "src" / name).symlink_to(os.readlink(root / name))
            else:
                (base / "src" / name).write_bytes((root / name).read_bytes())
    build = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", base / "dist")
    call(*build, "--sdist", base / "src", cwd=base)
    with tarfile.open(next((base / "dist").glob("*.tar.gz"))) as archive:
        # Python 3.11.2 of Debian 12 has no filters yet
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(base / "sdist", **safe)
    call(*build, "--wheel", next((base / "sdist").iterdir()), cwd=base)
    return base / "dist"


def environment(folder: Path, package: Path) -> Path:
    """Make an environment that holds the package alone, and return its scripts.

    The dependencies are those of the environment of the tests, after the package on the path; `.pth` files there are
    not read, so that an editable installation of the zoo does not count.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    scripts = folder / "bin"
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    words = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", package]
    call(sys.executable, "-m", "pip", "--python", scripts / "python", *words, cwd=folder)
    return scripts


@pytest.fixture(scope="module")
def scripts(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("wheel_env") / "env", next(dist.glob("*.whl")))


def test_the_wheel_holds_configs_templates_types_and_licence(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    configs = {name for name in names if name.startswith("zoo/configs/")}
    assert {"zoo/configs/suave/smoke.yaml", "zoo/configs/suave/claims.yaml"} <= configs
    assert "zoo/configs/hardware/ddp.yaml" in configs
    assert {"zoo/py.typed", "datamodules/py.typed", "callbacks/py.typed", "zoo/template/pyproject.toml.in"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"zoo", "datamodules", "callbacks"}


def test_the_installed_wheel_lists_fits_and_checks_from_another_directory(scripts: Path, tmp_path: Path) -> None:
    where = call(
        scripts / "python", "-c", "import zoo, datamodules; print(zoo.__file__, datamodules.__file__)", cwd=tmp_path
    )
    assert where.count(str(scripts.parent)) == 2
    listed = json.loads(call(scripts / "zoo", "list", "--json", cwd=tmp_path))
    assert not [row for row in listed["entries"] if row["problem"]]
    assert "suave/smoke" in listed["configs"]
    call(scripts / "zoo", "fit", "--config", "suave/smoke", "--run_dir", "run", cwd=tmp_path)
    assert (tmp_path / "run/summary.json").exists()
    checked = call(scripts / "zoo", "check", "suave", "--only", "card", "--only", "smoke", cwd=tmp_path)
    assert "2 passed" in checked


def test_the_installed_source_distribution_is_the_same(dist: Path, scripts: Path, tmp_path: Path) -> None:
    from_source = environment(tmp_path / "env", next(dist.glob("*.tar.gz")))
    assert call(from_source / "zoo", "list", "--json", cwd=tmp_path) == call(
        scripts / "zoo", "list", "--json", cwd=tmp_path
    )
    where = call(from_source / "python", "-c", "import zoo; print(zoo.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))


@pytest.mark.slow
def test_the_whole_check_passes_outside_the_checkout(scripts: Path, tmp_path: Path) -> None:
    assert "passed" in call(scripts / "zoo", "check", "suave", cwd=tmp_path)
