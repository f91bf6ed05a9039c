"""Quality against the cost of the first token, in operations and in time, for all ways to it.

Quality comes from the measured claims, means over seeds. Times are measured here, all ways in turn in one run, on
models of the same sizes and prompts of the same length; they do not depend on what was learned. A way is *beaten* if
another one needs no more operations and is at least as good.

    python benchmarks/kv_prediction_pareto.py [--tasks text facts] [--rounds 7] [--threads 1]

It writes `results/kv_prediction.pareto_<task>.png` and `results/bench/kv_prediction_pareto_<task>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kv_prediction_ttft import fastest

from zoo.bench.report import comparison, write_bench
from zoo.config import load_layers
from zoo.methods.kv_prediction.evaluation import all_arms, base_arm, predicted_arm
from zoo.methods.kv_prediction.figures import LABELS, pareto_figure, quality_of
from zoo.methods.kv_prediction.losses import canonical_map, pruned_map
from zoo.methods.kv_prediction.models import build_model, keep_layers
from zoo.methods.kv_prediction.networks import CausalLM, KVPredictor

Points = dict[str, dict[str, float]]


class Task(NamedTuple):
    """Where the numbers of a task come from, and what its prompts are.

    Args:
        scale: Of the claims.
        run: The method's run; its test measured all other ways too.
        alone: The auxiliary alone with as many more steps.
        others: Further runs by the name that their points get.
        configs: Of base, auxiliary and method.
        vocab_size: Tokens.
        prompts: Batch and length of the prompts of the test.
        claim: Ways that must not beat the method.
    """

    scale: str
    run: str
    alone: str
    others: dict[str, str]
    configs: tuple[str, str, str]
    vocab_size: int
    prompts: tuple[int, int]
    claim: tuple[str, ...]


PRUNING = ("random_prune", "static_prune", "lazyllm")
TASKS = {
    # Keeping the last tokens does well on text, see the page of the method: it is drawn, and named among what beats it.
    "text": Task(
        "cpu",
        "text_kvp",
        "text_aux_more",
        {"layers": "text_layers_kvp", "layers_alone": "text_layers_alone"},
        ("text_base", "text_aux", "text"),
        2048,
        (16, 192),
        ("auxiliary", *PRUNING),
    ),
    "facts": Task(
        "facts", "hop_kvp", "hop_aux_more", {}, ("hop_base", "hop_aux", "hop"), 158, (200, 8), ("truncate", *PRUNING)
    ),
}


def read_points(seeds: Mapping[str, Mapping[str, float]]) -> Points:
    """Return the means over seeds of the test metrics, by folder and name."""
    out: Points = {}
    for key in next(iter(seeds.values())):
        if key.startswith("test/"):
            folder, _, name = key.removeprefix("test/").rpartition("/")
            out.setdefault(folder, {})[name] = statistics.fmean(metrics[key] for metrics in seeds.values())
    return out


def measured_quality(task: Task, results: Path) -> Points:
    """Return the points of a task without times: `cost` and quality."""
    runs = json.loads((results / f"kv_prediction.{task.scale}.json").read_text(encoding="utf-8"))["runs"]
    points = {name: own for name, own in read_points(runs[task.run]).items() if "cost" in own}
    cost = points["auxiliary"]["cost"]
    points["auxiliary"] = read_points(runs[task.alone])[""] | {"cost": cost}
    for name, run in task.others.items():
        if run in runs:
            points[name] = dict(read_points(runs[run])[""])
    if "layers_alone" in points:
        points["layers_alone"]["cost"] = read_points(runs[task.others["layers"]])["auxiliary"]["cost"]
    return points


def part(config: str, key: str) -> Any:
    """Return an argument of the model of a config of the method."""
    return load_layers([f"kv_prediction/{config}"], []).merged["model"]["init_args"][key]


def time_to_first_token(task: Task, names: list[str], rounds: int, threads: int) -> dict[str, float]:
    """Return the milliseconds of each way on a batch of prompts, the fastest of some rounds."""
    base_config, auxiliary_config, method = task.configs
    base = build_model(part(base_config, "base"), "base", task.vocab_size).eval()
    auxiliary = build_model(part(auxiliary_config, "base"), "base", task.vocab_size).eval()
    batch, length = task.prompts

    def predictor(small: CausalLM, layer_map: list[int]) -> KVPredictor:
        return KVPredictor(small.shape, base.shape, layer_map)

    maps = predictor(auxiliary, canonical_map(auxiliary.shape.depth, base.shape.depth))
    arms = all_arms(base, auxiliary, maps, length, part(method, "retentions"))
    if "layers" in names:
        kept = part("text_pruned", "auxiliary")["layers"]
        layers = keep_layers(base, kept)
        arms["layers"] = predicted_arm(base, layers, predictor(layers, pruned_map(kept, base.shape.depth)), length)
        arms["layers_alone"] = base_arm(layers, length)
    prompt, rows = torch.randint(task.vocab_size, (batch, length)), torch.arange(batch)
    calls = {name: (lambda arm=arms[name]: arm.run(prompt, rows, 1).logits.argmax(-1)) for name in names}
    return fastest(calls, rounds, threads)


def beaten_by(points: Points, name: str = "") -> list[str]:
    """Return the ways that need no more operations and are at least as good."""
    metric, more = quality_of(points)
    own = points[name]
    return [
        other
        for other, values in points.items()
        if other != name
        and values["cost"] <= own["cost"]
        and (values[metric] >= own[metric] if more else values[metric] <= own[metric])
    ]


@torch.no_grad()
def main() -> None:
    """Measure, draw, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for name in args.tasks:
        task = TASKS[name]
        points = measured_quality(task, args.results)
        for way, milliseconds in time_to_first_token(task, list(points), args.rounds, args.threads).items():
            points[way]["ttft_ms"] = milliseconds
        path = args.results / f"kv_prediction.pareto_{name}.png"
        pareto_figure(points).savefig(path, dpi=120)
        better = beaten_by(points)
        counted = [way for way in better if way.startswith(task.claim)]
        metric, _ = quality_of(points)
        columns = ("cost", "ttft_ms", metric)
        details = {
            "beaten_by": better,
            "metric": metric,
            "ways": {LABELS.get(way, way): {key: own[key] for key in columns} for way, own in points.items()},
            "prompts": task.prompts,
            "threads": args.threads,
        }
        ways = ", ".join(way.replace("_", " ") for way in task.claim)
        what = f"{name}: ways among {ways} that need no more operations than KV prediction and are as good"
        content = comparison(f"kv_prediction_pareto_{name}", what, len(counted), "", "<=", 0, details)
        write_bench(args.results / "bench" / f"kv_prediction_pareto_{name}.json", content)
        print(path, json.dumps({"value": len(counted), "beaten_by": better}))


if __name__ == "__main__":
    main()
