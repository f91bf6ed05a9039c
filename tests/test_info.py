"""`zoo info` and `zoo list`: every option that a class takes, how it is given, and columns that hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo import registry
from zoo.checks import parameters
from zoo.explain import options_of
from zoo.main import main

Make = Callable[..., Path]
GROUPS = ("methods", "datamodules", "callbacks", "loggers")


@pytest.mark.parametrize("group", GROUPS)
def test_options_read_from_the_source_are_those_of_the_class(group: str) -> None:
    for entry in registry.entries(group):
        if entry.builtin and not entry.problem:
            options = options_of(entry)[1]
            assert [option.name for option in options] == list(parameters(registry.load(entry))), entry.name
            assert all(option.text for option in options), entry.name


def test_options_of_bases(make_distribution: Make) -> None:
    make_distribution(
        "heirs",
        {"zoo.datamodules": {name: f"heirs.leaf:{name}" for name in ("Plain", "Passing", "Closed", "Dotted", "Lost")}},
        {
            "heirs/__init__.py": "raise SystemExit('imported')",
            "heirs/parts/__init__.py": "from .base import Base as Root",
            "heirs/parts/base.py": (
                'class Base:\n    """B.\n\n    Args:\n        a: First.\n        b: Second.\n    """\n'
                "    def __init__(self, a: int, *, b: str = 'x'): ...\n"
            ),
            "heirs/leaf.py": (
                "import json\nimport heirs.parts as p\nfrom .parts import Root\n"
                'class Plain(Root):\n    """P.\n\n    Args:\n        b: Mine.\n    """\n'
                "class Passing(Root):\n    def __init__(self, c: int = 1, **rest): ...\n"
                "class Closed(Root):\n    def __init__(self, c: int = 1): ...\n"
                "class Dotted(p.Root): ...\n"
                "class Lost(json.nothing.X): ...\n"
            ),
        },
    )
    found = {
        name: [(o.name, o.default, o.text) for o in options_of(registry.find("datamodules", name))[1]]
        for name in ("Plain", "Passing", "Closed", "Dotted", "Lost")
    }
    first, second = ("a", "", "First."), ("b", "'x'", "Second.")
    assert found["Plain"] == [first, ("b", "'x'", "Mine.")]
    assert found["Passing"] == [("c", "1", ""), first, second]
    assert found["Closed"] == [("c", "1", "")]
    assert found["Dotted"] == [first, second]
    assert found["Lost"] == []


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("digits", ["options (--data.NAME VALUE):", "labels_per_class: int | None = 10"]),
        ("suave", ["options (--model.NAME VALUE):"]),
        ("figures", ["options (--trainer.callbacks+='{class_path: figures, init_args: {NAME: VALUE}}'):"]),
        ("wandb", ["options (--trainer.logger='[csv, {class_path: wandb, init_args: {NAME: VALUE}}]'):"]),
        ("resume_checkpoint", ["options (--checkpoint.NAME VALUE):"]),
    ],
)
def test_info_says_how_options_are_given(name: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in lines), out


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--trainer.callbacks+={class_path: figures, init_args: {dpi: 7}}", "callbacks"),
        ("--trainer.logger=[csv, {class_path: wandb, init_args: {group: g}}]", "logger"),
    ],
)
def test_what_info_says_is_accepted(option: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    toy = str(Path(__file__).parent / "support" / "toy.yaml")
    assert main(["fit", "--config", toy, option, "--print_config"]) == 0
    items = yaml.safe_load(capsys.readouterr().out)["trainer"][place]
    assert items[-1]["init_args"] in ({"dpi": 7}, {"group": "g"})


def test_a_long_name_keeps_the_columns_of_the_list(make_distribution: Make, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a_name_that_is_longer_than_all_the_others"
    source = {"lengthy.py": 'class X:\n    """Sums up things."""\n'}
    make_distribution("lengthy", {"zoo.datamodules": {name: "lengthy:X", "brief": "lengthy:X"}}, source)
    assert main(["list", "datamodules"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "Sums up" in line]
    assert len(lines) == 2
    assert len({line.index("Sums up") for line in lines}) == 1
