"""Numbers of hand-made rows, and what the studies behind the claims draw: independent curves, no easy problems."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from datamodules.reasoning_chain_task import ChainProblem, Writer
from tests.methods.cot_toy import PROBLEM, TASK, WRITER, TabularLM
from zoo.methods.cot_potential.curves import Chunker
from zoo.methods.cot_potential.engine import LocalEngine
from zoo.methods.cot_potential.losses import Thresholds
from zoo.methods.cot_potential.metrics import (
    all_metrics,
    curve_metrics,
    independent_metrics,
    optimise_metrics,
    pass_metrics,
    transfer_metrics,
)
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy
from zoo.methods.cot_potential.studies import (
    Bench,
    Settings,
    correct_traces,
    study_curves,
    study_independent,
    study_proxies,
)

#: What a chunk of the task may be.
KINDS = ("step", "hard", "try", "no", "ok", "redo", "hmm", "answer", "broken")


def curve(pot: list[float], kinds: list[str], **changes: Any) -> dict[str, Any]:
    """A row of a curve without events, whose exact curve nobody knows."""
    events: dict[str, Any] = {"insights": [], "tangents": [], "late_guess": False}
    return {"pot": pot, "kinds": kinds, "exact": [], "monotone": True, "monotone_2se": True, **events, **changes}


def truth(insights: bool, tangents: bool, late_guess: bool, monotone: bool) -> dict[str, bool]:
    """What the exact curve says."""
    found = {"insights": insights, "tangents": tangents, "late_guess": late_guess, "monotone": monotone}
    return {f"exact_{name}": value for name, value in found.items()}


CURVES = [
    curve([0.1, 0.2, 0.8, 0.9, 1.0], ["step", "hard", "step", "answer"], insights=[1],
          exact=[0.2, 0.2, 0.7, 0.9, 1.0], **truth(True, False, False, True)),
    curve([0.3, 0.8, 0.4, 0.9, 1.0], ["hard", "try", "no", "answer"], insights=[0, 2], tangents=[1], monotone=False,
          monotone_2se=False, exact=[0.3, 0.6, 0.4, 0.8, 0.7], **truth(False, False, False, False)),
    curve([0.2, 0.7, 0.3, 0.2, 1.0], ["step", "redo", "ok", "answer"], insights=[0], tangents=[1], monotone=False,
          exact=[0.2, 0.7, 0.3, 0.2, 0.0], **truth(True, True, True, True)),
    curve([0.0, 0.04, 1.0], ["hmm", "answer"], late_guess=True, exact=[0.0, 0.04, 1.0],
          **truth(False, False, True, True)),
    # of a text nobody knows kinds or the exact curve
    curve([0.1, 0.9, 0.2, 1.0], ["", "", ""], insights=[0], tangents=[1], monotone=False, monotone_2se=False),
]  # fmt: skip


def test_numbers_of_curves() -> None:
    assert curve_metrics(CURVES) == pytest.approx(
        {
            "traces": 5,
            "insight_rate": 4 / 5,
            "tangent_rate": 3 / 5,
            "late_guess_rate": 1 / 5,
            "monotone_rate": 2 / 5,
            "monotone_2se_rate": 3 / 5,
            "chunks_per_trace": (4 + 4 + 4 + 2 + 3) / 5,
            # the end of a trace is known and does not count
            "mae_exact": (0.1 + 0.1 + 0.2 + 0.1) / 14,
            "exact_insight_rate": 2 / 4,
            "exact_tangent_rate": 1 / 4,
            "exact_late_guess_rate": 2 / 4,
            "exact_monotone_rate": 3 / 4,
            "insight_agreement": 3 / 4,
            "tangent_agreement": 3 / 4,
            "late_guess_agreement": 3 / 4,
            "monotone_agreement": 3 / 4,
            "monotone_2se_agreement": 1.0,
            # hard, hard, no, and one that is a step
            "insight_precision": 3 / 4,
            # try, and one that is none
            "tangent_precision": 1 / 2,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_events_are_right_on_the_planted_kinds_alone(kind: str) -> None:
    row = curve([0.1, 0.9, 0.1, 1.0], ["step", kind, "answer"], insights=[1], tangents=[1])
    found = curve_metrics([row])
    assert found["insight_precision"] == (kind in ("hard", "no"))
    assert found["tangent_precision"] == (kind == "try")


def test_what_nobody_knows_is_left_out() -> None:
    found = all_metrics({"curves": CURVES[-1:], "independent": []})
    assert set(found) == {"traces", "insight_rate", "tangent_rate", "late_guess_rate", "monotone_rate",
                          "monotone_2se_rate", "chunks_per_trace"}  # fmt: skip


def test_numbers_of_independent_curves() -> None:
    assert independent_metrics(CURVES) == pytest.approx(
        {"independent_monotone_rate": 2 / 5, "independent_monotone_2se_rate": 3 / 5}
    )


def samples(n: int, *correct: tuple[str, bool]) -> dict[str, Any]:
    """A row of a problem: kind of the first chunk of each correct trace, and whether it is flagged."""
    return {
        "key": "p",
        "n": n,
        "correct": [{"before": 0.5, "kind": kind, "late_guess": late} for kind, late in correct],
    }


def test_numbers_of_pass_at_k() -> None:
    rows = [
        samples(4, ("hmm", True), ("hmm", True), ("hmm", False)),
        samples(8),
        samples(4, ("", True)),
        samples(4, ("hard", True), ("hard", False), ("step", False)),
    ]
    found = pass_metrics(rows)
    expected = {
        "pass_at_1": (3 / 4 + 0 + 1 / 4 + 3 / 4) / 4,
        "corrected_pass_at_1": (1 / 4 + 0 + 0 + 2 / 4) / 4,
        # of two among four samples: 1 - C(wrong, 2) / 6
        "pass_at_2": (1 + 0 + 3 / 6 + 1) / 4,
        "corrected_pass_at_2": (3 / 6 + 0 + 0 + 5 / 6) / 4,
        "pass_at_4": 3 / 4,
        "corrected_pass_at_4": 2 / 4,
        "guesses_flagged": 2 / 3,
        "others_flagged": 1 / 3,
        "guesses_among_correct": 4 / 7,
    }
    for k in (1, 2, 4):
        expected[f"pass_inflation_{k}"] = expected[f"pass_at_{k}"] - expected[f"corrected_pass_at_{k}"]
    assert found == pytest.approx(expected)


def transfer(pot: list[float], foreign: float, exact: list[float], given: list[float]) -> dict[str, Any]:
    return {"shares": [0.0, 0.1, 0.2, 0.8], "pot": pot, "foreign": foreign, "exact": exact, "given": given}


def test_numbers_of_transfer() -> None:
    unknown, given = [math.nan] * 4, [0.0, 0.1, 0.3, 0.8]
    rows = [
        transfer([0.0, 0.0, 0.6, 0.9], 0.1, [0.02, 0.04, 0.5, 0.8], given),
        transfer([0.04, 0.5, 0.5, 1.0], math.nan, unknown, given),
        # neither can do without a part of the trace, but these two are not locked
        transfer([0.05, 0.9, 0.95, 0.45], 0.3, [0.06, 0.8, 0.9, 1.0], given),
        transfer([0.7, 0.75, 0.8, 0.9], 0.2, unknown, [0.0, 0.3, 0.3, 1.0]),
    ]
    assert transfer_metrics(rows) == pytest.approx(
        {
            "transfer_traces": 4,
            "transfer_acc_0": 0.1975,
            "transfer_acc_10": 0.5375,
            "transfer_acc_20": 0.7125,
            "transfer_acc_80": 0.8125,
            "transfer_exact_0": 0.04,
            "transfer_exact_10": 0.42,
            "transfer_exact_20": 0.7,
            "transfer_exact_80": 0.9,
            "transfer_given_0": 0.0,
            "transfer_given_10": 0.15,
            "transfer_given_20": 0.3,
            "transfer_given_80": 0.85,
            # of the first two traces alone
            "unlock_rate_0": 0.0,
            "unlock_rate_10": 0.0,
            "unlock_rate_20": 0.5,
            "unlock_rate_80": 1.0,
            "transfer_foreign_acc": 0.2,
            "transfer_gain_20": 0.7125 - 0.1975,
            "transfer_share_of_80": 0.7125 / 0.8125,
            "transfer_foreign_gain": 0.2 - 0.1975,
        }
    )


def test_without_locked_traces_there_is_no_unlock_rate() -> None:
    found = all_metrics({"transfer": [transfer([0.5] * 4, 0.5, [0.5] * 4, [0.0, 0.1, 0.2, 0.8])]})
    assert not any(name.startswith("unlock") for name in found)
    assert found["transfer_gain_20"] == 0


def test_numbers_of_optimised_traces() -> None:
    rows = [
        {"arm": "optimised", "monotone_2se": True, "pot": [0.2, 1.0], "boundaries": [0, 5]},
        {"arm": "natural", "monotone_2se": False, "pot": [0.2, 0.0], "boundaries": [0, 4]},
        {"arm": "natural", "monotone_2se": True, "pot": [0.3, 1.0], "boundaries": [0, 8]},
    ]
    assert optimise_metrics(rows) == {
        "optimised_monotone_2se_rate": 1.0,
        "optimised_final_potential": 1.0,
        "optimised_tokens": 5.0,
        "natural_monotone_2se_rate": 0.5,
        "natural_final_potential": 0.5,
        "natural_tokens": 6.0,
    }


# ---------------------------------------------------------------- what is drawn

SAMPLES = 16


def bench_of(problems: list[Any]) -> Bench:
    model = TabularLM(*problems)
    engine = LocalEngine(model, [TASK.ids["EOS"]], Policy(budget=60))
    settings = Settings(SAMPLES, traces_per_problem=40)
    return Bench(engine, SampleStore(None), Chunker("step_token", token="SEP"), Thresholds(), settings, model=model)


def problem(start: int, writer: Writer = WRITER) -> ChainProblem:
    return ChainProblem(TASK, start, PROBLEM.ops, writer, f"p{start}")


def drawn(bench: Bench, row: dict[str, Any]) -> list[list[Any]]:
    """Completions of each boundary of a curve that were drawn for it."""
    found = [bench.store.get(row["key"], cut, k) for k, cut in enumerate(row["boundaries"][:-1])]
    return [[own[number] for number in sorted(own)] for own in found]


def decoded(bench: Bench) -> int:
    """Tokens that the engine of a bench has written."""
    assert isinstance(bench.engine, LocalEngine)
    return bench.engine.meter.decoded


def test_independent_curves_draw_each_completion_anew() -> None:
    problems: list[Any] = [problem(start) for start in range(5)]
    bench = bench_of(problems)
    traces = correct_traces(bench, problems, [[] for _ in problems])
    before = decoded(bench)
    rows = study_curves(bench, traces)
    between = decoded(bench)
    again = study_independent(bench, traces, rows)
    fresh = decoded(bench) - between
    assert len(again) == len(rows) == 5
    assert [row["trials"] for row in again] == [row["trials"] for row in rows]
    assert fresh > between - before
    assert sum(len(own) for row in rows for own in drawn(bench, row)) < sum(sum(row["trials"]) for row in rows)
    tokens = 0
    for trace, row in zip(traces, again, strict=True):
        assert row["trials"] == [SAMPLES] * (len(trace.boundaries) - 1) + [0]
        for k, own in enumerate(drawn(bench, row)):
            # nothing is taken over from the boundary before, nor from the curve with reuse
            assert len(own) == SAMPLES
            right = [trace.problem.judge(trace.tokens[: trace.boundaries[k]] + rest) for rest in own]
            assert row["pot"][k] == sum(right) / SAMPLES
            tokens += sum(map(len, own))
    assert fresh == tokens


def test_only_traces_with_a_curve_are_measured_again() -> None:
    problems: list[Any] = [problem(start) for start in range(4)]
    bench = bench_of(problems)
    traces = correct_traces(bench, problems, [[] for _ in problems])
    rows = study_curves(bench, traces)[1:3]
    again = study_independent(bench, traces, rows)
    assert [row["problem"] for row in again] == [row["problem"] for row in rows] == ["p1", "p2"]
    assert [row["key"] for row in study_proxies(bench, traces, rows)] == [row["key"] for row in rows]


def test_problems_that_are_easy_from_the_start_are_dropped() -> None:
    sure = Writer(insight=1.0, tangent=0.0, recover=1.0, guess=0.0)
    problems: list[Any] = [problem(0), problem(1, sure), problem(2)]
    bench = bench_of(problems)
    traces = correct_traces(bench, problems, [[] for _ in problems])
    assert [trace.problem.key for trace in traces] == ["p0", "p1", "p2"]
    rows = study_curves(bench, traces)
    assert [row["problem"] for row in rows] == ["p0", "p2"]

    def kept(easy: float) -> list[str]:
        other = replace(bench, settings=replace(bench.settings, easy=easy))
        return [row["problem"] for row in study_curves(other, traces)]

    assert kept(1.01) == ["p0", "p1", "p2"]
    first = {row["problem"]: row["pot"][0] for row in rows}
    assert first["p0"] != first["p2"]
    for easy in first.values():  # "at least this": the limit itself is easy
        assert kept(easy) == [name for name, pot in first.items() if pot < easy]
