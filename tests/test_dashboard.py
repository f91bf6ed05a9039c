"""`zoo dashboard`: what a method's dashboard shows, offline files, sweeps that the command line takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoo import registry
from zoo.config import load_layers, shipped_configs
from zoo.dashboards.contents import contents_of
from zoo.dashboards.sweep import parameter, sweep_of
from zoo.errors import UsageError
from zoo.explain import options_of
from zoo.main import main
from zoo.options import parse_options

needs_workspaces = pytest.mark.skipif(
    importlib.util.find_spec("wandb_workspaces") is None, reason="the extra dashboards is not installed"
)
METHODS = [entry.name for entry in registry.entries("methods") if not entry.problem]
SEARCHED = [name for name in METHODS if registry.read_card(registry.find("methods", name)).get("search")]


def test_contents(repository: Path) -> None:
    contents = contents_of("nncsl", repository / "results")
    assert contents.metrics[0] == "test/A_T"  # what most of its claims compare
    assert contents.configs["er"] == "nncsl/er"
    assert contents.figures == ("accuracy_matrix",)
    result = json.loads((repository / "results/nncsl.cpu.json").read_text())
    for claim in result["claims"]:
        assert claim["statement"] in contents.claims
    assert contents.claims.count("\n| ") == len(result["claims"]) + 2


def test_contents_without_results(tmp_path: Path) -> None:
    assert contents_of("nncsl", tmp_path).claims == ""


def panels_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    """All panels in a nested structure."""
    found = []
    if isinstance(view, dict):
        if "viewType" in view:
            found.append(view)
        view = list(view.values())  # type: ignore[assignment]
    if isinstance(view, list):
        for value in view:
            found += panels_of(value)
    return found


@needs_workspaces
def test_written_offline(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    argv = ["dashboard", "nncsl", "--entity", "us", "--results", str(repository / "results"), "--out"]
    assert main([*argv, str(tmp_path)]) == 0
    written = json.loads((tmp_path / "nncsl.json").read_text())
    sections = written["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections]
    assert names == ["Main metric and baselines", "Claims", "Figures", "Throughput", "System"]
    for section in sections:
        assert section["panels"], section["name"]
    panels = panels_of(written["workspace"])
    kinds = {panel["viewType"] for panel in panels}
    assert {"Bar Chart", "Run History Line Plot", "Markdown Panel", "Media Browser"} <= kinds
    bars = [panel for panel in panels if panel["viewType"] == "Bar Chart"]
    assert any("test/A_T" in json.dumps(bar) for bar in bars)
    assert "figures/accuracy_matrix" in json.dumps(sections[2])
    statement = json.loads((repository / "results/nncsl.cpu.json").read_text())["claims"][0]["statement"]
    assert statement in json.dumps(sections[1], ensure_ascii=False)
    assert '"query": "^(nncsl)-"' in json.dumps(written["workspace"])
    blocks = written["report"]["spec"]["blocks"]
    headings = [block["children"][0]["text"] for block in blocks if block.get("type") == "heading"]
    assert headings == names
    assert statement in json.dumps(blocks, ensure_ascii=False)
    # the same again: what is written can be compared and committed
    assert main([*argv, str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/nncsl.json").read_text()) == written


@needs_workspaces
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_one(name: str, repository: Path, tmp_path: Path) -> None:
    assert main(["dashboard", name, "--results", str(repository / "results"), "--out", str(tmp_path)]) == 0
    assert panels_of(json.loads((tmp_path / f"{name}.json").read_text())["workspace"])


@needs_workspaces
def test_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb
    from wandb_workspaces.reports import v2
    from wandb_workspaces.workspaces import Workspace

    saved: list[str] = []
    monkeypatch.setattr(wandb.api, "set_setting", None, raising=False)
    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: "k" * 40))
    for cls in (Workspace, v2.Report):
        monkeypatch.setattr(cls, "save", lambda self: saved.append(type(self).__name__))
        monkeypatch.setattr(cls, "url", property(lambda self: f"https://wandb.example/{type(self).__name__}"))
    argv = ["dashboard", "nncsl", "--publish", "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "--publish: no entity" in capsys.readouterr().err
    assert main([*argv, "--entity", "us"]) == 0
    assert saved == ["Workspace", "Report"]
    assert "https://wandb.example/Report" in capsys.readouterr().out

    def fail(self: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Workspace, "save", fail)
    assert main([*argv, "--entity", "us"]) == 1
    assert "not published: no route to host" in capsys.readouterr().err


def test_publishing_needs_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(type(wandb.api), "api_key", property(lambda self: None))
    assert main(["dashboard", "nncsl", "--publish", "--entity", "us", "--out", str(tmp_path)]) == 2
    assert "no W&B account is configured" in capsys.readouterr().err


def test_there_are_search_spaces() -> None:
    assert SEARCHED


@pytest.mark.parametrize("name", SEARCHED)
def test_sweeps(name: str, tmp_path: Path) -> None:
    assert main(["dashboard", name, "--sweep", "--out", str(tmp_path)]) == 0
    sweep = yaml.safe_load((tmp_path / f"{name}.sweep.yaml").read_text())
    assert sweep["metric"]["goal"] in ("minimize", "maximize")
    assert sweep["metric"]["name"].startswith("val/")  # a search never looks at the test data
    known = {option.name for option in options_of(registry.find("methods", name))[1]}
    config = sweep["command"][sweep["command"].index("--config") + 1]
    assert config in shipped_configs()
    for key, axis in sweep["parameters"].items():
        group, _, option = key.partition(".")
        assert group in ("model", "data", "trainer")
        assert group != "model" or option in known, key
        # what the agent will type is understood
        values = axis.get("values") or [axis["min"], axis["max"]]
        for value in values:
            options = parse_options("fit", ["--config", config, f"--{key}={value}"])
            merged = load_layers(options.configs, options.overrides).merged
            if group == "model":
                assert merged["model"]["init_args"][option] == value


def test_axes() -> None:
    assert parameter("lr", {"values": [1, 2]}) == {"values": [1, 2]}
    log = parameter("lr", {"min": 1e-3, "max": 1e-1, "log": True})
    assert log == {"distribution": "log_uniform_values", "min": 1e-3, "max": 1e-1}
    assert parameter("depth", {"min": 1, "max": 4})["distribution"] == "int_uniform"
    assert parameter("x", {"min": 0.0, "max": 1.0})["distribution"] == "uniform"
    assert parameter("n", {"min": 1, "max": 64, "log": True})["distribution"] == "q_log_uniform_values"
    wrongs: list[dict[str, Any]] = [{"min": 2, "max": 1}, {"values": []}, {"min": 1}, {"values": [1], "min": 0}]
    for wrong in wrongs:
        with pytest.raises(UsageError, match="search: lr: "):
            parameter("lr", wrong)
    with pytest.raises(UsageError, match="'vals' is not accepted; did you mean 'values'"):
        parameter("lr", {"vals": [1]})


def test_a_method_without_a_search_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "read_card", lambda entry: {})
    with pytest.raises(UsageError, match="'nncsl' documents no search space"):
        sweep_of("nncsl")
    monkeypatch.setattr(registry, "read_card", lambda entry: {"search": {"lr": {"values": [1]}}, "objective": "best"})
    with pytest.raises(UsageError, match="objective: 'best' is not accepted"):
        sweep_of("nncsl")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nncls"], "did you mean 'nncsl'"),
        (["nncsl", "--config", "nncsl/smoke"], "--config goes with --sweep"),
        (["slm_bottlenecks", "--sweep", "--config", "slm_bottlenecks/smok"], "did you mean 'slm_bottlenecks/smoke'"),
    ],
)
def test_misuse(argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", *argv, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
