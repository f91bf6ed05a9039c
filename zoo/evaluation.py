"""What `validate`, `test` and `predict` tell people: a note where nothing was trained, and one table of results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.checks import annotation_text, parameters
from zoo.output import short, table_console

#: What a command does, for a sentence.
DOING = {"validate": "validating", "test": "testing", "predict": "predicting with"}


def untrained_note(command: str, model: Any, options: Mapping[str, Any]) -> str:
    """Return the line that an evaluation without a checkpoint deserves, `""` where it is as it should be.

    Nothing is said of a module without parameters to train, and of options that bring weights or need none: a name
    where a mapping of sizes could stand (`lm: some/model`), `pretrained`, `reference.members`, and `study`, whose test
    measures the machine. `init_from` is read when a training starts: it does not count.

    Args:
        command: `validate`, `test` or `predict`.
        model: The module.
        options: The options that it was built with.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return ""
    nameable = [
        name
        for name, parameter in parameters(type(model)).items()
        if {"str", "dict"} <= set(re.findall(r"\w+", annotation_text(parameter)))
    ]
    named = any(isinstance(options.get(name), str) and options[name] for name in nameable)
    members = (options.get("reference") or {}).get("members") if isinstance(options.get("reference"), Mapping) else None
    if named or members or options.get("pretrained") or options.get("study"):
        return ""
    note = f"note: no checkpoint given: {DOING[command]} the weights a new network starts with"
    return f"{note}; init_from is what a fit starts from" if options.get("init_from") else note


def print_results(title: str, results: Iterable[Mapping[str, float]]) -> None:
    """Print the metrics of all loaders as one table on standard output; nothing where there are none.

    Args:
        title: What the table begins with.
        results: Metrics of each loader, as `Trainer.test` returns them.
    """
    metrics = {name: value for loader in results for name, value in loader.items()}
    if not metrics:
        return
    from rich import box
    from rich.table import Table

    table = Table(title, "", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "right"
    for name in sorted(metrics):
        table.add_row(name, short(float(metrics[name])))
    table_console().print(table, markup=False)
