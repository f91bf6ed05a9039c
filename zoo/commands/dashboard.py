"""W&B workspace, report or sweep of a method"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from zoo import registry
from zoo.errors import RunError, UsageError

DESCRIPTION = """\
Build the W&B workspace and report of a method: main metric beside the baselines, claims, figures, throughput, system.
They are written to a file; --publish saves them at W&B. --sweep writes a W&B sweep file of the method's search space.
"""


def main(argv: list[str]) -> int:
    """Write DIR/NAME.json, or DIR/NAME.sweep.yaml; publish if asked."""
    parser = argparse.ArgumentParser(prog="zoo dashboard", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("name", help="a method")
    parser.add_argument("--out", type=Path, default=Path("runs/dashboards"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--project", default="method-zoo", help="W&B project (default: method-zoo)")
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY", ""), help="W&B entity (WANDB_ENTITY)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--publish", action="store_true", help="save them at W&B, which needs an account")
    what.add_argument("--sweep", action="store_true", help="write a sweep file")
    parser.add_argument("--config", default="", metavar="C", help="config that a sweep starts from")
    args = parser.parse_args(argv)
    registry.find("methods", args.name)
    if args.config and not args.sweep:
        raise UsageError("--config goes with --sweep")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sweep:
        return write_sweep(args.name, args.config, args.project, args.entity, args.out)
    if args.publish:
        ask_for_account(args.entity)
    try:
        from zoo.dashboards import build
    except ImportError as error:
        raise UsageError("dashboards need the extra dashboards", "pip install 'method-zoo[dashboards]'") from error
    from zoo.dashboards.contents import contents_of

    contents = contents_of(args.name, args.results)
    path = args.out / f"{args.name}.json"
    text = json.dumps(build.to_json(contents, args.entity, args.project), indent=1, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"written: {path}")
    if args.publish:
        try:
            for what_is, address in build.publish(contents, args.entity, args.project).items():
                print(f"{what_is}: {address}")
        except Exception as error:  # the network, the account, or the service: whatever a request may raise
            raise RunError(f"not published: {str(error).splitlines()[0]}", f"{path} is complete") from error
    return 0


def ask_for_account(entity: str) -> None:
    """See whether something can be published before anything is built.

    Raises:
        UsageError: If there is no account.
    """
    import wandb

    if not wandb.api.api_key:
        raise UsageError("--publish: no W&B account is configured", "wandb login, or set WANDB_API_KEY")
    if not entity:
        raise UsageError("--publish: no entity", "--entity NAME or WANDB_ENTITY: the user or team that gets them")


def write_sweep(name: str, config: str, project: str, entity: str, out: Path) -> int:
    """Write the sweep file and say how to start it."""
    import yaml

    from zoo.config import resolve_config
    from zoo.dashboards.sweep import sweep_of

    if config:
        resolve_config(config)
    path = out / f"{name}.sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_of(name, config, project, entity), sort_keys=False), encoding="utf-8")
    print(f"written: {path}\nwandb sweep {path}   then on each machine: wandb agent <the id that it prints>")
    return 0
