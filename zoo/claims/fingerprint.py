"""What a result depends on, as a hash: the config, and the code that the method and its data are made of.

The code is found without importing it: from the modules of the classes in a config, along their import statements,
through the zoo's shared parts and the package of the class. Comments, docstrings, line breaks, the card and modules
called `figures` do not count, so that a better explanation does not make results stale; neither do the frame that
starts and records runs, data files, and the versions of libraries, which the results file names.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from zoo.errors import UsageError
from zoo.registry import source_path

#: Packages whose modules are followed besides those of the classes themselves.
SHARED = ("callbacks", "datamodules", "zoo")

#: Of the zoo itself, what decides about numbers; the rest is the frame.
ZOO_PARTS = ("zoo.nn", "zoo.methods")


def digest(content: Any) -> str:
    """Return a short hash of JSON-like content; the order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def class_paths(config: Any) -> set[str]:
    """Return every `class_path` in a config, at any depth."""
    if isinstance(config, Mapping):
        found = {config["class_path"]} if isinstance(config.get("class_path"), str) else set()
        return found.union(*map(class_paths, config.values()))
    if isinstance(config, list | tuple):
        return set().union(*map(class_paths, config))
    return set()


def code_files(paths: Iterable[str]) -> dict[str, str]:
    """Return the hash of each module that the classes `paths` are made of, by module name.

    Args:
        paths: Dotted class paths; packages without source files (compiled, or not installed) are left out.

    Raises:
        UsageError: If a file is not Python.
    """
    modules = {path.rpartition(".")[0] for path in paths}
    followed = {*SHARED, *(module.partition(".")[0] for module in modules)}
    out: dict[str, str] = {}
    queue = sorted(module for module in modules if _counts(module, followed))
    while queue:
        module = queue.pop()
        path = _file(module)
        if module in out or path is None:
            continue
        try:
            out[module] = source_hash(path, path.stat().st_mtime_ns)
            queue += [m for m in imported_modules(path, module, followed) if _counts(m, followed)]
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not Python: {error}") from error
    return out


def code_hash(paths: Iterable[str]) -> str:
    """Return one hash of everything in `code_files`."""
    return digest(code_files(paths))


def _counts(module: str, followed: set[str]) -> bool:
    top = module.partition(".")[0]
    if module.rpartition(".")[2] == "figures":
        return False
    if top == "zoo":
        return module.startswith(ZOO_PARTS)
    return top in followed


def _file(module: str) -> Path | None:
    return source_path(module) if module else None


@lru_cache(maxsize=1024)
def source_hash(path: Path, mtime_ns: int) -> str:
    """Return a hash of what a source file does: its tokens without comments, docstrings and the card."""
    text = path.read_text(encoding="utf-8")
    return hashlib.sha256("\n".join(significant_tokens(text)).encode()).hexdigest()[:16]


def significant_tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a source text that change what it does.

    Tokens instead of the syntax tree: the tree differs between Python versions. A string that is a whole statement is a
    docstring; f-strings, one token or many depending on the version, come as they are written.
    """
    skipped = _card_lines(text)
    lines = text.splitlines(keepends=True)
    statement: list[tuple[int, str]] = []
    depth, begin = 0, (0, 0)
    names = {tokenize.INDENT: ">", tokenize.DEDENT: "<"}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            begin = begin if depth else token.start
            depth += 1
        if depth:
            if name in ("FSTRING_END", "TSTRING_END"):
                depth -= 1
                if not depth:
                    statement.append((tokenize.OP, _slice(lines, begin, token.end)))
            continue
        if token.start[0] in skipped or token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            if statement and {kind for kind, _ in statement} != {tokenize.STRING}:
                yield " ".join(string for _, string in statement)
            statement = []
        elif token.type in names:
            yield names[token.type]
        else:
            # an f-string is one STRING before Python 3.12
            is_f = token.type == tokenize.STRING and "f" in token.string.partition(token.string[-1])[0].lower()
            statement.append((tokenize.OP if is_f else token.type, token.string))


def _slice(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    middle = lines[start[0] : end[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *middle, lines[end[0] - 1][: end[1]]])


def _card_lines(text: str) -> set[int]:
    """Return the lines of `card = Card(...)` in the classes of a module."""
    out: set[int] = set()
    for cls in ast.parse(text).body:
        for node in cls.body if isinstance(cls, ast.ClassDef) else ():
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if any(isinstance(t, ast.Name) and t.id == "card" for t in targets):
                out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return out


def imported_modules(path: Path, module: str, followed: Collection[str]) -> list[str]:
    """Return the modules that a source file imports when it is used, whether at its top or inside a function.

    Names that only the type checker sees do not count. `from package import name` stands for the submodule where there
    is one, and for the package's `__init__` otherwise; `from zoo import name` for the module that defines the name.

    Args:
        path: The source file.
        module: Its dotted name.
        followed: Packages whose submodules are looked up.
    """
    is_package = path.name == "__init__.py"
    found: list[str] = []
    for node in _runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            for alias in node.names:
                found.append(_defining_module(base, alias.name, followed))
    return list(dict.fromkeys(found))


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *_runtime_nodes(other))
            continue
        yield node
        yield from _runtime_nodes(node)


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _defining_module(base: str, name: str, followed: Collection[str]) -> str:
    if base == "zoo":
        from zoo import _PUBLIC

        base = _PUBLIC.get(name, base)
    own = f"{base}.{name}"
    return own if base.partition(".")[0] in followed and _file(own) is not None else base
