"""A forward pass of the AIMv2 encoder against transformers' `Aimv2VisionModel` with the same weights.

    python benchmarks/aimv2_encoder.py [--width 384] [--depth 6] [--batch 4] [--rounds 15] [--threads 1] [--device cpu]

Images of 224 pixels, 256 patches, no mask, no gradients; the features are compared before anything is timed. Both take
turns; the fastest pass of each counts, as what makes a pass slower comes from outside. On a processor it is the
processor's time that counts, not the clock on the wall. On a GPU both run in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from zoo.bench.report import comparison, write_bench
from zoo.methods.aimv2.encoder import build_trunk
from zoo.methods.aimv2.weights import trunk_to_transformers, vision_config


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15, help="passes of each; both take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = {"width": args.width, "depth": args.depth, "heads": args.width // 128}
    trunk = build_trunk(size, 224, 3).eval()
    theirs = Aimv2VisionModel(Aimv2VisionConfig(**vision_config(trunk))).eval()
    theirs.load_state_dict(trunk_to_transformers(trunk))
    images = torch.randn(args.batch, 3, 224, 224)
    kind = torch.bfloat16 if args.device == "cuda" else torch.float32
    trunk.to(args.device, kind)
    theirs.to(args.device, kind)
    images = images.to(args.device, kind)
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    passes: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: trunk(images),
        "transformers": lambda: theirs(images).last_hidden_state,
    }

    def synchronise() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        ours, other = (forward() for forward in passes.values())
        error = float((ours - other).abs().max())
        if error > (0.2 if args.device == "cuda" else 1e-3):
            raise SystemExit(f"the features differ by {error}")
        for _ in range(args.rounds):
            for name, forward in passes.items():
                synchronise()
                started = clock()
                forward()
                synchronise()
                times[name].append(clock() - started)
    best = {name: min(values) for name, values in times.items()}
    details: dict[str, Any] = {
        **size,
        "batch": args.batch,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "transformers": version("transformers"),
        "ms_per_pass": {name: 1000 * value for name, value in best.items()},
        "largest_difference": error,
    }
    print(json.dumps(details, indent=1))
    name = "aimv2_encoder" if args.device == "cpu" else "aimv2_encoder_gpu"
    what = "time of a forward pass of transformers' Aimv2VisionModel over ours, same weights"
    content = comparison(name, what, best["transformers"] / best["ours"], "", ">=", 1.0, details)
    write_bench(args.out or Path(f"results/bench/{name}.json"), content)


if __name__ == "__main__":
    main()
