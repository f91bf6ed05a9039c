"""Model FLOPs utilisation of a training step of AIMv2-L, as `aimv2/pretrain_large` has it, on one GPU.

    python benchmarks/aimv2_mfu.py [--batch 64] [--rounds 20] [--compile]
    python benchmarks/aimv2_mfu.py --config aimv2/gpu --batch 8 --rounds 2 --device cpu    # no MFU, a check

The operations of a step follow from the shapes (`zoo/methods/aimv2/flops.py`); the peak of the GPU is that of its data
sheet, for dense bfloat16. A device whose peak is not known gets no MFU and no file. Batches are random numbers with
captions of the full context: loading data is left out. Weights are float32 under autocast, as in the config.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from aimv2_step import FACTS, make_batch, make_step, seconds

from zoo.bench.report import comparison, peak_flops, write_bench
from zoo.config import load_layers
from zoo.methods.aimv2.flops import step_flops
from zoo.methods.aimv2.module import AIMv2


def main(words: list[str] | None = None) -> None:
    """Measure, print and, where the peak of the device is known, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(FACTS), default="aimv2/pretrain_large")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20, help="steps that are timed; the median counts")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them")
    parser.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/bench/aimv2_mfu_gpu.json"))
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: no GPU here; accepted: cpu, for a check without MFU")
    facts = FACTS[args.config]
    options: dict[str, Any] = {**load_layers([args.config], []).merged["model"]["init_args"], **facts}
    model = AIMv2(**options).to(args.device)
    assert model.decoder is not None
    batch = make_batch(facts, args.batch, args.device)
    flops = step_flops(model.trunk, model.decoder, args.batch, batch["text"].shape[1])
    if args.compile:
        model.trunk.compile()
        model.decoder.compile()
    step = make_step(model, batch, args.device)
    for _ in range(args.warmup):
        step()
    median = statistics.median(seconds(step, args.device) for _ in range(args.rounds))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    peak = peak_flops(name, "bf16-mixed") if args.device == "cuda" else None
    details: dict[str, Any] = {
        "config": args.config,
        "batch": args.batch,
        "compiled": args.compile,
        "device": name,
        "ms_per_step": 1000 * median,
        "images_per_second": args.batch / median,
        "tflop_per_step": flops / 1e12,
        "tflop_per_second": flops / median / 1e12,
    }
    if args.device == "cuda":
        details["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(details, indent=1))
    if peak is None:
        print(f"no MFU: the peak of this device ({name}) is not known")
        return
    value = flops / median / peak
    print(f"MFU: {value:.1%} of {peak / 1e12:g} TFLOP/s")
    what = "model FLOPs utilisation of a training step of AIMv2-L, one GPU, bfloat16"
    write_bench(args.out, comparison("aimv2_mfu", what, value, "", ">=", 0.4, details))


if __name__ == "__main__":
    main()
