"""How long `zoo list` and `zoo --help` take in a new process, and that they import nothing heavy.

    python benchmarks/startup.py [--rounds 7] [--out results/bench/startup.json]

The fastest of all rounds counts: everything that makes a round slower comes from outside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from zoo.bench.report import comparison, write_bench

COMMANDS = {"list": ["list"], "help": ["--help"]}
HEAVY = ("torch", "lightning", "numpy", "transformers", "wandb")
PROBE = "import sys; from zoo.main import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"


def seconds(argv: list[str]) -> float:
    """Return how long a new process takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def imported(words: list[str]) -> list[str]:
    """Return the heavy packages that a command imports."""
    run = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True)
    return sorted(set(HEAVY) & set(run.stderr.split()))


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("results/bench/startup.json"))
    args = parser.parse_args()
    best = dict.fromkeys(["python", *COMMANDS], float("inf"))
    for _ in range(args.rounds):
        best["python"] = min(best["python"], seconds(["-c", "pass"]))
        for name, words in COMMANDS.items():
            best[name] = min(best[name], seconds(["-m", "zoo", *words]))
    heavy = {name: imported(words) for name, words in COMMANDS.items()}
    slowest = max(best[name] for name in COMMANDS)
    details = {"seconds": best, "rounds": args.rounds, "heavy_imports": heavy}
    content = comparison("startup", "`zoo list` and `zoo --help`, the slower of them", slowest, "s", "<=", 0.3, details)
    content["holds"] = content["holds"] and not any(heavy.values())
    print(best, heavy)
    write_bench(args.out, content)


if __name__ == "__main__":
    main()
