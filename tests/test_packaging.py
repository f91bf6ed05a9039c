"""The wheel, built from the source distribution, works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


def call(*words: str, cwd: Path, site: Path | None = None) -> str:
    """Run Python in another directory; `site` comes before everything that is installed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(site)} if site else {})}
    done = subprocess.run([sys.executable, "-P", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder with the installed wheel, made from the sdist of what git tracks."""
    base = tmp_path_factory.mktemp("wheel")
    root = Path(__file__).parents[1]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    for name in (part.decode() for part in tracked if part):
        if not name.startswith(("tests/", "results/", "docs/")) and (root / name).exists():
            (base / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            if (root / name).is_symlink():
                (base / "src" / name).symlink_to(os.readlink(root / name))
            else:
                (base / "src" / name).write_bytes((root / name).read_bytes())
    call("-m", "build", "--no-isolation", "--sdist", "--outdir", str(base / "dist"), str(base / "src"), cwd=base)
    with tarfile.open(next((base / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(base / "sdist", filter="data")
    unpacked = next((base / "sdist").iterdir())
    call("-m", "build", "--no-isolation", "--wheel", "--outdir", str(base / "dist"), str(unpacked), cwd=base)
    wheel = next((base / "dist").glob("*.whl"))
    target = base / "site"
    call("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=base)
    return target


def test_the_wheel_holds_configs_templates_types_and_licence(site: Path) -> None:
    configs = {path.relative_to(site / "zoo/configs").as_posix() for path in site.glob("zoo/configs/**/*.yaml")}
    assert {"suave/smoke.yaml", "suave/claims.yaml", "hardware/ddp.yaml"} <= configs
    assert (site / "zoo/py.typed").exists()
    assert (site / "zoo/template/pyproject.toml.in").exists()
    assert list(site.glob("method_zoo-*.dist-info/licenses/LICENSE"))
    assert not (site / "tests").exists()


def test_it_lists_fits_and_checks_from_another_directory(site: Path, tmp_path: Path) -> None:
    where = call("-c", "import zoo, datamodules; print(zoo.__file__, datamodules.__file__)", cwd=tmp_path, site=site)
    assert where.count(str(site)) == 2
    assert "suave" in call("-m", "zoo", "list", "methods", cwd=tmp_path, site=site)
    call("-m", "zoo", "fit", "--config", "suave/smoke", "--run_dir", "run", cwd=tmp_path, site=site)
    assert (tmp_path / "run/summary.json").exists()
    checked = call("-m", "zoo", "check", "suave", "--only", "card", "--only", "smoke", cwd=tmp_path, site=site)
    assert "2 passed" in checked
