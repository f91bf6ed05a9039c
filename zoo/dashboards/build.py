"""Workspace and report of a method with `wandb-workspaces`; nothing here talks to W&B but `publish`."""

from __future__ import annotations

import random
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from zoo.dashboards.contents import Contents

#: What every run logs about the machine; the first pattern is ours, the others are W&B's own.
SPEED = r"train/.*(_per_second|_seconds|_ms)$"
SYSTEM = ("system/cpu", "system/memory_percent", "system/gpu.0.gpu", "system/gpu.0.memoryAllocatedBytes")
X_AXIS = "trainer/global_step"


def runs_of(contents: Contents) -> str:
    """Pattern of the names of a method's runs: `method-config-id`, baselines that are other methods included."""
    methods = {contents.name, *(config.partition("/")[0] for config in contents.configs.values())}
    return f"^({'|'.join(sorted(methods))})-"


def heading(contents: Contents) -> str:
    """What the method is, in markdown."""
    card = contents.card
    paper = f", [arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']})" if card.get("arxiv") else ""
    return f"**{card.get('title', contents.name)}**{paper}\n\n{card.get('summary', '')}"


def main_panels(contents: Contents) -> list[Any]:
    """The metrics of the claims for the method beside its baselines, and the course of training and validation."""
    bars = [wr.BarPlot(title=metric, metrics=[metric], max_bars_to_show=30) for metric in contents.metrics[:6]]
    courses = [
        wr.LinePlot(title=title, x=X_AXIS, metric_regex=pattern)
        for title, pattern in (("validation", "val/.*"), ("training", "train/.*(loss|acc).*"))
    ]
    return [*bars, *courses]


def claim_panels(contents: Contents) -> list[Any]:
    """The claims of the committed results, as text."""
    return [wr.MarkdownPanel(markdown=contents.claims or "No results yet: `zoo reproduce " + contents.name + "`")]


def figure_panels(contents: Contents) -> list[Any]:
    """One gallery for each figure of the method."""
    return [wr.MediaBrowser(title=name, media_keys=[f"figures/{name}"]) for name in contents.figures]


def speed_panels() -> list[Any]:
    """Throughput and times that methods log themselves."""
    return [wr.LinePlot(title="throughput and times", x=X_AXIS, metric_regex=SPEED)]


def system_panels() -> list[Any]:
    """Processor, memory and GPU, as W&B measures them."""
    return [wr.LinePlot(title=name.removeprefix("system/"), x="Relative Time", y=[name]) for name in SYSTEM]


def sections_of(contents: Contents) -> dict[str, list[Any]]:
    """Titles and panels, in order; empty ones are left out."""
    sections = {
        "Main metric and baselines": main_panels(contents),
        "Claims": claim_panels(contents),
        "Figures": figure_panels(contents),
        "Throughput": speed_panels(),
        "System": system_panels(),
    }
    return {title: panels for title, panels in sections.items() if panels}


def build_workspace(contents: Contents, entity: str, project: str) -> Any:
    """The workspace of a method: its runs, and panels in sections."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=contents.name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections_of(contents).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=ws.RunsetSettings(query=runs_of(contents), regex_query=True),
    )


def build_report(contents: Contents, entity: str, project: str) -> Any:
    """The report of a method: what it is, its claims, and its panels over its runs."""
    # a run set without a project is that of the report; another one would be looked up at W&B
    runs = wr.Runset(name=contents.name, query=runs_of(contents))
    blocks: list[Any] = [wr.MarkdownBlock(text=heading(contents))]
    for title, panels in sections_of(contents).items():
        blocks.append(wr.H2(text=title))
        if title == "Claims":
            blocks.append(wr.MarkdownBlock(text=panels[0].markdown))
        else:
            blocks.append(wr.PanelGrid(runsets=[runs], panels=panels))
    return wr.Report(entity=entity, project=project, title=f"method-zoo: {contents.name}", width="fluid",
                     description=contents.card.get("summary", ""), blocks=blocks)  # fmt: skip


def to_json(contents: Contents, entity: str, project: str) -> dict[str, Any]:
    """Workspace and report as W&B stores them; the same each time."""
    out: dict[str, Any] = {"method": contents.name, "entity": entity, "project": project}
    before = random.getstate()
    random.seed(contents.name)  # panels get random ids
    try:
        for name, build in {"workspace": build_workspace, "report": build_report}.items():
            model = build(contents, entity, project)._to_model()
            out[name] = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    finally:
        random.setstate(before)
    return out


def publish(contents: Contents, entity: str, project: str) -> dict[str, str]:
    """Save workspace and report at W&B and return their addresses."""
    workspace, report = build_workspace(contents, entity, project), build_report(contents, entity, project)
    workspace.save()
    report.save()
    return {"workspace": workspace.url, "report": report.url}
