"""The public names: the page, `zoo.__all__`, what is imported lazily and what the type checker sees are the same."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_page_lists_exactly_the_public_names() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Names")[1].split("## What stays")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(zoo.__all__)
    assert len(listed) == len(set(listed))


def test_the_type_checker_sees_what_is_imported_lazily() -> None:
    tree = ast.parse(Path(zoo.__file__).read_text(encoding="utf-8"))
    [block] = [n for n in tree.body if isinstance(n, ast.If)]
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == zoo._PUBLIC
    assert sorted(zoo.__all__) == sorted(zoo._PUBLIC)


@pytest.mark.parametrize("name", sorted(zoo.__all__))
def test_every_public_name_is_there_and_explained(name: str) -> None:
    value = getattr(zoo, name)
    assert name == "ZOO_API" or value.__doc__, f"{name} has no docstring"


def test_the_page_names_every_group_of_entry_points() -> None:
    from zoo import registry

    groups = re.findall(r"^\| `zoo\.(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(groups) == {*registry.GROUPS, "api"}


def test_import_zoo_is_light_and_a_wrong_name_is_an_attribute_error() -> None:
    code = "import sys, zoo; assert 'torch' not in sys.modules; assert 'Card' in dir(zoo); zoo.Card; zoo.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'zoo' has no attribute 'nothing'" in done.stderr


@pytest.mark.parametrize("folder", ["examples", "zoo/template"])
def test_what_we_show_as_plugins_imports_public_names_only(folder: str) -> None:
    root = PAGE.parents[1] / folder
    found = [path for path in root.rglob("*") if path.name.endswith((".py", ".py.in"))]
    assert found
    for path in found:
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\s*(?:from|import) (zoo|datamodules|callbacks)\b(\S*)", line)
            assert not match or (match[1] == "zoo" and match[2] == ""), f"{path}: {line}"
