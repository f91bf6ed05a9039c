"""Where a training step of each method spends its time: data, forward, backward, optimiser, the rest.

    python benchmarks/step_parts.py [CONFIG ...] [--steps 30] [--seconds 10] [--threads 1] [--out results/bench]

Each config is trained for a moment in this process with everything that `zoo fit` does but validation and checkpoints.
A part lasts from its hook to the next one. With manual optimisation there may be several of each in a step; all count.
Configs that go on from another run's checkpoint are measured by their smoke config.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback

from callbacks.boundaries import watch
from zoo import runs
from zoo.bench.report import write_bench
from zoo.registry import claim_packages

CONFIGS = (
    "suave/fashion_mnist", "daino/fashion_mnist", "nncsl/fashion_mnist", "aimv2/fashion_mnist",
    "aimv2_probe/fashion_mnist", "visual_scratchpad/rect_maze", "kv_prediction/text_base", "kv_prediction/smoke",
    "dynamoe/base", "dynamoe/smoke", "sft/pretrain", "reward_model/smoke", "salsa/smoke", "contrastive_perplexity/base",
    "contrastive_perplexity/smoke", "cot_potential/strong", "slm_bottlenecks/text",
)  # fmt: skip
#: `data`: fetching the batch, moving it to the device, augmenting it there. `rest`: schedules, callbacks, logging.
PARTS = ("data", "forward", "backward", "optimiser", "rest")
#: Steps before those that count.
WARMUP = 3


class Parts(Callback):
    """Marks where each part of a step begins, and ends the training after enough steps.

    Args:
        steps: Steps that count, at most.
        seconds: Time that they may take; at least five steps are measured.
    """

    measured: ClassVar[list[dict[str, float]]] = []

    def __init__(self, steps: int, seconds: float) -> None:
        super().__init__()
        self.steps, self.seconds, self._hooked = steps, seconds, False
        Parts.measured = []
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._part, self._since, self._done, self._began = "data", 0.0, 0, 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        watch(trainer)

    def begin(self, part: str) -> None:
        """End the present part and begin another."""
        now = time.perf_counter()
        self._spent[self._part] += now - self._since
        self._part, self._since = part, now

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not self._hooked:
            self._hooked = True
            then = "rest" if pl_module.automatic_optimization else "forward"
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *args: self.begin(then))
        self.begin("forward")

    def on_before_backward(self, *args: Any) -> None:
        self.begin("backward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.begin("optimiser" if pl_module.automatic_optimization else "forward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.begin("optimiser")

    def on_train_batch_end(self, *args: Any) -> None:
        self.begin("rest")

    def on_step_boundary(self, trainer: Any, pl_module: Any) -> None:
        self.begin("data")
        self._done += 1
        if self._done == WARMUP:
            self._began = time.perf_counter()
        if self._done > WARMUP:
            Parts.measured.append(self._spent)
            late = len(Parts.measured) >= 5 and time.perf_counter() - self._began > self.seconds
            trainer.should_stop = late or len(Parts.measured) >= self.steps
        self._spent = dict.fromkeys(PARTS, 0.0)


def measure(config: str, steps: int, seconds: float) -> dict[str, Any]:
    """Return the time to the first step, the median step in milliseconds and the share of each part."""
    import zoo

    options = {"steps": steps, "seconds": seconds}
    overrides = {
        "trainer.max_steps": 1000,
        "trainer.max_epochs": -1,
        "trainer.limit_val_batches": 0,
        "trainer.log_every_n_steps": 10,
        "checkpoint.every_n_steps": 0,
        "checkpoint.every_n_epochs": 0,
        "trainer.callbacks+": [{"class_path": "step_parts.Parts", "init_args": options}],
    }
    with tempfile.TemporaryDirectory(prefix="step-parts-") as folder:
        zoo.run("fit", config=config, overrides=overrides, run_dir=os.path.join(folder, "run"))
    measured = sys.modules["step_parts"].Parts.measured
    totals = {part: sum(step[part] for step in measured) for part in PARTS}
    whole = sum(totals.values())
    return {
        "config": config,
        "step_ms": 1000 * statistics.median(sum(step.values()) for step in measured),
        "steps": len(measured),
        "shares": {part: seconds / whole for part, seconds in totals.items()},
    }


def main() -> None:
    """Measure, print and write `step_parts.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a config at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the file")
    args = parser.parse_args()
    claim_packages()
    torch.set_num_threads(args.threads)
    # the callback is named by its class path, in this process
    sys.modules["step_parts"] = sys.modules[__name__]
    os.environ.setdefault("WANDB_MODE", "offline")
    rows = []
    for config in args.configs:
        rows.append(measure(config, args.steps, args.seconds))
        torch.set_num_threads(args.threads)
        shares = "  ".join(f"{part} {share:.0%}" for part, share in rows[-1]["shares"].items())
        print(f"{config}: {rows[-1]['step_ms']:.1f} ms  {shares}", flush=True)
    content = {"benchmark": "step_parts", "parts": rows, "threads": args.threads}
    rest = {"hardware": runs.hardware(), "versions": runs.versions(), "commit": runs.commit()}
    write_bench(args.out / "step_parts.json", content | rest)


if __name__ == "__main__":
    main()
