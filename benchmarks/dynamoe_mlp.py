"""One MLP of DynaMoE: experts of half the width on average against the dense MLP, in one run.

Measured in turn on the same tokens and weights: the MLP as it is; the grouped forward pass at an activity of one half,
router included; the same widths by masks; router and grouping where every token takes the full width; the similarities
of all experts, of which the labels of training are made.

    python benchmarks/dynamoe_mlp.py [--width 512] [--hidden 2048] [--tokens 4096] [--rounds 15] [--threads 1]
                                     [--device cpu] [--dtype float32] [--out results/bench/dynamoe_mlp.json]
    python benchmarks/dynamoe_mlp.py --device cuda --width 2048 --hidden 8192 --tokens 16384 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from zoo.bench.report import comparison, write_bench
from zoo.methods.dynamoe.networks import NestedMLP, add_routers
from zoo.methods.dynamoe.routes import ByRouter, Control, Fixed, Route

EXPERTS = 4
#: Share of the tokens at each width: an activity of 0.5.
SHARES = (0.4, 0.3, 0.2, 0.1)


def build(args: argparse.Namespace) -> tuple[NestedMLP, Control]:
    """A nested Llama MLP with a router that says full width."""
    config = LlamaConfig(hidden_size=args.width, intermediate_size=args.hidden)
    control = Control(execution="grouped")
    mlp = NestedMLP(LlamaMLP(config), 0, EXPERTS, control).to(args.device, getattr(torch, args.dtype))
    add_routers([mlp], args.router_units, "score")
    return mlp.eval(), control


class RouterThen(Fixed):
    """Fixed widths, with the router computed and its choice made as at inference."""

    needs_router = True

    def widths(self, layer: int, prediction: Tensor | None, scores: Tensor | None) -> Tensor | None:
        """Make the router's choice, and take the fixed one."""
        ByRouter("score", 0.75).widths(layer, prediction, scores)
        return self.table[layer].long()


def ways(mlp: NestedMLP, control: Control, x: Tensor) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    bounds = [round(sum(SHARES[: e + 1]) * len(x)) for e in range(EXPERTS)]
    widths = torch.bucketize(order, torch.tensor(bounds[:-1]), right=True).to(x.device)[None]
    full = torch.full_like(widths, EXPERTS - 1)
    act = nn.functional.silu

    def dense() -> Tensor:
        return mlp.down(act(mlp.gate(x)) * mlp.up(x))  # type: ignore[misc]

    def routed(route: Route, execution: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with control.using(route, execution=execution):
                return mlp(x)

        return call

    return {
        "dense": dense,
        "grouped_half": routed(RouterThen(widths), "grouped"),
        "masked_half": routed(RouterThen(widths), "masked"),
        "grouped_full": routed(RouterThen(full), "grouped"),
        "labels": lambda: mlp.scores(mlp.hidden(x)),
    }


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--router-units", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="rounds; all ways take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/bench/dynamoe_mlp.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    mlp, control = build(args)
    x = torch.randn(args.tokens, args.width).to(args.device, getattr(torch, args.dtype))
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        calls = ways(mlp, control, x)
        for number in range(args.rounds + 2):
            for name, call in calls.items():
                if args.device != "cpu":
                    torch.cuda.synchronize()
                # on a shared processor its own time is the fair clock
                clock = time.process_time if args.device == "cpu" else time.perf_counter
                started = clock()
                call()
                if args.device != "cpu":
                    torch.cuda.synchronize()
                if number >= 2:
                    times.setdefault(name, []).append(1000 * (clock() - started))
    ms = {name: statistics.median(values) for name, values in times.items()}
    details = {
        "setting": {k: v for k, v in vars(args).items() if k not in ("out", "rounds")},
        "clock": "processor time" if args.device == "cpu" else "wall",
        "ms": ms,
        "ms_of_rounds": times,
        "masked_over_grouped": ms["masked_half"] / ms["grouped_half"],
        "full_width_overhead": ms["grouped_full"] / ms["dense"] - 1,
        "labels_over_dense": ms["labels"] / ms["dense"],
        "never_slower_than_masked": ms["grouped_half"] <= ms["masked_half"],
        "overhead_at_most_5_percent": ms["grouped_full"] <= 1.05 * ms["dense"],
    }
    what = (
        "time of a dense MLP over that of its nested experts at an activity of one half, router and grouping included"
    )
    print(json.dumps({k: v for k, v in details.items() if k != "ms_of_rounds"}, indent=1))
    write_bench(args.out, comparison("dynamoe_mlp", what, ms["dense"] / ms["grouped_half"], "", ">=", 1.3, details))


if __name__ == "__main__":
    main()
