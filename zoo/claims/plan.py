"""What a claims file says: runs, and inequalities between their metrics."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zoo.errors import UsageError, did_you_mean

#: Seed -> metric -> value of one run; a value that is not finite is None, as JSON has no NaN.
Metrics = Mapping[str, Mapping[str, float | None]]

AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
}

#: What a seed sets, unless a scale names other keys.
SEED_KEYS = ("seed_everything", "data.init_args.data_seed")

#: `${run.checkpoint}`, `${run.run_dir}`.
PLACEHOLDER = re.compile(r"\$\{([^.}]+)\.([^}]+)\}")


@dataclass(frozen=True)
class Run:
    """One run of a scale, made once for each seed.

    Attributes:
        name: Its name in the claims.
        configs: Config names or files, merged from left to right.
        overrides: Dotted keys and their values; strings may hold `${run.checkpoint}` and `${run.run_dir}`.
        needs: Runs that come first, with the same seed.
        commands: What is called, in order.
        alone: Whether no other run may share the machine, as its metrics are times.
    """

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("fit", "test")
    alone: bool = False


@dataclass(frozen=True)
class Side:
    """One side of an inequality: `times` x `metric` of `run`, or a number.

    Attributes:
        run: Name of the run, `""` for a number.
        metric: Its metric.
        times: Factor of the metric.
        aggregate: If set, one value over all seeds instead of one for each.
        number: The number, where `run` is empty.
    """

    run: str = ""
    metric: str = ""
    times: float = 1.0
    aggregate: str = ""
    number: float = 0.0

    def values(self, runs: Mapping[str, Metrics], seeds: Iterable[str]) -> list[float]:
        """Return the side's value for each of `seeds`; NaN for a metric that is not finite."""
        if not self.run:
            return [self.number for _ in seeds]
        stored = [runs[self.run][seed][self.metric] for seed in seeds]
        values = [float("nan") if value is None else self.times * value for value in stored]
        # there is nothing to aggregate before the first seed is there
        return [AGGREGATES[self.aggregate](values)] * len(values) if self.aggregate and values else values

    def __str__(self) -> str:
        if not self.run:
            return f"{self.number:g}"
        text = f"{self.metric} of {self.run}"
        text = f"{self.aggregate} of {text}" if self.aggregate else text
        return text if self.times == 1 else f"{self.times:g} × {text}"


@dataclass(frozen=True)
class Claim:
    """`aggregate over seeds of (left - right) >= margin`.

    Attributes:
        id: Short name, unique within the file.
        statement: The claim as a sentence.
        paper: The paper's own number and where it stands.
        left: The side that is claimed to be larger.
        right: The other side.
        margin: By how much; fixed before the runs.
        aggregate: How the differences of the seeds become one number; `min` asks every seed to hold.
        note: What has to be said about it, e.g. what was tried where it does not hold.
    """

    id: str
    statement: str
    paper: str
    left: Side
    right: Side
    margin: float = 0.0
    aggregate: str = "mean"
    note: str = ""

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs that it compares."""
        return tuple(side.run for side in (self.left, self.right) if side.run)

    @property
    def terms(self) -> dict[str, Any]:
        """What has to be fixed before the runs."""
        terms = asdict(self)
        return {key: terms[key] for key in ("left", "right", "margin", "aggregate")}


@dataclass(frozen=True)
class Report:
    """Metrics that are shown beside the paper's numbers without a claim about them."""

    statement: str
    paper: str
    runs: tuple[str, ...]
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """One scale of a claims file.

    Attributes:
        method: Registered name of the method.
        scale: `cpu`, `gpu` or another name of the file.
        path: The claims file.
        seeds: The seeds of the claims.
        runs: The runs by name, each after those that it needs.
        claims: The claims.
        reports: Further metrics to show.
        seed_keys: Options that a seed sets.
    """

    method: str
    scale: str
    path: Path
    seeds: tuple[int, ...]
    runs: Mapping[str, Run]
    claims: tuple[Claim, ...]
    reports: tuple[Report, ...] = ()
    seed_keys: tuple[str, ...] = SEED_KEYS

    def needed(self, ids: Iterable[str]) -> list[Run]:
        """Return the runs that the claims `ids` compare, with everything that these need, in order.

        Raises:
            UsageError: If there is no such claim.
        """
        known = {claim.id: claim for claim in self.claims}
        wanted: set[str] = set()
        for claim_id in ids:
            if claim_id not in known:
                raise UsageError(f"{self.path}: {self.scale}: no claim {claim_id!r}", did_you_mean(claim_id, known))
            wanted.update(known[claim_id].runs)
        for name in reversed(list(self.runs)):
            if name in wanted:
                wanted.update(self.runs[name].needs)
        return [run for run in self.runs.values() if run.name in wanted]
