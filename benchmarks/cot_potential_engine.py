"""Potential curves: one prefill, forked caches and survivors, against `generate` for each prefix.

A small model is trained on the chain first, so that its completions end as they do in an analysis. All ways estimate
the same curves with the same number of completions and take turns in one run.

    python benchmarks/cot_potential_engine.py [--traces 6] [--samples 128] [--rounds 3] [--train-steps 400]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from datamodules.reasoning_chain import ReasoningChain
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.cot_potential.curves import Chunker, Trace, make_trace, sample_curves
from zoo.methods.cot_potential.engine import LocalEngine, Policy
from zoo.methods.cot_potential.losses import trace_loss
from zoo.methods.cot_potential.store import SampleStore
from zoo.nn.lm import build_lm

CONFIG = "cot_potential/strong"


def trained_model(data: ReasoningChain, lm: dict[str, Any], steps: int) -> Any:
    """A model that has learned the grammar."""
    torch.manual_seed(0)
    model = build_lm(lm, data.vocab_size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    batches: Any = data.train_dataloader().dataset
    for step in range(steps):
        batch = batches.batch(0, step)
        trace_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def generate_curves(model: Any, traces: list[Trace], samples: int, budget: int, eos: int, pad: int) -> int:
    """`generate` of transformers for each prefix; returns the number of tokens that were written."""
    decoded = 0
    for trace in traces:
        for cut in trace.boundaries[:-1]:
            prefix = torch.tensor([trace.problem.prompt + trace.tokens[:cut]])
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": eos}
            with torch.no_grad():
                out = model.generate(
                    prefix.expand(samples, -1), attention_mask=torch.ones(samples, prefix.shape[1], dtype=torch.long),
                    max_new_tokens=budget - cut, pad_token_id=pad, **options,
                )  # fmt: skip
            new = out[:, prefix.shape[1] :]
            decoded += int((new != pad).sum())
            sum(trace.problem.judge(trace.tokens[:cut] + row[row != pad].tolist()) for row in new)
    return decoded


def cache_bytes(model: Any, rows: int, tokens: int) -> int:
    """Bytes of keys and values."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    return rows * tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * size * 4


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the ways take turns")
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/cot_potential_engine.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_layers([CONFIG], []).merged
    data = ReasoningChain(**{**config["data"]["init_args"], "num_problems": args.traces})
    options = config["model"]["init_args"]
    model = trained_model(data, options["lm"], args.train_steps)
    budget, pad = options["budget"], data.task.ids["PAD"]
    given: Any = data.given_traces()
    problems, written = given
    chunker = Chunker("step_token", token="SEP")
    traces = [make_trace(p, t[0], chunker, "t") for p, t in zip(problems, written, strict=True)]

    def engine_way(scheme: str, reuse: bool) -> Callable[[int], dict[str, int]]:
        def way(seed: int) -> dict[str, int]:
            engine = LocalEngine(model, [data.eos_id], Policy(budget=budget, seed=seed), scheme)
            # one trace at a time where there is nothing to batch them with, as `generate` has it
            groups = [traces] if scheme == "fork" else [[trace] for trace in traces]
            for group in groups:
                sample_curves(engine, group, args.samples, SampleStore(None), reuse)
            meter = engine.meter
            return {
                "decoded": meter.decoded,
                "prefilled": meter.prefilled,
                "forwards": meter.forwards,
                "flops": meter.flops,
            }

        return way

    def generate_way(seed: int) -> dict[str, int]:
        torch.manual_seed(seed)
        decoded = generate_curves(model, traces, args.samples, budget, data.eos_id, pad)
        return {"decoded": decoded}

    ways: dict[str, Callable[[int], dict[str, int]]] = {
        "fork_survivors": engine_way("fork", True),
        "fork": engine_way("fork", False),
        "prefix": engine_way("prefix", False),
        "naive": engine_way("naive", False),
        "generate": generate_way,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, dict[str, int]] = {}
    for number in range(args.rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            work[name] = way(number)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [slow / fast for fast, slow in zip(seconds["fork_survivors"], seconds["generate"], strict=True)]
    longest = max(len(p.prompt) + len(t.tokens) for p, t in zip(problems, traces, strict=True))
    details = {
        "config": CONFIG,
        "traces": args.traces,
        "boundaries": sum(len(t.boundaries) - 1 for t in traces),
        "samples": args.samples,
        "threads": args.threads,
        "seconds": medians,
        "times_as_slow_as_fork_survivors": {name: medians[name] / medians["fork_survivors"] for name in ways},
        "work": work,
        "tokens_of_survivors_over_generate": work["fork_survivors"]["decoded"] / work["generate"]["decoded"],
        # forked rows copy their prefix when the first token is appended; only the parent of all of them is shared
        "cache_bytes": {
            "parent_of_a_trace": cache_bytes(model, 1, longest),
            "rows_of_a_boundary_with_their_prefix": cache_bytes(model, args.samples, longest),
            "rows_if_the_prefix_were_shared": cache_bytes(model, 1, longest) + cache_bytes(model, args.samples, 10),
        },
    }
    what = "wall time of potential curves by transformers' generate for each prefix, over fork with survivors"
    print(json.dumps(details, indent=1))
    write_bench(args.out, comparison("cot_potential_engine", what, statistics.median(ratios), "", ">=", 3.0, details))


if __name__ == "__main__":
    main()
