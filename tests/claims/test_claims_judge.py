"""Verdicts against arithmetic done by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.claims.judge import judge
from zoo.claims.plan import AGGREGATES, Claim, Side

A, B = Side("a", "m"), Side("b", "m")


def measured(**values: list[float | None]) -> dict[str, dict[str, dict[str, float | None]]]:
    return {run: {str(seed): {"m": v} for seed, v in enumerate(of_run)} for run, of_run in values.items()}


def claim(left: Side = A, right: Side = B, margin: float = 0.1, aggregate: str = "mean") -> Claim:
    return Claim("c", "s", "p", left, right, margin, aggregate)


def test_differences_are_paired_by_seed() -> None:
    out = judge(claim(), measured(a=[0.5, 0.9, 0.7], b=[0.4, 0.7, 0.5]), [0, 1, 2])
    differences = [0.5 - 0.4, 0.9 - 0.7, 0.7 - 0.5]
    assert list(out["per_seed"].values()) == differences
    assert out["mean"] == pytest.approx(sum(differences) / 3)
    mean = sum(differences) / 3
    assert out["std"] == pytest.approx(math.sqrt(sum((d - mean) ** 2 for d in differences) / 2))
    assert out["std"] < out["left"]["std"]  # pairing removes what the seeds share
    assert out["holds"] is True


@pytest.mark.parametrize(
    ("aggregate", "margin", "holds"),
    [("mean", 2.0, True), ("mean", 2.01, False), ("median", 1.0, True), ("median", 1.1, False),
     ("min", 0.0, True), ("min", 0.1, False), ("max", 5.0, True), ("max", 5.1, False)],
)  # fmt: skip
def test_aggregates(aggregate: str, margin: float, holds: bool) -> None:
    out = judge(claim(margin=margin, aggregate=aggregate), measured(a=[5, 1, 0], b=[0, 0, 0]), [0, 1, 2])
    assert out["holds"] is holds
    assert out["mean"] == 2


def test_a_side_may_be_a_number_a_multiple_or_an_aggregate() -> None:
    runs = measured(a=[4.0, 6.0], b=[1.0, 2.0])
    assert judge(claim(right=Side(number=4.0)), runs, [0, 1])["mean"] == 1.0
    assert judge(claim(right=Side("b", "m", times=2.0)), runs, [0, 1])["per_seed"] == {"0": 2.0, "1": 2.0}
    worst = judge(claim(Side("a", "m", aggregate="min"), Side("b", "m", aggregate="max")), runs, [0, 1])
    assert (worst["mean"], worst["std"]) == (2.0, None)


def test_no_verdict_before_all_seeds_are_there() -> None:
    runs = measured(a=[0.9, 0.9], b=[0.1])
    out = judge(claim(), runs, [0, 1])
    assert out["holds"] is None
    assert out["problem"] == "1 of 2 seeds"
    assert list(out["per_seed"]) == ["0"]
    assert judge(claim(), {}, [0])["holds"] is None


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_an_aggregate_waits_for_the_first_seed(aggregate: str) -> None:
    out = judge(claim(Side("a", "m", aggregate=aggregate), B), measured(a=[0.5], b=[]), [0, 1])
    assert out["holds"] is None
    assert out["left"] == {"run": "a", "metric": "m", "aggregate": aggregate, "mean": None, "std": None}


@pytest.mark.parametrize("aggregate", sorted(AGGREGATES))
def test_a_value_that_is_not_finite_fails(aggregate: str) -> None:
    out = judge(claim(aggregate=aggregate), measured(a=[0.9, None, 0.9], b=[0.1, 0.1, 0.1]), [0, 1, 2])
    assert out["holds"] is False
    assert out["problem"] == "a metric is not finite"
    assert out["per_seed"]["1"] is None


def test_a_missing_metric_is_named_with_those_that_are_there() -> None:
    out = judge(claim(left=Side("a", "acc")), measured(a=[1], b=[1]), [0])
    assert out["holds"] is None
    assert out["problem"] == "a has no metric 'acc'; it has: m"


def test_one_seed_has_no_spread() -> None:
    assert judge(claim(), measured(a=[1], b=[0]), [0])["std"] is None


VALUES = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=6)


@given(VALUES, st.floats(-1e3, 1e3), st.sampled_from(sorted(AGGREGATES)))
def test_min_holds_exactly_when_every_seed_does(pairs, margin: float, aggregate: str) -> None:
    runs = measured(a=[a for a, _ in pairs], b=[b for _, b in pairs])
    seeds = list(range(len(pairs)))
    every = all(a - b >= margin for a, b in pairs)
    assert judge(claim(margin=margin, aggregate="min"), runs, seeds)["holds"] is every
    assert judge(claim(margin=margin, aggregate="max"), runs, seeds)["holds"] is any(a - b >= margin for a, b in pairs)
    out = judge(claim(aggregate=aggregate), runs, seeds)
    assert out["mean"] == pytest.approx(statistics.fmean(a - b for a, b in pairs))
