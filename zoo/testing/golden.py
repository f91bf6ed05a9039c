"""The stored first losses of the smoke config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.runs import read_json, versions, write_atomically
from zoo.testing.kit import NotApplicable, Verdict, Violation, check
from zoo.testing.subject import Subject

STEPS = 20
TOLERANCE = 1e-5


@check("golden", "The first 20 losses of the smoke config are stored and stay the same to 1e-5.")
def golden(subject: Subject) -> Verdict:
    """The stored losses are those of this machine, in 32 bit on one thread.

    Where they differ and were stored with another Python, nothing is said: some train on the text that comes with it.
    """
    path = subject.golden / f"{subject.entry.name}.json"
    if not path.is_file():
        raise NotApplicable(f"no stored losses; zoo check {subject.name} --update-golden DIR writes them")
    stored = read_json(path)
    losses = subject.recorder.losses[:STEPS]
    if len(losses) != len(stored["losses"]):
        raise Violation(f"{len(losses)} steps, {len(stored['losses'])} are stored")
    for step, (now, then) in enumerate(zip(losses, stored["losses"], strict=True)):
        if not abs(now - then) <= TOLERANCE * max(1.0, abs(then)):
            what = f"loss {step} is {now:.9g}, stored {then:.9g}{_other_versions(stored['versions'])}"
            if stored["versions"].get("python") != versions()["python"]:
                raise NotApplicable(f"{what}; another Python may bring other texts to train on")
            raise Violation(what)
    return f"{len(losses)} losses, made with torch {stored['versions'].get('torch', '?')}"


def _other_versions(stored: dict[str, str]) -> str:
    here = versions()
    other = [f"{name} {v} (here {here.get(name)})" for name, v in stored.items() if here.get(name) != v]
    return f"; stored with {', '.join(other)}" if other else ""


def write_golden(subject: Subject) -> Path:
    """Store the first losses of the smoke config in the subject's folder of golden curves.

    They are those that the check will look at: made with its options, if the card has any.
    """
    path = subject.golden / f"{subject.entry.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: v for name, v in versions().items() if name != "method-zoo"}
    content: dict[str, Any] = {"config": f"{subject.entry.name}/smoke"}
    with subject.under("golden") as options:
        content |= {"options": options} if options else {}
        content |= {"versions": kept, "losses": subject.recorder.losses[:STEPS]}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path
