"""What is registered, by whom, and whether it can be used: entry points, read without importing anything.

Groups: `zoo.methods`, `zoo.datamodules`, `zoo.callbacks`, `zoo.loggers` (name -> `package.module:Class`),
`zoo.configs` (name -> package that holds a folder `configs`), `zoo.commands` (name -> `package.module`, with a
function `main(argv) -> int`) and `zoo.api` (the version of the contract that the distribution was written for).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from zoo.card import ZOO_API
from zoo.errors import UsageError, did_you_mean

GROUPS = ("methods", "datamodules", "callbacks", "loggers", "configs", "commands")

#: Comma-separated names of distributions whose plugins are switched off.
DISABLE_VARIABLE = "ZOO_DISABLE_PLUGINS"

OWN_DISTRIBUTION = "method-zoo"

#: Packages of ours with names that a folder of the user may have as well.
OWN_PACKAGES = ("datamodules", "callbacks")
OWN_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        group: One of `GROUPS`.
        name: The name that users type.
        value: What it stands for: `package.module:Class`, or a package.
        dist: Distribution that registers it.
        version: Version of that distribution.
        problem: Why it cannot be used, or `""`. Only what can be seen without an import is known here.
    """

    group: str
    name: str
    value: str
    dist: str
    version: str
    problem: str = ""

    @property
    def class_path(self) -> str:
        """The dotted path, `package.module.Class`."""
        return self.value.replace(":", ".")

    @property
    def builtin(self) -> bool:
        return self.dist == OWN_DISTRIBUTION


def claim_packages() -> None:
    """Let `datamodules` and `callbacks` mean ours where a folder of the user, such as one here, comes first.

    Our root goes to the front of `sys.path`, which child processes inherit.

    Raises:
        UsageError: If another package of that name has been imported already.
    """
    for name in OWN_PACKAGES:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
        if spec is None or _is_ours(spec.origin, spec.submodule_search_locations, name):
            continue
        if loaded is not None:
            raise UsageError(
                f"the package {name!r} that was imported from {_places(spec)} is not the zoo's, in {OWN_ROOT / name}",
                f"give your {name!r} another name",
            )
        sys.path.insert(0, str(OWN_ROOT))
        importlib.invalidate_caches()
        return


def hidden_folder(module_name: str) -> str:
    """Say which file or folder of the user a package of ours hides from a module's name; `""` where none does."""
    name = module_name.partition(".")[0]
    here = Path.cwd()
    for mine in (here / name, here / f"{name}.py") if name in OWN_PACKAGES and here != OWN_ROOT else ():
        if mine.exists():
            return f"{mine} is hidden by the zoo's own package {name!r}: give it another name"
    return ""


def _is_ours(origin: str | None, locations: Iterable[str] | None, name: str) -> bool:
    places = [Path(place).resolve() for place in locations or ()]
    return (OWN_ROOT / name) in places if places else str(origin).startswith(str(OWN_ROOT / name))


def _places(spec: Any) -> str:
    return spec.origin or ", ".join(spec.submodule_search_locations or ())


def normalise(name: str) -> str:
    """Return a distribution name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _disabled() -> set[str]:
    return {normalise(part) for part in os.environ.get(DISABLE_VARIABLE, "").split(",") if part.strip()}


def _api_problem(declared: Iterable[str]) -> str:
    newer = [v for v in declared if v.isdigit() and int(v) > int(ZOO_API)]
    if newer:
        return f"written for contract {newer[0]}, this zoo speaks {ZOO_API}: upgrade {OWN_DISTRIBUTION}"
    return ""


def scan(distributions: Iterable[metadata.Distribution]) -> list[Entry]:
    """Read the entries of all groups from `distributions`, the first of each name winning as on `sys.path`."""
    entries: list[Entry] = []
    seen: set[str] = set()
    disabled = _disabled()
    for dist in distributions:
        try:
            text = dist.read_text("entry_points.txt") or ""
            if "[zoo." not in text:
                continue
            about = dist.metadata  # parsed anew each time
            name, version = about["Name"], about["Version"] or ""
        except (OSError, KeyError, TypeError, UnicodeDecodeError):
            continue  # half removed: no readable metadata, so nothing is registered
        if not name or normalise(name) in seen:
            continue
        seen.add(normalise(name))
        points = [ep for ep in dist.entry_points if ep.group.startswith("zoo.")]
        problem = _api_problem(ep.name for ep in points if ep.group == "zoo.api")
        if normalise(name) in disabled:
            problem = f"switched off by {DISABLE_VARIABLE}"
        for ep in points:
            group = ep.group.removeprefix("zoo.")
            if group in GROUPS:
                entries.append(Entry(group, ep.name, ep.value, normalise(name), version, problem))
    return entries


@lru_cache(maxsize=1)
def _installed() -> tuple[Entry, ...]:
    return tuple(scan(metadata.distributions()))


def refresh() -> None:
    """Forget what was read, after something was installed or removed in this process."""
    _installed.cache_clear()
    importlib.invalidate_caches()


def entries(group: str | None = None) -> list[Entry]:
    """Return what is registered, sorted by group, name and distribution; clashes between distributions included."""
    found = [e for e in _installed() if group in (None, e.group)]
    return sorted(found, key=lambda e: (GROUPS.index(e.group), e.name, not e.builtin, e.dist))


def find(group: str, name: str) -> Entry:
    """Return the entry for `name`, or for `dist:name` where several distributions register the same name.

    Raises:
        UsageError: If the name is unknown, ambiguous or belongs to a plugin that cannot be used.
    """
    wanted_dist, _, short = name.rpartition(":")
    candidates = [e for e in entries(group) if e.name == short]
    if wanted_dist:
        candidates = [e for e in candidates if e.dist == normalise(wanted_dist)]
    else:
        usable = [e for e in candidates if not e.problem]
        candidates = usable or candidates
    if not candidates:
        known = sorted({e.name for e in entries(group)})
        raise UsageError(f"unknown name {name!r} in {group}", did_you_mean(short, known))
    if len(candidates) > 1:
        owners = " and ".join(f"{e.dist} {e.version}" for e in candidates)
        choice = " or ".join(f"{e.dist}:{short}" for e in candidates)
        raise UsageError(f"{name!r} in {group} is registered by {owners}", f"say which one: {choice}")
    entry = candidates[0]
    if entry.problem:
        raise UsageError(f"{name!r} of {entry.dist} {entry.version} cannot be used: {entry.problem}")
    return entry


def load(entry: Entry) -> Any:
    """Import what `entry` stands for.

    Raises:
        UsageError: If the import fails, naming the distribution and the cause.
    """
    module_name, _, attribute = entry.value.partition(":")
    owner = f"{entry.name!r} of {entry.dist} {entry.version} ({entry.value})"
    try:
        module = importlib.import_module(module_name)
        return getattr(module, attribute) if attribute else module
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if module_name == missing or module_name.startswith(f"{missing}."):
            hint = f"its files are not there: pip install --force-reinstall {entry.dist}"
        else:
            hint = f"it needs the package {missing!r}: {install_hint(entry, missing)}"
        raise UsageError(f"cannot import {owner}: {error}", hint) from error
    except AttributeError as error:
        raise UsageError(f"cannot use {owner}: {error}", "the entry point names something that is not there") from error
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"cannot import {owner}: {type(error).__name__}: {error}", f"reported by {entry.dist}"
        ) from error


def install_hint(entry: Entry, missing: str) -> str:
    """Return the `pip install` that brings `missing`, through an extra of the distribution where one names it."""
    try:
        requires = metadata.requires(entry.dist) or []
    except metadata.PackageNotFoundError:
        requires = []
    for line in requires:
        match = re.match(r"([\w.-]+).*;.*extra\s*==\s*['\"]([\w.-]+)['\"]", line)
        if match and normalise(match[1]) == normalise(missing) and match[2] not in ("test", "docs"):
            return f"pip install '{entry.dist}[{match[2]}]'"
    return f"pip install {missing}"


def read_card(entry: Entry) -> dict[str, Any]:
    """Return the literal arguments of `card = Card(...)` from the source of a method, without importing it."""
    module_name, _, class_name = entry.value.partition(":")
    path = source_path(module_name)
    if path is None:
        return {}
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return _card_of_class(node)
    return {}


def _card_of_class(node: ast.ClassDef) -> dict[str, Any]:
    for statement in node.body:
        value = getattr(statement, "value", None)
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        if any(isinstance(t, ast.Name) and t.id == "card" for t in targets) and isinstance(value, ast.Call):
            try:
                return {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg}
            except ValueError:
                return {}
    return {}


def source_path(module_name: str) -> Path | None:
    """Return the source file of a module; of its packages only the outermost is looked up, none is executed."""
    first, *rest = module_name.split(".")
    try:
        spec = importlib.util.find_spec(first)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for root in spec.submodule_search_locations or ():
        base = Path(root, *rest)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
