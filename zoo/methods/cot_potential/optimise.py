"""The optimised chain of thought (Algorithm 1 of arXiv 2602.14903, reported): greedy in the potential."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.methods.cot_potential.curves import Chunker, Problem, Trace, sample_curves, trace_key
from zoo.methods.cot_potential.engine import Job, Sampler
from zoo.methods.cot_potential.store import SampleStore


@dataclass
class _State:
    problem: Problem
    tokens: Any
    boundaries: list[int] = field(default_factory=lambda: [0])
    ended: bool = False


def optimise_traces(
    engine: Sampler,
    problems: Sequence[Problem],
    candidates: int,
    count: int,
    store: SampleStore,
    stop: Sequence[Any],
    chunk_tokens: int,
    most_chunks: int,
    least_chunks: int = 0,
) -> list[Trace]:
    """Write each trace chunk by chunk: of `M` sampled chunks, keep the one after which the potential is highest.

    Equal candidates are one. Ties go to the candidate that was drawn more often, then to the earlier one: a cheap
    stand-in for the higher log-probability. With many candidates and no `least_chunks` the search finds a lucky guess,
    as a public review remarks.

    Args:
        engine: Draws chunks and completions.
        problems: What is to be answered.
        candidates: Chunks `M` to choose from; 1 is natural sampling.
        count: Completions `N` behind each potential.
        store: Keeps both.
        stop: Tokens that end a chunk.
        chunk_tokens: Most tokens of a chunk.
        most_chunks: Where to give up.
        least_chunks: Chunks before which candidates with an answer are passed over, where there are others.

    Returns:
        A trace for each problem; their potentials are to be estimated anew, as the chosen ones are biased upwards.
    """
    states = [_State(problem, problem.prompt[:0]) for problem in problems]
    for step in range(most_chunks):
        live = [i for i, s in enumerate(states) if not s.ended]
        if not live:
            break
        jobs = []
        for i in live:
            s, cut = states[i], len(states[i].tokens)
            key = trace_key(s.problem, s.tokens, f"opt{candidates}-{step}")
            jobs.append(Job(engine.open(key, s.problem.prompt, s.tokens, [cut]), cut, 0, range(candidates)))
        drawn = dict(zip(live, _chunks(engine, jobs, store, chunk_tokens, stop), strict=True))
        choices = {i: _trials(states[i], drawn[i], step < least_chunks) for i in live}
        going = [t for own in choices.values() for t in own if not _ended(t, engine)]
        curves = sample_curves(engine, going, count, store, points=[[1]] * len(going))
        scores = {c.trace.key: float(c.pot[1]) for c in curves}
        for i, own in choices.items():
            # the first of equals: candidates are in the order of how often they were drawn
            best = max(own, key=lambda t: scores.get(t.key, float(t.correct)))
            states[i].tokens = best.tokens
            states[i].boundaries.append(len(best.tokens))
            states[i].ended = _ended(best, engine)
    return [
        Trace(s.problem, s.tokens, tuple(s.boundaries), trace_key(s.problem, s.tokens, f"opt{candidates}"))
        for s in states
    ]


def _ended(trace: Trace, engine: Sampler) -> bool:
    """Whether the model has ended the trace, or no room is left; an answer alone may be the first half of one."""
    return trace.problem.ended(trace.tokens) or engine.room(trace.problem.prompt, trace.tokens) < 1


def _trials(state: _State, chunks: Sequence[Any], hold_back: bool) -> list[Trace]:
    """The trace with each different chunk, those drawn more often first; without answers if others are there."""
    order: list[Any] = []
    for chunk in chunks:
        if chunk not in order:
            order.append(chunk)
    order.sort(key=lambda chunk: -sum(chunk == other for other in chunks))
    trials = []
    for chunk in order:
        tokens = state.tokens + chunk
        # its end stands twice, as the end of a trace is no boundary that one can go on from
        bounds = (0, len(tokens), len(tokens))
        trials.append(Trace(state.problem, tokens, bounds, trace_key(state.problem, tokens, "trial")))
    waiting = [t for t in trials if t.problem.answer_start(t.tokens) == len(t.tokens)]
    return (waiting or trials) if hold_back else trials


def _chunks(
    engine: Sampler, jobs: Sequence[Job], store: SampleStore, most: int, stop: Sequence[Any]
) -> list[list[Any]]:
    """Sample chunks, or take them from the store."""
    todo = []
    for job in jobs:
        known = store.get(job.opened.key, job.cut, job.boundary)
        missing = [row for row in job.rows if row not in known]
        todo += [replace(job, rows=missing)] if missing else []
    if todo:
        engine.complete(todo, most, stop, store.take)
    return [[store.get(j.opened.key, j.cut, j.boundary)[row] for row in j.rows] for j in jobs]


def chunk_stop(chunker: Chunker, vocabulary: Sequence[str]) -> tuple[list[int], int]:
    """Tokens that end a chunk, and most tokens of one, for a chunker on token ids."""
    if chunker.kind == "step_token":
        return [i for i, word in enumerate(vocabulary) if word == chunker.token], 0
    return [], chunker.size
