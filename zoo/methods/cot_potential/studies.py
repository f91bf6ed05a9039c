"""What is measured of problems and traces, as rows of plain values that go to files and into metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from zoo.methods.cot_potential.curves import Chunker, Curve, Problem, Trace, make_trace, sample_curves, write_traces
from zoo.methods.cot_potential.engine import Sampler
from zoo.methods.cot_potential.losses import Thresholds, difference_se, find_events, transfer_cut
from zoo.methods.cot_potential.optimise import optimise_traces
from zoo.methods.cot_potential.proxies import trace_proxies
from zoo.methods.cot_potential.store import SampleStore

#: Names of the studies.
STUDIES = ("curves", "independent", "pass_at_k", "optimise", "transfer", "proxies")
#: A row of results.
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Numbers of an analysis.

    Args:
        samples: Completions `N` behind a potential.
        traces_per_problem: Traces that are written for each problem, in the hope of a correct one.
        kept_per_problem: Correct traces of a problem that are analysed, at most.
        easy: Problems whose potential is at least this before anything is written are dropped.
        pass_samples: Traces of a problem for pass@k.
        guess_samples: Completions before the answer of each correct one of them.
        candidates: Chunks to choose from in optimised traces.
        choice_samples: Completions behind each choice.
        optimise_problems: Problems of a batch that are optimised, at most.
        shares: Parts of a trace that a receiver is given.
    """

    samples: int = 128
    traces_per_problem: int = 4
    kept_per_problem: int = 1
    easy: float = 0.95
    pass_samples: int = 64
    guess_samples: int = 512
    candidates: int = 8
    choice_samples: int = 64
    optimise_problems: int = 8
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if key not in ("easy", "shares") and value < 1:
                raise ValueError(f"{key}: {value} is not accepted; accepted: 1 or more")
        if any(not 0 <= share < 1 for share in self.shares):
            raise ValueError(f"shares: {list(self.shares)} is not accepted; accepted: fractions from 0 to below 1")


@dataclass
class Bench:
    """An engine with what goes with it.

    Attributes:
        engine: Draws completions.
        store: Keeps them.
        chunker: Cuts traces.
        thresholds: Of events.
        settings: Numbers of the analysis.
        stop: Tokens that end a chunk.
        reuse: Whether survivors are reused.
        stop_width: See `sample_curves`.
        model: The model in this process, for proxies; None for a server.
    """

    engine: Sampler
    store: SampleStore
    chunker: Chunker
    thresholds: Thresholds
    settings: Settings
    stop: Sequence[Any] = ()
    reuse: bool = True
    stop_width: float = 0.0
    model: Any = None

    def curves(self, traces: Sequence[Trace], points: Sequence[Sequence[int]] | None = None) -> list[Curve]:
        """Curves with the settings' number of completions."""
        return sample_curves(
            self.engine, traces, self.settings.samples, self.store, self.reuse, points, self.stop_width
        )


def correct_traces(bench: Bench, problems: Sequence[Problem], given: Sequence[Sequence[Any]]) -> list[Trace]:
    """Correct traces of problems, given ones or written now; at most `kept_per_problem` of each.

    Raises:
        ValueError: If a given trace has no answer.
    """
    settings = bench.settings
    asked = [p for p, traces in zip(problems, given, strict=True) if not traces]
    written = iter(write_traces(bench.engine, asked, settings.traces_per_problem, bench.store) if asked else [])
    out = []
    for problem, own in zip(problems, given, strict=True):
        texts = own or next(written)
        traces = [make_trace(problem, tokens, bench.chunker, f"t{i}") for i, tokens in enumerate(texts)]
        for trace in traces if own else []:
            check_trace(trace)
        out += [t for t in traces if t.correct][: settings.kept_per_problem]
    return out


def check_trace(trace: Trace) -> None:
    """Refuse a given trace that is empty or has no answer.

    Raises:
        ValueError: Naming the trace.
    """
    tokens = trace.tokens
    if not len(tokens):
        raise ValueError(f"trace {trace.key!r} is empty")
    if trace.problem.answer_start(tokens) >= len(tokens):
        raise ValueError(
            f"trace {trace.key!r} does not contain an answer; accepted: traces that end with one in the problem's form"
        )


def curve_row(curve: Curve, thresholds: Thresholds) -> Row:
    """A curve as plain values, with its events."""
    trace, pot = curve.trace, curve.pot
    kinds, exact = trace.problem.annotate(trace.tokens, trace.boundaries)
    trials = max(curve.trials)
    tolerance = 2 * difference_se(pot, max(trials, 1))
    strict = find_events(pot, trace.before_answer, trace.correct, thresholds)
    tolerant = find_events(pot, trace.before_answer, trace.correct, thresholds, tolerance)
    low, high = curve.interval()
    chunks = [trace.problem.text(trace.tokens[a:b]) for a, b in pairwise(trace.boundaries)]
    row: Row = {
        "key": trace.key,
        "problem": trace.problem.key,
        "correct": trace.correct,
        "boundaries": list(trace.boundaries),
        "before_answer": trace.before_answer,
        "chunks": chunks,
        "joint": trace.problem.joint,
        "text": trace.problem.text(trace.tokens),
        "pot": pot.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "trials": curve.trials,
        "insights": list(strict.insights),
        "tangents": list(strict.tangents),
        "late_guess": strict.late_guess,
        "monotone": strict.monotone,
        "monotone_2se": tolerant.monotone,
        "kinds": kinds,
        "exact": exact if not all(map(math.isnan, exact)) else [],
    }
    if row["exact"] and not any(map(math.isnan, exact)):
        true = find_events(exact, trace.before_answer, trace.correct, thresholds, 1e-9)
        row |= {
            f"exact_{name}": bool(getattr(true, name)) for name in ("insights", "tangents", "late_guess", "monotone")
        }
    return row


def study_curves(bench: Bench, traces: Sequence[Trace]) -> list[Row]:
    """Curves of correct traces; those of problems that are easy from the start are dropped."""
    rows = [curve_row(curve, bench.thresholds) for curve in bench.curves(traces)]
    return [row for row in rows if row["pot"][0] < bench.settings.easy]


def study_independent(bench: Bench, traces: Sequence[Trace], rows: Sequence[Row]) -> list[Row]:
    """Curves of the same traces again, without reuse: estimates of neighbours are independent, as the paper's are."""
    kept = {row["key"] for row in rows}
    again = [replace(trace, key=trace.key + "-independent") for trace in traces if trace.key in kept]
    settings = bench.settings
    curves = sample_curves(bench.engine, again, settings.samples, bench.store, False)
    return [curve_row(curve, bench.thresholds) for curve in curves]


def study_pass(bench: Bench, problems: Sequence[Problem]) -> list[Row]:
    """Samples, correct ones, and late guesses among these, of each problem."""
    settings = bench.settings
    written = write_traces(bench.engine, problems, settings.pass_samples, bench.store, "pass")
    right: list[Trace] = []
    for problem, texts in zip(problems, written, strict=True):
        traces = [make_trace(problem, tokens, bench.chunker, f"p{i}") for i, tokens in enumerate(texts)]
        right += [t for t in traces if t.correct]
    points = [[t.before_answer] for t in right]
    curves = sample_curves(bench.engine, right, settings.guess_samples, bench.store, points=points)
    rows: dict[str, Row] = {p.key: {"key": p.key, "n": settings.pass_samples, "correct": []} for p in problems}
    for curve in curves:
        trace = curve.trace
        before = float(curve.pot[trace.before_answer])
        kinds, _ = trace.problem.annotate(trace.tokens, trace.boundaries)
        rows[trace.problem.key]["correct"].append(
            {"before": before, "late_guess": before < bench.thresholds.guess, "kind": kinds[0] if kinds else ""}
        )
    return list(rows.values())


def study_optimise(bench: Bench, problems: Sequence[Problem]) -> list[Row]:
    """Optimised and natural traces of the same problems, with curves from new completions."""
    settings, engine = bench.settings, bench.engine
    chosen = problems[: settings.optimise_problems]
    size = 0 if bench.chunker.kind == "step_token" else bench.chunker.size
    out = []
    for name, candidates in (("optimised", settings.candidates), ("natural", 1)):
        if candidates == 1:
            texts = [own[0] for own in write_traces(engine, chosen, 1, bench.store, "natural")]
            traces = [make_trace(p, t, bench.chunker, "natural") for p, t in zip(chosen, texts, strict=True)]
        else:
            found = optimise_traces(
                engine, chosen, candidates, settings.choice_samples, bench.store, bench.stop, size, engine.policy.budget
            )
            traces = [Trace(t.problem, t.tokens, t.boundaries, t.key + "-curve") for t in found]
        out += [{"arm": name, **curve_row(curve, bench.thresholds)} for curve in bench.curves(traces)]
    return out


def study_transfer(bench: Bench, traces: Sequence[Trace]) -> list[Row]:
    """What a receiver makes of the first part of a provider's correct traces, and of those of other problems."""
    shares = bench.settings.shares
    cuts = [[transfer_cut(t.boundaries, t.before_answer, share) for share in shares] for t in traces]
    points = [sorted(set(own)) for own in cuts]
    curves = bench.curves(traces, points)
    foreign, controlled = [], []
    for i, trace in enumerate(traces):
        others = [j % len(traces) for j in range(i + 1, i + len(traces))]
        j = next((j for j in others if traces[j].problem.key != trace.problem.key), None)
        if j is None or 0.2 not in shares:
            continue
        cut = traces[j].boundaries[cuts[j][shares.index(0.2)]]
        # one more token than is given: the end of a trace is no boundary to complete from
        bounds = (0, cut, cut + 1) if cut else (0, 1)
        foreign.append(Trace(trace.problem, traces[j].tokens[: cut + 1], bounds, trace.key + "-foreign"))
        controlled.append(trace.key)
    controls = bench.curves(foreign, [[len(t.boundaries) - 2] for t in foreign])
    reached = {key: float(control.pot[-2]) for key, control in zip(controlled, controls, strict=True)}
    rows = []
    for trace, own, curve in zip(traces, cuts, curves, strict=True):
        kinds, exact = trace.problem.annotate(trace.tokens, trace.boundaries)
        rows.append(
            {
                "key": trace.key,
                "shares": list(shares),
                "pot": [float(curve.pot[k]) for k in own],
                "exact": [exact[k] for k in own],
                "given": [trace.boundaries[k] / len(trace.tokens) for k in own],
                "foreign": reached.get(trace.key, math.nan),
                "kind": kinds[0] if kinds else "",
            }
        )
    return rows


def study_proxies(bench: Bench, traces: Sequence[Trace], rows: Sequence[Row]) -> list[Row]:
    """Proxies of the traces whose curves were measured."""
    known = {row["key"]: row for row in rows}
    out = []
    for trace in traces:
        if trace.key not in known or bench.model is None:
            continue
        found = trace_proxies(bench.model, trace)
        kinds, _ = trace.problem.annotate(trace.tokens, trace.boundaries)
        out.append(
            {
                "key": trace.key,
                "kinds": kinds,
                "before_answer": trace.before_answer,
                "surprisal": found.surprisal.tolist(),
                "entropy": found.entropy.tolist(),
                "forced": found.forced.tolist(),
                "gain": torch.tensor(known[trace.key]["pot"]).diff().tolist(),
                "insights": known[trace.key]["insights"],
            }
        )
    return out
