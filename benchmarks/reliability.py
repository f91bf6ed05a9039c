"""Every fault of the tests, injected many times into real runs, and what exact resume costs a step.

    python -m benchmarks.reliability [--kills 20] [--times 3] [--seed 0] [--out results/reliability.json]

Writes the file and `docs/reliability.md`. A fault that a run does not survive is counted and told, not hidden.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo import runs
from zoo.claims.results import hardware_name, table
from zoo.runs import write_atomically

PAGE = Path("docs/reliability.md")
#: Faults whose moment matters most.
OFTEN = ("kill -9",)


def inject(kills: int, times: int, seed: int) -> list[dict[str, Any]]:
    """Inject every fault and return what came of it."""
    from tests.faults.faults import FAULTS

    rows = []
    for name, fault in FAULTS.items():
        wanted = kills if name in OFTEN else times
        row: dict[str, Any] = {"fault": name, "what": (fault.__doc__ or "").strip().split("\n")[0], "tried": 0}
        row |= {"survived": 0, "told": [], "failures": []}
        for n in range(wanted):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    row["told"].append(fault(Path(folder), random.Random(f"{seed}-{name}-{n}")))
                    row["survived"] += 1
                except NotImplementedError as error:
                    row["failures"].append(f"not tried: {error}")
                    break
                except AssertionError as error:
                    row["failures"].append(str(error).split("\n")[0][:300])
            row["tried"] += 1
        print(f"{row['survived']} of {row['tried']}  {name}", flush=True)
        rows.append(row)
    return rows


def overhead(config: str, steps: int) -> dict[str, float]:
    """Return what the moments between steps and the writes of checkpoints cost in a fit of a config.

    Args:
        config: A shipped config.
        steps: Optimiser steps.

    Returns:
        `step_ms` (median), `between_ms` (mean cost of what makes a resume exact, without the writes), `share` of the
        two, `write_ms` (median of the writes) and `checkpoint_mib`.
    """
    from lightning.pytorch import Callback

    from callbacks.boundaries import _Boundaries
    from callbacks.resume_checkpoint import ResumeCheckpoint
    from zoo import run

    between, writes, marks = [0.0], list[float](), list[float]()
    call, save = _Boundaries.call, ResumeCheckpoint.save

    def timed_call(self: Any, hook: str, *args: Any) -> None:
        written, started = sum(writes), time.perf_counter()
        call(self, hook, *args)
        between[0] += time.perf_counter() - started - (sum(writes) - written)
        if hook == "on_step_boundary":
            marks.append(time.perf_counter())

    def timed_save(self: Any, *args: Any, **kwargs: Any) -> Path | None:
        started = time.perf_counter()
        path = save(self, *args, **kwargs)
        writes.append(time.perf_counter() - started)
        return path

    _Boundaries.call, ResumeCheckpoint.save = timed_call, timed_save  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            changes = {
                "trainer.max_steps": steps,
                "trainer.limit_val_batches": 0,
                "checkpoint.every_n_steps": steps // 4,
            }
            result = run("fit", config=config, overrides=changes, run_dir=Path(folder, "run"), wandb="disabled")
            files = list(Path(folder, "run", "checkpoints").glob("*.ckpt"))
            size = max(path.stat().st_size for path in files)
            callbacks: list[Callback] = result.trainer.callbacks  # type: ignore[union-attr]
            assert any(isinstance(callback, ResumeCheckpoint) for callback in callbacks)
    finally:
        _Boundaries.call, ResumeCheckpoint.save = call, save  # type: ignore[method-assign]
    step = statistics.median(b - a for a, b in itertools.pairwise(marks))
    each = between[0] / len(marks)
    return {
        "steps": len(marks), "step_ms": 1000 * step, "between_ms": 1000 * each, "share": each / step,
        "write_ms": 1000 * statistics.median(writes), "checkpoint_mib": size / 2**20,
    }  # fmt: skip


def page(content: Mapping[str, Any]) -> str:
    """Return `docs/reliability.md`."""
    rows = [
        [row["fault"], row["what"], str(row["tried"]), str(row["survived"]), "; ".join(row["failures"]) or "–"]
        for row in content["faults"]
    ]
    tried, survived = (sum(row[key] for row in content["faults"]) for key in ("tried", "survived"))
    costs = [
        [
            config, f"{c['step_ms']:.1f}", f"{c['between_ms']:.3f}", f"{c['share']:.2%}", f"{c['write_ms']:.0f}",
            f"{c['checkpoint_mib']:.1f}",
        ]
        for config, c in content["overhead"].items()
    ]  # fmt: skip
    table_of_faults = table(["fault", "what has to hold", "tried", "survived", "what went wrong"], rows)
    table_of_costs = table(["config", "step, ms", "between steps, ms", "share", "write, ms", "checkpoint, MiB"], costs)
    return f"""# Reliability

Made by `python -m benchmarks.reliability` from `results/reliability.json`; not to be edited.

A run that was stopped goes on with `zoo fit --resume RUN`, and on a CPU its weights, optimiser state, buffers,
generators and logged metrics are those of a run that was not, bit for bit. `zoo check NAME` shows it for each method.
The table shows it for what goes wrong: each fault is injected into a real child process, at a random moment where there
is a choice, and what is left of the run has to come to the same end. Survived means that the run went on or stopped
with a sentence, and that after a resume nothing was lost but the steps since the last checkpoint.

{survived} of {tried} survived. {hardware_name(content["hardware"])}, commit {content["commit"]}.

{table_of_faults}

## What it costs

The time of all that happens between two steps so that a resume is exact, beside the time of a step; and of the write of
a checkpoint, which by default happens every 500 steps and at the end of an epoch.

{table_of_costs}
"""


def main() -> None:
    """Measure, print and write the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--configs", nargs="*", default=["suave/fashion_mnist", "contrastive_perplexity/toxicity"])
    parser.add_argument("--out", type=Path, default=Path("results/reliability.json"))
    parser.add_argument("--page", action="store_true", help="only write the page again")
    args = parser.parse_args()
    if args.page:
        content = json.loads(args.out.read_text(encoding="utf-8"))
    else:
        content = {
            "overhead": {config: overhead(config, args.steps) for config in args.configs},
            "faults": inject(args.kills, args.times, args.seed),
            "hardware": runs.hardware(),
            "versions": runs.versions(),
            "commit": runs.commit(),
        }
        write_atomically(args.out, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomically(PAGE, page(content))


if __name__ == "__main__":
    main()
