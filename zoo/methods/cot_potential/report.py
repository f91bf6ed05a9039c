"""An HTML page with traces coloured by potential gain, and the rows of an analysis as files. No script, no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.methods.cot_potential.losses import Thresholds

Rows = Sequence[Mapping[str, Any]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.trace { white-space: pre-wrap; font-family: ui-monospace, monospace; border: 1px solid #ddd; padding: .6rem }
.chunk { border-bottom: 2px solid transparent } .insight { border-color: #1a7f37 } .tangent { border-color: #cf222e }
table { border-collapse: collapse } td, th { padding: .1rem .8rem .1rem 0; text-align: left }
.key span { padding: 0 .5rem } svg { display: block; margin: .3rem 0 1.5rem }
"""


def colour(gain: float) -> str:
    """CSS colour of a gain in `[-1, 1]`: red for a fall, white for none, green for a rise."""
    strength = max(-1.0, min(1.0, 0.0 if math.isnan(gain) else gain))
    faded = round(255 * (1 - abs(strength)))
    return f"rgb({faded},255,{faded})" if strength >= 0 else f"rgb(255,{faded},{faded})"


def report_html(rows: Rows, metrics: Mapping[str, float], thresholds: Thresholds) -> str:
    """The page.

    Args:
        rows: Curves, see `studies.curve_row`.
        metrics: Numbers for the table.
        thresholds: What counts as an event.
    """
    legend = "".join(f'<span style="background:{colour(g)}">{100 * g:+.0f}</span>' for g in (-0.8, -0.3, 0, 0.3, 0.8))
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>CoT potential</title>',
        f"<style>{_STYLE}</style></head><body><h1>Potential of chains of thought</h1>",
        f'<p class="key">Change of the probability of a correct answer over a chunk, in points: {legend}. '
        f"Underlined: a rise of more than {100 * thresholds.insight:g} points (insight) or a fall of more than "
        f"{100 * thresholds.tangent:g} (tangent). The potential is a value, not an explanation: correct traces rise by "
        "selection.</p>",
        "<table>" + "".join(f"<tr><td>{html.escape(k)}</td><td>{v:.4g}</td></tr>" for k, v in sorted(metrics.items())),
        "</table>",
    ]
    return "".join([*parts, *map(_trace_html, rows), "</body></html>\n"])


def _trace_html(row: Mapping[str, Any]) -> str:
    spans = []
    for k, chunk in enumerate(row["chunks"]):
        gain = row["pot"][k + 1] - row["pot"][k]
        kind = "insight" if k in row["insights"] else "tangent" if k in row["tangents"] else ""
        title = f"{row['pot'][k]:.3f} to {row['pot'][k + 1]:.3f}, {row['trials'][k]} completions"
        planted = row["kinds"][k] if row["kinds"] else ""
        spans.append(
            f'<span class="chunk {kind}" style="background:{colour(gain)}" title="{title} {html.escape(planted)}">'
            f"{html.escape(chunk)}</span>"
        )
    facts = ["correct" if row["correct"] else "wrong"]
    facts += ["late guess"] if row["late_guess"] else []
    facts += [] if row["monotone_2se"] else ["not monotone"]
    heading = f"<h3>{html.escape(row['key'])} <small>{', '.join(facts)}</small></h3>"
    return f'{heading}<div class="trace">{" ".join(spans)}</div>{_curve_svg(row)}'


def _curve_svg(row: Mapping[str, Any], width: int = 600, height: int = 90) -> str:
    """The curve with its intervals; dashed where it is known exactly."""
    last = max(row["boundaries"][-1], 1)

    def points(values: Sequence[float]) -> str:
        pairs = zip(row["boundaries"], values, strict=True)
        return " ".join(f"{width * t / last:.1f},{height * (1 - v):.1f}" for t, v in pairs if not math.isnan(v))

    band = points(row["high"]) + " " + " ".join(reversed(points(row["low"]).split()))
    exact = (
        f'<polyline points="{points(row["exact"])}" fill="none" stroke="#000" stroke-dasharray="4 3"/>'
        if row["exact"]
        else ""
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="potential">'
        f'<polygon points="{band}" fill="#0969da" opacity="0.2"/>'
        f'<polyline points="{points(row["pot"])}" fill="none" stroke="#0969da" stroke-width="2"/>{exact}</svg>'
    )


def write_report(path: Path, rows: Rows, metrics: Mapping[str, float], thresholds: Thresholds) -> Path:
    """Write the page and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(rows, metrics, thresholds), encoding="utf-8")
    return path


def write_rows(folder: Path, rows: Mapping[str, Rows]) -> None:
    """Write `<study>.jsonl` for each study; NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    for study, own in rows.items():
        lines = [json.dumps(_plain(row), ensure_ascii=False) for row in own]
        (folder / f"{study}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def log_report(loggers: Iterable[Any], path: Path, rows: Rows) -> None:
    """Give the page and a table of the curves to W&B, where a run has it."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({"report": wandb.Html(path.read_text(encoding="utf-8"), inject=False)})
            columns = ["key", "correct", "insights", "tangents", "late_guess", "monotone_2se"]
            data = [[str(row[c]) for c in columns] for row in rows]
            logger.log_table("curves", columns=columns, data=data)
