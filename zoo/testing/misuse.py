"""Checks of what a mistake is answered."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.api import words
from zoo.checks import parameters
from zoo.testing.kit import Verdict, Violation, check
from zoo.testing.subject import Subject, command_line

MOST_LINES = 5


def mistakes(subject: Subject) -> Iterator[tuple[str, list[str], str]]:
    """Yield mistakes with this method: what it is, the words on the command line, a word that the answer must have."""
    config = words(subject.smoke, subject.options, {})
    name = subject.entry.name
    yield "unknown method", [*config, "--model", f"{name}x"], name
    yield "unknown config", ["--config", f"{name}/smok"], f"{name}/smoke"
    yield "unknown datamodule", [*config, "--data", "no_such_data"], "no_such_data"
    options = {k: p for k, p in parameters(subject.cls).items() if k not in subject.card.links}
    if options:
        first = next(iter(options))
        yield "misspelt option", [*config, f"--model.{first}_", "1"], first
    for kind in ("int", "float"):
        typed = [k for k, p in options.items() if p.annotation in (kind, int if kind == "int" else float)]
        if typed:
            yield f"text for {kind}", [*config, f"--model.{typed[0]}", "many"], typed[0]
    for option in subject.card.links:
        yield "an option that the data set", [*config, f"--model.{option}", "1"], option
    yield "misspelt option of the trainer", [*config, "--trainer.max_step", "3"], "max_steps"


@check(
    "misuse",
    "A mistake is answered in at most five lines with key, value and what is accepted, exit code 2, and no file of an "
    "earlier run is touched.",
)
def misuse(subject: Subject) -> Verdict:
    """Mistakes with names, options and types of this method, and a second `fit` into the directory of a run."""
    run = subject.base.folder
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    count = 0
    tried = [*mistakes(subject), ("a second run in the directory", ["--config", str(subject.smoke)], "already holds")]
    for what, call, wanted in tried:
        code, _, err = command_line(["fit", *call, "--run_dir", str(run), "--wandb", "disabled"])
        lines = [line for line in err.splitlines() if line.strip()]
        if code != 2 or len(lines) > MOST_LINES or wanted not in err or "Traceback" in err:
            raise Violation(f"{what} ({' '.join(call[2:])}): exit code {code}, {len(lines)} lines: {err.strip()[:300]}")
        count += 1
    if {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} != before:
        raise Violation(f"files of the earlier run were touched: {run}")
    return f"{count} mistakes"
