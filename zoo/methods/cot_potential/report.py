"""An HTML page of an analysis: numbers, figures, events, and traces coloured by potential gain; and its rows as files.

The page is one file without scripts that loads nothing. What models and files have written is escaped, and a content
policy keeps a browser from running anything even if it were not.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.methods.cot_potential.losses import Thresholds

Rows = Sequence[Mapping[str, Any]]

#: Traces, characters of traces, and events that the page shows at most; the files have all.
_TRACES, _CHARACTERS, _EVENTS = 100, 2_000_000, 300
#: Characters of a chunk in the table of events.
_EXCERPT = 80
#: Opacity of the colour of a gain of one.
_OPACITY = 0.6
_EVENT_NAMES = ("insight", "tangent", "late guess")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --faint: #59636e; --line: #d1d9e0;
  --rise: 26 127 55; --fall: 207 34 46; --curve: #0969da; --guess: #8250df }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --faint: #9198a1; --line: #3d444d;
  --rise: 63 185 80; --fall: 248 81 73; --curve: #4493f8; --guess: #ab7df8 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--back); print-color-adjust: exact }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere }
h3 small, .faint { color: var(--faint); font-weight: normal }
a { color: var(--curve) }
.numbers { columns: 19rem; padding: 0; list-style: none }
.numbers li { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px dotted var(--line);
  break-inside: avoid }
.numbers b { font-variant-numeric: tabular-nums; font-weight: 500 }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; align-items: center; padding: .5rem .8rem;
  border: 1px solid var(--line); border-radius: .4rem; background: var(--back) }
.scale { display: inline-block; width: 9rem; height: .9rem; vertical-align: -.1rem; border: 1px solid var(--line);
  background: linear-gradient(90deg, rgb(var(--fall) / .6), transparent, rgb(var(--rise) / .6)) }
.trace { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; max-height: 26rem;
  overflow: auto; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem }
.chunk { unicode-bidi: isolate; box-decoration-break: clone; -webkit-box-decoration-break: clone; padding: .1rem 0;
  border-bottom: 2px solid transparent; border-left: 1px solid var(--line) }
.chunk.insight { border-bottom-color: rgb(var(--rise)) } .chunk.tangent { border-bottom: 2px dashed rgb(var(--fall)) }
.chunk.late-guess { border-bottom: 2px dotted var(--guess) }
/* marks are no text: who copies a trace gets the trace */
.insight::before { content: "\\25B2\\2009"; color: rgb(var(--rise)) }
.tangent::before { content: "\\25BC\\2009"; color: rgb(var(--fall)) }
.late-guess::before { content: "\\25C6\\2009"; color: var(--guess) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--line); white-space: nowrap }
td.name { max-width: 15rem; overflow: hidden; text-overflow: ellipsis }
td:last-child { white-space: normal; overflow-wrap: anywhere; font-family: ui-monospace, monospace; min-width: 14rem;
  unicode-bidi: isolate }
td.number { text-align: right; font-variant-numeric: tabular-nums; padding: .15rem .8rem .15rem .4rem }
td + td.gain { padding-right: .4rem } td.gain + td { padding-left: .8rem } nav a { margin-right: 1.2rem }
figure { margin: 1rem 0 } figcaption { color: var(--faint); font-size: 13px }
figure img { max-width: 100%; background: #fff; border-radius: .4rem; padding: .3rem }
svg { display: block; width: 100%; max-width: 46rem; margin: .4rem 0; overflow: visible }
svg text { fill: var(--faint); font: 10px system-ui, sans-serif } svg .grid { stroke: var(--line) }
svg .band { fill: var(--curve); opacity: .2 } svg .line { fill: none; stroke: var(--curve); stroke-width: 2 }
svg circle { fill: var(--curve) } svg .exact { fill: none; stroke: var(--text); stroke-dasharray: 4 3 }
svg .rise { fill: rgb(var(--rise) / .16) } svg .fall { fill: rgb(var(--fall) / .16) }
"""


def colour(gain: float) -> str:
    """CSS colour of a gain in `[-1, 1]`: red for a fall, none for no change, green for a rise."""
    strength = max(-1.0, min(1.0, 0.0 if math.isnan(gain) else gain))
    return f"rgb(var(--{'rise' if strength >= 0 else 'fall'}) / {_OPACITY * abs(strength):.2f})"


def event_rows(rows: Rows) -> list[dict[str, Any]]:
    """The events of curves, one row each.

    Args:
        rows: Curves, see `studies.curve_row`.

    Returns:
        Rows with the key of the trace, the `event` (`insight`, `tangent` or `late guess`), the number of its `chunk`
        from 0 and where it starts and ends, the potential before and after it, the planted kind if there is one, and
        the chunk's text. A late guess is at the answer.
    """
    out = []
    for row in rows:
        found = [(k, "insight") for k in row["insights"]] + [(k, "tangent") for k in row["tangents"]]
        found += [(row["before_answer"], "late guess")] if row["late_guess"] else []
        for k, event in sorted(found):
            before, after = row["pot"][k], row["pot"][k + 1]
            out.append(
                {
                    "key": row["key"],
                    "event": event,
                    "chunk": k,
                    "start": row["boundaries"][k],
                    "end": row["boundaries"][k + 1],
                    "before": before,
                    "after": after,
                    "change": after - before,
                    "completions": row["trials"][k],
                    "kind": row["kinds"][k] if row["kinds"] else "",
                    "text": row["chunks"][k].encode(errors="backslashreplace").decode(),
                }
            )
    return out


def report_html(
    rows: Rows,
    metrics: Mapping[str, float],
    thresholds: Thresholds,
    figures: Mapping[str, bytes] | None = None,
    unit: str = "tokens",
) -> str:
    """The page.

    Args:
        rows: Curves, see `studies.curve_row`; may be empty.
        metrics: Numbers of all studies.
        thresholds: What counts as an event.
        figures: PNG images by name.
        unit: What boundaries count.
    """
    shown = _chosen(rows)
    places = {row["key"]: f"trace-{i}" for i, row in enumerate(shown)}
    numbers = "".join(f"<li><span>{_text(k)}</span><b>{v:.4g}</b></li>" for k, v in metrics.items())
    sections = {"numbers": numbers, "figures": figures, "events": rows, "traces": rows}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>CoT potential</title>',
        f"<style>{_STYLE}</style></head><body><h1>Potential of chains of thought</h1>",
        "<p>The potential of a prefix is the probability that the model, left to itself from there, gives the right "
        "answer. It is a value, not an explanation: along correct traces it rises by selection alone.</p>",
        "<nav>" + "".join(f'<a href="#{n}">{n.capitalize()}</a>' for n, there in sections.items() if there) + "</nav>",
        f'<h2 id="numbers">Numbers</h2><ul class="numbers">{numbers}</ul>' if numbers else "",
        _figures_html(figures or {}),
    ]
    if rows:
        others = f" {len(shown)} of {len(rows)} are shown; the others are in curves.jsonl."
        parts += [
            _events_html(event_rows(rows), places, thresholds, unit),
            '<h2 id="traces">Traces</h2><p>Those with most events first. What a chunk changes is told by its colour, '
            f"and in numbers where the pointer rests on it.{others if len(shown) < len(rows) else ''}</p>",
            _legend_html(thresholds, any(row["exact"] for row in shown)),
            *(_trace_html(row, places[row["key"]], unit) for row in shown),
        ]
    return "".join([*parts, "</body></html>\n"])


def _text(value: Any) -> str:
    """Anything as text of the page: no markup, and nothing that ends an attribute."""
    return html.escape(str(value))


def _chosen(rows: Rows) -> Rows:
    """The traces that are shown: those with most events, as many as a browser takes lightly."""
    ranked = sorted(rows, key=lambda r: -(len(r["insights"]) + 2 * len(r["tangents"]) + 3 * r["late_guess"]))
    out: list[Mapping[str, Any]] = []
    room = _CHARACTERS
    for row in ranked[:_TRACES]:
        room -= sum(map(len, row["chunks"]))
        if room < 0 and out:
            break
        out.append(row)
    return out


def _figures_html(figures: Mapping[str, bytes]) -> str:
    parts = []
    for name, image in figures.items():
        title = _text(name.replace("_", " "))
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts.append(f'<figure><img alt="{title}" src="{source}"><figcaption>{title}</figcaption></figure>')
    return '<h2 id="figures">Figures</h2>' + "".join(parts) if parts else ""


def _marked(event: str, text: str) -> str:
    return f'<span class="{event.replace(" ", "-")}">{text}</span>'


def _rules(thresholds: Thresholds) -> dict[str, str]:
    """What each event is."""
    return {
        "insight": f"a rise of more than {100 * thresholds.insight:g} points",
        "tangent": f"a fall of more than {100 * thresholds.tangent:g} points",
        "late guess": f"a right answer from below {100 * thresholds.guess:g} %",
    }


def _legend_html(thresholds: Thresholds, exact: bool) -> str:
    events = "".join(_marked(event, f"{event}: {rule}") for event, rule in _rules(thresholds).items())
    dashed = "; dashed: exact potential" if exact else ""
    return (
        '<div class="key"><span>change over a chunk: &minus;100 <span class="scale"></span> +100 points</span>'
        f"{events}<span>curve: estimate with its 95 % interval{dashed}</span></div>"
    )


def _events_html(events: Rows, places: Mapping[str, str], thresholds: Thresholds, unit: str) -> str:
    """The table of events, in the order of their traces on the page."""
    counts = {event: sum(e["event"] == event for e in events) for event in _EVENT_NAMES}
    said = ", ".join(_marked(e, f"{n} {e if n == 1 else _plural(e)}") for e, n in counts.items())
    rules = "; ".join(f"{event}: {rule}" for event, rule in _rules(thresholds).items())
    parts = [f'<h2 id="events">Events</h2><p>{said}. <span class="faint">{rules}.</span></p>']
    if not events:
        return parts[0]
    order = {key: i for i, key in enumerate(places)}
    listed = sorted(events, key=lambda e: order.get(e["key"], len(order)))[:_EVENTS]
    planted = any(e["kind"] for e in events)
    names = ["event", "trace", "chunk", unit, "before", "after", "change", *(["planted"] if planted else []), "text"]
    parts.append(
        f'<div class="wide"><table><thead><tr>{"".join(f"<th>{name}</th>" for name in names)}</tr></thead><tbody>'
    )
    for e in listed:
        key = _text(e["key"])
        text = " ".join(e["text"].split())
        cells = [
            f"<td>{_marked(e['event'], e['event'])}</td>",
            f'<td class="name" title="{key}">'
            + (f'<a href="#{places[e["key"]]}">{key}</a></td>' if e["key"] in places else f"{key}</td>"),
            f'<td class="number">{e["chunk"] + 1}</td>',
            f'<td class="number">{e["start"]}&ndash;{e["end"]}</td>',
            f'<td class="number">{e["before"]:.3f}</td>',
            f'<td class="number">{e["after"]:.3f}</td>',
            f'<td class="number gain" style="background:{colour(e["change"])}">{100 * e["change"]:+.0f}</td>',
            *([f"<td>{_text(e['kind'])}</td>"] if planted else []),
            f"<td>{_text(text[:_EXCERPT])}{'…' if len(text) > _EXCERPT else ''}</td>",
        ]
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append("</tbody></table></div>")
    if len(listed) < len(events):
        parts.append(f'<p class="faint">{len(listed)} of {len(events)} events; the others are in events.jsonl.</p>')
    return "".join(parts)


def _plural(event: str) -> str:
    return f"{event}es" if event.endswith("s") else f"{event}s"


def _trace_html(row: Mapping[str, Any], place: str, unit: str) -> str:
    spans = []
    for k, chunk in enumerate(row["chunks"]):
        before, after = row["pot"][k], row["pot"][k + 1]
        event = "insight" if k in row["insights"] else "tangent" if k in row["tangents"] else ""
        event = "late-guess" if row["late_guess"] and k == row["before_answer"] else event
        planted = f", planted: {row['kinds'][k]}" if row["kinds"] and row["kinds"][k] else ""
        title = f"chunk {k + 1}: {before:.3f} to {after:.3f}, {row['trials'][k]} completions{planted}"
        spans.append(
            f'<span class="chunk {event}" style="background:{colour(after - before)}" title="{_text(title)}">'
            f"{_text(chunk)}</span>"
        )
    facts = ["correct" if row["correct"] else "wrong"]
    facts += ["late guess"] if row["late_guess"] else []
    facts += [] if row["monotone_2se"] else ["not monotone"]
    heading = f'<h3 id="{place}">{_text(row["key"])} <small>{", ".join(facts)}</small></h3>'
    joint = _text(row.get("joint", ""))
    return f'{heading}<div class="trace">{joint.join(spans)}</div>{_curve_svg(row, unit)}'


def _curve_svg(row: Mapping[str, Any], unit: str) -> str:
    """The curve with its intervals and events; dashed where it is known exactly."""
    width, height, left, top = 720, 110, 28, 8
    bounds = row["boundaries"]
    last = max(bounds[-1], 1)

    def x(position: float) -> float:
        return left + (width - left) * position / last

    def y(value: float) -> float:
        return top + height * (1 - value)

    def points(values: Sequence[float]) -> str:
        pairs = zip(bounds, values, strict=True)
        return " ".join(f"{x(t):.1f},{y(v):.1f}" for t, v in pairs if not math.isnan(v))

    parts = [f'<svg viewBox="0 0 {width + 8} {height + top + 18}" role="img" aria-label="potential along the trace">']
    for value in (0, 0.5, 1):
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y(value) + 3:.1f}" text-anchor="end">{value:g}</text>')
    for name, kind in (("insights", "rise"), ("tangents", "fall")):
        for k in row[name]:
            wide = x(bounds[k + 1]) - x(bounds[k])
            parts.append(
                f'<rect class="{kind}" x="{x(bounds[k]):.1f}" y="{top}" width="{wide:.1f}" height="{height}"/>'
            )
    band = points(row["high"]) + " " + " ".join(reversed(points(row["low"]).split()))
    parts.append(f'<polygon class="band" points="{band}"/><polyline class="line" points="{points(row["pot"])}"/>')
    if row["exact"]:
        parts.append(f'<polyline class="exact" points="{points(row["exact"])}"/>')
    for t, value, low, high in zip(bounds, row["pot"], row["low"], row["high"], strict=True):
        if not math.isnan(value):
            title = f"after {t}: {value:.3f} ({low:.3f} to {high:.3f})"
            parts.append(f'<circle cx="{x(t):.1f}" cy="{y(value):.1f}" r="2.5"><title>{title}</title></circle>')
    parts.append(f'<text x="{left}" y="{height + top + 14}">0</text>')
    parts.append(f'<text x="{width}" y="{height + top + 14}" text-anchor="end">{bounds[-1]} {unit}</text>')
    return "".join([*parts, "</svg>"])


def write_report(
    path: Path,
    rows: Rows,
    metrics: Mapping[str, float],
    thresholds: Thresholds,
    figures: Mapping[str, bytes] | None = None,
    unit: str = "tokens",
) -> Path:
    """Write the page and return its path; see `report_html`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    page = report_html(rows, metrics, thresholds, figures, unit)
    # a text of a server may hold halves of characters, which no file can
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def write_rows(folder: Path, rows: Mapping[str, Rows]) -> None:
    """Write `<study>.jsonl` for each study, and `events.jsonl` where there are curves; NaN becomes null."""
    folder.mkdir(parents=True, exist_ok=True)
    events = {"events": event_rows(rows["curves"])} if rows.get("curves") else {}
    for study, own in {**rows, **events}.items():
        lines = [json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in own]
        # what replaces halves of characters is JSON's own way to write them
        (folder / f"{study}.jsonl").write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def log_report(loggers: Iterable[Any], path: Path, rows: Rows) -> None:
    """Give the page and tables of curves and events to W&B, where a run has it."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({"report": wandb.Html(path.read_text(encoding="utf-8"), inject=False)})
            columns = ["key", "correct", "insights", "tangents", "late_guess", "monotone_2se"]
            tables = {"curves": (columns, [[str(row[c]) for c in columns] for row in rows])}
            if events := event_rows(rows):
                names = list(events[0])
                tables["events"] = (names, [[event[name] for name in names] for event in events])
            for name, (titles, data) in tables.items():
                logger.log_table(name, columns=titles, data=data)
