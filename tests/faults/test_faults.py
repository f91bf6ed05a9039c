"""Every fault, injected once into a real run."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, kill
from zoo.main import main


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(name: str, tmp_path: Path) -> None:
    try:
        FAULTS[name](tmp_path, random.Random(name))
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_survives_kill_at_other_moments(seed: int, tmp_path: Path) -> None:
    kill(tmp_path, random.Random(seed))


def test_a_broken_plugin_leaves_the_others_alone(
    make_distribution: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {"broken_plugin/__init__.py": "", "broken_plugin/method.py": "import not_there\n"}
    make_distribution("broken-plugin", {"zoo.methods": {"broken": "broken_plugin.method:Method"}}, files)
    assert main(["list", "methods"]) == 0
    assert "broken" in capsys.readouterr().out
    assert main(["fit", "--model", "broken", "--data", "digits", "--run_dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "broken-plugin 1.0" in err
    assert "not_there" in err
    assert not (tmp_path / "run").exists()
    assert main(["fit", "--config", "suave/smoke", "--print_config"]) == 0
