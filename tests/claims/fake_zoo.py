"""Stands in for the zoo in tests: the same words, files and exit codes, no training.

`acc` + seed/100 is the accuracy; `steps` steps of 20 ms, one checkpoint each; `crash: true` ends with code 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(command: str, words: list[str]) -> int:
    options: dict[str, str] = {}
    while words:
        key, equals, value = words.pop(0)[2:].partition("=")
        options[key] = value if equals else words.pop(0)
    resumed = "resume" in options
    run_dir = Path(options.get("resume") or options["run_dir"])
    if resumed:
        options = json.loads((run_dir / "config.yaml").read_text())
    run_dir.mkdir(exist_ok=True)
    with open(os.environ["FAKE_CALLS"], "a") as log:
        log.write(f"{run_dir.parent.name}/{run_dir.name} {command}{' resumed' if resumed else ''}\n")
    if command == "fit" and not resumed:
        (run_dir / "config.yaml").write_text(json.dumps(options))
    if resumed and (run_dir / "damaged").exists():
        return 2
    if options.get("model.init_args.crash") == "true":
        print("this is why")
        return 1
    checkpoints = run_dir / "checkpoints"
    if command == "fit":
        checkpoints.mkdir(exist_ok=True)
        steps = int(options.get("model.init_args.steps", "1"))
        done = max((int(p.stem.partition("=")[2]) for p in checkpoints.glob("*.ckpt")), default=0)
        for step in range(done + 1, steps + 1):
            time.sleep(0.02)
            (checkpoints / f"step={step}.ckpt").write_text("x")
            print(f"step {step}/{steps}", flush=True)
            with open(run_dir / "executed", "a") as log:
                log.write(f"{step}\n")
        metrics = {"train/steps": float(steps)}
    else:
        acc = options.get("model.init_args.acc", "0")
        metrics = {f"{command}/acc": float(acc) + int(options["seed_everything"]) / 100}
        metrics |= {"test/seed": float(options["data.init_args.data_seed"])}
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {"metrics": {}, "stages": {}}
    summary["metrics"] |= metrics
    summary["stages"][command] = {"status": "finished", "seconds": 1.5}
    summary["options"] = options
    hardware = {"cpu": "Fake CPU", "cores": 2, "threads": int(os.environ["OMP_NUM_THREADS"]), "gpus": []}
    summary |= {"seconds": 1.5 * len(summary["stages"]), "versions": {"torch": "2"}, "commit": "abc"}
    path.write_text(json.dumps(summary | {"hardware": hardware}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
