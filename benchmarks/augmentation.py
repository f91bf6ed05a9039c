"""Two views a batch by the batched augmentation, against torchvision on one PIL image at a time in loader processes.

    python benchmarks/augmentation.py [--rounds 12] [--workers 2] [--out results/bench/augmentation.json]

The images, the kinds of change and their strengths are those of `suave/fashion_mnist`. Ours has one thread, theirs one
loader process for each core. Both take turns in one run; the fastest round of each counts, as what makes a round slower
comes from outside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.augment import Augment
from datamodules.loading import keyed_generator
from datamodules.sources import source
from zoo.bench.report import comparison, write_bench

BATCH = 128
VIEW: dict[str, Any] = {"scale": (0.4, 1.0), "brightness": 0.4, "contrast": 0.4}


class OneByOne(Dataset[list[Tensor]]):
    """Two views of one image, as torchvision makes them."""

    def __init__(self, images: Tensor, augment: Augment) -> None:
        self.images, self.transform = images, augment.torchvision()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.fromarray(self.images[index, 0].numpy())
        return [self.transform(image), self.transform(image)]


def batched(images: Tensor, augment: Augment) -> Iterator[list[Tensor]]:
    """Two views of each batch, as the datamodules make them."""
    index = 0
    while True:
        chosen = torch.randint(len(images), (BATCH,))
        yield [augment(images[chosen], keyed_generator(0, f"view{view}", index)) for view in range(2)]
        index += 1


def forever(loader: DataLoader[Any]) -> Iterator[list[Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def seconds(batches: Iterator[list[Tensor]], count: int) -> float:
    """Return the seconds that a batch takes."""
    started = time.perf_counter()
    for _ in range(count):
        views = next(batches)
    assert len(views) == 2
    assert views[0].shape == (BATCH, 1, 28, 28)
    return (time.perf_counter() - started) / count


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of theirs")
    parser.add_argument("--root", default=None, help="folder of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("results/bench/augmentation.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = source("fashion_mnist")
    images, _ = facts.load(args.root, train=True)
    augment = Augment(size=28, mean=facts.mean, std=facts.std, **VIEW)
    theirs = DataLoader(
        OneByOne(images, augment), BATCH, shuffle=True, drop_last=True, num_workers=args.workers,
        persistent_workers=True, prefetch_factor=2,
    )  # fmt: skip
    ways = {"batched": (batched(images, augment), 50), "one_by_one": (forever(theirs), 12)}
    rounds: list[dict[str, float]] = []
    for _ in range(1 + args.rounds):
        rounds.append({})
        for name, (batches, count) in ways.items():
            for _ in range(2 * args.workers + 1):
                next(batches)  # what the processes have prepared while the other way was measured
            rounds[-1][name] = seconds(batches, count)
    del rounds[0]
    best = {name: min(r[name] for r in rounds) for name in ways}
    views = {name: 2 * BATCH / best[name] for name in ways}
    median = statistics.median(r["one_by_one"] / r["batched"] for r in rounds)
    print({name: round(rate) for name, rate in views.items()}, "views/s, median ratio", median)
    what = "two views of 128 Fashion-MNIST images: batched over one image at a time (torchvision, PIL)"
    details = {"views_per_second": views, "median_ratio": median, "workers": args.workers, "rounds": rounds}
    ratio = best["one_by_one"] / best["batched"]
    write_bench(args.out, comparison("augmentation", what, ratio, "", ">=", 15.0, details))


if __name__ == "__main__":
    main()
