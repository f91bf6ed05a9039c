"""From `zoo fit` to the end of its first step in a new process, and without what was done to make that short.

Without it, Python's collector runs during imports, and W&B imports its Launch at every start.

    python benchmarks/fit_start.py [--rounds 5] [--out results/bench/fit_start.json]

Both take turns; the fastest round of each counts, as everything that makes a round slower comes from outside.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zoo.bench.report import comparison, write_bench

CONFIG = "suave/smoke"
#: What a process does first. Without a pause, `gc.disable` does nothing.
BEFORE = {
    "ours": "",
    "before": "import gc; gc.disable = lambda: None; import callbacks.loggers as l;"
    " l.look_for_launch_inputs_where_there_are_any = lambda run: None; ",
}
RUN = "import sys; from zoo.main import main; sys.exit(main(sys.argv[1:]))"

if os.environ.get("FIT_START_MARK"):
    from lightning.pytorch import Callback

    class Mark(Callback):
        """Writes time and processor time at the end of the first batch."""

        def on_train_batch_end(self, *args: Any) -> None:
            Path(os.environ["FIT_START_MARK"]).write_text(f"{time.time()} {time.process_time()}")


def seconds(before: str) -> tuple[float, float]:
    """Return time and the processor time until the first step is over."""
    with tempfile.TemporaryDirectory(prefix="fit-start-") as folder:
        mark = Path(folder, "mark")
        words = ["fit", "--config", CONFIG, "--run_dir", f"{folder}/run", "--trainer.max_steps", "1"]
        words += ["--trainer.callbacks+=fit_start.Mark", "--trainer.limit_val_batches", "0"]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "FIT_START_MARK": str(mark), "PYTHONPATH": paths, "WANDB_MODE": "offline"}
        started = time.time()
        subprocess.run([sys.executable, "-c", before + RUN, *words], env=env, capture_output=True, check=True)
        ended, processor = map(float, mark.read_text().split())
    return ended - started, processor


def main() -> None:
    """Measure, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/bench/fit_start.json"))
    args = parser.parse_args()
    rounds = [{name: seconds(before) for name, before in BEFORE.items()} for _ in range(args.rounds)]
    wall, processor = ({name: min(r[name][i] for r in rounds) for name in BEFORE} for i in (0, 1))
    print(wall, processor)
    what = "time of `zoo fit` until its first step is over, with a running collector and W&B Launch, over ours"
    value = processor["before"] / processor["ours"]
    details = {"config": CONFIG, "seconds": wall, "processor_seconds": processor, "rounds": rounds}
    write_bench(args.out, comparison("fit_start", what, value, "", ">=", 1.1, details))


if __name__ == "__main__":
    main()
