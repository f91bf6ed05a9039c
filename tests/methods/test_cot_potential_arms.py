"""The arms beside the claims, on exact tables: controls are as long as what they control, and temperature sharpens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.reasoning_chain_task import ChainProblem
from tests.methods.cot_toy import PROBLEM, TASK, WRITER, TabularLM
from zoo.bench.report import page
from zoo.methods.cot_potential.curves import Chunker
from zoo.methods.cot_potential.engine import LocalEngine
from zoo.methods.cot_potential.losses import Thresholds
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy
from zoo.methods.cot_potential.studies import Bench, Settings, correct_traces

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cot_potential_arms.py"


@pytest.fixture(scope="module")
def arms() -> Any:
    spec = importlib.util.spec_from_file_location("cot_potential_arms", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problems() -> list[ChainProblem]:
    return [ChainProblem(TASK, start, PROBLEM.ops, WRITER, f"p{start}") for start in range(5)]


@pytest.fixture(scope="module")
def bench(problems: list[ChainProblem]) -> Bench:
    engine = LocalEngine(TabularLM(*problems), [TASK.ids["EOS"]], Policy(budget=60))
    settings = Settings(48, traces_per_problem=24, choice_samples=32)
    return Bench(engine, SampleStore(None), Chunker("step_token", token="SEP"), Thresholds(), settings,
                 [TASK.ids["SEP"]])  # fmt: skip


@pytest.fixture(scope="module")
def traces(bench: Bench, problems: list[ChainProblem]) -> list[Any]:
    found = correct_traces(bench, problems, [[] for _ in problems])
    return [t for t in found if t.problem.annotate(t.tokens, t.boundaries)[0][0] != "hmm"]


def test_noise_hides_monotone_traces_and_more_completions_show_them(arms: Any, bench: Bench, traces: list[Any]) -> None:
    few, many = arms.vary_samples(bench, traces, (8, 256))
    assert few["samples"] == 8
    assert many["mae_exact"] < few["mae_exact"]


def test_an_answer_that_is_held_back_is_not_guessed_at_once(arms: Any, bench: Bench, problems: list[Any]) -> None:
    natural, free, held = arms.vary_candidates(bench, problems, ((1, 0), (12, 0), (12, 2)), 20)
    assert free["optimised_final_potential"] > natural["optimised_final_potential"]
    assert held["optimised_final_potential"] >= 0.8
    assert held["candidates"] == 12


def test_only_the_trace_itself_helps_a_receiver_that_lacks_the_insight(arms: Any, problems: list[Any]) -> None:
    from dataclasses import replace

    writer = replace(WRITER, insight=0.02, guess=0.05)
    weak = [replace(problem, writer=writer) for problem in problems]
    own = [replace(problem, writer=replace(WRITER, guess=0.0)) for problem in problems]
    engine = LocalEngine(TabularLM(*own), [TASK.ids["EOS"]], Policy(budget=60))
    give = Bench(engine, SampleStore(None), Chunker("step_token", token="SEP"), Thresholds(), Settings(8, 60))
    traces = [replace(t, problem=w) for t, w in zip(correct_traces(give, own, [[]] * 5), weak, strict=True)]
    take = replace(give, engine=LocalEngine(_Forgiving(*weak), [TASK.ids["EOS"]], Policy(budget=60)),
                   store=SampleStore(None), settings=Settings(64))  # fmt: skip
    found = arms.control_transfer(take, traces, 0.2, 0)
    assert found["own"] > found["nothing"] + 0.2
    assert found["foreign"] < found["own"]
    assert found["reversed"] == pytest.approx(found["own"], abs=0.2)  # one chunk has one order
    assert 0 < found["traces_without_answer"] <= found["traces"]


class _Forgiving(TabularLM):
    """Its answer is a guess where a prefix is not of its grammar."""

    def row(self, prompt: tuple[int, ...], trace: tuple[int, ...]) -> Any:  # type: ignore[override]
        try:
            return super().row(prompt, trace)
        except (KeyError, IndexError):
            end = super().row(prompt, (TASK.ids["EOS"],))
            return end


def test_arms_of_several_calls_end_in_one_file(arms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    row = {"share": 0.2, "own": 0.75, "random_chunks": 0.25}

    def measure(*args: Any) -> Any:
        asked.append(list(args[-1]))
        return ((name, [row if name == "transfer" else {"a": 1.0}]) for name in args[-1])

    monkeypatch.setattr(arms, "measure", measure)
    out = tmp_path / "cot_potential_arms.json"
    call = ["--strong", "s.ckpt", "--weak", "w.ckpt", "--problems", "3", "--out", str(out)]
    arms.main([*call, "--arms", "chunks"])
    arms.main([*call, "--arms", "samples"])
    assert asked == [["transfer", "chunks"], ["samples"]]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["arms"]) == ["transfer", "samples", "chunks"]
    assert (found["value"], found["holds"]) == (0.5, True)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == page(tmp_path)
    assert "## Length of chunks" in out.with_suffix(".md").read_text(encoding="utf-8")
    arms.main(["--problems", "4", *call[:4], "--out", str(out), "--arms", "chunks"])
    assert asked[-1] == ["transfer", "chunks"]  # other terms: all anew
    assert list(json.loads(out.read_text(encoding="utf-8"))["arms"]) == ["transfer", "chunks"]


def test_the_page_has_a_table_for_each_arm(arms: Any) -> None:
    rows = {name: [{"a_b": 1.0, "c": 0.123456}] for name in arms._TITLES}
    page = arms.as_page(rows, "3 problems")
    assert page.count("| a b | c |") == len(rows)
    assert "| 1 | 0.123 |" in page
