"""What `zoo fit --help` takes longer than importing LightningCLI, which it cannot do without.

    python benchmarks/fit_help.py [--rounds 5] [--out results/bench/fit_help.json]

Both take turns; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from zoo.bench.report import comparison, write_bench

BOTH = {"import": ["-c", "import lightning.pytorch.cli"], "fit_help": ["-m", "zoo", "fit", "--help"]}


def seconds(argv: list[str]) -> float:
    """Return how long a new process takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/bench/fit_help.json"))
    args = parser.parse_args()
    rounds = [{name: seconds(argv) for name, argv in BOTH.items()} for _ in range(args.rounds)]
    best = {name: min(r[name] for r in rounds) for name in BOTH}
    print(best)
    more = best["fit_help"] - best["import"]
    what = "`zoo fit --help` beyond `import lightning.pytorch.cli`"
    details = {"seconds": best, "rounds": rounds}
    write_bench(args.out, comparison("fit_help", what, more, "s", "<=", 0.7, details))


if __name__ == "__main__":
    main()
