"""The chain's exact potential against the whole tree of traces, simulation and limits; its batches."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datamodules.reasoning_chain import ReasoningChain
from datamodules.reasoning_chain_task import ChainProblem, ChainTask, Writer, draw_problem, read_problem
from tests.methods.cot_toy import PROBLEM, TASK, WRITER, next_tokens


def coins(seed: int) -> Iterator[float]:
    return iter(random.Random(seed).random, 2)


def tree(problem: ChainProblem) -> dict[tuple[int, ...], float]:
    """Probability of a right answer after every prefix that the writer can write, by brute force."""
    values: dict[tuple[int, ...], float] = {}

    def value(trace: tuple[int, ...]) -> float:
        if trace and trace[-1] == problem.task.ids["EOS"]:
            values[trace] = float(trace[-2] == problem.answer)
        else:
            values[trace] = sum(p * value((*trace, t)) for t, p in next_tokens(problem, trace).items() if p)
        return values[trace]

    value(())
    return values


@pytest.mark.parametrize("hard", [(1,), (2,), (1, 3), ()])
def test_the_potential_equals_that_of_the_whole_tree_and_is_a_martingale(hard: tuple[int, ...]) -> None:
    task = ChainTask(5, 3, hard, (1, 4))
    ops = tuple(("H" if i in hard else "+*"[i % 2], 1 + i) for i in (1, 2, 3))
    problem = ChainProblem(task, 2, ops, WRITER)
    values, sep = tree(problem), task.ids["SEP"]
    ends = [trace for trace in values if trace and trace[-1] == task.ids["EOS"]]
    assert len(ends) > 200
    seen = 0
    for trace in ends:
        cuts = [0, *(i + 1 for i, token in enumerate(trace) if token == sep), len(trace)]
        kinds, exact = problem.annotate(trace, cuts)
        assert "broken" not in kinds
        assert "" not in kinds
        # the tree's value of a prefix is the mean of those of its continuations, so this is the martingale, too
        for cut, potential in zip(cuts, exact, strict=True):
            assert potential == pytest.approx(values[trace[:cut]], abs=1e-12)
            seen += 1
    assert seen > 1000


def test_conditioned_on_the_outcome_the_mean_potential_rises_or_falls() -> None:
    probabilities = {(): 1.0}
    traces: list[tuple[int, ...]] = [()]
    done: list[tuple[int, ...]] = []
    while traces:
        trace = traces.pop()
        for token, p in next_tokens(PROBLEM, trace).items():
            following = (*trace, token)
            probabilities[following] = probabilities[trace] * p
            (done if token == TASK.ids["EOS"] else traces).append(following)
    for right in (True, False):
        rows = []
        for trace in done:
            if PROBLEM.judge(trace) == right:
                cuts = [0, *(i + 1 for i, token in enumerate(trace) if token == TASK.ids["SEP"])]
                exact = PROBLEM.annotate(trace, [*cuts, len(trace)])[1][:-1]
                padded = (exact + [exact[-1]] * 12)[:12]
                rows.append((probabilities[trace], padded))
        total = sum(p for p, _ in rows)
        means = [sum(p * own[i] for p, own in rows) / total for i in range(12)]
        steps = [b - a for a, b in itertools.pairwise(means)]
        assert all(s > -1e-12 for s in steps) if right else all(s < 1e-12 for s in steps)
        assert abs(means[-1] - means[0]) > 0.1


def test_simulated_accuracy_is_the_potential() -> None:
    task, who = ChainTask(31, 5, (2,), (1, 2)), Writer(0.4, 0.12, 0.5, 0.25)
    stream, hits, expected = coins(1), [], []
    for _ in range(4000):
        problem = draw_problem(task, who, stream)
        hits.append(problem.judge(problem.write(stream).tokens))
        expected.append(problem.potential)
    mean = sum(expected) / len(expected)
    assert abs(sum(hits) / len(hits) - mean) < 3 * math.sqrt(mean * (1 - mean) / len(hits))


@pytest.mark.parametrize(
    ("who", "expected"),
    [
        (Writer(1, 0, 0.5, 0), {0: 1.0}),
        (Writer(0.4, 0.1, 0.5, 1), {0: 1 / 5}),
        (Writer(1, 0.5, 1, 0), {0: 1.0}),
        (Writer(1 / 5, 0, 0.5, 0), {0: 1 / 5}),
    ],
)
def test_limits(who: Writer, expected: dict[int, float]) -> None:
    problem = ChainProblem(TASK, 3, PROBLEM.ops, who)
    assert problem.potential == pytest.approx(expected[0], abs=1e-12)
    trace = problem.write(coins(3)).tokens
    bounds = [0, *(i + 1 for i, token in enumerate(trace) if token == TASK.ids["SEP"]), len(trace)]
    _kinds, exact = problem.annotate(trace, bounds)
    assert exact[-1] == float(problem.judge(trace))
    if who.guess == 1:
        assert exact[:-1] == pytest.approx([1 / 5] * 4)
    if who.recover == 1:  # a tangent costs nothing
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(exact))


def test_what_is_written_has_its_probability_and_marks_its_choices() -> None:
    stream = coins(5)
    for _ in range(200):
        written = PROBLEM.write(stream)
        logprob = sum(
            math.log(next_tokens(PROBLEM, written.tokens[:i])[token]) for i, token in enumerate(written.tokens)
        )
        assert written.logprob == pytest.approx(logprob, abs=1e-9)
        for position, right, hard in written.choices:
            table = next_tokens(PROBLEM, written.tokens[:position])
            assert table[right] == pytest.approx(WRITER.insight if hard else 1 - WRITER.tangent)


def test_what_leaves_the_grammar_has_no_exact_potential() -> None:
    ids = TASK.ids
    good = [ids["S1"], ids["H"], 2, 1, ids["SEP"]]
    kinds, exact = PROBLEM.annotate([*good, 0, 0, ids["SEP"]], [0, 5, 8])
    assert kinds == ["hard", "broken"]
    assert not math.isnan(exact[1])
    assert math.isnan(exact[2])
    assert not PROBLEM.judge([*good, ids["ANS"], PROBLEM.answer])  # no end, no answer


def test_sharpening_follows_temperature_and_nucleus() -> None:
    who = Writer(0.35, 0.12, 0.5, 0.25).sharpened(23, 0.6, 1.0)
    weight = 0.35 ** (1 / 0.6)
    rest = 22 * (0.65 / 22) ** (1 / 0.6)
    assert who.insight == pytest.approx(weight / (weight + rest))
    assert who.insight > 0.6
    assert who.recover == pytest.approx(0.5)
    assert Writer(0.35, 0.04, 0.5, 0.25).sharpened(23, 1.0, 0.95).tangent == 0
    assert Writer().sharpened(31, 1.0, 1.0) == Writer()


def test_batches_are_a_function_of_seed_epoch_and_index_and_labels_spare_the_prompt() -> None:
    data = ReasoningChain(p=7, steps=3, hard=[2], batch_size=8, num_batches=3, data_seed=4)
    batches = data.train_dataloader().dataset
    one, again, other = batches.batch(1, 2), batches.batch(1, 2), batches.batch(2, 2)
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    assert not torch.equal(one["labels"][:, :20], other["labels"][:, :20])
    length = int(one["prompt_len"][0])
    assert bool((one["labels"][:, : length - 1] == -100).all())
    assert bool((one["labels"][:, length - 1] != -100).all())
    for row in range(8):
        problem = read_problem(data.task, data.writer, one["input_ids"][row, :length].tolist())
        trace = one["labels"][row][one["labels"][row] != -100].tolist()
        assert {chunk.kind for chunk in problem.read(trace)} <= {
            "step",
            "hard",
            "try",
            "no",
            "ok",
            "redo",
            "hmm",
            "answer",
        }
        at = one["right"][row] != -100
        assert bool((one["target"][row][at & one["hard"][row]] == 0.4).all())
    batches.rank, batches.world_size = 1, 2
    second = batches.batch(1, 2)
    torch.testing.assert_close(second["input_ids"], one["input_ids"][4:], rtol=0, atol=0)


def test_traces_of_a_file(tmp_path: Path) -> None:
    data = ReasoningChain(p=5, steps=2, hard=[1], num_problems=3)
    problems, traces = data.given_traces()
    path = tmp_path / "traces.jsonl"
    rows = [{"prompt_ids": p.prompt, "trace_ids": t[0]} for p, t in zip(problems, traces, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    again = ReasoningChain(p=5, steps=2, hard=[1], traces=str(path))
    assert [p.prompt for p in again.given_traces()[0]] == [p.prompt for p in problems]
    assert again.given_traces()[1] == traces
    path.write_text('{"prompt_ids": [1, 2], "trace_ids": [0]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt of this task"):
        again.given_traces()
    path.write_text('{"prompt_ids": [1]}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"traces.jsonl:1: no line with"):
        again.given_traces()
    with pytest.raises(FileNotFoundError, match="no file"):
        ReasoningChain(traces=str(tmp_path / "none.jsonl")).given_traces()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 30}, "p: 30"),
        ({"steps": 0, "hard": []}, "steps: 0"),
        ({"hard": [9]}, r"hard: \[9\]"),
        ({"operands": [0, 2]}, r"operands: \[0, 2\]"),
        ({"insight": 1.5}, "insight: 1.5"),
        ({"num_problems": 0}, "num_problems: 0"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningChain(**options)  # type: ignore[arg-type]
