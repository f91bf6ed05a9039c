"""write a run's networks as safetensors for timm and transformers"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.errors import UsageError

DESCRIPTION = """\
Write the networks of a trained run as safetensors. A part that is a model of timm or transformers is written as that
library stores it and loads there by one line, which is printed; the rest is stored under the method's own names.
What was written is read back and compared before the command says that it is done.
"""


def main(argv: list[str]) -> int:
    """Export the newest readable checkpoint of a run, or one checkpoint file."""
    parser = argparse.ArgumentParser(prog="zoo export", description=DESCRIPTION)
    parser.add_argument("run", type=Path, help="directory of a run, or a checkpoint file")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write (default: RUN/export)")
    args = parser.parse_args(argv)
    if not args.run.exists():
        raise UsageError(f"{args.run}: there is no such run or checkpoint")
    target = args.to or (args.run if args.run.is_dir() else args.run.parent) / "export"
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty", "choose another folder with --to DIR")

    from zoo.cli import newest_readable, read_checkpoint
    from zoo.export import export, load_trained

    checkpoint = newest_readable(args.run) if args.run.is_dir() else args.run
    if checkpoint is None:
        raise UsageError(f"{args.run} has no checkpoint", "fit it first")
    written = export(load_trained(read_checkpoint(checkpoint)), target)
    for folder, how in written.items():
        print(f"{folder}\n    {how}")
    return 0
