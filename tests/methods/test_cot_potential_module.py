"""The module: training on traces alone, studies on the exact tables, reports, and what misuse is answered."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from matplotlib import pyplot

from datamodules.reasoning_chain import ChainTraces
from datamodules.reasoning_chain_task import ChainProblem, ChainTask, Writer
from tests.methods.cot_toy import PROBLEM, TASK, WRITER, TabularLM
from zoo.methods.cot_potential.curves import Chunker, make_trace, sample_curves
from zoo.methods.cot_potential.engine import LocalEngine
from zoo.methods.cot_potential.figures import events_figure
from zoo.methods.cot_potential.losses import Thresholds
from zoo.methods.cot_potential.metrics import all_metrics, curve_metrics, pass_metrics
from zoo.methods.cot_potential.module import CoTPotential
from zoo.methods.cot_potential.proxies import trace_proxies
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy
from zoo.methods.cot_potential.studies import (
    Bench,
    Settings,
    check_trace,
    correct_traces,
    curve_row,
    study_curves,
    study_independent,
    study_optimise,
    study_pass,
    study_proxies,
    study_transfer,
)

LM = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
      "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
CHUNKER = Chunker("step_token", token="SEP")


@pytest.fixture(scope="module")
def problems() -> list[ChainProblem]:
    return [ChainProblem(TASK, start, PROBLEM.ops, WRITER, f"p{start}") for start in range(5)]


def bench_of(problems: list[ChainProblem], n: int = 32) -> Bench:
    model = TabularLM(*problems)
    engine = LocalEngine(model, [TASK.ids["EOS"]], Policy(budget=60))
    settings = Settings(n, traces_per_problem=40, pass_samples=n, guess_samples=n, candidates=20, choice_samples=n)
    return Bench(engine, SampleStore(None), CHUNKER, Thresholds(), settings, [TASK.ids["SEP"]], model=model)


def test_training_sees_the_trace_and_not_the_prompt() -> None:
    torch.manual_seed(0)
    task = ChainTask(5, 2, (1,), (1, 2))
    model = CoTPotential(LM, len(task.words), task.ids["EOS"])
    batch: Any = ChainTraces(task, Writer(), 8, 1, 0, "train").batch(0, 0)
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    logits: list[torch.Tensor] = []
    handle = model.net.register_forward_hook(lambda _, __, out: logits.append(out.logits) or out.logits.retain_grad())
    loss = model.training_step(batch, 0)
    loss.backward()
    handle.remove()
    gradient = logits[0].grad
    assert gradient is not None
    length = int(batch["prompt_len"][0])
    assert not gradient[:, : length - 1].any()
    assert bool(gradient[:, length - 1].any(dim=-1).all())
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "embed" not in n)


def test_studies_of_exact_tables(problems: list[ChainProblem]) -> None:
    bench = bench_of(problems, 48)
    traces = correct_traces(bench, problems, [[] for _ in problems])
    assert len(traces) == len(problems)
    assert all(t.correct for t in traces)
    rows = study_curves(bench, traces)
    metrics = curve_metrics(rows)
    assert metrics["mae_exact"] < 0.08
    again = study_independent(bench, traces, rows)
    assert [r["pot"] for r in again] != [r["pot"] for r in rows]
    passes = study_pass(bench, problems)
    assert all(r["n"] == 48 and 0 < len(r["correct"]) < 48 for r in passes)
    numbers = pass_metrics(passes)
    assert numbers["pass_at_1"] > numbers["corrected_pass_at_1"] or numbers["guesses_among_correct"] == 0
    assert numbers["pass_at_1"] == pytest.approx(sum(len(r["correct"]) for r in passes) / (48 * 5))
    transfer = study_transfer(bench, traces)
    found = all_metrics({"transfer": transfer})
    assert found["transfer_acc_0"] < found["transfer_acc_80"]
    assert abs(found["transfer_exact_80"] - found["transfer_acc_80"]) < 0.15
    assert found["transfer_foreign_acc"] < 0.6
    proxies = study_proxies(bench, traces, rows)
    assert len(proxies) == len(rows)


def test_optimised_traces_beat_natural_ones(problems: list[ChainProblem]) -> None:
    bench = bench_of(problems, 24)
    metrics = all_metrics({"optimise": study_optimise(bench, problems)})
    assert metrics["optimised_final_potential"] == 1
    assert metrics["natural_final_potential"] < 1
    assert metrics["optimised_monotone_2se_rate"] >= 0.8


def test_late_guesses_are_flagged_where_chance_is_low() -> None:
    task = ChainTask(31, 2, (1,), (1, 2))
    problem = ChainProblem(task, 3, (("H", 2), ("+", 1)), Writer(0.4, 0.1, 0.5, 0.5), "low")
    engine = LocalEngine(TabularLM(problem), [task.ids["EOS"]], Policy(budget=40))
    hmm, ids = [task.ids["HMM"]] * 4 + [task.ids["SEP"]], task.ids
    guess = make_trace(problem, [*hmm, *hmm, ids["ANS"], problem.answer, ids["EOS"]], CHUNKER, "g")
    assert guess.correct
    curve = sample_curves(engine, [guess], 600, SampleStore(None))[0]
    row = curve_row(curve, Thresholds())
    assert row["late_guess"]
    assert row["exact_late_guess"]
    assert row["insights"] == []
    assert row["kinds"] == ["hmm", "hmm", "answer"]


def test_proxies_of_exact_tables() -> None:
    ids = TASK.ids
    trace = make_trace(
        PROBLEM,
        [ids["S1"], ids["H"], 2, 1, ids["SEP"], ids["S2"], ids["+"], 4, 0, ids["SEP"], ids["S3"], ids["*"], 3, 0,
         ids["SEP"], ids["ANS"], 0, ids["EOS"]],
        CHUNKER, "t",
    )  # fmt: skip
    right = TASK.successor(1, 3, "H", 2)
    found = trace_proxies(TabularLM(PROBLEM), trace)
    first = WRITER.insight if right == 1 else (1 - WRITER.insight) / 4
    assert float(found.surprisal[0]) == pytest.approx(-math.log(first) - math.log(1 - WRITER.guess), abs=1e-5)
    assert float(found.surprisal[1]) == pytest.approx(-math.log(1 - WRITER.tangent), abs=1e-5)
    assert float(found.entropy[3]) == pytest.approx(0, abs=1e-6)
    assert float(found.forced[-1]) == float(trace.correct)


def test_the_figure_of_events_marks_each_one(problems: list[ChainProblem]) -> None:
    bench = bench_of(problems)
    rows = study_curves(bench, correct_traces(bench, problems, [[] for _ in problems]))
    axis, bars, _ = events_figure(rows).axes
    for line, name in zip(axis.lines, ("insights", "tangents"), strict=True):
        assert len(line.get_xdata()) == sum(len(row[name]) for row in rows)  # type: ignore[arg-type]
    widths = [patch.get_width() for patch in bars.patches]  # type: ignore[attr-defined]
    assert sum(widths) == sum(len(row["insights"]) + len(row["tangents"]) for row in rows)
    unknown = [{**row, "kinds": [""] * len(row["kinds"])} for row in rows]
    assert len(events_figure(unknown).axes) == 2  # the map and its scale
    pyplot.close("all")


def test_given_traces_must_have_an_answer() -> None:
    ids = TASK.ids
    for tokens, message in (([], "is empty"), ([ids["S1"], ids["H"], 2, 1, ids["SEP"]], "does not contain an answer")):
        trace = make_trace(PROBLEM, tokens, CHUNKER, "t")
        with pytest.raises(ValueError, match=message):
            check_trace(trace)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm": ""}, "exactly one"),
        ({"server": {"url": "http://x", "model": "m"}}, "exactly one"),
        ({"lm": "", "server": {"url": "http://x"}}, "server.model: not given"),
        ({"lm": "", "server": {"url": "http://x", "model": "m", "concurency": 2}}, "did you mean 'concurrency'"),
        ({"lm": "", "server": {"url": "http://x", "model": "m", "concurrency": 0}}, "server.concurrency: 0"),
        ({"studies": ["curve"]}, "did you mean 'curves'"),
        ({"engine": "forks"}, "did you mean 'fork'"),
        ({"stop_width": 1.0}, "stop_width: 1.0"),
        ({"budget": 0}, "budget: 0"),
        ({"samples": 0}, "samples: 0"),
        ({"chunker": "lines"}, "chunker: 'lines'"),
        ({"guess_below": 0.0}, "guess: 0.0"),
        ({"analysis": {"sample": 3}}, "analysis.sample: not accepted"),
        ({"analysis": {"shares": [1.0]}}, "shares"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"lm": {"model_type": "llama", "hidden": 3}}, "hidden"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoTPotential(**{"lm": LM, "vocab_size": 20, **options})
