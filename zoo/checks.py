"""Check the options of a class against its signature, so that a mistake is one sentence and not a Union traceback."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from zoo import registry
from zoo.config import NAMED, Layers, quote_hint
from zoo.errors import UsageError, did_you_mean


def import_class(class_path: str, key: str, base: type) -> type:
    """Import the class behind a config key.

    Raises:
        UsageError: If it cannot be imported or is not derived from `base`, saying which distribution is to blame.
    """
    group = NAMED[key]
    entry = next((e for e in registry.entries(group) if e.class_path == class_path), None)
    if entry is None:
        module, _, name = class_path.rpartition(".")
        entry = registry.Entry(group, class_path, f"{module}:{name}", module.partition(".")[0], "")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and module.startswith(error.name):
                known = [e.name for e in registry.entries(group)]
                hint = registry.hidden_folder(module) or did_you_mean(name, known)
                raise UsageError(f"{key}: there is no class {class_path!r}", hint) from error
        except Exception:
            pass  # `load` says what is wrong with the module
    cls = registry.load(entry)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UsageError(f"{key}: {class_path} of {entry.dist} is not a {base.__name__}")
    return cls


def parameters(cls: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the options of a class by name, those of its bases where the constructor passes keywords on."""
    out: dict[str, inspect.Parameter] = {}
    for base in inspect.getmro(cls) if isinstance(cls, type) else [cls]:
        init = base.__dict__.get("__init__") if isinstance(cls, type) else base
        if init is None:
            continue
        signature = inspect.signature(init).parameters
        for name, parameter in signature.items():
            if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                out.setdefault(name, parameter)
        if not any(p.kind == p.VAR_KEYWORD for p in signature.values()):
            break
    return out


def check_options(
    key: str,
    cls: type,
    given: Mapping[str, Any],
    layers: Layers,
    provided: Collection[str] = (),
) -> None:
    """Check names and types of the options under `key`, and that nothing required is missing.

    Args:
        key: Dotted key of the options, e.g. `model.init_args`.
        cls: The class they belong to.
        given: The options.
        layers: Where they were set.
        provided: Options that somebody else fills in (facts of the data).

    Raises:
        UsageError: For the first mistake: place, key, value and what is accepted.
    """
    accepted = parameters(cls)
    for name in given:
        place = layers.place(f"{key}.{name}")
        if name in provided:
            raise UsageError(f"{place}: {key}.{name}: set by the data, not by hand")
        if name not in accepted:
            raise UsageError(f"{place}: {key}: {cls.__name__} has no option {name!r}", did_you_mean(name, accepted))
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in given and name not in provided:
            raise UsageError(f"{key}.{name}: required by {cls.__name__} and not given")
    check_types(key, cls, given, layers)


def check_types(key: str, cls: type, given: Mapping[str, Any], layers: Layers) -> None:
    """Check each value against its annotation with the parser that will read it."""
    from jsonargparse import ArgumentError, ArgumentParser

    for name, value in given.items():
        parser = ArgumentParser(exit_on_error=False)
        others = {other for other in parameters(cls) if other != name}
        parser.add_class_arguments(cls, skip=others, instantiate=False)
        try:
            parser.parse_object({name: value})
        except (ArgumentError, TypeError, ValueError) as error:
            wanted = annotation_text(parameters(cls)[name])
            place = layers.place(f"{key}.{name}")
            hint = quote_hint(place) if wanted == "str" and place.startswith("--") else ""
            raise UsageError(f"{place}: {key}.{name}: expected {wanted}, got {value!r}", hint, str(error)) from error


def check_nested(key: str, cls: type, given: Mapping[str, Any], layers: Layers) -> None:
    """Let the function that the card of a method names look into options that are mappings themselves.

    Raises:
        UsageError: For the first mistake that it finds: place, key, value and what is accepted.
    """
    path = getattr(getattr(cls, "card", None), "check", "")
    if not path:
        return
    module, _, name = path.partition(":")
    try:
        getattr(importlib.import_module(module), name)(given)
    except ValueError as error:
        option = str(error).partition(":")[0]
        raise UsageError(f"{layers.place(f'{key}.{option}')}: {key}.{error}") from error


def annotation_text(parameter: inspect.Parameter) -> str:
    """Return a type annotation as a user would write it."""
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if not isinstance(annotation, str) and "[" in str(annotation):
        text = str(annotation)
    return re.sub(r"\b(?:typing|collections\.abc|builtins)\.", "", text)
