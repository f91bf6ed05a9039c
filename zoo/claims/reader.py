"""Reads `configs/<method>/claims.yaml` and names the place of every mistake in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.claims.plan import AGGREGATES, PLACEHOLDER, SEED_KEYS, Claim, Plan, Report, Run, Side
from zoo.config import parse_yaml
from zoo.errors import UsageError, did_you_mean

COMMANDS = ("fit", "validate", "test")
PLACEHOLDER_FACTS = ("checkpoint", "run_dir")


def claims_files() -> dict[str, list[Path]]:
    """Return the claims files of the installed packages by method name, one for each package that ships it."""
    found: dict[str, list[Path]] = {}
    for entry in registry.entries("configs"):
        module = registry.source_path(entry.value.partition(":")[0])
        if not entry.problem and module is not None:
            for path in sorted((module.parent / "configs").glob("*/claims.yaml")):
                found.setdefault(path.parent.name, []).append(path)
    return found


def find_claims(name: str) -> Path:
    """Return the claims file for the name of a method, or for the path of one.

    Raises:
        UsageError: If there is none, or several packages ship it.
    """
    if Path(name).is_file():
        return Path(name)
    files = claims_files()
    if name not in files:
        raise UsageError(f"{name!r} has no claims.yaml", did_you_mean(name, files))
    if len(files[name]) > 1:
        raise UsageError(
            f"several packages ship claims of {name!r}", "give the path: " + " or ".join(map(str, files[name]))
        )
    return files[name][0]


class _Reader:
    """Reads mappings of a claims file and names the place of each mistake."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, place: str, problem: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.path}: {place}: {problem}", hint)

    def mapping(self, value: Any, place: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
        required = tuple(required)
        if not isinstance(value, dict):
            raise self.error(place, f"expected a mapping, got {value!r}")
        accepted = (*required, *optional)
        for key in value:
            if key not in accepted:
                raise self.error(place, f"unknown key {key!r}", did_you_mean(str(key), accepted))
        for key in required:
            if key not in value:
                raise self.error(place, f"{key} is missing", f"required: {', '.join(required)}")
        return value

    def text(self, value: Any, place: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(place, f"expected a text, got {value!r}")
        return value.strip()

    def texts(self, value: Any, place: str) -> tuple[str, ...]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items:
            raise self.error(place, f"expected a name or a list of names, got {value!r}")
        return tuple(self.text(item, place) for item in items)

    def number(self, value: Any, place: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise self.error(place, f"expected a number, got {value!r}")
        return float(value)

    def choice(self, value: Any, place: str, accepted: Iterable[str]) -> str:
        accepted = tuple(accepted)
        if value not in accepted:
            raise self.error(place, f"{value!r} is not known", did_you_mean(str(value), accepted))
        return str(value)


@lru_cache(maxsize=64)
def _parsed(text: str, path: str) -> Any:
    return parse_yaml(text, path)


def scales(path: Path) -> dict[str, Any]:
    """Return the raw scales of a claims file.

    Raises:
        UsageError: If it cannot be read or has another form.
    """
    reader = _Reader(path)
    try:
        content = deepcopy(_parsed(path.read_text(encoding="utf-8"), str(path)))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read claims {path}: {error}") from error
    content = reader.mapping(content, "top", ("method", "scales"))
    found = content["scales"]
    if not isinstance(found, dict) or not found:
        raise reader.error("scales", "expected a mapping from cpu or gpu to runs and claims")
    for scale in found:
        if not re.fullmatch(r"[a-z0-9_]+", str(scale)):
            raise reader.error(f"scales.{scale}", "a scale is a lower-case name")
    return {"method": reader.text(content["method"], "method"), "scales": found}


def load_plan(path: Path, scale: str = "") -> Plan:
    """Read one scale of a claims file; the first one if `scale` is empty.

    Raises:
        UsageError: For the first mistake, with file, key and what is accepted.
    """
    content = scales(path)
    scale = scale or next(iter(content["scales"]))
    if scale not in content["scales"]:
        raise UsageError(f"{path}: there is no scale {scale!r}", did_you_mean(scale, content["scales"]))
    reader, place = _Reader(path), f"scales.{scale}"
    optional = ("claims", "report", "commands", "seed_keys")
    body = reader.mapping(content["scales"][scale], place, ("seeds", "runs"), optional)
    seeds = body["seeds"]
    if not isinstance(seeds, list) or not seeds or any(isinstance(s, bool) or not isinstance(s, int) for s in seeds):
        raise reader.error(f"{place}.seeds", f"expected a list of whole numbers, got {seeds!r}")
    if min(seeds) < 0 or len(set(seeds)) != len(seeds):
        raise reader.error(f"{place}.seeds", f"expected different numbers from 0 on, got {seeds!r}")
    commands = body.get("commands", ["fit", "test"])
    if not isinstance(body["runs"], dict) or not body["runs"]:
        raise reader.error(f"{place}.runs", "expected a mapping from names to runs")
    runs = {str(n): _run(reader, str(n), v, f"{place}.runs.{n}", commands) for n, v in body["runs"].items()}
    ordered = _in_order(reader, runs, f"{place}.runs")
    claims = tuple(
        _claim(reader, item, f"{place}.claims[{i}]", ordered) for i, item in enumerate(body.get("claims", []))
    )
    ids = [claim.id for claim in claims]
    for claim_id in ids:
        if ids.count(claim_id) > 1:
            raise reader.error(f"{place}.claims", f"id {claim_id!r} is given twice")
    reports = tuple(
        _report(reader, item, f"{place}.report[{i}]", ordered) for i, item in enumerate(body.get("report", []))
    )
    if not claims and not reports:
        raise reader.error(place, "neither claims nor a report: there is nothing to reproduce")
    keys = tuple(body.get("seed_keys", SEED_KEYS))
    return Plan(content["method"], scale, path, tuple(seeds), ordered, claims, reports, keys)


def _run(reader: _Reader, name: str, value: Any, place: str, commands: Any) -> Run:
    if not re.fullmatch(r"[\w+=-]+", name):
        raise reader.error(place, "a run is named by letters, digits and _+=-")
    body = reader.mapping(value, place, ("config",), ("overrides", "needs", "commands", "alone"))
    overrides = body.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise reader.error(f"{place}.overrides", f"expected dotted keys and values, got {overrides!r}")
    needs = list(reader.texts(body["needs"], f"{place}.needs")) if body.get("needs") else []
    for run, fact in PLACEHOLDER.findall(str(overrides)):
        reader.choice(fact, f"{place}.overrides: ${{{run}.{fact}}}", PLACEHOLDER_FACTS)
        if run not in needs:
            needs.append(run)
    chosen = reader.texts(body.get("commands", commands), f"{place}.commands")
    for command in chosen:
        reader.choice(command, f"{place}.commands", COMMANDS)
    if not isinstance(body.get("alone", False), bool):
        raise reader.error(f"{place}.alone", f"expected true or false, got {body['alone']!r}")
    configs = reader.texts(body["config"], f"{place}.config")
    return Run(name, configs, overrides, tuple(needs), chosen, body.get("alone", False))


def _in_order(reader: _Reader, runs: Mapping[str, Run], place: str) -> dict[str, Run]:
    """Return the runs so that each comes after those that it needs."""
    ordered: dict[str, Run] = {}

    def add(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            raise reader.error(f"{place}.{name}", "needs itself: " + " -> ".join((*chain, name)))
        for other in runs[name].needs:
            reader.choice(other, f"{place}.{name}.needs", runs)
            add(other, (*chain, name))
        ordered.setdefault(name, runs[name])

    for name in runs:
        add(name, ())
    return ordered


def _claim(reader: _Reader, value: Any, place: str, runs: Mapping[str, Run]) -> Claim:
    required = ("id", "statement", "paper", "left", "right")
    body = reader.mapping(value, place, required, ("margin", "aggregate", "note"))
    claim_id = reader.text(body["id"], f"{place}.id")
    if not re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", claim_id):
        raise reader.error(f"{place}.id", f"expected lower-case words and numbers joined by hyphens, got {claim_id!r}")
    place = f"{place} ({claim_id})"
    left, right = (_side(reader, body[key], f"{place}.{key}", runs) for key in ("left", "right"))
    if not left.run and not right.run:
        raise reader.error(place, "one of left and right has to be the metric of a run")
    return Claim(
        claim_id,
        reader.text(body["statement"], f"{place}.statement"),
        reader.text(body["paper"], f"{place}.paper"),
        left,
        right,
        reader.number(body.get("margin", 0.0), f"{place}.margin"),
        reader.choice(body.get("aggregate", "mean"), f"{place}.aggregate", AGGREGATES),
        reader.text(body["note"], f"{place}.note") if "note" in body else "",
    )


def _side(reader: _Reader, value: Any, place: str, runs: Mapping[str, Run]) -> Side:
    if not isinstance(value, dict):
        return Side(number=reader.number(value, place))
    body = reader.mapping(value, place, ("run", "metric"), ("times", "aggregate"))
    aggregate = reader.choice(body["aggregate"], f"{place}.aggregate", AGGREGATES) if "aggregate" in body else ""
    return Side(
        reader.choice(body["run"], f"{place}.run", runs),
        reader.text(body["metric"], f"{place}.metric"),
        reader.number(body.get("times", 1.0), f"{place}.times"),
        aggregate,
    )


def _report(reader: _Reader, value: Any, place: str, runs: Mapping[str, Run]) -> Report:
    body = reader.mapping(value, place, ("statement", "runs", "metrics"), ("paper",))
    names = reader.texts(body["runs"], f"{place}.runs")
    for name in names:
        reader.choice(name, f"{place}.runs", runs)
    paper = reader.text(body["paper"], f"{place}.paper") if "paper" in body else ""
    return Report(
        reader.text(body["statement"], f"{place}.statement"), paper, names,
        reader.texts(body["metrics"], f"{place}.metrics"),
    )  # fmt: skip
