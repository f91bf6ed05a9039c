"""One broken plugin disturbs no other: through the command line, with fake distributions and with real wheels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.sites import on_the_path
from zoo import registry
from zoo.main import main

ROOT = Path(__file__).parents[1]
TOY = str(ROOT / "tests" / "support" / "toy.yaml")
Make = Callable[..., Path]

#: A method that works, to be spoilt.
METHOD = """
from tests.support.toy import Toy
class Model(Toy):
    '''A toy.'''
"""

#: Name -> source, requirements, what the answer has to say.
BROKEN: dict[str, tuple[str, tuple[str, ...], str]] = {
    "missing_package": ("import not_there_at_all\n", (), "pip install not_there_at_all"),
    "missing_extra": ("import exotic_lib\n", ("exotic-lib>=1; extra == 'fast'",), "pip install 'missing-extra[fast]'"),
    "raises": ("raise RuntimeError('boom')\n", (), "RuntimeError: boom"),
    "leaves": ("raise SystemExit(0)\n", (), "SystemExit: 0"),
    "not_python": ("class Model(:\n", (), "SyntaxError"),
    "nothing_there": ("Other = 1\n", (), "the entry point names something that is not there"),
    "no_method": ("class Model:\n    pass\n", (), "is not a LightningModule"),
    "refuses": (
        METHOD + "    def __init__(self, num_classes: int = 2):\n        raise ValueError('never')\n",
        (),
        "never",
    ),
    "stumbles": (METHOD + "    def __init__(self, num_classes: int = 2):\n        {}['key']\n", (), "KeyError: 'key'"),
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def install_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Return a function that writes wheels and lets pip install them into a folder on `sys.path`."""
    site, wheels = tmp_path / "wheels_site", tmp_path / "wheels"
    wheels.mkdir()

    def install(*packages: tuple[str, dict[str, dict[str, str]], dict[str, str], tuple[str, ...]]) -> Path:
        made = []
        for name, points, files, requires in packages:
            info = f"{name.replace('-', '_')}-1.0.dist-info"
            needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
            content = dict(files)
            content[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}"
            content[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            content[f"{info}/entry_points.txt"] = "".join(
                f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
                for group, entries in points.items()
            )
            content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
            made.append(wheels / f"{name.replace('-', '_')}-1.0-py3-none-any.whl")
            with zipfile.ZipFile(made[-1], "w") as archive:
                for path, text in content.items():
                    archive.writestr(path, text)
        words = ["install", "-q", "--no-deps", "--no-index", "--target", str(site), *map(str, made)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True)
        registry.refresh()
        return site

    with on_the_path(site, monkeypatch):
        yield install


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of a command that is misuse: a few lines, no traceback."""
    capsys.readouterr()
    assert main([*words]) == 2
    error = capsys.readouterr().err
    shown = [line for line in error.splitlines() if not line.startswith(("Seed set", "run directory"))]
    assert len(shown) <= 5, error
    assert "Traceback" not in error
    return error


def others_work(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "suave" in capsys.readouterr().out
    assert main(["fit", "--config", TOY, "--trainer.max_epochs", "1"]) == 0


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_sentence(
    name: str, make_distribution: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    source, requires, message = BROKEN[name]
    dist = name.replace("_", "-")
    make_distribution(dist, {"zoo.methods": {name: f"{name}_mod:Model"}}, {f"{name}_mod.py": source}, requires=requires)
    error = answer(capsys, "fit", "--config", TOY, "--model", name)
    assert message in error
    assert dist in error or name in error
    others_work(capsys)


def test_real_wheels_that_are_broken_are_told_apart_and_leave_the_good_one_alone(
    install_wheels: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    good = (
        "good-plugin",
        {"zoo.methods": {"good": "good_plugin.module:Model"}, "zoo.configs": {"good_plugin": "good_plugin"}},
        {
            "good_plugin/__init__.py": "",
            "good_plugin/module.py": METHOD,
            "good_plugin/configs/good/smoke.yaml": Path(TOY).read_text().replace("tests.support.toy.Toy,", "good,"),
        },
        (),
    )
    broken = [
        (name.replace("_", "-"), {"zoo.methods": {name: f"{name}_mod:Model"}}, {f"{name}_mod.py": source}, requires)
        for name, (source, requires, _) in BROKEN.items()
    ]
    gone = ("gone", {"zoo.methods": {"gone": "gone_mod.module:Model"}}, {"gone_mod/module.py": METHOD}, ())
    bare = ("bare", {"zoo.methods": {"bare": "bare_mod:Model"}}, {"bare_mod.py": METHOD}, ())
    site = install_wheels(good, *broken, gone, bare)
    shutil.rmtree(site / "gone_mod")  # half removed: the files are away, the metadata are not
    (site / "bare-1.0.dist-info" / "METADATA").unlink()  # and the other way round
    registry.refresh()

    assert main(["list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["entries"]}
    assert rows["good"]["problem"] == ""
    assert "pip install --force-reinstall gone" in rows["gone"]["problem"]
    assert "bare" not in rows
    for name, (_, _, message) in BROKEN.items():
        assert message in answer(capsys, "fit", "--config", TOY, "--model", name)
    assert "pip install --force-reinstall gone" in answer(capsys, "fit", "--config", TOY, "--model", "gone")
    assert main(["fit", "--config", "good/smoke", "--trainer.max_epochs", "1"]) == 0


def test_a_newer_contract_is_refused_in_every_group(
    make_distribution: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"zoo.methods": {"late": "late:Model"}, "zoo.commands": {"later": "late"}, "zoo.configs": {"late": "late"}}
    groups["zoo.callbacks"] = {"latest": "late:Callback"}
    make_distribution("futuristic", {"zoo.api": {"9": "late"}, **groups}, {"late.py": "raise SystemExit"})
    sentence = "written for contract 9, this zoo speaks 1: upgrade method-zoo"
    assert sentence in answer(capsys, "fit", "--config", TOY, "--model", "late")
    assert sentence in answer(capsys, "fit", "--config", TOY, "--trainer.callbacks+=latest")
    assert sentence in answer(capsys, "later")
    assert sentence in answer(capsys, "info", "late")
    assert main(["list"]) == 0
    assert capsys.readouterr().out.count("NOT USABLE: written for contract 9") == 3
    others_work(capsys)


def test_a_plugin_takes_the_place_of_nothing_built_in(
    make_distribution: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "def main(argv):\n    print('theirs', argv)\n    return 0\n"
    make_distribution(
        "evil",
        {
            "zoo.methods": {"suave": "evil_mod:Model"},
            "zoo.loggers": {"csv": "evil_mod:Logger"},
            "zoo.callbacks": {"figures": "evil_mod:Callback", "resume_checkpoint": "evil_mod:Callback"},
            "zoo.commands": {"list": "evil_command", "fit": "evil_command"},
            "zoo.configs": {"evil_configs": "evil_configs"},
        },
        {
            "evil_mod.py": METHOD,
            "evil_command.py": command,
            "evil_configs/__init__.py": "",
            "evil_configs/configs/suave/smoke.yaml": "{}",
        },
    )
    others_work(capsys)  # with the loggers and callbacks that every run has
    error = answer(capsys, "fit", "--config", TOY, "--model", "suave")
    assert "registered by method-zoo" in error
    assert "say which one: method-zoo:suave or evil:suave" in error
    assert "shipped by several packages" in answer(capsys, "fit", "--config", "suave/smoke")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "theirs" not in out
    assert "the zoo has a command of this name; write evil:list" in out
    assert main(["evil:list", "word"]) == 0
    assert capsys.readouterr().out == "theirs ['word']\n"
    assert main(["fit", "--config", TOY, "--model", "evil:suave", "--trainer.max_epochs", "1"]) == 0


def test_one_plugin_extends_every_group(
    install_wheels: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    module = METHOD + (
        "import lightning.pytorch as pl\n"
        "from tests.support.toy import ToyData\n"
        "class Data(ToyData):\n    '''Points.'''\n"
        "class Shout(pl.Callback):\n"
        "    '''Says it.'''\n"
        "    def on_fit_end(self, trainer, model):\n        print('the callback was here')\n"
    )
    command = (
        '"""say something"""\nimport zoo\ndef main(argv):\n    raise zoo.UsageError("no " + argv[0], "try again")\n'
    )
    points = {
        "zoo.api": {"1": "full"},
        "zoo.methods": {"full": "full.module:Model"},
        "zoo.datamodules": {"full_data": "full.module:Data"},
        "zoo.callbacks": {"shout": "full.module:Shout"},
        "zoo.commands": {"full-say": "full.command", "full-half": "full.module"},
        "zoo.configs": {"full": "full"},
    }
    config = "model: {class_path: full}\ndata: {class_path: full_data}\n"
    config += "trainer: {max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, callbacks: [{class_path: shout}]}\n"
    files = {"full/__init__.py": "", "full/module.py": module, "full/command.py": command}
    install_wheels(("full", points, {**files, "full/configs/full/smoke.yaml": config}, ()))
    assert main(["fit", "--config", "full/smoke"]) == 0
    assert "the callback was here" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "full-say    from full" in capsys.readouterr().out
    assert answer(capsys, "full-say", "cake") == "error: no cake\ntry again\n"
    assert "has no function main(argv)" in answer(capsys, "full-half")
    assert main(["list", "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["entries"] if row["dist"] == "full"]
    assert {row["group"] for row in rows} == {"methods", "datamodules", "callbacks", "commands"}
    assert all(row["version"] == "1.0" and not row["problem"] for row in rows)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the working directory, which comes first on its path."""
    env = {**os.environ, "PYTHONPATH": f"{Path.cwd()}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)


def test_folders_of_the_user_with_our_names_are_in_nobodys_way() -> None:
    Path("callbacks").mkdir()
    Path("callbacks/__init__.py").write_text("raise RuntimeError('mine')")
    Path("datamodules").mkdir()
    Path("datamodules/mine.py").write_text("class Data: pass")
    done = python("-m", "zoo", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert not [row for row in json.loads(done.stdout)["entries"] if row["problem"]]
    done = python("-m", "zoo", "fit", "--config", TOY, "--trainer.max_epochs", "1", "--data.num_workers", "1")
    assert done.returncode == 0, done.stderr
    done = python("-m", "zoo", "fit", "--config", TOY, "--data", "datamodules.mine.Data")
    assert done.returncode == 2
    assert "is hidden by the zoo's own package 'datamodules': give it another name" in done.stderr


def test_a_package_of_the_user_that_was_imported_first_is_named() -> None:
    Path("callbacks.py").write_text("mine = 1")
    done = python("-c", f"import callbacks, zoo; zoo.run('fit', config={TOY!r})")
    assert done.returncode == 1
    assert f"{Path('callbacks.py').resolve()} is not the zoo's" in done.stderr
    done = python("-c", "import zoo; zoo.ZooDataModule; import callbacks; print(callbacks.__file__)")
    assert done.stdout.strip() == str(ROOT / "callbacks" / "__init__.py")
