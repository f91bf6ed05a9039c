"""Arms beside the claims: controls of transfer, temperature, numbers of completions and candidates, length of chunks.

    python benchmarks/cot_potential_arms.py --strong STRONG.ckpt --weak WEAK.ckpt [--problems 40] [--seed 0]

Takes the two models of a reproduction and writes `results/bench/cot_potential_arms.json` and `.md` after each arm; what
an earlier call has measured under the same terms is kept. One number has a target, fixed before it was measured;
the others are looked at. Each comes from one pair of models and is a mean over their traces.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from datamodules.reasoning_chain import ReasoningChain
from zoo.bench.report import comparison, write_bench
from zoo.claims.results import table
from zoo.config import load_layers
from zoo.methods.cot_potential.curves import Chunker, Trace, make_trace, sample_curves
from zoo.methods.cot_potential.engine import LocalEngine
from zoo.methods.cot_potential.losses import Thresholds, transfer_cut
from zoo.methods.cot_potential.metrics import curve_metrics, mean, optimise_metrics
from zoo.methods.cot_potential.networks import load_provider
from zoo.methods.cot_potential.optimise import optimise_traces
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy
from zoo.methods.cot_potential.studies import Bench, Row, Settings, correct_traces, curve_row

CONFIG = "cot_potential/strong"
_STEPS = Chunker("step_token", token="SEP")
_RATES = (
    "traces", "mae_exact", "insight_rate", "exact_insight_rate", "tangent_rate", "exact_tangent_rate", "monotone_rate",
    "monotone_2se_rate", "exact_monotone_rate", "insight_agreement", "tangent_agreement",
)  # fmt: skip


def bench_of(model: Any, data: ReasoningChain, settings: Settings, **policy: Any) -> Bench:
    """A model with the engine of an analysis; completions are kept in memory."""
    engine = LocalEngine(model, [data.eos_id], Policy(**policy))
    return Bench(engine, SampleStore(None), _STEPS, Thresholds(), settings, [data.task.ids["SEP"]], model=model)


def rates(rows: Sequence[Row]) -> dict[str, float]:
    """Numbers of curves that the arms are compared by."""
    found = curve_metrics(rows)
    return {name: found[name] for name in _RATES if found[name] == found[name]}


def vary_samples(bench: Bench, traces: Sequence[Trace], counts: Sequence[int]) -> list[dict[str, float]]:
    """Independent estimates with different numbers of completions `N`."""
    out = []
    for n in counts:
        again = [replace(trace, key=f"{trace.key}-n{n}") for trace in traces]
        curves = sample_curves(bench.engine, again, n, bench.store, reuse=False)
        out.append({"samples": n, **rates([curve_row(curve, bench.thresholds) for curve in curves])})
    return out


def vary_chunks(bench: Bench, traces: Sequence[Trace], sizes: Sequence[int]) -> list[dict[str, float]]:
    """The same traces, cut into chunks of so many tokens; 0 for the grammar's own."""
    out = []
    for size in sizes:
        chunker = Chunker("every_m_tokens", size) if size else _STEPS
        cut = [make_trace(trace.problem, trace.tokens, chunker, f"chunk{size}") for trace in traces]
        rows = [curve_row(curve, bench.thresholds) for curve in bench.curves(cut)]
        names = ("insight_rate", "tangent_rate", "monotone_2se_rate", "chunks_per_trace")
        found = curve_metrics(rows)
        out.append({"tokens_of_a_chunk": size, **{name: found[name] for name in names}})
    return out


def vary_temperature(
    model: Any, settings: Settings, seed: int, policies: Sequence[tuple[float, float]], count: int, budget: int
) -> list[dict[str, float]]:
    """Traces and curves at temperatures and nuclei, beside the exact curve of the process sharpened likewise."""
    out = []
    for temperature, top_p in policies:
        init = load_layers([CONFIG], []).merged["data"]["init_args"]
        data = ReasoningChain(**init | {"temperature": temperature, "top_p": top_p, "data_seed": seed})
        bench = bench_of(model, data, settings, temperature=temperature, top_p=top_p, budget=budget, seed=seed)
        problems: list[Any] = list(data.problems("test", count))
        traces = correct_traces(bench, problems, [[] for _ in problems])
        rows = [curve_row(curve, bench.thresholds) for curve in bench.curves(traces)]
        found = {"temperature": temperature, "top_p": top_p, "insight_of_the_process": data.oracle.insight}
        out.append({**found, "potential_at_the_start": mean(row["pot"][0] for row in rows), **rates(rows)})
    return out


def vary_candidates(
    bench: Bench, problems: Sequence[Any], arms: Sequence[tuple[int, int]], most: int
) -> list[dict[str, float]]:
    """Optimised traces from `M` candidates, with answers held back for so many chunks; one candidate is natural."""
    out = []
    for candidates, least in arms:
        found = optimise_traces(
            bench.engine, problems, candidates, bench.settings.choice_samples, SampleStore(None), bench.stop, 0, most,
            least,
        )  # fmt: skip
        traces = [replace(trace, key=f"{trace.key}-{candidates}-{least}") for trace in found]
        rows = [{"arm": "optimised", **curve_row(curve, bench.thresholds)} for curve in bench.curves(traces)]
        guesses = mean(bool(row["kinds"]) and row["kinds"][0] == "hmm" for row in rows)
        numbers = optimise_metrics(rows)
        kept = {name: value for name, value in numbers.items() if name.startswith("optimised")}
        out.append({"candidates": candidates, "least_chunks": least, **kept, "begins_with_filler": guesses})
    return out


def control_transfer(bench: Bench, traces: Sequence[Trace], share: float, seed: int) -> dict[str, float]:
    """What the receiver makes of a share of a provider's trace, and of controls that are as long.

    `own` is the trace itself; `own_without_answer` counts the prefixes alone in which the right answer is not yet
    written as a value; `foreign` comes from another problem; `random_chunks` has chunks from all over other traces;
    `reversed_chunks` has the trace's own in the wrong order.
    """
    draw = random.Random(seed)
    chunks = {t.key: [t.tokens[a:b] for a, b in zip(t.boundaries, t.boundaries[1:], strict=False)] for t in traces}
    cuts = {t.key: transfer_cut(t.boundaries, t.before_answer, share) for t in traces}
    given: dict[str, list[Trace]] = {name: [] for name in ("nothing", "own", "foreign", "random_chunks", "reversed")}
    leaks = {}
    for i, trace in enumerate(traces):
        own = chunks[trace.key][: cuts[trace.key]]
        other = traces[(i + 1) % len(traces)]
        pool = [c for t in traces if t.problem.key != trace.problem.key for c in chunks[t.key][: t.before_answer]]
        parts = {
            "nothing": [],
            "own": own,
            "foreign": chunks[other.key][: cuts[other.key]],
            "random_chunks": draw.sample(pool, len(own)),
            "reversed": own[::-1],
        }
        answer = trace.problem.answer  # type: ignore[attr-defined]
        leaks[trace.key] = any(chunk[-2:-1] == [answer] for chunk in own)
        for name, pieces in parts.items():
            tokens = [token for piece in pieces for token in piece]
            # one more token than is given: the end of a trace is no boundary to complete from
            bounds = (0, len(tokens), len(tokens) + 1) if tokens else (0, 1)
            given[name].append(Trace(trace.problem, [*tokens, 0], bounds, f"{trace.key}-{name}-{share}"))
    out: dict[str, float] = {"share": share, "traces": len(traces)}
    for name, controls in given.items():
        curves = bench.curves(controls, [[len(t.boundaries) - 2] for t in controls])
        pots = [float(curve.pot[-2]) for curve in curves]
        out[name] = mean(pots)
        if name == "own":
            free = [pot for pot, trace in zip(pots, traces, strict=True) if not leaks[trace.key]]
            out |= {"own_without_answer": mean(free), "traces_without_answer": len(free)}
    return out


def measure(
    strong: str, weak: str, problems: int, seed: int, counts: Sequence[int], names: Sequence[str]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Some arms, each with its rows as soon as it is done."""
    merged = load_layers([CONFIG], []).merged
    options = merged["model"]["init_args"]
    data = ReasoningChain(**merged["data"]["init_args"] | {"data_seed": seed})
    models = {name: load_provider(path, data.vocab_size) for name, path in (("strong", strong), ("weak", weak))}
    settings = Settings(samples=options["samples"], traces_per_problem=8)
    common = {"budget": options["budget"], "seed": seed}
    own, receiver = (bench_of(models[name], data, settings, **common) for name in ("strong", "weak"))
    asked: list[Any] = list(data.problems("test", problems))
    traces = correct_traces(own, asked, [[] for _ in asked])
    honest = [t for t in traces if t.problem.annotate(t.tokens, t.boundaries)[0][0] != "hmm"]
    policies = ((1.0, 1.0), (0.6, 1.0), (0.6, 0.95))
    few = asked[: max(1, problems // 4)]
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "transfer": lambda: [control_transfer(receiver, honest, share, seed) for share in (0.1, 0.2, 0.4)],
        "temperature": lambda: vary_temperature(
            models["strong"], settings, seed, policies, problems, options["budget"]
        ),
        "samples": lambda: vary_samples(own, traces, counts),
        "chunks": lambda: vary_chunks(own, traces, (0, 2, 5, 10)),
        "candidates": lambda: vary_candidates(own, few, ((1, 0), (4, 0), (16, 0), (16, 3)), options["budget"]),
    }
    for name in names:
        # a mean over nothing is no number
        yield name, [{key: None if value != value else value for key, value in row.items()} for row in makers[name]()]


_TITLES = {
    "transfer": "The weak model's accuracy after a share of a correct trace, or after something as long",
    "temperature": "Temperature and nucleus of the strong model",
    "samples": "Completions behind each potential, without reuse",
    "chunks": "Length of chunks in tokens (0: those of the grammar)",
    "candidates": "Candidates of optimised traces, and chunks before which answers are held back",
}


_STATEMENT = (
    "share of problems that the weak model solves after the first 20 % of a correct trace, less that after as many "
    "chunks of other problems' traces"
)
_TARGET = 0.4


def own_over_random(rows: Sequence[dict[str, Any]]) -> float:
    """The number with a target, from the rows of `transfer`."""
    row = next(row for row in rows if row["share"] == 0.2)
    return float(row["own"] - row["random_chunks"])


def as_page(arms: dict[str, list[dict[str, Any]]], facts: str) -> str:
    """The arms as tables."""
    parts = ["# Arms of CoT potential\n\nMade by `benchmarks/cot_potential_arms.py`; not to be edited.\n",
             facts + "\n"]  # fmt: skip
    for name, rows in arms.items():
        columns = list(rows[0])
        cells = [["–" if row[c] is None else f"{row[c]:.3g}" for c in columns] for row in rows]
        parts.append(f"## {_TITLES[name]}\n\n" + table([c.replace("_", " ") for c in columns], cells) + "\n")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strong", required=True, help="checkpoint of cot_potential/strong")
    parser.add_argument("--weak", required=True, help="checkpoint of cot_potential/weak")
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="seed of the data; that of the checkpoints")
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 32, 128, 512], help="completions to compare")
    parser.add_argument("--arms", nargs="+", default=list(_TITLES), choices=list(_TITLES))
    parser.add_argument("--out", type=Path, default=Path("results/bench/cot_potential_arms.json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    facts = {"config": CONFIG, "seed": args.seed, "problems": args.problems}
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    arms = known["arms"] if known and {key: known[key] for key in facts} == facts else {}
    # the number with a target comes from the first arm
    wanted = [name for name in _TITLES if name in args.arms or (name == "transfer" and name not in arms)]
    for name, rows in measure(args.strong, args.weak, args.problems, args.seed, args.counts, wanted):
        arms = {key: rows if key == name else arms[key] for key in _TITLES if key == name or key in arms}
        content = comparison(args.out.stem, _STATEMENT, own_over_random(arms["transfer"]), "", ">=", _TARGET,
                             {**facts, "arms": arms})  # fmt: skip
        write_bench(args.out, content)
        said = f"{args.problems} problems of seed {args.seed}; torch {content['versions']['torch']}."
        args.out.with_suffix(".md").write_text(as_page(arms, said), encoding="utf-8")
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
