"""measure how fast a method trains, beside a plain PyTorch loop"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.config import load_layers, shipped_configs
from zoo.errors import UsageError, did_you_mean
from zoo.options import parse_options

DESCRIPTION = """\
Train a config for a moment, with everything that `zoo fit` does except validation and checkpoints, and interrupt it for
blocks of a plain PyTorch loop over a copy of its module and the same data. Prints and writes throughput, step times,
waiting for data, what the Trainer costs, and memory. Further options change the config, as for `zoo fit`.
`zoo bench NAME --grid GRID` and `--plan PLAN` are for methods that measure grids of configurations (slm_bottlenecks);
`zoo bench slm_bottlenecks --grid --help` explains them.
"""


def main(argv: list[str]) -> int:
    """Measure one config and write `NAME.json` (`NAME.gpu.json` on a GPU) into the results folder."""
    if any(word.partition("=")[0] in ("--grid", "--plan") for word in argv):
        return grid_command(argv)
    parser = argparse.ArgumentParser(prog="zoo bench", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("name", help="a method")
    parser.add_argument(
        "--config", action="append", metavar="C", help="config, may be repeated (default: that of its first claim)"
    )
    parser.add_argument("--vs", choices=["raw", "none"], default="raw", help="what to compare with (default: raw)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="steps of each that count (default: 120)")
    parser.add_argument("--blocks", type=int, default=6, metavar="N", help="blocks they are divided in (default: 6)")
    parser.add_argument(
        "--results", type=Path, default=Path("results/bench"), metavar="DIR", help="default: results/bench"
    )
    args, rest = parser.parse_known_args(argv)
    for option in ("steps", "blocks"):
        if getattr(args, option) < 1:
            raise UsageError(f"--{option} {getattr(args, option)}: at least 1")
    if args.blocks > args.steps:
        raise UsageError(f"--blocks {args.blocks}: more than the {args.steps} steps")
    content = measure(
        args.name, args.config or [default_config(args.name)], rest, args.steps, args.blocks, args.vs == "raw"
    )
    from zoo.bench.report import show, write_bench

    show(content)
    path = args.results / f"{args.name}{'.gpu' if content['device'] == 'cuda' else ''}.json"
    write_bench(path, content)
    print(f"written: {path}")
    return 0


def grid_command(argv: list[str]) -> int:
    """Let the method measure a grid of configurations itself: its module `bench`, which lies beside `module`.

    Raises:
        UsageError: If no method is named, or it has no grids.
    """
    names = [word for word in argv if not word.startswith("-")]
    if not names or argv[0] != names[0]:
        raise UsageError("bench: the method comes first", "zoo bench slm_bottlenecks --grid GRID.yaml")
    entry = registry.find("methods", names[0])
    module = f"{entry.value.partition(':')[0].rpartition('.')[0]}.bench"
    if registry.source_path(module) is None:
        raise UsageError(f"bench: {names[0]!r} has no grids", "zoo bench NAME measures one config; zoo bench --help")
    return int(importlib.import_module(module).main(argv[1:]) or 0)


def default_config(name: str) -> str:
    """Return the GPU config of a method on a machine with one, else the config of the first fit for its claims.

    Raises:
        UsageError: If the method ships no config.
    """
    import torch

    from zoo.claims.reader import claims_files, load_plan

    shipped = shipped_configs()
    if torch.cuda.is_available() and f"{name}/gpu" in shipped:
        return f"{name}/gpu"
    if name in claims_files():
        runs = load_plan(claims_files()[name][0]).runs.values()
        return next((run for run in runs if "fit" in run.commands), next(iter(runs))).configs[0]
    if f"{name}/smoke" not in shipped:
        names = {key.partition("/")[0] for key in shipped}
        raise UsageError(f"{name!r} has no configs", did_you_mean(name, names))
    return f"{name}/smoke"


def measure(
    name: str, configs: list[str], rest: list[str], steps: int, blocks: int, raw: bool, warmup: int = 10
) -> dict[str, Any]:
    """Train a config and return what was measured.

    Args:
        name: The method; it stands in the results.
        configs: Config files or names.
        rest: Further words of the command line, which change the config.
        steps: Steps that count, of the fit and of the raw loop.
        blocks: Blocks of the raw loop.
        raw: Whether to compare with a raw loop.
        warmup: Steps before.

    Raises:
        UsageError: If the config is wrong, the run ends too soon, or the raw loop cannot do its work.
    """
    options = parse_options("fit", rest)
    given = load_layers(configs, options.overrides).merged
    needed = warmup + (blocks + 1) * (1 + -(-steps // blocks))
    planned = given.get("trainer", {}).get("max_steps") or -1
    bench = {"steps": steps, "blocks": blocks, "warmup": warmup, "raw": raw}
    overrides: dict[str, Any] = {
        "trainer.callbacks+": [{"class_path": "zoo.bench.measure.Bench", "init_args": bench}],
        "trainer.limit_val_batches": 0,
        "checkpoint.every_n_steps": 0,
        "checkpoint.every_n_epochs": 0,
    }
    if planned < 2 * needed:  # schedules need an end, which the measurement must not reach
        overrides |= {"trainer.max_steps": 100 * needed, "trainer.max_epochs": -1}
    import torch

    from zoo import runs
    from zoo.api import words
    from zoo.bench.measure import Bench
    from zoo.bench.report import summarise
    from zoo.cli import run_command

    with tempfile.TemporaryDirectory(prefix="zoo-bench-") as folder:
        argv = [*words(configs, {}, {"run_dir": os.path.join(folder, "run")}), *rest, *words((), overrides, {})]
        result = run_command(parse_options("fit", argv))
    callback = next(c for c in result.trainer.callbacks if isinstance(c, Bench))
    if not callback.done:
        raise UsageError(
            f"{name}: the run ended after {result.trainer.global_step} steps, {needed} batches were needed",
            "--steps and --blocks ask for less",
        )
    hardware = runs.hardware()
    trainer = result.trainer
    return {
        "method": name,
        "config": " + ".join(configs),
        "options": rest,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "compiled": hasattr(trainer.lightning_module, "_compiler_ctx"),
        "callbacks": [type(c).__name__ for c in trainer.callbacks if c is not callback],
        "wandb": os.environ.get("WANDB_MODE", "offline"),
        "threads": torch.get_num_threads(),
        **summarise(callback, str(trainer.precision), hardware),
        "hardware": hardware,
        "versions": runs.versions(),
        "commit": runs.commit(),
    }
