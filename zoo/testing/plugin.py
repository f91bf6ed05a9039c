"""The conformance kit in pytest: a test that takes the fixture `zoo_check` runs once for each check of each method.

    import pytest


    @pytest.mark.zoo_methods("my_method")
    def test_contract(zoo_check):
        zoo_check()

Without the marker it runs for every registered method, so that none is left out. `--zoo-full` adds the slow checks.
Checks that the card of a method names in `skip_checks` are skipped with its reason. Stored losses are looked for in the
folder of the ini option `zoo_golden`. Nothing heavy is imported when pytest loads this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from zoo.testing.subject import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--zoo-full` and the ini option `zoo_golden`."""
    parser.getgroup("zoo").addoption("--zoo-full", action="store_true", help="run the slow conformance checks too")
    parser.addini("zoo_golden", "folder of the stored losses of methods", default="tests/golden")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "zoo_methods(*names): methods that the fixture zoo_check is for (default: all)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each method and check, those of a method together."""
    if "zoo_check" not in metafunc.fixturenames:
        return
    from zoo import registry
    from zoo.testing.catalogue import CHECKS

    marker = metafunc.definition.get_closest_marker("zoo_methods")
    registered = sorted({entry.name for entry in registry.entries("methods")})
    names = marker.args if marker is not None else registered
    full = metafunc.config.getoption("--zoo-full")
    together = metafunc.config.pluginmanager.hasplugin("xdist")
    cases = [
        pytest.param((name, check), id=f"{name}-{check.name}", marks=[pytest.mark.xdist_group(name)] * together)
        for name in names
        for check in CHECKS
        if full or not check.full
    ]
    metafunc.parametrize("zoo_check", cases, indirect=True)


@pytest.fixture(scope="session")
def zoo_subjects(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Subject]]:
    """Return a function that gives the subject of a method; its runs are shared by its checks."""
    from zoo.testing.subject import Subject

    golden = Path(request.config.rootpath, request.config.getini("zoo_golden"))
    last: dict[str, Subject] = {}

    def subject(name: str) -> Subject:
        if name not in last:
            last.clear()
            last[name] = Subject(name, tmp_path_factory.mktemp(f"zoo-{name}"), golden)
        return last[name]

    yield subject
    last.clear()


@pytest.fixture
def zoo_check(request: Any, zoo_subjects: Callable[[str], Subject]) -> Callable[[], None]:
    """Return a function that runs one check on one method and fails or skips the test as it ends."""
    name, check = request.param

    def run() -> None:
        from zoo.testing.run import outcome

        found = outcome(check, zoo_subjects(name))
        if found.status == "skipped":
            pytest.skip(found.text)
        if found.status in ("failed", "blocked"):
            pytest.fail(f"{name} does not keep the contract\n  {check.statement}\n  {found.text}", pytrace=False)

    return run
