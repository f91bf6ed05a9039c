"""The generated parts of a method's page; nothing of the method is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zoo import registry
from zoo.claims.reader import claims_files, load_plan, scales
from zoo.claims.results import read_all, table
from zoo.config import shipped_configs
from zoo.explain import Option, options_of

#: Sections that a page gets, in order.
SECTIONS = ("Measured", "Options", "Configs")


def cell(text: str) -> str:
    """A text as a cell of a markdown table: one line, brackets kept; `table` sees to bars."""
    return re.sub(r"\s+", " ", text).replace("<", "&lt;").strip()


def code(text: str) -> str:
    """A text as code in a cell, nothing for an empty one."""
    text = re.sub(r"\s+", " ", text).strip()
    return f"`{text}`" if text else ""


def card_box(name: str, card: Mapping[str, Any], dist: str) -> str:
    """Facts of the card in a box."""
    facts = [str(card.get("kind", "")), str(card.get("year") or "")]
    if card.get("arxiv"):
        facts.insert(0, f"[arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})")
    lines = [str(card.get("summary", "")) + ".", " · ".join(fact for fact in facts if fact)]
    if card.get("batch"):
        lines.append(f"Batches: `{card['batch']}`. Package: `{dist}`.")
    compiles = "`torch.compile` is supported." if card.get("compiles") else ""
    extra = f"Needs the extra `{card['extra']}`." if card.get("extra") else ""
    lines += [line for line in (compiles, extra) if line]
    for check, reason in (card.get("skip_checks") or {}).items():
        lines.append(f"Not checked: `{check}`, {reason}.")
    body = "\n\n".join(f"    {line}" for line in lines if line.strip("."))
    return f'!!! abstract "`{name}`"\n\n{body}\n'


def option_rows(options: Iterable[Option]) -> str:
    """The constructor arguments as a table."""
    rows = [[code(o.name), code(o.annotation), code(o.default) or "required", cell(o.text)] for o in options]
    return table(["option", "type", "default", "meaning"], rows)


def first_comment(path: Path) -> str:
    """The comment at the top of a config: what it does and what it costs."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def config_rows(name: str) -> str:
    """The shipped configs of a method as a table, `""` if it ships none."""
    found = {key: paths[0] for key, paths in sorted(shipped_configs().items()) if key.startswith(f"{name}/")}
    return table(["config", "what it does and costs"],
                 [[code(key), cell(first_comment(path))] for key, path in found.items()]) if found else ""  # fmt: skip


def claims_section(markdown: str) -> str:
    """The table of claims in a page that `zoo reproduce` wrote, with the line on seeds and hardware above it."""
    head, _, rest = markdown.partition("## Claims\n")
    facts = next((line for line in head.splitlines() if line.startswith("Seeds")), "")
    claims = rest.split("\n## ")[0].strip()
    return f"{facts}\n\n{claims}"


def measured_parts(name: str, results: Path) -> list[str]:
    """For each results file of a method: its claims, its figure and a link to all numbers."""
    parts = []
    for result in read_all(results):
        stem = f"{name}.{result.get('scale', '')}"
        page = results / f"{stem}.md"
        if result.get("method") != name or not result.get("claims") or not page.is_file():
            continue
        figure = f"![measured values and claims of {stem}](../measured/{stem}.png)\n\n"
        parts.append(
            f"### Scale `{result['scale']}`\n\n{claims_section(page.read_text(encoding='utf-8'))}\n\n"
            + (figure if (results / f"{stem}.png").is_file() else "")
            + f"[All numbers of this scale](../measured/{stem}.md)"
        )
    return parts


def measured_with(name: str) -> list[str]:
    """Methods whose claims also run configs of the method `name`, as those of alignment run its earlier stages."""
    found = []
    for method, files in claims_files().items():
        plans = [load_plan(files[0], scale) for scale in scales(files[0])["scales"]] if method != name else []
        configs = {config for plan in plans for run in plan.runs.values() for config in run.configs}
        if any(config.startswith(f"{name}/") for config in configs):
            found.append(method)
    return found


def generated(name: str, results: Path) -> str:
    """Everything below the hand-written part of a page."""
    entry = registry.find("methods", name)
    doc, options = options_of(entry)
    measured = measured_parts(name, results)
    if not measured:
        links = [f"[{code(method)}]({method}.md)" for method in measured_with(name)]
        measured = [f"With {' and '.join(links)}." if links else f"Nothing yet. `zoo reproduce {name}` measures it."]
    parts = {
        "Measured": "\n\n".join(measured),
        "Options": f"{doc}\n\n`--model.NAME VALUE` on the command line.\n\n{option_rows(options)}",
        "Configs": config_rows(name),
    }
    return "\n\n".join(f"## {title}\n\n{parts[title]}" for title in SECTIONS if parts[title])


def assemble(name: str, written: str, results: Path) -> str:
    """A method's page: hand-written text with the card below its title, then what is generated.

    Args:
        name: The method.
        written: Its hand-written page, `""` if there is none.
        results: Folder of the results.
    """
    entry = registry.find("methods", name)
    card = registry.read_card(entry)
    title, _, rest = (written or f"# {name}\n\n*{card.get('title', name)}*").partition("\n")
    return f"{title}\n\n{card_box(name, card, entry.dist)}\n{rest.strip()}\n\n{generated(name, results)}\n"


def method_names() -> list[str]:
    """Registered methods of this distribution that can be used."""
    return [e.name for e in registry.entries("methods") if e.builtin and not e.problem]


def overview(results: Path) -> str:
    """All methods: what they are, and how many of their claims hold."""
    rows = []
    measured = read_all(results)
    for name in method_names():
        card = registry.read_card(registry.find("methods", name))
        claims = [c for r in measured if r.get("method") == name for c in r.get("claims", [])]
        judged = [c for c in claims if c["holds"] is not None]
        others = [f"[{code(method)}](methods/{method}.md)" for method in ([] if claims else measured_with(name))]
        holds = f"with {' and '.join(others)}" if others else "not measured"
        holds = f"{sum(c['holds'] for c in judged)} of {len(judged)}" if judged else holds
        holds += f", {len(claims) - len(judged)} open" if judged and len(judged) < len(claims) else ""
        arxiv = f"[{card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})" if card.get("arxiv") else ""
        link = f"[{code(name)}](methods/{name}.md)"
        rows.append([link, cell(str(card.get("summary", ""))), cell(str(card.get("kind", ""))), arxiv, holds])
    return table(["method", "what it is", "kind", "paper", "claims that hold"], rows)
