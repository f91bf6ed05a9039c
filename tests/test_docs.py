"""The documentation site: built without a warning, complete for every method, and drawn by a browser."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo import registry
from zoo.config import shipped_configs
from zoo.explain import Option, options_of
from zoo.pages.mathml import replace_equations
from zoo.pages.method import assemble, card_box, claims_section, generated, method_names, option_rows, overview

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None or importlib.util.find_spec("latex2mathml") is None,
    reason="the extra docs is not installed",
)
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def text_of(page: str) -> str:
    """The words of an HTML page."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning is an error."""
    root, out = Path(__file__).parents[1], tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@needs_mkdocs
@pytest.mark.parametrize("name", method_names())
def test_method_pages_are_complete(site: Path, name: str, repository: Path) -> None:
    raw = (site / "methods" / name / "index.html").read_text(encoding="utf-8")
    words = text_of(raw)
    entry = registry.find("methods", name)
    assert text_of(registry.read_card(entry)["summary"]) in words
    for option in options_of(entry)[1]:
        assert f"<code>{option.name}</code>" in raw, option.name
        assert option.text, f"{name}: {option.name} is not documented"
    for config in (key for key in shipped_configs() if key.startswith(f"{name}/")):
        assert config in words
    for path in (repository / "results").glob(f"{name}.*.json"):
        result = json.loads(path.read_text())
        for claim in result["claims"]:
            assert re.sub(r"\s+", " ", claim["statement"]) in words
        if path.with_suffix(".png").is_file() and result["claims"]:
            assert f"measured/{path.stem}.png" in raw
            assert (site / "measured" / f"{path.stem}.png").read_bytes() == path.with_suffix(".png").read_bytes()
    assert "arithmatex" not in raw
    written = repository / "docs/methods" / f"{name}.md"
    if written.is_file() and "$$" in written.read_text(encoding="utf-8"):
        assert "<math" in raw


@needs_mkdocs
def test_home_page_lists_all_methods(site: Path) -> None:
    raw = (site / "index.html").read_text(encoding="utf-8")
    for name in method_names():
        assert f'href="methods/{name}/"' in raw


@needs_mkdocs
def test_the_tutorial_shows_the_code_that_is_tested(site: Path, repository: Path) -> None:
    words = text_of((site / "plugin/index.html").read_text(encoding="utf-8"))
    package = repository / "examples/zoo-simsiam"
    for file in ("pyproject.toml", "zoo_simsiam/module.py", "zoo_simsiam/losses.py", "tests/test_simsiam.py"):
        for line in (package / file).read_text(encoding="utf-8").splitlines():
            assert re.sub(r"\s+", " ", line.strip()) in words, (file, line)


@needs_mkdocs
def test_no_page_asks_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        raw = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(https?:[^"]+)"', raw)
        assert not [address for address in loaded if 'rel="canonical"' not in address], page


#: Looks at a page in a frame and writes what it sees.
PROBE = """<!doctype html><body><iframe id="f" src="{page}" width="1280" height="2000"></iframe>
<pre id="seen">waiting</pre>
<script>
document.getElementById("f").addEventListener("load", () => setTimeout(() => {{
  const inside = document.getElementById("f").contentDocument, drawn = e => e.getBoundingClientRect();
  const visible = e => drawn(e).width > 5 && drawn(e).height > 5;
  const seen = selector => [...inside.querySelectorAll(selector)].filter(visible);
  document.getElementById("seen").textContent = JSON.stringify({{
    title: inside.title,
    tables: seen(".md-content table").length,
    cells: seen(".md-content td").filter(e => e.textContent.trim()).length,
    figures: seen(".md-content img").filter(e => e.complete && e.naturalWidth > 100).length,
    broken: [...inside.images].filter(e => e.complete && !e.naturalWidth).map(e => e.src),
    equations: seen("math").length,
    code: seen("pre code").length,
    links: seen(".md-nav a").length,
    wider: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
  }});
}}, 300));
</script></body>"""


@pytest.fixture(scope="session")
def served(site: Path) -> Iterator[tuple[Path, str]]:
    """The site behind a local server, and its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield site, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def look(served: tuple[Path, str], page: str, profile: Path) -> dict[str, object]:
    """Let a headless browser draw a page and return what it sees."""
    site, address = served
    (site / "probe.html").write_text(PROBE.format(page=f"{address}/{page}"), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
         "--virtual-time-budget=20000", "--dump-dom", f"{address}/probe.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return dict(json.loads(html.unescape(found[1])))


@needs_mkdocs
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_browser_draws_the_pages(served: tuple[Path, str], tmp_path: Path, repository: Path) -> None:
    home = look(served, "index.html", tmp_path)
    assert home["title"] == "method-zoo"
    assert home["tables"] == 1
    assert int(str(home["cells"])) >= 4 * len(method_names())
    method = look(served, "methods/nncsl/index.html", tmp_path)
    assert int(str(method["tables"])) >= 4  # losses, arms, claims, options, configs
    assert int(str(method["equations"])) >= 5
    if (repository / "results/nncsl.cpu.png").is_file():
        assert int(str(method["figures"])) >= 1
    for seen in (home, method):
        assert seen["broken"] == []
        assert int(str(seen["wider"])) <= 1, "the page itself must not scroll sideways"
        assert int(str(seen["links"])) > len(method_names())
        assert int(str(seen["code"])) >= 1


def test_parts_of_a_page(tmp_path: Path) -> None:
    option = Option("name", "str | None", "None", "A text with a | bar and <angle>.")
    row = option_rows([option]).splitlines()[-1]
    assert row == "| `name` | `str \\| None` | `None` | A text with a \\| bar and &lt;angle>. |"
    box = card_box("m", {"summary": "What", "arxiv": "1234.5678", "skip_checks": {"ranks": "why"}}, "dist")
    assert "    What." in box
    assert "arXiv 1234.5678](https://arxiv.org/abs/1234.5678)" in box
    assert "Not checked: `ranks`, why." in box
    page = "# m\n\nSeeds 0, 1; a CPU.\n\n## Claims\n\n| claim |\n| --- |\n| it holds |\n\n## Runs\n\n| run |\n"
    assert claims_section(page) == "Seeds 0, 1; a CPU.\n\n| claim |\n| --- |\n| it holds |"
    assert "Nothing yet. `zoo reproduce nncsl`" in generated("nncsl", tmp_path)
    page = assemble("nncsl", "# NNCSL\n\nBy hand.\n", tmp_path)
    assert page.index("# NNCSL") < page.index('!!! abstract "`nncsl`"') < page.index("By hand.") < page.index("## Opt")
    assert assemble("nncsl", "", tmp_path).startswith("# nncsl\n")
    assert "not measured" in overview(tmp_path)
    assert "With [`salsa`](salsa.md)." in generated("sft", tmp_path)
    stages = [line for line in overview(tmp_path).splitlines() if "| with [`" in line]
    assert [line.split("`")[1] for line in stages if line.endswith("with [`salsa`](methods/salsa.md) |")] == [
        "reward_model",
        "sft",
    ]


def test_overview_counts_judged_claims(tmp_path: Path) -> None:
    claims = [{"holds": True}, {"holds": False}, {"holds": None}]
    (tmp_path / "nncsl.cpu.json").write_text(json.dumps({"method": "nncsl", "claims": claims}))
    row = next(line for line in overview(tmp_path).splitlines() if "`nncsl`" in line)
    assert "| 1 of 2, 1 open |" in row


@needs_mkdocs
def test_equations() -> None:
    drawn = replace_equations('a <span class="arithmatex">\\(x_i &lt; \\frac{1}{2}\\)</span> b')
    assert drawn.startswith("a <math")
    assert "<mfrac>" in drawn
    assert "arithmatex" not in drawn
    assert 'class="equation"><math' in replace_equations('<div class="arithmatex">\\[\ny^2\n\\]</div>')
    for wrong, message in {"x^": "Missing", "\\foo x": "foo is not known"}.items():
        with pytest.raises(ValueError, match=message):
            replace_equations(f'<span class="arithmatex">\\({wrong}\\)</span>')


@needs_mkdocs
def test_links_that_leave_the_docs() -> None:
    from mkdocs.structure.files import File, Files

    from zoo.pages.hook import log, mend_links

    known = ("measured/x.cpu.md", "measured/p.png", "contract.md", "methods/m.md", "measured/README.md")
    files = Files([File(name, "docs", "site", True) for name in known])
    assert mend_links("[a](../../results/x.cpu.md)", "methods/m.md", files) == "[a](../measured/x.cpu.md)"
    assert mend_links("![a](../../results/p.png)", "methods/m.md", files) == "![a](../measured/p.png)"
    assert mend_links("[a](../contract.md#ranks)", "methods/m.md", files) == "[a](../contract.md#ranks)"
    assert mend_links("[a](../examples/zoo-simsiam)", "contract.md", files) == "`a`"
    assert mend_links("[all](results)", "contract.md", files) == "[all](results)"  # mkdocs will complain
    assert mend_links("```\n[a](../results/x.md)\n```\n", "contract.md", files) == "```\n[a](../results/x.md)\n```\n"
    said: list[str] = []
    log.addFilter(lambda record: said.append(record.getMessage()) or False)  # type: ignore[func-returns-value]
    try:
        mend_links("[a](../zoo/no_such_file.py)", "contract.md", files)
    finally:
        log.filters.clear()
    assert said == ["contract.md: the link to ../zoo/no_such_file.py leads nowhere"]
