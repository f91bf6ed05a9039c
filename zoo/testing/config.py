"""Checks of the shipped configs and of what a run saves of them."""

from __future__ import annotations

from pathlib import Path

import yaml

from zoo.api import words
from zoo.claims.reader import claims_files, load_plan, scales
from zoo.config import load_file, shipped_configs
from zoo.errors import UsageError
from zoo.testing.compare import differences, row_differences, told
from zoo.testing.kit import NotApplicable, Verdict, Violation, check
from zoo.testing.subject import SHORT, Subject, command_line, in_process


def _configs(subject: Subject) -> dict[str, Path]:
    """Shipped configs of the method by name."""
    prefix = f"{subject.entry.name}/"
    return {name: paths[0] for name, paths in shipped_configs().items() if name.startswith(prefix)}


@check("configs", "Each starts with a comment: what it does and what it costs.")
def configs(subject: Subject) -> Verdict:
    """All shipped configs of the method have that comment, and their options exist and have the right types."""
    subject.smoke  # noqa: B018 - there is one
    for name, path in _configs(subject).items():
        text = path.read_text(encoding="utf-8")
        if not text.startswith("#"):
            raise Violation(f"{name}: does not start with a comment")
        if not {"model", "data"} <= set(load_file(path)):
            continue  # to be laid over another one
        code, _, err = command_line(["fit", "--config", str(path), "--print_config"])
        if code != 0:
            raise Violation(f"{name}: {err.strip()}")
    return f"{len(_configs(subject))} configs"


@check("claims", "`configs/<name>/claims.yaml` holds the claims")
def claims(subject: Subject) -> Verdict:
    """Every scale of the claims file can be read, and the configs that it names are there."""
    paths = claims_files().get(subject.entry.name, [])
    if not paths:
        raise NotApplicable("the method has no claims of its own")
    count = 0
    for scale in scales(paths[0])["scales"]:
        try:
            plan = load_plan(paths[0], scale)
        except UsageError as error:
            raise Violation(str(error)) from error
        count += len(plan.claims)
    return f"{count} claims"


@check("replay", "What `--print_config` prints, and the saved `config.yaml` of a run, give the same run again.")
def replay(subject: Subject) -> Verdict:
    """A short run, its saved config, and the printed config of the same call: one config, one run."""
    first = subject.fit("short", SHORT)
    call = subject.words(SHORT)
    code, printed, err = command_line(["fit", *words(call["config"], call["overrides"], {}), "--print_config"])
    if code != 0:
        raise Violation(f"--print_config: {err.strip()}")
    saved = yaml.safe_load((first.folder / "config.yaml").read_text(encoding="utf-8"))
    found = differences(yaml.safe_load(printed), saved, "printed and saved config")
    if found:
        raise Violation(told(found))
    path = subject.folder / "printed.yaml"
    path.write_text(printed, encoding="utf-8")
    again = in_process("fit", config=path, run_dir=subject.new_folder("replay"))
    found = row_differences(first.rows, again.rows) + differences(first.final(), again.final(), "checkpoint")
    if found:
        raise Violation(told(found))
    return None


@check("warnings", "No warning is caused: ours, or of a call that a library has deprecated.")
def no_warnings(subject: Subject) -> Verdict:
    """What was warned of while the smoke config was trained and evaluated; libraries' own affairs do not count."""
    runs = [subject.base, *subject.evaluations.values()]
    ours = []
    for message in (w for run in runs for w in run.warnings):
        foreign = "site-packages" in message.filename or "/lib/python" in message.filename
        theirs = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
        if not (foreign and issubclass(message.category, theirs)):
            place = f"{Path(message.filename).name}:{message.lineno}"
            ours.append(f"{message.category.__name__}: {str(message.message).splitlines()[0][:200]} ({place})")
    ours = list(dict.fromkeys(ours))
    if ours:
        raise Violation(told(ours))
    return None
