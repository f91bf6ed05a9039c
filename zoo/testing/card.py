"""Checks of what a method says about itself: card, constructor, imports, options."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
import typing
from typing import Any

from zoo import registry
from zoo.card import Card
from zoo.checks import parameters
from zoo.children import call
from zoo.explain import argument_texts
from zoo.testing.kit import NotApplicable, Verdict, Violation, check
from zoo.testing.subject import Subject

#: Packages that take long to import and that options, figures or logging need, not training.
HEAVY = ("matplotlib", "wandb", "sklearn", "datasets", "peft", "pandas")
PLAIN = (int, float, str, bool, type(None))
SUMMARY_LENGTH = 100


@check("importable", "A method is a `LightningModule` that an entry point of the group `zoo.methods` names")
def importable(subject: Subject) -> Verdict:
    """The class can be imported by its entry point."""
    return f"{subject.entry.dist} {subject.entry.version}, {subject.cls.__module__}"


def _imported_with(module: str) -> list[str]:
    """Import a module in a fresh process; returns what came with it and `!name` for heavy packages at its top."""
    before = set(sys.modules)
    importlib.import_module(module)
    new = sorted(set(sys.modules) - before)
    heavy = set()
    for name in new:
        if name.partition(".")[0] == module.partition(".")[0]:
            for value in vars(sys.modules[name]).values():
                owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
                if isinstance(owner, str) and owner.partition(".")[0] in HEAVY:
                    heavy.add(f"!{owner.partition('.')[0]} in {name}")
    return new + sorted(heavy)


@check("imports", "A method never imports a datamodule or a callback.")
def imports(subject: Subject) -> Verdict:
    """Importing the method brings neither in; nor heavy packages at the top of its modules."""
    module = subject.cls.__module__
    new = call(_imported_with, module)
    others = {
        e.value.partition(":")[0]: e for g in ("datamodules", "callbacks", "loggers") for e in registry.entries(g)
    }
    for name in new:
        if name in others:
            raise Violation(f"importing {module} imports {name}, where {others[name].name} is registered")
        if name.startswith(("datamodules.", "callbacks.")):
            raise Violation(f"importing {module} imports {name}")
    heavy = [name[1:] for name in new if name.startswith("!")]
    if heavy:
        raise Violation(f"imported at the top of a module, needed by an option or a figure alone: {', '.join(heavy)}")
    return None


@check("card", "The class attribute `card = Card(...)` (`zoo.card`), written with literals only.")
def card(subject: Subject) -> Verdict:
    """The card can be read from the source, and what it names is there."""
    from zoo.testing.catalogue import CHECKS

    found = subject.card
    stated = registry.read_card(subject.entry)
    if not stated:
        raise Violation("the card cannot be read from the source: write it with literals, in the class itself")
    if Card(**stated) != found:
        changed = [
            f.name for f in dataclasses.fields(Card) if getattr(Card(**stated), f.name) != getattr(found, f.name)
        ]
        raise Violation(f"the card in the source differs from that of the class in {', '.join(changed)}")
    if not found.title.strip() or not found.summary.strip():
        raise Violation("title or summary is empty")
    if len(found.summary) > SUMMARY_LENGTH or found.summary.endswith(".") or "\n" in found.summary:
        raise Violation(
            f"summary: one line of at most {SUMMARY_LENGTH} characters without a full stop: {found.summary!r}"
        )
    if found.batch:
        module, _, name = found.batch.rpartition(".")
        batch = getattr(importlib.import_module(module), name, None) if module else None
        if not typing.is_typeddict(batch):
            raise Violation(f"batch: {found.batch!r} is not the import path of a TypedDict")
    unknown = [name for name in found.links if name not in parameters(subject.cls)]
    if unknown:
        raise Violation(f"links: the constructor has no argument {unknown[0]!r}")
    names = [c.name for c in CHECKS]
    for name in (*found.skip_checks, *found.check_options):
        if name not in names:
            raise Violation(f"skip_checks, check_options: there is no check {name!r}; there are {', '.join(names)}")
    for name, why in found.skip_checks.items():
        if len(why.split()) < 3:
            raise Violation(f"skip_checks: {name}: the reason in words, got {why!r}")
    return None


def is_plain(annotation: Any) -> bool:
    """Whether an annotation admits only numbers, strings, bools, None, and lists, tuples and dicts of those."""
    if annotation in (*PLAIN, Any, list, dict, None):
        return True
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return all(isinstance(value, PLAIN) for value in inner)
    if origin in (list, dict, tuple, typing.Union, types.UnionType):
        return all(part is Ellipsis or is_plain(part) for part in inner)
    return False


@check("constructor", "Plain types only (numbers, strings, bools, None, lists and dicts of those)")
def constructor(subject: Subject) -> Verdict:
    """Each argument of the constructor has an annotation of plain types and, if any, a plain default."""
    init: Any = subject.cls.__init__
    hints = typing.get_type_hints(init)
    for name, parameter in parameters(subject.cls).items():
        if name not in hints and parameter.annotation is parameter.empty:
            raise Violation(f"{name} has no annotation")
        if not is_plain(hints.get(name, parameter.annotation)):
            raise Violation(f"{name}: {parameter.annotation} is not a plain type")
    for parameter in inspect.signature(init).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise Violation(f"{parameter}: what it accepts cannot be told")
    return f"{len(parameters(subject.cls))} arguments"


@check("documented", "each argument is described under `Args:` of the class docstring")
def documented(subject: Subject) -> Verdict:
    """`zoo info` can say something about each option, and nothing about options that are not there."""
    told = argument_texts(subject.cls.__doc__ or "")
    names = parameters(subject.cls)
    missing = [name for name in names if not told.get(name)]
    if missing:
        raise Violation(f"not described under Args: of {subject.cls.__name__}: {', '.join(missing)}")
    gone = [name for name in told if name not in names]
    if gone:
        raise Violation(f"described but not an argument: {', '.join(gone)}")
    return None


@check("hyperparameters", "it ends with `self.save_hyperparameters()`")
def hyperparameters(subject: Subject) -> Verdict:
    """Every argument is in `hparams`, with the value of the smoke config."""
    result: Any = subject.base.result
    hparams = dict(result.model.hparams)
    missing = [name for name in parameters(subject.cls) if name not in hparams]
    if missing:
        raise Violation(f"not in self.hparams: {', '.join(missing)}")
    for name, value in subject.config["model"].get("init_args", {}).items():
        kept = list(hparams[name]) if isinstance(hparams[name], tuple) else hparams[name]
        if kept != value and not isinstance(value, dict):
            raise Violation(f"self.hparams.{name} is {kept!r}, the config says {value!r}")
    return None


@check("figures", "A method may have `figures(self) -> dict[str, matplotlib.figure.Figure]`")
def figures(subject: Subject) -> Verdict:
    """After an evaluation they can be drawn."""
    if not hasattr(subject.cls, "figures"):
        raise NotApplicable("the method draws no figures")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    result: Any = subject.evaluations["test"].result
    drawn = result.model.figures()
    pyplot.close("all")
    if not isinstance(drawn, dict):
        raise Violation(f"figures() returned a {type(drawn).__name__}, expected names and figures")
    for name, figure in drawn.items():
        if not isinstance(figure, Figure):
            raise Violation(f"figures()[{name!r}] is a {type(figure).__name__}")
    return ", ".join(drawn) or "none after the smoke config"
