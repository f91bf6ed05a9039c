"""write a package with a method of your own"""

from __future__ import annotations

import argparse
import keyword
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from zoo import __version__, registry
from zoo.card import ZOO_API
from zoo.errors import UsageError

#: Names of modules that a package must not hide.
TAKEN = ("zoo", "datamodules", "callbacks", "torch", "lightning", "test", "tests", "configs")


def main(argv: list[str]) -> int:
    """Write the package and say what to do with it."""
    parser = argparse.ArgumentParser(
        prog="zoo new", description="Write a pip package with a small method that passes `zoo check`, to start from."
    )
    parser.add_argument("name", help="name of the method, e.g. my_method; the package is called the same")
    parser.add_argument("--path", type=Path, default=Path(), help="folder to write into (default: here)")
    args = parser.parse_args(argv)
    package = check_name(args.name)
    target = args.path / package.replace("_", "-")
    write(package, target)
    print(f"wrote {target}\n  pip install -e {relative(target)}\n  zoo check {package}")
    return 0


def check_name(name: str) -> str:
    """Return the name of the Python package for a method.

    Raises:
        UsageError: If it is no name of a package or taken.
    """
    package = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", package) or keyword.iskeyword(package):
        raise UsageError(f"new: {name!r} cannot name a Python package", "accepted: lower-case letters, digits and _")
    if package in TAKEN or any(entry.name == package for entry in registry.entries()):
        raise UsageError(f"new: {name!r} is taken", "zoo list shows the names that are registered")
    return package


def relative(path: Path) -> str:
    """Return a path that pip does not mistake for the name of a package."""
    return str(path) if path.is_absolute() or str(path).startswith(".") else f"./{path}"


def write(package: str, target: Path) -> None:
    """Fill in the template.

    Raises:
        UsageError: If there is something at `target`.
    """
    if target.exists():
        raise UsageError(f"new: {target} is there already", "choose another --path or name")
    words = {
        "package": package,
        "dist": package.replace("_", "-"),
        "class_name": "".join(part.capitalize() for part in package.split("_")),
        "title": package.replace("_", " ").capitalize(),
        "version": __version__,
        "api": ZOO_API,
    }
    places = {
        "package/configs": f"{package}/configs/{package}",
        "package": package,
        "tests/test_package": f"tests/test_{package}",
    }
    for name, source in files(resources.files("zoo") / "template"):
        for old, new in places.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        path = target / name.removesuffix(".in")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(source.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")


def files(folder: Traversable, prefix: str = "") -> list[tuple[str, Traversable]]:
    """Return the template's files with their paths in it."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".in"):
            found.append((prefix + entry.name, entry))
    return found
