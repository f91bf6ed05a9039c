"""versions, devices, W&B, plugins and data sets of this machine"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

from zoo import registry, runs
from zoo.errors import UsageError


def main(argv: list[str]) -> int:
    """Print the state of the installation; exit code 1 if a plugin cannot be used."""
    parser = argparse.ArgumentParser(prog="zoo doctor", description="What is installed, found and broken.")
    parser.add_argument(
        "--import-plugins", action="store_true", help="import every plugin, not only look for its files"
    )
    args = parser.parse_args(argv)
    print("versions  " + "  ".join(f"{name} {version}" for name, version in runs.versions().items()))
    print(f"devices   {devices()}")
    print(f"W&B       {wandb_state()}")
    broken = plugin_problems(args.import_plugins)
    print(f"plugins   {len(registry.entries())} entries, {len(broken)} not usable")
    for line in broken:
        print(f"          {line}")
    print("data      " + "\n          ".join(data_sets()))
    for name in ("callbacks", "datamodules"):
        collision = foreign_package(name)
        if collision:
            print(f"warning   {collision}")
    return 1 if broken else 0


def devices() -> str:
    """Describe processor and accelerators."""
    found = runs.hardware()
    gpus = ", ".join(found["gpus"]) or "no GPU"
    return f"{found['cpu']}, {found['cores']} cores, {found['threads']} torch threads; {gpus}"


def wandb_state() -> str:
    """Say which mode a run would use, and whether an account is configured."""
    mode = os.environ.get("WANDB_MODE", "offline")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    account = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))
    return f"mode {mode}; " + ("an account is configured" if account else "no account (not needed offline)")


def plugin_problems(import_them: bool) -> list[str]:
    """Return one line for each entry that cannot be used."""
    from zoo.commands.list import mark_clashes, missing_module

    lines = []
    for entry in mark_clashes(registry.entries()):
        problem = entry.problem or missing_module(entry)
        if not problem and import_them and entry.group not in ("configs",):
            try:
                registry.load(entry)
            except UsageError as error:
                problem = str(error).replace("\n", "; ")
        if problem:
            lines.append(f"{entry.group} {entry.name} of {entry.dist} {entry.version}: {problem}")
    return lines


def data_sets() -> list[str]:
    """Return one line for each data set that can be looked for without a download."""
    from datamodules import sources

    return [f"{name}: {where or 'not found'}" for name, where in sources.found().items()]


def foreign_package(name: str) -> str:
    """Say when `import callbacks` or `import datamodules` gives somebody else's package."""
    module = importlib.import_module(name)
    ours = Path(__file__).resolve().parents[2] / name
    where = Path(module.__file__).resolve().parent if module.__file__ else None
    if where == ours:
        return ""
    return f"`import {name}` finds {where}, not the zoo's {ours}: run from another folder or rename yours"
