"""The front of the command line: decides what runs, before anything heavy is imported."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence

from zoo import __version__
from zoo.errors import UsageError, did_you_mean

#: The commands that LightningCLI answers.
TRAINER_COMMANDS = {
    "fit": "train a method",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "run a method on data",
}

USAGE = """\
usage: zoo COMMAND [options]        (python train.py COMMAND is the same)

  zoo fit --config suave/fashion_mnist          train a shipped config
  zoo fit --config my.yaml --model.lr 0.1       a file, with one option changed
  zoo fit --resume runs/suave/.../              go on with a run that was stopped
  zoo list                                      methods, data, callbacks, configs
"""


def own_commands() -> dict[str, str]:
    """Names of our commands and their one-line descriptions, read without importing them."""
    import ast
    from pathlib import Path

    import zoo.commands

    out = {}
    for module in pkgutil.iter_modules(zoo.commands.__path__):
        if module.name.startswith("_"):
            continue
        source = Path(zoo.commands.__path__[0], f"{module.name}.py").read_text(encoding="utf-8")
        doc = ast.get_docstring(ast.parse(source)) or ""
        out[module.name] = doc.split("\n", 1)[0].rstrip(".")
    return out


def plugin_commands() -> dict[str, str]:
    """Names of the commands that plugins add, and who adds them; `dist:name` where the name alone is taken."""
    from zoo import registry

    usable = [entry for entry in registry.entries("commands") if not entry.problem]
    names = [entry.name for entry in usable]
    taken = {*TRAINER_COMMANDS, *own_commands(), *(name for name in names if names.count(name) > 1)}
    return {
        f"{entry.dist}:{entry.name}" if entry.name in taken else entry.name: f"from {entry.dist}" for entry in usable
    }


def help_text() -> str:
    """Return the text of `zoo --help`."""
    commands = {**TRAINER_COMMANDS, **own_commands()}
    lines = [USAGE, "commands:", *(f"  {name:<11} {text}" for name, text in commands.items())]
    plugins = plugin_commands()
    if plugins:
        lines += ["", "commands of plugins:", *(f"  {name:<11} {text}" for name, text in plugins.items())]
    lines += ["", "zoo COMMAND --help explains one command; zoo info NAME explains a method; --debug shows tracebacks."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the run failed, 2 misuse, 130 and 143 stopped by a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        return dispatch(argv)
    except UsageError as error:
        print_error(error)
        if debug:
            print(error.detail, file=sys.stderr)
            traceback.print_exc()
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output went away, e.g. `zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def print_error(error: UsageError) -> None:
    """Print an error in at most five lines."""
    lines = [*f"error: {error.message}".splitlines()[:3], *error.hint.splitlines()[:1]]
    print("\n".join(lines[:4]), file=sys.stderr)


def dispatch(argv: list[str]) -> int:
    """Find the command and call it."""
    from zoo import registry

    registry.claim_packages()
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"method-zoo {__version__}")
        return 0
    command, rest = argv[0], argv[1:]
    if command.startswith("-"):
        names = [arg for arg in argv if arg in TRAINER_COMMANDS]
        hint = f"the command comes first: zoo {names[0]} {command} ..." if names else "zoo --help lists the commands"
        raise UsageError(f"{command} stands before the command", hint)
    if command in TRAINER_COMMANDS:
        from zoo.options import parse_options

        options = parse_options(command, rest)
        from zoo.cli import run_command

        return run_command(options).exit_code
    if command in own_commands():
        return int(importlib.import_module(f"zoo.commands.{command}").main(rest) or 0)
    plugins = plugin_commands()
    if command in plugins or any(entry.name == command.rpartition(":")[2] for entry in registry.entries("commands")):
        return run_plugin_command(command, rest)
    known = [*TRAINER_COMMANDS, *own_commands(), *plugins]
    raise UsageError(f"unknown command {command!r}", did_you_mean(command, known, show=30))


def run_plugin_command(command: str, words: list[str]) -> int:
    """Call the command of a plugin.

    Raises:
        UsageError: If it cannot be imported, or has no `main(argv)`.
    """
    from zoo import registry

    entry = registry.find("commands", command)
    call = getattr(registry.load(entry), "main", None)
    if not callable(call):
        raise UsageError(
            f"command {command!r} of {entry.dist} {entry.version}: {entry.value} has no function main(argv)",
            f"reported by {entry.dist}",
        )
    return int(call(words) or 0)


if __name__ == "__main__":
    sys.exit(main())
