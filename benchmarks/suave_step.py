"""A training step of Suave against the same step with the SwAV loss and the heads of `lightly`.

    pip install -e '.[benchmarks]'
    python benchmarks/suave_step.py [--steps 10] [--rounds 9] [--threads 1] [--out results/bench/suave_step.json]

Both are `suave/fashion_mnist` with the same backbone, probes, labelled loss, optimiser and batches; projector,
prototypes, assignments and swapped prediction are ours or lightly's. Loading data is left out. Both take turns; the
fastest step of each counts, as what makes a step slower comes from outside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
from torch import Tensor, nn

from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.suave.mix import Mix
from zoo.methods.suave.module import Suave
from zoo.nn.optim import build_optimizer
from zoo.registry import find, load

CONFIG = "suave/fashion_mnist"


class Projector(nn.Module):
    """lightly's head, with its hidden layer shown to the probes."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = SwaVProjectionHead(in_dim, hidden_dim, out_dim).layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.layers[:-1](x)
        return hidden, self.layers[-1](hidden)


class Prototypes(SwaVPrototypes):
    """lightly's prototypes under the names that the network calls."""

    gain = None

    def normalise_(self) -> None:
        self.normalize()


class WithLightly(Suave):
    """Suave with lightly's projector, prototypes and loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        hp, net = self.hparams, self.net
        dim = int(net.backbone.num_features)  # type: ignore[arg-type]
        net.projector = Projector(dim, hp["hidden_dim"], hp["embed_dim"])  # type: ignore[assignment]
        net.prototypes = Prototypes(hp["embed_dim"], hp["num_classes"])  # type: ignore[assignment]
        self.swav = SwaVLoss(hp["tau"], hp["sinkhorn_iterations"], hp["epsilon"])

    def unlabelled_losses(
        self, views: list[Tensor], z_views: list[Tensor], mix: Mix | None, hidden: Tensor
    ) -> dict[str, Tensor]:
        logits = self.net.prototypes(torch.cat(z_views)).split(len(views[0]))
        return {"unlabelled": self.swav(list(logits[:2]), list(logits[2:])).squeeze()}


class Step:
    """Training steps of a module without a Trainer.

    Args:
        cls: The module's class.
        options: Its options.
    """

    def __init__(self, cls: type[Suave], options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.module = cls(**options).train()
        self.module.switch_step = 1
        self.module.log = self.module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        hp = self.module.hparams
        parameters = [*self.module.net.parameters(), *self.module.probes.parameters()]
        self.optimizer = build_optimizer(
            parameters, hp["optimizer"], hp["lr"], weight_decay=hp["weight_decay"], nesterov=hp["nesterov"]
        )

    def __call__(self, batch: Any) -> float:
        """Make a step and return its seconds."""
        started = time.perf_counter()
        loss = self.module.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - started


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds; both take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/bench/suave_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_layers([CONFIG], []).merged
    data = load(find("datamodules", "fashion_mnist"))(**config["data"]["init_args"])
    data.setup("fit")
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(args.steps)]
    options = {**config["model"]["init_args"], "num_classes": data.num_classes, "in_channels": data.in_channels}
    ways = {"ours": Step(Suave, options), "lightly": Step(WithLightly, options)}
    rounds: list[dict[str, float]] = []
    for number in range(1 + args.rounds):
        order = list(ways.items())[:: 1 if number % 2 else -1]
        rounds.append({name: min(step(batch) for batch in batches) for name, step in order})
    del rounds[0]
    ms = {name: 1000 * min(r[name] for r in rounds) for name in ways}
    median = statistics.median(r["lightly"] / r["ours"] for r in rounds)
    print(ms, "median ratio", median)
    what = "time of a Suave step with lightly's SwAV loss and heads over ours"
    details = {"ms_per_step": ms, "median_ratio": median, "threads": args.threads, "lightly": version("lightly")}
    ratio = ms["lightly"] / ms["ours"]
    write_bench(args.out, comparison("suave_step", what, ratio, "", ">=", 1.0, details))


if __name__ == "__main__":
    main()
