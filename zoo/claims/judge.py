"""Whether a claim holds, given what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.claims.plan import AGGREGATES, Claim, Metrics, Side


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation; None where there is none (no value, one value, not finite)."""
    if not values or not all(map(math.isfinite, values)):
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def judge(claim: Claim, runs: Mapping[str, Metrics], seeds: Sequence[int]) -> dict[str, Any]:
    """Judge a claim on the seeds that all its runs have.

    Differences are paired: seed by seed, `left - right`. The claim holds if their aggregate is at least the margin; a
    value that is not finite fails it.

    Args:
        claim: The claim.
        runs: Run -> seed -> metric -> value.
        seeds: The seeds that the claim is about.

    Returns:
        The entry of the results file: the claim's own words and terms, `mean`, `std` and `per_seed` of the differences,
        `value` (their aggregate), `holds` (None before all seeds are there) and `problem` (what is missing).
    """
    done = [str(seed) for seed in seeds if all(str(seed) in runs.get(name, {}) for name in claim.runs)]
    missing = missing_metric(claim, runs, done)
    if missing:
        done = []
    left, right = claim.left.values(runs, done), claim.right.values(runs, done)
    differences = [a - b for a, b in zip(left, right, strict=True)]
    mean, std = spread(differences)
    if all(side.aggregate or not side.run for side in (claim.left, claim.right)):
        std = None  # one difference, not one for each seed
    # not every aggregate is NaN when a value is: max([1, nan]) is 1
    value = AGGREGATES[claim.aggregate](differences) if mean is not None else None
    complete = bool(done) and len(done) == len(seeds)
    problem = missing or (f"{len(done)} of {len(seeds)} seeds" if not complete else "")
    return {
        "id": claim.id,
        "statement": claim.statement,
        "paper": claim.paper,
        "left": _side(claim.left, left),
        "right": _side(claim.right, right),
        "margin": claim.margin,
        "aggregate": claim.aggregate,
        "mean": mean,
        "std": std,
        "per_seed": {seed: _finite(d) for seed, d in zip(done, differences, strict=True)},
        "value": value,
        "holds": None if not complete else value is not None and value >= claim.margin,
        "problem": problem or ("a metric is not finite" if complete and value is None else ""),
        "note": claim.note,
    }


def missing_metric(claim: Claim, runs: Mapping[str, Metrics], seeds: Sequence[str]) -> str:
    """Say which metric a finished run does not have, and which ones it has."""
    for side in (claim.left, claim.right):
        for seed in seeds if side.run else ():
            found = runs[side.run][seed]
            if side.metric not in found:
                return f"{side.run} has no metric {side.metric!r}; it has: {', '.join(sorted(found)) or 'none'}"
    return ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _side(side: Side, values: list[float]) -> dict[str, Any] | float:
    if not side.run:
        return side.number
    mean, std = spread(values)
    out: dict[str, Any] = {"run": side.run, "metric": side.metric}
    if side.times != 1:
        out["times"] = side.times
    if side.aggregate:
        out["aggregate"], std = side.aggregate, None
    return out | {"mean": mean, "std": std}
