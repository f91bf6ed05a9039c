"""Committed results, made again: a claim of a method from training to judgement, and one of arithmetic alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.main import main

COMMITTED = Path(__file__).parents[2] / "results"


def reproduced(method: str, claim: str, folder: Path) -> tuple[dict, dict]:
    """Reproduce the first seed of a claim in `folder`; return the new results and the committed ones."""
    words = ["--only", claim, "--seeds", "1", "--jobs", "1", "--threads", "1"]
    main(["reproduce", method, *words, "--results", str(folder / "results"), "--runs", str(folder / "runs")])
    file = f"{method}.cpu.json"
    new, committed = (json.loads((path / file).read_text()) for path in (folder / "results", COMMITTED))
    assert list(new["runs"]), "no run has ended"
    return new, committed


@pytest.mark.slow
def test_a_claim_of_daino_holds_again(tmp_path: Path) -> None:
    new, committed = reproduced("daino", "daino-beats-supervised", tmp_path)
    assert set(new["runs"]) == {"daino_10", "supervised_10"}
    for run, by_seed in new["runs"].items():
        # 10,000 test images; another processor rounds otherwise, and 300 steps with ten labels a class spread it
        assert by_seed["0"]["test/acc"] == pytest.approx(committed["runs"][run]["0"]["test/acc"], abs=0.03), run
    difference = new["runs"]["daino_10"]["0"]["test/acc"] - new["runs"]["supervised_10"]["0"]["test/acc"]
    assert difference > 0


def test_the_paper_s_own_points_give_the_same_numbers_again(tmp_path: Path) -> None:
    new, committed = reproduced("slm_bottlenecks", "replay-flash-helps-100m", tmp_path)
    assert set(new["runs"]) == {"replay"}
    kept = {key: value for key, value in committed["runs"]["replay"]["0"].items() if key.startswith("test/")}
    assert kept
    assert {key: new["runs"]["replay"]["0"][key] for key in kept} == pytest.approx(kept, rel=1e-6)
