"""Hooks of mkdocs: assembles the method pages, brings results in, mends links that leave `docs/`."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from zoo.pages.mathml import replace_equations
from zoo.pages.method import assemble, method_names, overview

log = logging.getLogger("mkdocs.hooks.zoo")
#: Place of a generated text in a hand-written page.
METHODS_MARK = "<!-- methods -->"
LINK = re.compile(r"\[([^\]\n]+)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
#: Pages in the navigation, those that are not there yet left out.
PAGES = {
    "Start": "index.md",
    "Contract": "contract.md",
    "Reproducing claims": "reproduce.md",
    "Writing a plugin": "plugin.md",
    "Plugin API": "api.md",
    "Dashboards": "dashboards.md",
    "Reliability": "reliability.md",
    "Decisions": "decisions.md",
}


def repository(config: Any) -> Path:
    """Folder of mkdocs.yml."""
    return Path(config.config_file_path).parent


def on_config(config: Any) -> Any:
    """Make the navigation: a page for each registered method."""
    docs = Path(config.docs_dir)
    pages = [{title: page} for title, page in PAGES.items() if (docs / page).is_file()]
    methods: list[Any] = [{name: f"methods/{name}.md"} for name in method_names()]
    measured = [{"Claims": "measured/README.md"}, {"Speed": "measured/bench.md"}]
    config.nav = [pages[0], {"Methods": methods}, {"Results": measured}, *pages[1:]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add pages of methods without a hand-written one, and the results."""
    results = repository(config) / "results"
    for name in method_names():
        if files.get_file_from_path(f"methods/{name}.md") is None:
            files.append(File.generated(config, f"methods/{name}.md", content=f"# {name}\n"))
    for path in sorted((*results.glob("*.md"), *results.glob("*.png"))):
        files.append(File.generated(config, f"measured/{path.name}", abs_src_path=str(path)))
    files.append(
        File.generated(config, "measured/bench.md", content=(results / "bench/README.md").read_text(encoding="utf-8"))
    )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Assemble a method's page, put the overview in its place, and mend links that leave `docs/`."""
    results = repository(config) / "results"
    source = page.file.src_uri
    folder, _, file = source.rpartition("/")
    name = file.removesuffix(".md")
    if folder == "methods" and name in method_names():
        hand_written = markdown if page.file.generated_by is None else ""
        markdown = assemble(name, hand_written, results)
    if METHODS_MARK in markdown:
        markdown = markdown.replace(METHODS_MARK, overview(results))
    return mend_links(markdown, source, files)


def mend_links(markdown: str, source: str, files: Files) -> str:
    """Point links and pictures at the copies of `results/`; links to other files become their names."""

    def mend(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), path))
        if source.startswith("measured/"):
            there = posixpath.normpath(posixpath.join("results", path))
        if there.startswith("docs/") or files.get_file_from_path(posixpath.normpath(
            posixpath.join(posixpath.dirname(source), path))) is not None:  # fmt: skip
            return match[0]
        copy = f"measured/{there.removeprefix('results/')}"
        copy = "measured/bench.md" if there in ("results/bench", "results/bench/README.md") else copy
        copy = "measured/README.md" if there == "results" else copy
        if there.startswith("results") and files.get_file_from_path(copy) is not None:
            link = posixpath.relpath(copy, posixpath.dirname(source) or ".")
            return f"[{text}]({link}{'#' + anchor if anchor else ''})"
        # results that are not there yet are no mistake
        if not there.startswith("results/") and not (Path(__file__).parents[2] / there).exists():
            log.warning("%s: the link to %s leads nowhere", source, target)
        return text if "`" in text else f"`{text}`"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(mend, part) for part in parts)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Draw equations."""
    try:
        return replace_equations(html)
    except ValueError as error:
        log.warning("%s: %s", page.file.src_uri, error)
        return html
