"""A training step of a small language model: `zoo fit` against a bare PyTorch loop and against transformers' Trainer.

    python benchmarks/slm_step.py [--steps 12] [--rounds 5] [--threads 1] [--out results/bench]

All three train the Llama of `slm_bottlenecks/text` on the same blocks in float32, with AdamW (fused), gradients clipped
to norm 1, and a loss logged every ten steps. They take turns. The time of a step is processor time, which other work on
the machine does not change, and the median of a round counts; loading data and logging are part of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import Dataset

from zoo.bench.report import comparison, write_bench

CONFIG = "slm_bottlenecks/text"
#: Steps of a round before those that count.
WARMUP = 3


class Marks(Callback):
    """Processor time at the end of each batch of a fit."""

    times: ClassVar[list[float]] = []

    def __init__(self) -> None:
        super().__init__()
        Marks.times = []

    def on_train_batch_end(self, *args: Any) -> None:
        Marks.times.append(time.process_time())


def step_ms(times: list[float]) -> float:
    """Median time between marks, without the first steps."""
    gaps = [b - a for a, b in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]
    return 1000 * statistics.median(gaps)


def zoo_round(steps: int) -> float:
    """`zoo fit`, with all that it does except validation and checkpoints."""
    import zoo

    with tempfile.TemporaryDirectory(prefix="slm-step-") as folder:
        zoo.run(
            "fit",
            config=CONFIG,
            overrides={
                "trainer.max_steps": steps + WARMUP + 1,
                "trainer.limit_val_batches": 0,
                "checkpoint.every_n_steps": 0,
                "checkpoint.every_n_epochs": 0,
                "trainer.callbacks+": [{"class_path": "slm_step.Marks"}],
            },
            run_dir=os.path.join(folder, "run"),
        )
    return step_ms(sys.modules["slm_step"].Marks.times)


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of the text datamodule, one at a time."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.blocks[index].long()
        return {"input_ids": ids[:-1], "labels": ids[1:]}


def make_model(options: dict[str, Any], vocab_size: int) -> Any:
    """The model of the config: a module whose `net` gives the loss, and whose `net.lm` is the Llama."""
    from zoo.methods.slm_bottlenecks.module import SLMBottlenecks

    torch.manual_seed(0)
    return SLMBottlenecks(**{**options, "vocab_size": vocab_size})


def bare_round(model: Any, data: Blocks, batch_size: int, steps: int) -> float:
    """A loop as one writes it in a notebook."""
    from zoo.methods.slm_bottlenecks.networks import build_adamw

    net = model.net
    optimizer = build_adamw(net, 2e-3, (0.9, 0.95), 0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True)
    batches, times = iter(loader), []
    for number in range(steps + WARMUP + 1):
        batch = next(batches)
        loss = net(batch["input_ids"], batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if number % 10 == 0:
            print(f"bare loop: loss {float(loss):.3f}", file=sys.stderr)
        times.append(time.process_time())
    return step_ms(times)


def transformers_round(model: Any, data: Blocks, batch_size: int, steps: int) -> float:
    """`transformers.Trainer` with its defaults where nothing else is said; it shifts the labels itself."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.process_time())

    class Unshifted(Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            ids = data[index]["input_ids"]
            return {"input_ids": ids, "labels": ids}

    with tempfile.TemporaryDirectory(prefix="slm-step-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + WARMUP + 1,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine",
            warmup_steps=20,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        Trainer(model=model.net.lm, args=arguments, train_dataset=Unshifted(), callbacks=[Watch()]).train()
    return step_ms(times)


def main() -> None:
    """Measure, print and write two files: against the bare loop, against transformers' Trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the three take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # the callback is named by its class path, in this process
    sys.modules["slm_step"] = sys.modules[__name__]
    os.environ.setdefault("WANDB_MODE", "offline")

    from zoo.config import load_layers
    from zoo.registry import find, load

    config = load_layers([CONFIG], []).merged
    text = load(find("datamodules", "text"))(**config["data"]["init_args"])
    text.prepare_data()
    text.setup("fit")
    loader: Any = text.train_dataloader()
    blocks, batch_size = Blocks(loader.dataset.blocks), config["data"]["init_args"]["batch_size"]
    model = make_model(config["model"]["init_args"], text.vocab_size)
    arms: dict[str, Callable[[], float]] = {
        "zoo": lambda: zoo_round(args.steps),
        "bare": lambda: bare_round(model, blocks, batch_size, args.steps),
        "transformers": lambda: transformers_round(model, blocks, batch_size, args.steps),
    }
    rounds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, arm in arms.items():
            rounds[name].append(arm())
            torch.set_num_threads(args.threads)
    for other, limit, what in (
        ("bare", 0.97, "throughput of `zoo fit` on slm_bottlenecks/text over that of a bare PyTorch loop"),
        ("transformers", 1.0, "throughput of `zoo fit` on slm_bottlenecks/text over that of transformers' Trainer"),
    ):
        ratios = [b / a for a, b in zip(rounds["zoo"], rounds[other], strict=True)]
        details = {
            "config": CONFIG,
            "processor_ms_per_step": {name: statistics.median(rounds[name]) for name in ("zoo", other)},
            "ratio_of_rounds": ratios,
            "steps": args.steps,
            "threads": args.threads,
            "accelerate": version("accelerate"),
        }
        name = "slm_step" if other == "bare" else "slm_step_transformers"
        value = statistics.median(ratios)
        print(f"{what}: {value:.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios)})")
        write_bench(args.out / f"{name}.json", comparison(name, what, value, "", ">=", limit, details))


if __name__ == "__main__":
    main()
