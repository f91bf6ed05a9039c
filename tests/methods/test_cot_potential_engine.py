"""The sampling engine: forks against fresh passes, streams, exact survivors on tabular models, costs, interruption."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch.utils.flop_counter import FlopCounterMode

from datamodules.reasoning_chain import ChainTraces
from datamodules.reasoning_chain_task import ChainProblem, ChainTask, Writer
from tests.methods.cot_toy import PROBLEM, TASK, TabularLM, next_tokens
from zoo.methods.cot_potential.curves import Chunker, make_trace, sample_curves, survivors, write_traces
from zoo.methods.cot_potential.engine import Job, LocalEngine
from zoo.methods.cot_potential.flops import cost_of, fork_flops, naive_flops, prefix_flops
from zoo.methods.cot_potential.losses import trace_loss
from zoo.methods.cot_potential.optimise import optimise_traces
from zoo.methods.cot_potential.store import SampleStore, fingerprint
from zoo.methods.cot_potential.streams import Policy, pick, row_keys, uniforms
from zoo.nn.lm import build_lm

EOS = TASK.ids["EOS"]
CHUNKER = Chunker("step_token", token="SEP")


@pytest.fixture(scope="module")
def lm() -> Any:
    torch.manual_seed(0)
    spec = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.3}  # fmt: skip
    return build_lm(spec, 40)


def traces_of(engine: LocalEngine, count: int) -> list[Any]:
    written = write_traces(engine, [PROBLEM], count, SampleStore(None))[0]
    return [make_trace(PROBLEM, tokens, CHUNKER, f"t{i}") for i, tokens in enumerate(written)]


@pytest.mark.parametrize("scheme", ["prefix", "naive"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_schemes_draw_the_same_tokens(lm: Any, scheme: str, temperature: float) -> None:
    out = []
    for name in ("fork", scheme):
        engine = LocalEngine(lm, [39], Policy(temperature=temperature, top_p=0.95, budget=20, seed=3), name)
        jobs = []
        for key, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6, 7, 8])):
            opened = engine.open(key, prompt, list(range(10, 18)), [0, 3, 8])
            jobs += [Job(opened, cut, k, range(5)) for k, cut in enumerate((0, 3, 8))]
        out.append(engine.complete(jobs))
    assert out[0] == out[1]
    if temperature:
        assert out[0][0][0] != out[0][0][1]


def test_forked_logits_are_those_of_a_full_pass_and_the_parent_stays_as_it_is(lm: Any) -> None:
    engine = LocalEngine(lm, [39], Policy(budget=30, seed=1))
    seen: list[tuple[Any, torch.Tensor]] = []
    positions: list[torch.Tensor] = []
    forward = lm.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append((kwargs, output.logits))
        if "position_ids" in kwargs:
            positions.append(kwargs["position_ids"].clone())
        return output

    opened = engine.open("a", [1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 2, 4])
    before = copy.deepcopy(opened.layers)
    lm.forward = watch
    try:
        short, long = engine.complete([Job(opened, 2, 1, range(3)), Job(opened, 4, 2, range(3))])
    finally:
        del lm.forward
    for (keys, values), (old_keys, old_values) in zip(opened.layers, before, strict=True):
        assert keys.shape == old_keys.shape
        assert torch.equal(keys, old_keys)
        assert torch.equal(values, old_values)
    # the first token after the prefix is at position P + t
    assert positions[0][:, 0].tolist() == [6] * 3 + [8] * 3
    for step, (_, logits) in enumerate(seen[:5]):
        if len(logits) < 6:
            break  # ended rows were dropped
        for row, (cut, completion) in enumerate([(2, c) for c in short] + [(4, c) for c in long]):
            if len(completion) > step + 1:
                ids = torch.tensor([[1, 2, 3, 4, *[5, 6, 7, 8, 9][:cut], *completion[: step + 1]]])
                full = lm(input_ids=ids).logits[0, -1]
                torch.testing.assert_close(logits[row, -1], full, rtol=0, atol=1e-5)


def test_streams_depend_on_nothing_but_their_name(lm: Any) -> None:
    engine = LocalEngine(lm, [39], Policy(budget=16, seed=5), max_rows=1000)
    small = LocalEngine(lm, [39], Policy(budget=16, seed=5), max_rows=3)
    opened = engine.open("x", [1, 2], [3, 4, 5], [0, 1, 2])
    jobs = [Job(opened, cut, k, range(7)) for k, cut in enumerate((0, 1, 2))]
    together = engine.complete(jobs)
    assert small.complete(jobs) == together
    assert [engine.complete([Job(opened, cut, k, [4])])[0][0] for k, cut in enumerate((0, 1, 2))] == [
        rows[4] for rows in together
    ]
    keys = row_keys(0, "a", 1, range(2000))
    assert (
        len({*keys.tolist(), *row_keys(0, "a", 2, range(2000)).tolist(), *row_keys(0, "b", 1, range(2000)).tolist()})
        == 6000
    )
    values = np.concatenate([uniforms(keys, step) for step in range(20)])
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < chi2.ppf(0.999, 19)


def test_temperature_comes_before_the_nucleus() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, -1)
    uniform = (np.arange(4000) + 0.5) / 4000
    policy = Policy(temperature=2.0, top_p=0.7)
    tempered = (logits[0] / 2).softmax(0)
    kept = tempered.clone()
    kept[2:] = 0  # 0.455 + 0.276 reaches 0.7 after the temperature; before it, the first alone would not do
    expected = kept / kept.sum()
    counts = torch.bincount(pick(logits, uniform, policy), minlength=4) / 4000
    torch.testing.assert_close(counts, expected, rtol=0, atol=1e-3)
    assert pick(logits[:1], np.array([0.999]), Policy(temperature=0.0)).tolist() == [0]


def test_budget_is_that_of_trace_and_completion_together(lm: Any) -> None:
    engine = LocalEngine(lm, [999], Policy(budget=9))
    opened = engine.open("a", [1, 2, 3], [4, 5, 6, 7], [0, 4])
    first, last = engine.complete([Job(opened, 0, 0, range(2)), Job(opened, 4, 1, range(2))])
    assert [len(c) for c in first] == [9, 9]
    assert [len(c) for c in last] == [5, 5]
    with pytest.raises(ValueError, match=r"a prefix of 9 tokens with budget: 9"):
        engine.open("b", [1], list(range(12)), [0, 9])
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.open("b", [], [1], [0])


@pytest.mark.parametrize("reuse", [False, True])
def test_on_tables_the_estimates_are_binomial_around_the_exact_potential(reuse: bool) -> None:
    engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=60, seed=int(reuse)))
    traces = traces_of(engine, 40)
    curves = sample_curves(engine, traces, 64, SampleStore(None), reuse=reuse)
    statistic, count = 0.0, 0
    for curve in curves:
        exact = PROBLEM.annotate(curve.trace.tokens, curve.trace.boundaries)[1]
        assert float(curve.pot[-1]) == exact[-1]
        for k, pot in enumerate(curve.pot[:-1].tolist()):
            if 0 < exact[k] < 1:
                statistic += (pot - exact[k]) ** 2 / (exact[k] * (1 - exact[k]) / 64)
                count += 1
            else:
                assert pot == exact[k]
    assert count > 100
    if reuse:  # neighbours are correlated: the mean of the statistic is the same, its spread is larger
        assert 0.75 < statistic / count < 1.25
    else:
        assert chi2.ppf(0.0005, count) < statistic < chi2.ppf(0.9995, count)


def test_reuse_saves_tokens_and_survivors_are_the_rests_of_equal_chunks() -> None:
    assert survivors([[1, 2, 3], [1, 2], [1, 3, 4], [1, 2, 9, 9]], [1, 2]) == [[3], [9, 9]]
    decoded = {}
    for reuse in (False, True):
        engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=60, seed=2))
        traces = traces_of(engine, 10)
        start = engine.meter.decoded
        sample_curves(engine, traces, 48, SampleStore(None), reuse=reuse)
        decoded[reuse] = engine.meter.decoded - start
    assert decoded[True] < 0.75 * decoded[False]


def test_no_answer_counts_as_wrong_and_stays_in_the_denominator() -> None:
    engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=14, seed=0))
    trace = make_trace(PROBLEM, [TASK.ids["S1"], TASK.ids["H"], 2, 1, TASK.ids["SEP"]] + [0] * 3, CHUNKER, "t")
    curve = sample_curves(engine, [trace], 32, SampleStore(None), points=[[0, 1]])[0]
    assert curve.pot[:2].tolist() == [0.0, 0.0]
    assert curve.trials[:2] == [32, 32]


def test_counted_operations_are_the_formulas(lm: Any) -> None:
    prompt, trace, cuts = [1, 2, 3, 4, 5], list(range(6, 16)), [0, 3, 7]
    for scheme, formula in (("naive", naive_flops), ("prefix", prefix_flops), ("fork", fork_flops)):
        engine = LocalEngine(lm, [39], Policy(budget=25, seed=9), scheme)
        opened = engine.open("a", prompt, trace, cuts)
        jobs = [Job(opened, cut, k, range(4)) for k, cut in enumerate(cuts)]
        lengths = [[len(c) - 1 for c in rows] for rows in engine.complete(jobs)]
        assert engine.meter.flops == formula(cost_of(lm), len(prompt), cuts, lengths)


def test_the_cost_of_a_token_is_what_torch_counts() -> None:
    torch.manual_seed(0)
    spec = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
            }  # fmt: skip
    model = build_lm(spec, 40)
    model.set_attn_implementation("eager")
    cost, cache, counted = cost_of(model), None, 0
    for token in range(12):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            cache = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        table = counter.get_flop_counts()
        rotary = sum(sum(ops.values()) for name, ops in table.items() if name.endswith("rotary_emb"))
        counted += counter.get_total_flops() - rotary
    assert counted == cost.span(0, 12) + 12 * cost.head


def test_an_interrupted_analysis_goes_on_and_draws_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=60, seed=4))
    traces = traces_of(engine, 5)
    whole = sample_curves(engine, traces, 32, SampleStore(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:9])  # killed while it wrote the fifth line
    store = SampleStore(path)
    assert store.found > 0
    start = engine.meter.decoded
    again = sample_curves(engine, traces, 32, store)
    assert engine.meter.decoded - start > 0
    for one, two in zip(whole, again, strict=True):
        assert torch.equal(one.pot, two.pot)
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())
    start = engine.meter.decoded
    sample_curves(engine, traces, 32, SampleStore(path))
    assert engine.meter.decoded == start
    path.write_text('{"trace": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples.jsonl:1: no line of completions"):
        SampleStore(path)


def test_fingerprints_tell_weights_and_settings_apart(lm: Any) -> None:
    other = copy.deepcopy(lm)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    names = {
        fingerprint(lm, Policy()),
        fingerprint(other, Policy()),
        fingerprint(lm, Policy(seed=1)),
        fingerprint(None),
    }
    assert len(names) == 4
    assert fingerprint(lm, Policy()) == fingerprint(copy.deepcopy(lm), Policy())


def test_sequential_stopping_draws_less_and_never_more_than_asked() -> None:
    engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=60, seed=4))
    traces = traces_of(engine, 6)
    curves = sample_curves(engine, traces, 256, SampleStore(None), stop_width=0.15)
    trials = [n for curve in curves for n in curve.trials[:-1]]
    assert max(trials) <= 256
    assert min(trials) < 100
    assert all(n >= 22 for n in trials)  # with fewer the interval is wider, whatever was seen


def test_optimised_traces_are_right_more_often_and_one_candidate_is_natural() -> None:
    engine = LocalEngine(TabularLM(PROBLEM), [EOS], Policy(budget=60, seed=8))
    problems = [copy.copy(PROBLEM) for _ in range(12)]
    for i, problem in enumerate(problems):
        object.__setattr__(problem, "key", f"p{i}")
    sep = [TASK.ids["SEP"]]
    best, natural = (optimise_traces(engine, problems, m, 48, SampleStore(None), sep, 0, 20) for m in (16, 1))
    assert sum(t.correct for t in best) >= 11
    assert sum(t.correct for t in natural) <= 8
    for trace in best:
        assert trace.boundaries[-1] == len(trace.tokens)
        assert all(trace.tokens[b - 1] == sep[0] for b in trace.boundaries[1:-1])


def test_bad_values(lm: Any) -> None:
    with pytest.raises(ValueError, match="engine: 'forks' is not accepted"):
        LocalEngine(lm, [0], Policy(), "forks")
    with pytest.raises(ValueError, match="max_rows: 0"):
        LocalEngine(lm, [0], Policy(), max_rows=0)
    with pytest.raises(ValueError, match="budget: 0"):
        Policy(budget=0)
    with pytest.raises(ValueError, match="temperature: -1"):
        Policy(temperature=-1)


def grammar_leaves(problem: Any, prefix: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every trace of the grammar that starts with a prefix."""
    if prefix and prefix[-1] == problem.task.ids["EOS"]:
        return [prefix]
    return [leaf for token in next_tokens(problem, prefix) for leaf in grammar_leaves(problem, (*prefix, token))]


def test_completions_of_a_trained_model_have_the_probabilities_of_its_tree() -> None:
    torch.manual_seed(0)
    task = ChainTask(p=5, steps=2, hard=(1,), operands=(1, 2))
    writer = Writer(0.4, 0.3, 0.5, 0.25)
    lm: Any = build_lm({"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
                       len(task.words)).train()  # fmt: skip
    batches, steps = ChainTraces(task, writer, 32, 120, 0, "train"), 120
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        batch = batches.batch(0, step)
        trace_loss(lm(input_ids=batch["input_ids"]).logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    lm.eval()
    problem = ChainProblem(task, 3, (("H", 2), ("+", 1)), writer, "tree")
    leaves = grammar_leaves(problem)
    assert len(leaves) == 50  # 5 guesses; 5 first values, each with 1 + 4 * 2 ways through the second step
    logprob = []
    for leaf in leaves:
        with torch.no_grad():
            logits = lm(input_ids=torch.tensor([[*problem.prompt, *leaf]])).logits[0, len(problem.prompt) - 1 : -1]
        logprob.append(logits.double().log_softmax(-1).gather(1, torch.tensor(leaf)[:, None])[:, 0])
    engine = LocalEngine(lm, [task.ids["EOS"]], Policy(budget=40, seed=3))
    right = next(x for x in leaves if problem.judge(list(x)) and task.ids["NO"] in x)
    trace = make_trace(problem, list(right), CHUNKER, "t")
    opened = engine.open("t", problem.prompt, trace.tokens, trace.boundaries[:-1])
    n = 2000
    for k, cut in enumerate(trace.boundaries[:-1]):
        drawn = engine.complete([Job(opened, cut, k, range(n))])[0]
        counts = Counter(map(tuple, drawn))
        expected = {
            leaf[cut:]: n * float(lp[cut:].sum().exp())
            for leaf, lp in zip(leaves, logprob, strict=True)
            if leaf[:cut] == right[:cut]
        }
        often = {leaf: m for leaf, m in expected.items() if m > 8}
        rest = n - sum(often.values())
        bins = [(counts[leaf], m) for leaf, m in often.items()]
        bins += [(n - sum(seen for seen, _ in bins), rest)] if rest > 8 else []
        statistic = sum((seen - m) ** 2 / m for seen, m in bins)
        assert statistic < chi2.ppf(0.9998, len(bins) - 1 if rest > 8 else len(bins))
        # what is certain of the potential: the right leaves, and at most what is outside the grammar besides
        low = sum(m for leaf, m in expected.items() if problem.judge([*right[:cut], *leaf])) / n
        outside = 1 - sum(expected.values()) / n
        share = sum(problem.judge([*right[:cut], *tokens]) for tokens in drawn) / n
        noise = 4 * (max(low * (1 - low), 0.01) / n) ** 0.5
        assert low - noise <= share <= low + outside + noise
