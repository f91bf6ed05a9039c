"""Potential curves by one prefill, shared caches and survivors, against `generate` for each prefix; memory of rows.

All ways estimate the curves of the same correct traces, which the model has written itself, with the same number of
completions, and take turns in one run. Memory is that of processes of their own, which only differ in the way.

    python benchmarks/cot_potential_engine.py --checkpoint STRONG.ckpt [--traces 16] [--samples 128] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from datamodules.reasoning_chain import ReasoningChain
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.cot_potential.curves import Chunker, Trace, make_trace, sample_curves, write_traces
from zoo.methods.cot_potential.engine import Job, LocalEngine
from zoo.methods.cot_potential.losses import trace_loss
from zoo.methods.cot_potential.networks import load_provider
from zoo.methods.cot_potential.store import SampleStore
from zoo.methods.cot_potential.streams import Policy
from zoo.nn.lm import build_lm

CONFIG = "cot_potential/strong"
#: Tokens of the prefix, rows, and tokens of each row, where memory is measured.
MEMORY = {"prefix_tokens": 512, "rows": 256, "new_tokens": 16}


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


def correct_traces(model: Any, data: ReasoningChain, budget: int, count: int) -> list[Trace]:
    """Correct traces of the model itself, one of each of `count` problems that it solves."""
    engine = LocalEngine(model, [data.eos_id], Policy(budget=budget, seed=1))
    problems: list[Any] = list(data.problems("test", 4 * count))
    chunker = Chunker("step_token", token="SEP")
    out = []
    for problem, texts in zip(problems, write_traces(engine, problems, 8, SampleStore(None)), strict=True):
        out += [t for i, x in enumerate(texts) if (t := make_trace(problem, x, chunker, f"t{i}")).correct][:1]
    if len(out) < count:
        raise SystemExit(
            f"the model solves {len(out)} of {len(problems)} problems; {count} are needed: train it longer"
        )
    return out[:count]


def resident(key: str) -> int:
    """Bytes of this process that `/proc` calls `VmRSS` (now) or `VmHWM` (at most)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measure_memory(way: str, spec: dict[str, Any]) -> int:
    """Bytes by which this process grows at most while rows go on from one prefix.

    Args:
        way: `shared` (one cache of the prefix), `copied` (one prefill, a copy for each row), or `generate`.
        spec: The model, with untrained weights.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, rows, new = MEMORY["prefix_tokens"], MEMORY["rows"], MEMORY["new_tokens"]
    model: Any = build_lm({**spec, "max_position_embeddings": tokens + new}, 64)
    prompt = torch.randint(0, 60, (tokens,)).tolist()

    def run(count: int) -> None:
        if way == "generate":
            ids = torch.tensor([prompt]).expand(count, -1)
            options = {"do_sample": True, "top_k": 0, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 63}
            with torch.no_grad():
                model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=62, **options)
            return
        engine = LocalEngine(model, [99], Policy(budget=new))
        engine.shares = way == "shared"
        engine.complete([Job(engine.open("m", prompt, [], [0]), 0, 0, range(count))])

    run(2)  # what any number of rows needs is there
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak so far
    before = resident("VmRSS")
    run(rows)
    return resident("VmHWM") - before


def memory_details(spec: dict[str, Any]) -> dict[str, Any]:
    """The growth of a process for each way, and what its caches need by arithmetic."""
    peaks = {}
    for way in ("shared", "copied", "generate"):
        command = [sys.executable, __file__, "--memory", way]
        peaks[way] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    size = spec["hidden_size"] // spec["num_attention_heads"]
    token = 2 * spec["num_hidden_layers"] * spec["num_key_value_heads"] * size * 4
    tokens, rows, new = MEMORY["prefix_tokens"], MEMORY["rows"], MEMORY["new_tokens"]
    return {
        **MEMORY,
        "peak_growth_bytes": peaks,
        "times_as_much_as_shared": {way: peak / peaks["shared"] for way, peak in peaks.items()},
        "cache_bytes_by_arithmetic": {
            "shared": token * (tokens + rows * new), "copied": token * rows * (tokens + new),
        },
    }  # fmt: skip


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="", help="a trained model; without one it is trained first")
    parser.add_argument("--memory", choices=("shared", "copied", "generate"), help="only print the bytes of one way")
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the ways take turns")
    parser.add_argument("--train-steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/cot_potential_engine.json"))
    args = parser.parse_args()
    config = load_layers([CONFIG], []).merged
    options = config["model"]["init_args"]
    if args.memory:
        print(measure_memory(args.memory, options["lm"]))
        return
    memory = memory_details(options["lm"])
    torch.set_num_threads(args.threads)
    data = ReasoningChain(**config["data"]["init_args"])
    budget, pad = options["budget"], data.task.ids["PAD"]
    model = (
        load_provider(args.checkpoint, data.vocab_size)
        if args.checkpoint
        else trained_model(data, options["lm"], args.train_steps)
    )
    traces = correct_traces(model, data, budget, args.traces)

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
    processor: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, dict[str, int]] = {}
    for number in range(args.rounds):
        for name, way in ways.items():
            started, worked = time.perf_counter(), time.process_time()
            work[name] = way(number)
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - worked)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [slow / fast for fast, slow in zip(seconds["fork_survivors"], seconds["generate"], strict=True)]
    share = work["fork_survivors"]["decoded"] / work["generate"]["decoded"]
    details = {
        "config": CONFIG,
        "model": "a checkpoint of the config" if args.checkpoint else f"trained for {args.train_steps} steps",
        "traces": args.traces,
        "boundaries": sum(len(t.boundaries) - 1 for t in traces),
        "samples": args.samples,
        "threads": args.threads,
        "seconds": medians,
        # what other jobs of the machine do not change
        "processor_seconds": {name: statistics.median(values) for name, values in processor.items()},
        "times_as_slow_as_fork_survivors": {name: medians[name] / medians["fork_survivors"] for name in ways},
        "work": work,
        "tokens_of_survivors_over_generate": {"value": share, "target": "<= 0.6", "holds": share <= 0.6},
        "memory": memory,
    }
    what = "wall time of potential curves by transformers' generate for each prefix, over fork with survivors"
    print(json.dumps(details, indent=1))
    write_bench(args.out, comparison("cot_potential_engine", what, statistics.median(ratios), "", ">=", 3.0, details))


if __name__ == "__main__":
    main()
