"""What holds for the whole repository: nothing unsafe, nothing of one machine, nothing left out for a method."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from zoo import registry
from zoo.claims.reader import claims_files
from zoo.config import shipped_configs

#: What no file may hold, and why. This file is the only one that has to name it.
FORBIDDEN = {
    r"trust_remote_code\s*=\s*True": "code that comes with weights is never run",
    r"(?<!safe_)yaml\.(?:unsafe_|full_)load\(|yaml\.load\((?!text, Loader=Loader\))": "tags of YAML can run code",
    r"allow_pickle\s*=\s*True|joblib\.load\(": "unpickling runs code",
    r"\beval\(|\bexec\(": "text is not run",
    r"/(?:work|farm|root|home/[a-z]+)/": "paths of one machine",
}
#: Places where a pattern stands for a reason.
ALLOWED = {
    # the isolated runner of programs that answer a problem, off unless it is asked for
    ("datamodules/reasoning_answers.py", r"\beval\(|\bexec\("),
}


def tracked(*patterns: str) -> list[str]:
    repository = Path(__file__).parents[1]
    shown = subprocess.run(["git", "ls-files", *patterns], cwd=repository, capture_output=True, text=True, check=False)
    if shown.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in shown.stdout.split() if (repository / name).is_file()]


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_nothing_forbidden_is_in_the_repository(pattern: str, repository: Path) -> None:
    found = []
    for name in tracked("*.py", "*.yaml", "*.toml", "*.md", "*.in", ".ci"):
        if name == "tests/test_house.py" or any(name.startswith(a) and pattern == b for a, b in ALLOWED):
            continue
        text = (repository / name).read_text(encoding="utf-8")
        if name.endswith(".py"):  # methods of that name are something else: model.eval()
            text = re.sub(r"\.(eval|exec)\(", ".x(", text)
        for line in re.finditer(pattern, text):
            found.append(f"{name}:{text.count(chr(10), 0, line.start()) + 1}: {line.group()}")
    assert not found, f"{FORBIDDEN[pattern]}\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "text", "hit"),
    [
        (1, "yaml.safe_load(x)", False),
        (1, "yaml.load(x, Loader=yaml.Loader)", True),
        (1, "yaml.unsafe_load(x)", True),
        (0, "from_pretrained(x, trust_remote_code = True)", True),
        (4, "open('/root/x')", True),
    ],
)
def test_the_patterns_hit_what_they_are_for(pattern: int, text: str, hit: bool) -> None:
    assert bool(re.search(list(FORBIDDEN)[pattern], text)) is hit


def unsafe_loads(source: str) -> list[int]:
    """Lines that call `torch.load` without `weights_only=True`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
    return [c.lineno for c in loads if not any(ast.unparse(k) == "weights_only=True" for k in c.keywords)]


def test_checkpoints_are_read_without_unpickling(repository: Path) -> None:
    assert unsafe_loads("torch.load(f(), map_location='cpu')") == [1]
    assert unsafe_loads("torch.load(f(), weights_only=True)") == []
    found = {name: unsafe_loads((repository / name).read_text(encoding="utf-8")) for name in tracked("*.py")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def own_methods() -> list[str]:
    return sorted({entry.name for entry in registry.entries("methods") if entry.dist == "method-zoo"})


@pytest.mark.parametrize("name", own_methods())
def test_every_method_has_its_parts(name: str, repository: Path) -> None:
    assert f"{name}/smoke" in shipped_configs()
    assert (repository / "tests" / "golden" / f"{name}.json").is_file(), "zoo check NAME --update-golden tests/golden"
    pages = [path.read_text(encoding="utf-8") for path in (repository / "docs" / "methods").glob("*.md")]
    assert any(f"`{name}`" in text or f"config {name}/" in text for text in pages), "no page in docs/methods names it"
    assert f"`{name}`" in (repository / "README.md").read_text(encoding="utf-8"), "README's table leaves it out"


def test_every_claims_file_is_of_a_registered_method() -> None:
    methods = {entry.name for entry in registry.entries("methods")}
    assert set(claims_files()) <= methods


def test_public_functions_of_the_equations_say_where_they_come_from(repository: Path) -> None:
    """Each `losses.py` names the paper, and each of its public functions has a docstring."""
    for path in sorted((repository / "zoo" / "methods").glob("*/losses.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        whole = " ".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        assert re.search(r"arXiv|Section|Eq\.", (ast.get_docstring(tree) or "") + whole), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_a_long_file_says_why(repository: Path) -> None:
    files = [repository / name for name in tracked("*.py")]
    long = [path for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400]
    silent = [
        str(path.relative_to(repository))
        for path in long
        if "Longer than other files" not in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    ]
    assert not silent, f"over 400 lines without a reason in the docstring: {silent}"
