"""The registry finds everybody, imports nobody, and one broken plugin disturbs no other."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo import registry
from zoo.errors import UsageError

Make = Callable[..., Path]
HEAVY = ("torch", "lightning", "numpy", "transformers", "jsonargparse", "wandb")


def names(group: str) -> list[str]:
    return [e.name for e in registry.entries(group)]


def test_a_foreign_method_is_found_and_loaded_only_on_demand(make_distribution: Make) -> None:
    make_distribution(
        "fake-plugin", {"zoo.methods": {"fake": "fake_plugin:Fake"}}, {"fake_plugin.py": "class Fake: pass"}
    )
    assert "fake" in names("methods")
    entry = registry.find("methods", "fake")
    assert "fake_plugin" not in sys.modules
    assert registry.load(entry).__name__ == "Fake"


def test_unknown_name_lists_the_closest(make_distribution: Make) -> None:
    make_distribution("fake-plugin", {"zoo.methods": {"resnetlike": "fake_plugin:Fake"}})
    with pytest.raises(UsageError, match=r"unknown name 'resnetlik' in methods\ndid you mean 'resnetlike'\?"):
        registry.find("methods", "resnetlik")


def test_two_distributions_with_one_name_are_both_named_and_can_be_chosen(make_distribution: Make) -> None:
    make_distribution("plug-a", {"zoo.methods": {"same": "plug_a:A"}}, {"plug_a.py": "class A: pass"})
    make_distribution("plug-b", {"zoo.methods": {"same": "plug_b:B"}}, {"plug_b.py": "class B: pass"}, version="2.5")
    with pytest.raises(
        UsageError, match=r"registered by plug-a 1.0 and plug-b 2.5\nsay which one: plug-a:same or plug-b:same"
    ):
        registry.find("methods", "same")
    assert registry.load(registry.find("methods", "plug_b:same")).__name__ == "B"


def test_a_plugin_cannot_shadow_a_builtin_silently(make_distribution: Make) -> None:
    make_distribution("evil", {"zoo.loggers": {"csv": "evil:X"}}, {"evil.py": "class X: pass"})
    with pytest.raises(UsageError, match=r"method-zoo .* and evil"):
        registry.find("loggers", "csv")
    assert registry.find("loggers", "method-zoo:csv").builtin


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        (
            "import not_installed_anywhere\nclass A: pass",
            "broken_mod:A",
            "it needs the package 'not_installed_anywhere'",
        ),
        ("raise RuntimeError('boom')", "broken_mod:A", "RuntimeError: boom"),
        ("class A: pass", "broken_mod:B", "has no attribute 'B'"),
        ("", "absent_mod:A", "pip install --force-reinstall broken-dist"),
        ("x = (", "broken_mod:A", "SyntaxError"),
    ],
)
def test_broken_plugins_say_who_and_why(make_distribution: Make, source: str, value: str, message: str) -> None:
    make_distribution("broken-dist", {"zoo.methods": {"broken": value}}, {"broken_mod.py": source})
    make_distribution("good", {"zoo.methods": {"good": "good_mod:G"}}, {"good_mod.py": "class G: pass"})
    with pytest.raises(UsageError) as error:
        registry.load(registry.find("methods", "broken"))
    assert "broken-dist 1.0" in str(error.value)
    assert message in str(error.value)
    assert registry.load(registry.find("methods", "good")).__name__ == "G"


def test_missing_extra_names_the_pip_install(make_distribution: Make) -> None:
    make_distribution(
        "needs-extra",
        {"zoo.methods": {"x": "needs_extra:X"}},
        {"needs_extra.py": "import exotic_lib"},
        requires=("exotic-lib>=1; extra == 'fast'",),
    )
    with pytest.raises(UsageError, match=r"pip install 'needs-extra\[fast\]'"):
        registry.load(registry.find("methods", "x"))


def test_newer_contract_is_refused_with_a_sentence(make_distribution: Make) -> None:
    make_distribution("futuristic", {"zoo.api": {"2": "futuristic"}, "zoo.methods": {"late": "futuristic:X"}})
    with pytest.raises(UsageError, match="written for contract 2, this zoo speaks 1"):
        registry.find("methods", "late")


def test_a_plugin_can_be_switched_off(make_distribution: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "Fake_Plugin")
    make_distribution("fake-plugin", {"zoo.methods": {"fake": "fake_plugin:Fake"}})
    with pytest.raises(UsageError, match="switched off"):
        registry.find("methods", "fake")


def test_half_removed_distribution_is_passed_over(make_distribution: Make) -> None:
    site = make_distribution("half", {"zoo.methods": {"half": "half:X"}})
    (site / "half-1.0.dist-info" / "METADATA").unlink()
    registry.refresh()
    assert "csv" in names("loggers")


def test_listing_imports_nothing_heavy_and_nothing_of_a_plugin(make_distribution: Make, tmp_path: Path) -> None:
    site = make_distribution("loud", {"zoo.methods": {"loud": "loud:X"}}, {"loud.py": "raise SystemExit('imported')"})
    code = (
        "import sys; from zoo.main import main; assert main(['list']) == 0; assert main(['--help']) == 0; "
        f"bad = [m for m in {HEAVY} if m in sys.modules]; assert not bad, bad"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
    )
    assert out.returncode == 0, out.stderr
    assert "loud" in out.stdout


@pytest.mark.parametrize("count", [500])
def test_many_plugins_are_listed_quickly(make_distribution: Make, tmp_path: Path, count: int) -> None:
    for i in range(count):
        make_distribution(
            f"plug{i}",
            {"zoo.methods": {f"method{i}": f"plug{i}:M"}},
            {f"plug{i}.py": f"class M:\n    card = Card(title='t', summary='number {i}')\n"},
        )
    site = tmp_path / "site"
    command = [sys.executable, "-m", "zoo", "list"]
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run(
            command, capture_output=True, text=True, env={"PYTHONPATH": str(site), "PATH": ""}, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert f"number {count - 1}" in out.stdout
    # processor time: what the clock shows on a machine with nothing else to do
    assert min(seconds) <= 0.5


def test_card_is_read_without_import(make_distribution: Make) -> None:
    make_distribution(
        "carded",
        {"zoo.methods": {"carded": "carded.module:M"}},
        {
            "carded/__init__.py": "raise SystemExit('imported')",
            "carded/module.py": "class M:\n    card = Card(title='T', summary='S', skip_checks={'a': 'b'})\n",
        },
    )
    assert registry.read_card(registry.find("methods", "carded")) == {
        "title": "T", "summary": "S", "skip_checks": {"a": "b"},
    }  # fmt: skip
