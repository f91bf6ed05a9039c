"""What each arm is run with is what the search found, and every arm was searched with the same care."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from zoo.claims.plan import Plan
from zoo.claims.reader import load_plan
from zoo.config import load_layers

#: The config of each arm.
ARMS = {
    "cp": "toxicity",
    "cp_paper": "paper_objective",
    "official": "official",
    "cp_min": "cp_min",
    "cp_max": "cp_max",
    "no_hard_negatives": "no_hard_negatives",
    "dpo": "dpo",
    "simpo": "simpo",
    "sft_pos": "sft_pos",
    "unlikelihood_neg": "unlikelihood_neg",
}
REPOSITORY = Path(__file__).parents[2]
TRIALS = 6
#: Trials of contrastive perplexity that came before those of the others.
EARLIER = ("cp_alpha=1_lr=2e-4",)
Runs = Mapping[str, Mapping[str, Mapping[str, float]]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return load_plan(REPOSITORY / "configs/contrastive_perplexity/claims.yaml", "search")


@pytest.fixture(scope="module")
def searched() -> Runs:
    path = REPOSITORY / "results/contrastive_perplexity.search.json"
    return json.loads(path.read_text(encoding="utf-8"))["runs"]


def trials_of(arm: str, plan: Plan) -> list[str]:
    shape = re.compile(rf"{arm}(_(alpha|beta|lambda_lm)=[\d_]+)?_lr=[\de-]+")
    return [name for name in plan.runs if shape.fullmatch(name) and name not in EARLIER]


def best(names: list[str], runs: Runs) -> str:
    """The rule of the claims file."""

    def order(name: str) -> tuple[Any, ...]:
        seeds = runs[name]
        valid = min(values["val/valid"] for values in seeds.values())
        wanted = max(v["val/ppl_wanted"] / runs["base"][seed]["val/ppl_wanted"] for seed, v in seeds.items())
        if valid < 0.95 or wanted > 1.05:
            return (1, -valid)
        rate, perplexity = (fmean(v[key] for v in seeds.values()) for key in ("val/unwanted_rate", "val/ppl_wanted"))
        return (0, round(rate, 2), -round(valid, 2), perplexity)

    return min(names, key=order)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_the_same_number_of_trials_and_runs_with_its_best(arm: str, plan: Plan, searched: Runs) -> None:
    names = trials_of(arm, plan)
    assert len(names) == TRIALS
    chosen = best(names, searched)
    arguments = load_layers([f"contrastive_perplexity/{ARMS[arm]}"], []).merged["model"]["init_args"]
    found = {key.removeprefix("model.init_args."): value for key, value in plan.runs[chosen].overrides.items()}
    assert {key: arguments[key] for key in found if key != "init_from"} == {
        key: value for key, value in found.items() if key != "init_from"
    }, f"{chosen} is the best trial"


def test_the_search_uses_no_seed_of_the_claims(plan: Plan) -> None:
    assert not set(plan.seeds) & set(load_plan(plan.path, "cpu").seeds)
    assert all(run.commands == ("fit",) for run in plan.runs.values()), "the test split is left alone"
