"""what is registered: methods, datamodules, callbacks, loggers, configs, commands"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import textwrap
from collections import Counter

from zoo import registry
from zoo.config import shipped_configs
from zoo.explain import description_of


def main(argv: list[str]) -> int:
    """Print the registry as a table, or as JSON with `--json`."""
    parser = argparse.ArgumentParser(
        prog="zoo list", description="What is registered, and what cannot be used and why."
    )
    parser.add_argument("group", nargs="?", choices=[*registry.GROUPS], help="only this group")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parser.parse_args(argv)
    rows = [row(entry) for entry in mark_clashes(registry.entries(args.group)) if entry.group != "configs"]
    configs = sorted(shipped_configs()) if args.group in (None, "configs") else []
    if args.json:
        print(json.dumps({"entries": rows, "configs": configs}, indent=1))
        return 0
    folders: dict[str, list[str]] = {}
    for name in configs:
        folder, _, rest = name.rpartition("/")
        folders.setdefault(folder, []).append(rest)
    width = max(map(len, [*(r["name"] for r in rows), *(f"{folder}/" for folder in folders)]), default=0) + 1
    for group in registry.GROUPS:
        members = [r for r in rows if r["group"] == group]
        if members:
            print(f"{group}:")
        for r in members:
            source = "" if r["dist"] == registry.OWN_DISTRIBUTION else f"  [{r['dist']} {r['version']}]"
            problem = f"  NOT USABLE: {r['problem']}" if r["problem"] else ""
            print(f"  {r['name']:<{width}} {r['summary']}{source}{problem}".rstrip())
    if folders:
        print("configs (--config NAME/CONFIG):")
    for folder, names in folders.items():
        line = f"{folder + '/':<{width}} {' '.join(names)}"
        print(textwrap.fill(line, 120, initial_indent="  ", subsequent_indent=" " * (width + 3)))
    return 0


def mark_clashes(entries: list[registry.Entry]) -> list[registry.Entry]:
    """Say of names that several distributions register, or that are commands of ours, how to choose one."""
    from dataclasses import replace

    from zoo.main import TRAINER_COMMANDS, own_commands

    counts = Counter((e.group, e.name) for e in entries if not e.problem and e.group != "configs")
    ours = {*TRAINER_COMMANDS, *own_commands()} if any(e.group == "commands" for e in entries) else set()

    def problem(e: registry.Entry) -> str:
        if e.problem:
            return e.problem
        if e.group == "commands" and e.name in ours:
            return f"the zoo has a command of this name; write {e.dist}:{e.name}"
        if counts[e.group, e.name] > 1:
            return f"several distributions register it; write {e.dist}:{e.name}"
        return ""

    return [replace(e, problem=problem(e)) for e in entries]


def row(entry: registry.Entry) -> dict[str, str]:
    """Return one line of the table; what can be seen without an import is seen."""
    card = registry.read_card(entry) if entry.group == "methods" and not entry.problem else {}
    problem = entry.problem or missing_module(entry)
    summary = str(card.get("summary", ""))
    if card.get("arxiv"):
        summary += f" (arXiv {card['arxiv']})"
    if not summary and not problem:
        # the first sentence of the docstring
        summary = re.split(r"[.;](?:\s|$)", description_of(entry).replace("\n", " "), maxsplit=1)[0]
    return {
        "group": entry.group, "name": entry.name, "summary": summary, "class": entry.class_path,
        "dist": entry.dist, "version": entry.version, "problem": problem,
    }  # fmt: skip


def missing_module(entry: registry.Entry) -> str:
    """Say when the module that an entry names is not there."""
    module = entry.value.partition(":")[0]
    if registry.source_path(module) is not None:
        return ""
    try:
        top = importlib.util.find_spec(module.split(".")[0])
    except (ImportError, ValueError):
        top = None
    # a compiled or zipped module has no source file to look at
    if top is not None and "." not in module and top.origin:
        return ""
    return f"module {module} is not there; pip install --force-reinstall {entry.dist}"
