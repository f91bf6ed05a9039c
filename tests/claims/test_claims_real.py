"""`zoo reproduce` with the real zoo: a linear classifier in child processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from zoo.children import Child
from zoo.claims.campaign import start_child
from zoo.claims.reader import load_plan
from zoo.commands.reproduce import reproduce
from zoo.main import main

TOY = str(Path(__file__).parents[1] / "support" / "toy.yaml")
STEPS = 60


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    body = {
        "seeds": [3],
        "runs": {
            "long": {
                "config": TOY,
                "overrides": {"trainer.max_steps": STEPS, "trainer.max_epochs": -1, "checkpoint.every_n_steps": 7},
            },
            "tested_again": {"config": TOY, "commands": ["test"], "overrides": {"ckpt_path": "${long.checkpoint}"}},
        },
        "claims": [
            {
                "id": "training-helps",
                "statement": "A trained classifier beats guessing.",
                "paper": "none",
                "left": {"run": "long", "metric": "test/acc"},
                "right": 0.5,
                "margin": 0.2,
            },
            {
                "id": "a-checkpoint-is-the-run",
                "statement": "Testing a checkpoint gives the result of its run.",
                "paper": "none",
                "left": {"run": "tested_again", "metric": "test/acc"},
                "right": {"run": "long", "metric": "test/acc"},
            },
        ],
    }
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"method": "toy", "scales": {"cpu": body}}))
    return path


def make(claims: Path, folder: str, only: Sequence[str] = (), **options: object) -> tuple[int, dict]:
    """Run `reproduce` into a folder and return exit code and results."""
    plan = load_plan(claims)
    code = reproduce(plan, plan.seeds, only, 1, Path(folder, "results"), Path(folder, "runs"), **options)
    return code, json.loads(Path(folder, "results", "toy.cpu.json").read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_was_killed_goes_on_and_ends_the_same(claims: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed: list[Path] = []

    def start(argv: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        child = start_child(argv, env, log)
        if not killed:
            first = log.parent / "checkpoints" / "step=7.ckpt"
            assert child.wait_for(first), child.output()
            child.kill()
            killed.append(log.parent)
        return child

    code, _ = make(claims, "killed", start=start)
    assert code == 1
    assert "fit ended with code -9" in capfd.readouterr().err
    code, content = make(claims, "killed")
    assert code == 0, capfd.readouterr().err
    assert content["provenance"]["long"]["3"]["resumed"] == 1
    assert content["claims"][0]["holds"] is True
    assert content["claims"][1]["holds"] is True, "the checkpoint did not go from one run to the other"
    assert content["claims"][1]["mean"] == 0

    code, undisturbed = make(claims, "undisturbed", ["training-helps"])
    assert code == 0
    assert undisturbed["runs"] == {"long": content["runs"]["long"]}
    assert undisturbed["provenance"]["long"]["3"]["resumed"] == 0
    assert main(["reproduce", str(claims), "--check", "--results", "killed/results"]) == 0
