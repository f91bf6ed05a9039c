"""Peak memory of `zoo soup` for two checkpoints, against the size of one of them.

The members are files of random weights in the shapes of a Llama of the size asked for. The command runs in a process of
its own, whose peak resident memory is measured, less that of the same process before it reads anything.

    python benchmarks/salsa_soup.py [--parameters 1.0] [--folder DIR] [--out results/bench/salsa_soup.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from zoo.bench.report import comparison, write_bench
from zoo.methods.salsa.soup import CHUNK, write_safetensors

#: Run in the child: the command with everything imported first, then the peak above that.
CHILD = """
import resource, sys, json, torch, safetensors
from zoo.methods.salsa import networks, soup
from zoo.commands.soup import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
main(sys.argv[1:])
print(json.dumps({"before": before, "peak": peak()}))
"""


def shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """Shapes of a Llama of about so many billion parameters, of width 2048."""
    width, inner, vocab = 2048, 5632, 32000
    layer = 4 * width * width + 3 * width * inner
    layers = max(round((parameters * 1e9 - 2 * vocab * width) / layer), 1)
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for n in range(layers):
        out |= {f"model.layers.{n}.self_attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        out |= {f"model.layers.{n}.mlp.{p}_proj.weight": (inner, width) for p in ("gate", "up")}
        out[f"model.layers.{n}.mlp.down_proj.weight"] = (width, inner)
    return out


def write_member(path: Path, parts: dict[str, tuple[int, ...]], seed: int) -> None:
    """Write random weights a piece at a time."""
    generator = torch.Generator().manual_seed(seed)

    def pieces() -> Iterator[Tensor]:
        for shape in parts.values():
            size = shape[0] * shape[1]
            for start in range(0, size, CHUNK):
                yield torch.rand(min(CHUNK, size - start), generator=generator).bfloat16()

    write_safetensors(path, parts, dict.fromkeys(parts, torch.bfloat16), pieces())


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=1.0, help="billions")
    parser.add_argument("--folder", type=Path, help="where there is room for three checkpoints; default: temporary")
    parser.add_argument("--out", type=Path, default=Path("results/bench/salsa_soup.json"))
    args = parser.parse_args()
    parts = shapes(args.parameters)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        members = [folder / f"{n}.safetensors" for n in (1, 2)]
        for seed, member in enumerate(members):
            write_member(member, parts, seed)
        size = members[0].stat().st_size
        started = time.perf_counter()
        command = [sys.executable, "-c", CHILD, *map(str, members), "--out", str(folder / "soup")]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds = time.perf_counter() - started
    found = json.loads(printed.splitlines()[-1])
    above = found["peak"] - found["before"]
    details = {
        "parameters": sum(a * b for a, b in parts.values()),
        "dtype": "bfloat16",
        "checkpoint_bytes": size,
        "peak_bytes": found["peak"],
        "peak_above_imports_bytes": above,
        "seconds": seconds,
        "page_bytes": resource.getpagesize(),
    }
    print(json.dumps(details, indent=1))
    what = "peak memory of the soup of two checkpoints over the size of one, above what imports take"
    write_bench(args.out, comparison("salsa_soup", what, above / size, "", "<=", 1.3, details))


if __name__ == "__main__":
    main()
