"""one method in a page: paper, options, configs, measured claims"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from zoo import registry
from zoo.claims.results import number
from zoo.cli import CHECKPOINT_CALLBACK, DEFAULT_LOGGERS
from zoo.config import shipped_configs
from zoo.explain import option_table, options_of


def main(argv: list[str]) -> int:
    """Print what is known about a registered name, without importing it."""
    parser = argparse.ArgumentParser(prog="zoo info", description="What a method, datamodule or callback is and takes.")
    parser.add_argument("name", help="a name from `zoo list`")
    args = parser.parse_args(argv)
    entry = lookup(args.name)
    doc, options = options_of(entry)
    card = registry.read_card(entry)
    print(f"{entry.name}  ({entry.group}, {entry.dist} {entry.version})")
    if card:
        paper = f"{card.get('title', '')}" + (f", arXiv {card['arxiv']}" if card.get("arxiv") else "")
        print(f"paper    {paper}, {card.get('year', '')}".rstrip(", "))
        print(f"summary  {card.get('summary', '')}")
        for key in ("kind", "batch", "extra"):
            if card.get(key):
                print(f"{key:<8} {card[key]}")
    print(f"class    {entry.class_path}")
    if doc:
        print(f"\n{doc}")
    configs = [name for name in sorted(shipped_configs()) if name.startswith(f"{entry.name}/")]
    if configs:
        print("\nconfigs  " + "\n         ".join(configs))
    print_claims(entry.name)
    if options:
        print(f"\noptions ({given_as(entry)}):")
        print(option_table(options), end="")
    else:
        print("\nno options")
    return 0


def lookup(name: str) -> registry.Entry:
    """Return the entry of a name in the first group that has it; methods come first."""
    for group in ("methods", "datamodules", "callbacks", "loggers"):
        if any(e.name == name.rpartition(":")[2] for e in registry.entries(group)):
            return registry.find(group, name)
    return registry.find("methods", name)


def given_as(entry: registry.Entry) -> str:
    """How an option of a registered class is written on the command line or in a config."""
    if entry.builtin and entry.name == CHECKPOINT_CALLBACK:
        return "--checkpoint.NAME VALUE"
    item = f"{{class_path: {entry.name}, init_args: {{NAME: VALUE}}}}"
    return {
        "methods": "--model.NAME VALUE",
        "datamodules": "--data.NAME VALUE",
        "callbacks": f"--trainer.callbacks+='{item}'",
        # the list of a config replaces that of the defaults
        "loggers": f"--trainer.logger='[{', '.join([*(n for n in DEFAULT_LOGGERS if n != entry.name), item])}]'",
    }[entry.group]


def print_claims(name: str) -> None:
    """Print the measured claims of a method, where the results are at hand."""
    for path in sorted((Path(__file__).parents[2] / "results").glob(f"{name}.*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if not result["claims"]:
            continue
        print(f"\nclaims   ({result['scale']} scale, {len(result['seeds'])} seeds)")
        for claim in result["claims"]:
            outcome = {True: "holds", False: "FAILS", None: "open"}[claim["holds"]]
            print(
                f"  {claim['id']:<36} {number(claim['value'], signed=True)} (margin {claim['margin']:+.4f})  {outcome}"
            )
