"""What a dashboard of a method shows, from its card, source, claims and results; without torch and without W&B."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.claims.reader import claims_files, load_plan
from zoo.claims.results import difference_text, number, read_all, side_text, table, verdict


@dataclass(frozen=True)
class Contents:
    """What is known about a method before any of its runs is looked at.

    Attributes:
        name: Name of the method.
        card: Its card, see `zoo.card.Card`.
        metrics: Metrics that its claims compare, the most used ones first.
        configs: Config of each run of the claims, by the run's name: the method and its baselines.
        claims: Table of the measured claims in markdown, `""` without results.
        figures: Names of the figures that its module draws.
    """

    name: str
    card: dict[str, Any]
    metrics: tuple[str, ...]
    configs: dict[str, str]
    claims: str
    figures: tuple[str, ...]


def contents_of(name: str, results: Path) -> Contents:
    """Collect what the dashboard of a method shows.

    Args:
        name: A registered method.
        results: Folder with `NAME.<scale>.json`.

    Raises:
        UsageError: If there is no such method.
    """
    entry = registry.find("methods", name)
    counts: dict[str, int] = {}
    configs: dict[str, str] = {}
    if name in claims_files():
        plan = load_plan(claims_files()[name][0])
        configs = {run.name: run.configs[0] for run in plan.runs.values()}
        for claim in plan.claims:
            for side in (claim.left, claim.right):
                if side.metric:
                    counts[side.metric] = counts.get(side.metric, 0) + 1
    metrics = tuple(sorted(counts, key=lambda metric: -counts[metric]))
    measured = [result for result in read_all(results) if result["method"] == name]
    claims = "\n\n".join(claims_table(result) for result in measured if result["claims"])
    return Contents(name, registry.read_card(entry), metrics, configs, claims, figure_names(entry))


def claims_table(result: dict[str, Any]) -> str:
    """The claims of one scale as a markdown table."""
    rows = [
        [
            claim["statement"],
            claim["paper"],
            side_text(claim["left"]),
            side_text(claim["right"]),
            difference_text(claim),
            number(claim["margin"]),
            verdict(claim),
        ]
        for claim in result["claims"]
    ]
    header = ["claim", "paper", "left", "right", "left - right", "margin", "holds"]
    return f"Scale `{result['scale']}`, {len(result['seeds'])} seeds.\n\n{table(header, rows)}"


def figure_names(entry: registry.Entry) -> tuple[str, ...]:
    """Names of the figures in a method's source: literal keys in its function `figures`, none of it executed."""
    module, _, cls = entry.value.partition(":")
    path = registry.source_path(module)
    if path is None:
        return ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [
        node
        for owner in tree.body
        if isinstance(owner, ast.ClassDef) and owner.name == cls
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and node.name == "figures"
    ]
    keys: list[ast.expr] = []
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Dict):
            keys += [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Assign):
            keys += [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
    return tuple(dict.fromkeys(texts(keys)))


def texts(nodes: Iterable[ast.expr]) -> list[str]:
    """The literal strings among some expressions."""
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
