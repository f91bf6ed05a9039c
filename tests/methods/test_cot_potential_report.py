"""The page of an analysis: what it shows, that nothing a model writes becomes markup, and the files beside it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zoo.methods.cot_potential import report
from zoo.methods.cot_potential.figures import png_images
from zoo.methods.cot_potential.losses import Thresholds
from zoo.methods.cot_potential.report import colour, event_rows, log_report, report_html, write_report, write_rows

ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></div><svg onload=alert(1)>",
    "]]><!-- <b>&amp;</b> \u202e",
)
#: Everything that the page is made of.
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "nav", "a", "ul", "li", "b", "span",
    "small", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "img", "figcaption", "svg", "line", "text",
    "rect", "polygon", "polyline", "circle",
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str]] = []
        #: Texts of the traces, and of the cells of each row of the table.
        self.traces: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        kind = dict(attrs).get("class") or ""
        if tag not in ("meta", "img"):
            self.open.append((tag, kind))
        if kind == "trace":
            self.traces.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if ("div", "trace") in self.open:
            self.traces[-1] += data
        if self.open and any(tag in ("td", "th") for tag, _ in self.open):
            self.rows[-1][-1] += data

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attrs[name] or "" for own, attrs in self.elements if own == tag and name in attrs]


def row_of(key: str, pot: Sequence[float], **more: Any) -> dict[str, Any]:
    """A curve whose chunks are named after it; the last one is the answer."""
    count, change = len(pot) - 1, [b - a for a, b in pairwise(pot)]
    return {
        "key": key,
        "correct": True,
        "boundaries": [5 * i for i in range(count + 1)],
        "before_answer": count - 1,
        "chunks": [f"{key} {i}.\n" for i in range(count)],
        "joint": "",
        "pot": list(pot),
        "low": [max(0.0, p - 0.1) for p in pot],
        "high": [min(1.0, p + 0.1) for p in pot],
        "trials": [128] * count + [0],
        "insights": [k for k in range(count - 1) if change[k] > 0.4],
        "tangents": [k for k in range(count - 1) if change[k] < -0.3],
        "late_guess": pot[-2] < 0.05,
        "monotone": False,
        "monotone_2se": True,
        "kinds": [""] * count,
        "exact": [],
        **more,
    }


ROWS = [
    row_of("calm", (0.5, 0.6, 0.7, 1.0)),
    row_of("lively", (0.2, 0.9, 0.3, 1.0, 1.0), kinds=["hard", "try", "no", "answer"], exact=[0.2, 0.8, 0.4, 1.0, 1.0]),
    row_of("guess", (0.02, 0.01, 1.0)),
]


def test_gains_are_colours() -> None:
    assert colour(1) == colour(3) == "rgb(var(--rise) / 0.60)"
    assert colour(-0.5) == "rgb(var(--fall) / 0.30)"
    assert colour(0) == colour(float("nan")) == "rgb(var(--rise) / 0.00)"
    page = report_html(ROWS, {"insight_rate": 1 / 3}, Thresholds())
    for row in ROWS:
        for k, chunk in enumerate(row["chunks"]):
            gain = row["pot"][k + 1] - row["pot"][k]
            assert re.search(rf'style="background:{re.escape(colour(gain))}" title="[^"]*">{re.escape(chunk)}<', page)


def test_the_table_has_each_event_with_its_numbers() -> None:
    events = event_rows(ROWS)
    assert [(e["key"], e["event"], e["chunk"]) for e in events] == [
        ("lively", "insight", 0), ("lively", "tangent", 1), ("lively", "insight", 2), ("guess", "late guess", 1),
    ]  # fmt: skip
    assert [e["change"] for e in events] == pytest.approx([0.7, -0.6, 0.7, 0.99])
    assert events[1] == {
        "key": "lively", "event": "tangent", "chunk": 1, "start": 5, "end": 10, "before": 0.9, "after": 0.3,
        "change": pytest.approx(-0.6), "completions": 128, "kind": "try", "text": "lively 1.\n",
    }  # fmt: skip
    page = Page(report_html(ROWS, {}, Thresholds(), unit="characters"))
    head, *body = page.rows
    assert head == ["event", "trace", "chunk", "characters", "before", "after", "change", "planted", "text"]
    assert ["tangent", "lively", "2", "5\u201310", "0.900", "0.300", "-60", "try", "lively 1."] in body
    assert len(body) == len(events)
    # every link of the page leads somewhere
    targets = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = page.attributes("a", "href")
    assert {link.removeprefix("#") for link in links} <= targets
    assert len(links) == 2 + len(events)


def test_without_events_or_curves_there_is_still_a_page() -> None:
    page = report_html(ROWS[:1], {}, Thresholds())
    assert "0 insights" in page
    assert "<table" not in page
    page = report_html([], {"pass_at_1": 0.25}, Thresholds(), {"pass_at_k": b"image"})
    assert "0.25" in page
    assert "data:image/png;base64,aW1hZ2U=" in page
    assert "Traces" not in page


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_that_was_written_becomes_markup(attack: str) -> None:
    pot = (0.1, 0.9, 0.2, 1.0)
    row = row_of(attack, pot, chunks=[attack] * 3, kinds=[attack] * 3, late_guess=True)
    text = report_html([row], {attack: 0.5}, Thresholds(), {attack: b"image"})
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.attributes("img", "src") == ["data:image/png;base64,aW1hZ2U="]
    assert page.open == []
    # the text itself is all there, and nothing else is
    assert page.traces == [attack * 3]
    # nor would a browser run or load anything
    policies = [attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert text.index("Content-Security-Policy") < text.index(report._text(attack))


def test_words_are_parted_and_texts_are_not() -> None:
    words = row_of("w", (0.2, 0.5, 1.0), chunks=["S1 + 2", "ANS 3"], joint=" ")
    assert Page(report_html([words], {}, Thresholds())).traces == ["S1 + 2 ANS 3"]
    assert Page(report_html(ROWS[:1], {}, Thresholds())).traces == ["calm 0.\ncalm 1.\ncalm 2.\n"]


def test_the_page_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(f"r{i}", (0.2, 0.5, 1.0)) for i in range(30)] + [ROWS[1]]
    monkeypatch.setattr(report, "_TRACES", 10)
    page = Page(text := report_html(rows, {}, Thresholds()))
    assert len(page.traces) == 10
    assert page.traces[0].startswith("lively")  # what happens most comes first
    assert "10 of 31 are shown" in text
    monkeypatch.setattr(report, "_CHARACTERS", 60)
    assert len(Page(report_html(rows, {}, Thresholds())).traces) == 2
    monkeypatch.setattr(report, "_CHARACTERS", 1)
    assert len(Page(report_html(rows, {}, Thresholds())).traces) == 1
    monkeypatch.setattr(report, "_EVENTS", 2)
    assert "2 of 3 events" in report_html(rows, {}, Thresholds())


def test_curves_are_drawn_where_they_are_known() -> None:
    nan = math.nan
    row = row_of("r", (0.2, nan, 0.4, 1.0), low=[0.1, nan, 0.3, 1.0], high=[0.3, nan, 0.5, 1.0])
    text = report_html([row], {}, Thresholds())
    assert "nan," not in text.partition("<svg")[2]
    page = Page(text)
    assert [len(p.split()) for p in page.attributes("polyline", "points")] == [3]
    assert [len(p.split()) for p in page.attributes("polygon", "points")] == [6]
    exact = Page(report_html(ROWS[1:2], {}, Thresholds()))
    assert exact.attributes("polyline", "class") == ["line", "exact"]
    assert exact.attributes("rect", "class") == ["rise", "rise", "fall"]


def test_files_beside_the_page(tmp_path: Path) -> None:
    nan = math.nan
    broken = row_of("half", (0.2, nan, 1.0), chunks=["a \ud83d", "\u00e9"])  # half of a character, as servers may send
    write_rows(tmp_path, {"curves": [*ROWS, broken], "pass_at_k": [{"key": "p"}]})
    stored = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    assert stored[0]["pot"] == ROWS[0]["pot"]
    assert stored[-1]["pot"][1] is None
    assert stored[-1]["chunks"] == broken["chunks"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events == event_rows(ROWS)
    assert (tmp_path / "pass_at_k.jsonl").is_file()
    path = write_report(tmp_path / "report.html", [broken], {}, Thresholds())
    assert Page(path.read_text(encoding="utf-8")).traces == ["a \\ud83d\u00e9"]


def test_figures_are_images_of_the_page() -> None:
    images = png_images({"curves": ROWS})
    assert set(images) == {"mean_curve", "events"}
    assert all(image.startswith(b"\x89PNG") for image in images.values())
    page = Page(report_html(ROWS, {}, Thresholds(), images))
    assert page.attributes("img", "alt") == ["mean curve", "events"]


def test_wandb_gets_the_page_and_tables(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    class Recorder(WandbLogger):
        def __init__(self) -> None:
            self.media: dict[str, Any] = {}
            self.tables: dict[str, Any] = {}

        @property
        def experiment(self) -> Any:  # type: ignore[override]
            return SimpleNamespace(log=self.media.update)

        def log_table(self, key: str, columns: Any = None, data: Any = None, **kwargs: Any) -> None:
            self.tables[key] = [dict(zip(columns, row, strict=True)) for row in data]

    logger = Recorder()
    path = write_report(tmp_path / "report.html", ROWS, {"insight_rate": 0.5}, Thresholds())
    log_report([object(), logger], path, ROWS)
    assert isinstance(logger.media["report"], wandb.Html)
    assert [row["insights"] for row in logger.tables["curves"]] == ["[]", "[0, 2]", "[]"]
    assert logger.tables["events"] == event_rows(ROWS)
