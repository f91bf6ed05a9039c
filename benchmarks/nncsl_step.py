"""A training step of NNCSL, data included, against the same step in the structure of PAWS' code.

PAWS augments one PIL image at a time and has a forward pass for each view. Here both ways are measured in turn, in one
run, on the second task of `nncsl/fashion_mnist`: the same images, network, losses and optimiser.

    python benchmarks/nncsl_step.py [--steps 20] [--rounds 5] [--threads 1] [--out results/bench/nncsl_step.json]
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
from PIL import Image
from torch import Tensor

from datamodules.class_incremental import ClassIncrementalImages
from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.nncsl.module import NNCSL, Encoded
from zoo.methods.nncsl.networks import Network

CONFIG = "nncsl/fashion_mnist"


class PassPerView(NNCSL):
    """NNCSL with a forward pass for each view, as PAWS' code has it."""

    def _encode(self, net: Network, batch: Any) -> Encoded:
        outputs = [net(view) for view in (*batch["supports"], *batch["views"])]
        z, logits = [out[1] for out in outputs], [net.classifier(out[0]) for out in outputs]
        n = len(batch["supports"])
        return Encoded(z[n:], logits[n:], torch.cat(z[:n]), torch.cat(logits[:n]))


def make_steps(data: ClassIncrementalImages, options: dict[str, Any]) -> dict[str, Callable[[int], float]]:
    """Return both ways of making step `i` of the second task."""
    batches: Any = data.train_dataloader().dataset
    epoch = data.epochs_per_task
    images = data.images
    assert isinstance(images, Tensor)
    view, support_view = data.view_list[0].torchvision(), data.support_augment.torchvision()

    def one_by_one(indices: Tensor, transform: Callable[[Any], Tensor]) -> Tensor:
        return torch.stack([transform(Image.fromarray(images[i, 0].numpy())) for i in indices.tolist()])

    def images_one_by_one(index: int) -> dict[str, Any]:
        # indices and classes as in the batched way, at no cost here: only the pixels are made anew
        batch = batches.batch(epoch, index)
        unlabelled = data.unlabelled[1][index * data.batch_size : (index + 1) * data.batch_size]
        started = time.perf_counter()
        batch["views"] = [one_by_one(unlabelled, view) for _ in batch["views"]]
        batch["supports"] = [one_by_one(batch["support_index"], support_view) for _ in batch["supports"]]
        return batch | {"started": started}

    def step_of(cls: type[NNCSL], read: Callable[[int], dict[str, Any]]) -> Callable[[int], float]:
        torch.manual_seed(0)
        model = cls(num_classes=data.num_classes, num_tasks=data.num_tasks, in_channels=data.in_channels, **options)
        model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        optimizer = model.configure_optimizers()

        def step(index: int) -> float:
            started = time.perf_counter()
            batch: Any = read(index)
            started = batch.pop("started", started)
            loss = model.training_step(batch, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - started

        return step

    return {
        "batched": step_of(NNCSL, lambda index: batches.batch(epoch, index)),
        "one_by_one": step_of(PassPerView, images_one_by_one),
    }


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; both ways take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/nncsl_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_layers([CONFIG], []).merged
    data = ClassIncrementalImages(**config["data"]["init_args"])
    data.setup("fit")
    steps = make_steps(data, config["model"]["init_args"])
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(0)
    for number in range(args.rounds):
        for name, step in steps.items():
            seconds = [step(1 + (number * args.steps + i) % 150) for i in range(args.steps)]
            rounds[name].append(1000 * statistics.median(seconds))
    ratios = [slow / fast for fast, slow in zip(rounds["batched"], rounds["one_by_one"], strict=True)]
    details = {
        "config": CONFIG,
        "ms_per_step": {name: statistics.median(values) for name, values in rounds.items()},
        "ratio_of_rounds": ratios,
        "threads": args.threads,
    }
    what = "time of an NNCSL step with one image and one view at a time, as in PAWS' code, over ours"
    print(json.dumps(details, indent=1))
    write_bench(args.out, comparison("nncsl_step", what, statistics.median(ratios), "", ">=", 3.0, details))


if __name__ == "__main__":
    main()
