"""Quality against the cost of the first token for all ways to it, from the measured claims; means over seeds.

    python benchmarks/kv_prediction_pareto.py [--results results/kv_prediction.cpu.json]

It writes `results/kv_prediction.pareto_text.png` and `..._hop.png`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from zoo.methods.kv_prediction.figures import pareto_figure

RUNS = {"text": "text_kvp", "hop": "hop_kvp"}


def points(seeds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the means over seeds of the test metrics, by folder and name."""
    out: dict[str, dict[str, float]] = {}
    for key in next(iter(seeds.values())):
        if key.startswith("test/"):
            folder, _, name = key.removeprefix("test/").rpartition("/")
            out.setdefault(folder, {})[name] = statistics.fmean(metrics[key] for metrics in seeds.values())
    return out


def main() -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/kv_prediction.cpu.json"))
    args = parser.parse_args()
    runs = json.loads(args.results.read_text(encoding="utf-8"))["runs"]
    for name, run in RUNS.items():
        path = args.results.with_name(f"kv_prediction.pareto_{name}.png")
        pareto_figure(points(runs[run])).savefig(path, dpi=120)
        print(path)


if __name__ == "__main__":
    main()
