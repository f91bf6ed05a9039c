"""evaluate a model on tasks of the lm-evaluation-harness, for each threshold or cache"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UsageError

if TYPE_CHECKING:
    from zoo.harness import HarnessLM

DESCRIPTION = """\
MODEL is a directory that `zoo moefy` wrote: its row for each threshold has the accuracy, the activity that was measured
meanwhile and the parameters in use; a last row has the full width. Or MODEL is a run of kv_prediction: one row with the
predicted cache, one with the base's own. Needs the extra: pip install 'method-zoo[lm-eval]'.
"""
THRESHOLDS = [0.45, 0.55, 0.65, 0.75, 0.83, 0.9, 0.96]


def main(argv: list[str]) -> int:
    """Evaluate, print a row for each threshold, and write the table."""
    parser = argparse.ArgumentParser(prog="zoo harness", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory of zoo moefy, or run of kv_prediction")
    parser.add_argument("--tasks", required=True, help="names of tasks, with commas between")
    parser.add_argument("--include", type=Path, help="folder with tasks of your own, as YAML files")
    parser.add_argument("--only-included", action="store_true", help="do not look the harness's own tasks up")
    shown = " ".join(map(str, THRESHOLDS))
    parser.add_argument("--thresholds", type=float, nargs="+", help=f"theta, or tau of a label head (default: {shown})")
    parser.add_argument("--tokenizer", help="of a moefied model, if not in its folder")
    parser.add_argument("--shots", type=int, help="examples in each prompt (default: what the task says)")
    parser.add_argument("--limit", type=int, help="most examples of each task, for a trial")
    parser.add_argument("--batch-size", type=int, default=8, help="texts that are scored at a time (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer, if the task says nothing")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--run-code", action="store_true", help="let tasks such as humaneval run what the model writes")
    parser.add_argument("--out", type=Path, help="table to write, .csv or .json")
    args = parser.parse_args(argv)
    for option in ("shots", "limit", "batch_size", "max_new_tokens"):
        value, least = getattr(args, option), 0 if option == "shots" else 1
        if value is not None and value < least:
            raise UsageError(f"--{option.replace('_', '-')} {value}", f"accepted: {least} or more")
    if args.out is not None and args.out.suffix not in (".csv", ".json"):
        raise UsageError(f"--out {args.out}", "accepted: a name that ends with .csv or .json")
    if args.include is not None and not args.include.is_dir():
        raise UsageError(f"--include {args.include} is no folder")
    try:
        rows = table(args)
    except (ImportError, ValueError) as error:
        raise UsageError(f"harness: {error}") from error
    show(rows)
    if args.out is not None:
        from zoo import runs
        from zoo.harness import write_table

        facts = {
            "model": str(args.model),
            "tasks": args.tasks.split(","),
            "shots": args.shots,
            "limit": args.limit,
            "versions": runs.versions() | harness_version(),
            "hardware": runs.hardware(),
        }
        write_table(args.out, rows, facts)
        print(f"written: {args.out}")
    return 0


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model; which kind it is follows from what lies in its directory."""
    from zoo.harness import evaluate
    from zoo.methods.dynamoe.export import SETTINGS

    def measure(lm: HarnessLM) -> dict[str, float]:
        tasks, shipped = args.tasks.split(","), not args.only_included
        return evaluate(lm, tasks, args.include, args.limit, args.shots, shipped, args.run_code)

    if (args.model / SETTINGS).is_file():
        from zoo.methods.dynamoe.zero_shot import load, theta_grid

        lm, head = load(args.model, args.tokenizer, args.device, args.batch_size, args.max_new_tokens)
        return theta_grid(lm, head, args.thresholds or THRESHOLDS, measure)
    for option in ("thresholds", "tokenizer"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option} is for a directory of zoo moefy", f"{args.model} has no {SETTINGS}")
    from zoo.commands.generate import load as load_run
    from zoo.methods.kv_prediction.export import Loaded
    from zoo.methods.kv_prediction.lm_eval_adapter import KVPredictionLM

    model, encoder = load_run(args.model)
    if model.predictor is None:
        raise UsageError(f"{args.model} trained one model alone", "accepted: a run with mode: predict")
    if encoder is None:
        raise UsageError(f"the data of {args.model} are no text", "accepted: a run whose data have a tokenizer")
    model.to(args.device)
    models = Loaded(model.base, *model.pair)
    make = partial(KVPredictionLM, models, encoder, args.max_new_tokens, batch_size=args.batch_size)
    return [{"cache": name, **measure(make(use_base=name == "base"))} for name in ("predicted", "base")]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table; errors are left to the file."""
    columns = [key for key in rows[0] if not key.endswith("_stderr")]
    cells = [[f"{v:.4g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def harness_version() -> dict[str, str]:
    """Version of the harness, by its name."""
    from importlib.metadata import version

    return {"lm-eval": version("lm-eval")}
