"""What `metrics.csv` costs a logged step: written anew at each of them, as Lightning asks for, and as it is done here.

    python benchmarks/metrics_file.py [--rows 300] [--rounds 3] [--out results/bench/metrics_file.json]

Both take turns and write the same rows of eight metrics; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from callbacks.loggers import RunCSVLogger
from zoo.bench.report import comparison, write_bench

METRICS = {f"train/loss_{i}": 1.0 / (i + 3) for i in range(8)}


def seconds(rows: int, every: int | None) -> float:
    """Return the time of `rows` logged steps and the end of the run."""
    with tempfile.TemporaryDirectory(prefix="metrics-file-") as folder:
        options = {} if every is None else {"flush_every_n_rows": every}
        logger = RunCSVLogger(folder, **options)
        started = time.perf_counter()
        for step in range(rows):
            logger.log_metrics(METRICS, step)
            logger.save()
        logger.finalize("success")
        return time.perf_counter() - started


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench/metrics_file.json"))
    args = parser.parse_args()
    rounds = [{"each": seconds(args.rows, 1), "ours": seconds(args.rows, None)} for _ in range(args.rounds)]
    best = {name: min(r[name] for r in rounds) for name in ("each", "ours")}
    per_row = {name: 1000 * value / args.rows for name, value in best.items()}
    print(per_row)
    what = f"time of metrics.csv in a run of {args.rows} logged steps, written at each of them, over ours"
    details = {"ms_per_logged_step": per_row, "rounds": rounds}
    write_bench(args.out, comparison("metrics_file", what, best["each"] / best["ours"], "", ">=", 10, details))


if __name__ == "__main__":
    main()
