"""The results file, its pages, and `--check`, which runs nothing."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

import pytest

from tests.claims.conftest import World
from zoo.claims.reader import claims_files, load_plan
from zoo.claims.results import OVERALL, method_markdown, overall_markdown, plus_minus, read_all, seconds_of
from zoo.main import main


@pytest.fixture
def measured(world: World, undrawn: None) -> World:
    """A world in which everything has been measured."""
    assert world.reproduce() == 0
    return world


def check(world: World, *words: str) -> int:
    calls = world.calls()
    code = world.command(str(world.claims), "--check", *words)
    assert world.calls() == calls, "--check ran something"
    return code


def test_check_is_content_with_complete_and_current_results(measured: World) -> None:
    assert check(measured) == 0


def test_check_before_anything_was_measured(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(world) == 1
    assert "a: no result for seed 0, 1" in capsys.readouterr().out
    assert not world.results.exists()


@pytest.mark.parametrize("what", ["code", "config", "margin", "page", "value"])
def test_check_notices_every_change(measured: World, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    if what == "code":
        (measured.package / "losses.py").write_text("RATE = 9\n")
    elif what == "config":
        measured.body["runs"]["a"]["overrides"]["model.init_args.acc"] = 0.9
        measured.write()
    elif what == "margin":
        measured.body["claims"][0]["margin"] = 0.15
        measured.write()
    elif what == "page":
        page = measured.results / "fake.cpu.md"
        page.write_text(page.read_text().replace("0.2", "0.3"))
    else:
        path = measured.results / "fake.cpu.json"
        content = json.loads(path.read_text())
        content["runs"]["a"]["0"]["test/acc"] = 0.99
        path.write_text(json.dumps(content))
    assert check(measured) == 1
    shown = capsys.readouterr().out
    expected = {
        "code": "a: config or code changed since seed 0, 1 ran",
        "config": "a: config or code changed since seed 0, 1 ran",
        "margin": "the verdicts do not follow",
        "page": "fake.cpu.md is not what the JSON file says",
        "value": "the verdicts do not follow",
    }
    assert expected[what] in shown


def test_a_failing_claim_stays_and_may_be_known(world: World, undrawn: None, make_claim) -> None:
    world.write(claims=[make_claim(margin=0.5)])
    assert world.reproduce() == 0, "running worked; whether the claim holds is another question"
    assert world.json["claims"][0]["holds"] is False
    assert check(world) == 1
    assert check(world, "--allow-failing") == 1, "nothing was said about it"
    world.write(claims=[make_claim(margin=0.5, note="Tried a longer training; the gap stays at 0.2.")])
    assert check(world, "--allow-failing") == 1, "the JSON file does not hold the note yet"
    assert world.command(str(world.claims), "--table") == 0
    assert check(world, "--allow-failing") == 0
    assert check(world) == 1
    assert world.json["claims"][0]["note"].startswith("Tried a longer")
    assert world.json["claims"][0]["fixed_before_runs"] is True
    page = (world.results / "fake.cpu.md").read_text()
    assert "**no**" in page
    assert "Tried a longer training" in page


def test_a_margin_that_was_changed_after_the_runs_is_marked(measured: World) -> None:
    measured.body["claims"][0]["margin"] = 0.15
    measured.write()
    assert measured.command(str(measured.claims), "--table") == 0
    claim = measured.json["claims"][0]
    assert claim["fixed_before_runs"] is False
    assert claim["holds"] is True
    assert "the margin was set or changed after some of its runs" in (measured.results / "fake.cpu.md").read_text()


def test_table_keeps_results_of_earlier_code(measured: World) -> None:
    before = measured.json["runs"]
    (measured.package / "losses.py").write_text("RATE = 9\n")
    assert measured.command(str(measured.claims), "--table") == 0
    assert measured.json["runs"] == before
    assert check(measured) == 1


def test_runs_and_seeds_that_the_claims_file_lost_go(measured: World, make_claim) -> None:
    del measured.body["runs"]["b"]
    measured.write(seeds=[0], claims=[make_claim(right=0.5)])
    assert measured.command(str(measured.claims), "--table") == 0
    assert {run: list(seeds) for run, seeds in measured.json["runs"].items()} == {"a": ["0"]}


def test_a_resumed_run_says_that_its_seconds_are_not_all(world: World, undrawn: None) -> None:
    world.reproduce(seeds=1)
    (world.runs / "fake" / "cpu" / "a" / "0" / "config.resume-1.yaml").write_text("")
    (world.results / "fake.cpu.json").unlink()
    world.reproduce(seeds=1)
    assert world.json["provenance"]["a"]["0"]["resumed"] == 1
    assert world.json["provenance"]["b"]["0"]["resumed"] == 0
    page = (world.results / "fake.cpu.md").read_text()
    assert re.search(r"\| a \| 1 \| > 3 \|", page)
    assert re.search(r"\| b \| 1 \| 3 \|", page)


def test_pages_say_what_the_file_says(world: World, make_claim) -> None:
    report = [{"statement": "Accuracy | all", "runs": ["a", "b"], "metrics": ["test/acc"], "paper": "Table 2: 0.9"}]
    second = make_claim("b-alone", left={"run": "b", "metric": "test/acc"}, right=0.9)
    world.write(claims=[make_claim(), second], report=report)
    world.reproduce(threads=2)
    page = (world.results / "fake.cpu.md").read_text()
    assert "| yes | a 0.7050 ± 0.0071 | b 0.5050 ± 0.0071 | +0.2" in page
    assert "| test/acc | Table 1: 2 against 1 |" in page
    assert "Fake CPU, 2 threads" in page
    assert "## Accuracy | all" in page
    assert (world.results / "fake.cpu.png").read_bytes().startswith(b"\x89PNG")
    overall = (world.results / OVERALL).read_text()
    assert "1 of 2 claims hold." in overall
    assert overall.count("[fake](fake.cpu.md)") == 2
    rows = [line for line in (page + overall).splitlines() if line.startswith("|")]
    assert all(row.count("|") - row.count("\\|") > 3 for row in rows)


def test_a_value_that_is_not_finite_is_written_as_none(world: World, undrawn: None) -> None:
    world.body["runs"]["a"]["overrides"]["model.init_args.acc"] = "nan"
    world.write()
    world.reproduce()
    text = (world.results / "fake.cpu.json").read_text()
    assert "NaN" not in text
    assert world.json["runs"]["a"]["0"]["test/acc"] is None
    assert world.json["claims"][0]["holds"] is False


def test_wrong_options_are_misuse(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--jobs", "0"], ["--threads", "0"], ["--seeds", "3"], ["--scale", "gpu"], ["--only", "a-beat-b"]):
        assert world.command(str(world.claims), *words) == 2, words
    assert world.command("not_a_method") == 2
    assert main(["reproduce"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert world.calls() == []


def test_a_figure_has_what_the_claims_compare_and_a_few_reports() -> None:
    from zoo.claims.figures import PANELS, _panels

    names = [f"m{n}" for n in range(20)]
    runs = {run: {"0": dict.fromkeys([*names, "alone"], 0.5)} for run in ("a", "b")}
    claim = {"id": "c", "left": {"run": "a", "metric": "m3"}, "right": {"run": "b", "metric": "m3"}}
    reported = [{"run": "a", "metric": "alone"}, *({"run": run, "metric": name} for name in names for run in runs)]
    panels = _panels({"runs": runs, "claims": [claim], "reports": [{"values": reported}]})
    assert list(panels) == ["m3", "m0", "m1", "m2", "m4", "m5", "m6", "m7"]
    assert len(panels) == PANELS
    assert panels["m3"][1] == [claim]


def test_values_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    from matplotlib.figure import Figure

    from zoo.claims.figures import _draw_runs, far_apart

    assert far_apart([2.5, 3.0, 20000.0])
    for near in ([], [2.5, 200.0], [0.0, 20000.0], [-1.0, 20000.0], [0.001, 0.9]):
        assert not far_apart(near)
    left, right = Figure().subplots(1, 2)
    _draw_runs(left, "ppl", {"good": [2.5, 3.0], "bad": [10.0, 20000.0]})
    _draw_runs(right, "rate", {"good": [0.0, 0.2], "bad": [0.9]})
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert left.get_xlim()[0] > 0.5, "no band reaches down to nothing"


class TestOfThisRepository:
    """What is committed below `results/`."""

    def test_the_overall_table_is_what_the_json_files_say(self, repository: Path) -> None:
        path = repository / "results" / OVERALL
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        assert text == overall_markdown(read_all(repository / "results")), "zoo reproduce --table writes it"

    def test_every_page_is_what_its_json_file_says(self, repository: Path) -> None:
        for result in read_all(repository / "results"):
            stem = repository / "results" / f"{result['method']}.{result['scale']}"
            figure = stem.with_name(f"{stem.name}.png").is_file()
            assert stem.with_name(f"{stem.name}.md").read_text(encoding="utf-8") == method_markdown(result, figure)

    def test_every_results_file_belongs_to_a_claims_file(self, repository: Path) -> None:
        for result in read_all(repository / "results"):
            plan = load_plan(claims_files()[result["method"]][0], result["scale"])
            assert set(result["runs"]) <= set(plan.runs)


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [(0.41234, 0.0441, "0.412 ± 0.044"), (123.4, 31.0, "123 ± 31"), (-0.5, 0.0071, "-0.5000 ± 0.0071"), (2.0, 0.0, "2"),
     (0.5, None, "0.5"), (None, None, "–")],
)  # fmt: skip
def test_a_mean_is_given_as_exactly_as_its_spread_allows(mean: float | None, std: float | None, text: str) -> None:
    assert plus_minus(mean, std) == text


def test_seconds_are_summed_exactly_so_that_the_order_of_runs_does_not_matter() -> None:
    values = [0.1, 1e16, 0.7, -1e16, 0.3]
    for letter in string.ascii_letters:  # the order of a set follows from the names, otherwise in each process
        names = [f"{letter}{i}" for i in range(len(values))]
        result = {"seconds": {name: {"0": value} for name, value in zip(names, values, strict=True)}}
        assert seconds_of(result, names) == pytest.approx(1.1), "a plain sum loses the small ones"
