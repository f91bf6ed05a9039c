"""What a step costs around the network: with the shortcuts of `zoo/shortcuts.py`, and without them.

    python benchmarks/step_overhead.py [--steps 400] [--rounds 5] [--out results/bench/step_overhead.json]

A fit of the main job's config, with all of its callbacks, loggers and logged names, but a network of one weight and a
batch that is built once. Both take turns in one process; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

import zoo
from datamodules.loading import Batches, ResumableLoader, ZooDataModule
from zoo import shortcuts
from zoo.bench.report import comparison, write_bench

#: What a step of Suave logs.
LOGGED = ("loss", "loss_labelled", "loss_unlabelled", "loss_mixed", "loss_probes", "pseudo_label_acc")
WARMUP = 50


class Small(LightningModule):
    """Logs as much as Suave does and computes next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.weight * batch["image"]
        value = loss.detach()
        self.log_dict({f"train/{name}": value for name in LOGGED}, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Ones(Batches):
    def __len__(self) -> int:
        return 10_000

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        return {"image": torch.ones(())}


class Ones(ZooDataModule):
    """Batches of a single number."""

    def train_dataloader(self) -> ResumableLoader:
        return self.loader(_Ones())


class Stopwatch(Callback):
    """Time and processor time of all steps after the first ones."""

    spent: ClassVar[tuple[float, float]]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == WARMUP:
            self.began = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        wall, processor = self.began
        Stopwatch.spent = time.perf_counter() - wall, time.process_time() - processor


def milliseconds(steps: int, quick: bool) -> tuple[float, float]:
    """Return time and processor time of a step."""
    overrides = {
        "model": "step_overhead.Small",
        "data": "step_overhead.Ones",
        "trainer.max_steps": WARMUP + steps,
        "trainer.log_every_n_steps": 10,
        "trainer.callbacks+": [{"class_path": "step_overhead.Stopwatch"}],
    }
    shortcuts.uninstall()
    kept = shortcuts.install
    if not quick:
        shortcuts.install = lambda: None
    try:
        with tempfile.TemporaryDirectory(prefix="step-overhead-") as folder:
            zoo.run("fit", overrides=overrides, run_dir=Path(folder, "run"))
    finally:
        shortcuts.install = kept
    wall, processor = sys.modules["step_overhead"].Stopwatch.spent
    return 1000 * wall / steps, 1000 * processor / steps


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/bench/step_overhead.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"lightning": False, "shortcuts": True}
    rounds = [{name: milliseconds(args.steps, quick) for name, quick in ways.items()} for _ in range(args.rounds)]
    wall, processor = ({name: min(r[name][i] for r in rounds) for name in ways} for i in (0, 1))
    print(f"ms a step: {wall}, in processor time: {processor}")
    what = (
        "time around the network in a step, with all callbacks and logged names of the main job, Lightning's over ours"
    )
    details = {"ms_per_step": wall, "processor_ms_per_step": processor, "rounds": rounds}
    write_bench(
        args.out,
        comparison("step_overhead", what, processor["lightning"] / processor["shortcuts"], "", ">=", 1.5, details),
    )


if __name__ == "__main__":
    main()
