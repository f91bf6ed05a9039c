"""A result is stale when something changed that it depends on, and only then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zoo.claims.campaign import fingerprints
from zoo.claims.fingerprint import class_paths, code_files, imported_modules, significant_tokens
from zoo.claims.reader import load_plan
from zoo.errors import UsageError


def hashes(world) -> dict[str, str]:
    return {name: seeds[0] for name, seeds in fingerprints(load_plan(world.claims), [0]).items()}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_code_of_the_method_and_of_what_it_imports_counts(world) -> None:
    before = hashes(world)
    edit(world.package / "losses.py", "RATE = 1", "RATE = 2")
    after = hashes(world)
    assert before["a"] != after["a"]
    edit(world.package / "data.py", "pass", "size = 3")
    assert after["a"] != hashes(world)["a"]


def test_comments_docstrings_layout_and_unrelated_code_do_not(world) -> None:
    before = hashes(world)
    (world.package / "losses.py").write_text('"""Losses."""\n\n# a comment\nRATE   =  1  # why\n')
    (world.package / "method.py").write_text(
        '"""Doc."""\nfrom fakepkg import losses\n\n\nclass Method:\n'
        '    """Doc.\n\n    More."""\n\n    rate = losses.RATE\n'
    )
    (world.package / "unrelated.py").write_text("x = 2\n")
    assert hashes(world) == before


def test_config_options_seed_and_needs_count(world) -> None:
    before = hashes(world)
    world.body["runs"]["a"]["overrides"]["model.init_args.acc"] = 0.71
    world.body["runs"]["b"]["needs"] = ["a"]
    with_needs = hashes(load(world))
    assert with_needs["a"] != before["a"]
    world.body["runs"]["a"]["overrides"]["model.init_args.acc"] = 0.72
    assert hashes(load(world))["b"] != with_needs["b"], "b needs a"
    edit(world.root / "base.yaml", "fakepkg.data.Data", "fakepkg.unrelated.Data")
    assert hashes(world)["b"] != with_needs["b"]
    plan = load_plan(world.claims)
    assert len(set(fingerprints(plan, [0, 1])["a"].values())) == 2


def load(world):
    world.write()
    return world


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 2"),
        ("if a:\n    b()\n    c()", "if a:\n    b()\nc()"),
        ("x = f'{a}'", "x = f'{b}'"),
        ("x = f'a {b} {{c}}'", "x = f'a {b} {{d}}'"),
        ("x = 'a'", "x = 'b'"),
        ("f('doc')", "f('cod')"),
        ("class A:\n    n = Card(x=1)", "class A:\n    n = Card(x=2)"),
    ],
)
def test_what_changes_a_program_changes_its_tokens(one: str, other: str) -> None:
    assert list(significant_tokens(one)) != list(significant_tokens(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1 # a", "x = 1"),
        ("def f():\n    'doc'\n    return 1", "def f():\n    return 1"),
        ("x = [1,\n 2]", "x = [1, 2]"),
        ("class A:\n    card = Card(x=1)\n    y = 1", "class A:\n    card = Card(\n        x=2,\n    )\n    y = 1"),
        ("a\n\n\nb", "a\nb"),
        ("if a:\n  b", "if a:\n    b"),
    ],
)
def test_what_does_not_change_a_program_does_not(one: str, other: str) -> None:
    assert list(significant_tokens(one)) == list(significant_tokens(other))


def test_an_f_string_is_one_token_on_every_python() -> None:
    text = "x = f'a {b!r:>{w}} {{c}}' + rf'''{d}\n{e}'''"
    assert list(significant_tokens(text)) == [f"{text.replace(' + ', ' + ')}"]


def test_imports_inside_functions_and_relative_ones_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nimport os.path\n"
        "from . import sibling\nfrom ..other import thing\nfrom zoo import keyed_generator, nn\n"
        "if TYPE_CHECKING:\n    import never\nelse:\n    import really\n"
        "def f():\n    from datamodules import loading\n"
    )
    found = imported_modules(path, "top.sub.m", ("zoo", "datamodules"))
    assert {"os.path", "top.sub", "top.other", "datamodules.loading", "zoo.nn", "really"} <= set(found)
    assert "never" not in found


def test_our_frame_is_left_out_and_shared_parts_are_in() -> None:
    found = code_files(["callbacks.resume_checkpoint.ResumeCheckpoint", "zoo.nn.ema.X"])
    assert {"callbacks.resume_checkpoint", "callbacks.boundaries", "zoo.nn.ema"} <= set(found)
    assert not any(name.startswith(("zoo.errors", "zoo.runs", "zoo.card")) for name in found)


def test_drawing_does_not_decide_about_numbers(world) -> None:
    before = hashes(world)
    (world.package / "figures.py").write_text("size = 3\n")
    (world.package / "method.py").write_text(
        "from fakepkg import losses\n\nclass Method:\n    rate = losses.RATE\n    def figures(self):\n"
        "        from fakepkg.figures import size\n        return size\n"
    )
    assert "fakepkg.figures" not in code_files(["fakepkg.method.Method"])
    after = hashes(world)
    assert after["a"] != before["a"], "the module itself has changed"
    (world.package / "figures.py").write_text("size = 4\n")
    assert hashes(world) == after


def test_class_paths_are_found_at_any_depth() -> None:
    config = {"model": {"class_path": "a.A", "init_args": {"inner": [{"class_path": "b.B"}]}}, "x": {"class_path": 3}}
    assert class_paths(config) == {"a.A", "b.B"}


def test_broken_source_is_a_message(world) -> None:
    (world.package / "losses.py").write_text("def :\n")
    with pytest.raises(UsageError, match="losses.py is not Python"):
        hashes(world)


def test_hashing_imports_nothing_heavy(world) -> None:
    code = (
        "import sys; from zoo.claims.campaign import fingerprints; from zoo.claims.reader import load_plan\n"
        "from pathlib import Path; import zoo.commands.reproduce\n"
        f"fingerprints(load_plan(Path({str(world.claims)!r})), [0])\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'matplotlib', 'fakepkg')))"
    )
    env = {"PYTHONPATH": str(world.root / "site"), "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", code], env=env, cwd=Path.cwd()).returncode == 0
