"""The kit passes a method that keeps the contract, and catches each breach by the check that is meant to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.errors import UsageError
from zoo.main import main
from zoo.testing import CHECKS, Report, check_method
from zoo.testing.ranks import metric_differences

SOURCE = Path(__file__).parent / "exemplary"

#: Places in the exemplary method that several mutants change.
LOSS, PREDICT = "loss = nn.", "    def predict_step"

#: What is spoilt -> file, text, what takes its place, the check that has to fail.
MUTANTS = {
    "import of a module that is not there": (
        "method.py", "from zoo import Card\n", "from zoo import Card\nimport not_there\n", "importable",
    ),
    "import of the datamodule": (
        "method.py", "from zoo import Card\n", "from zoo import Card\nfrom exemplary.data import Points\n", "imports",
    ),
    "heavy package at the top": (
        "method.py", "if TYPE_CHECKING:\n    from matplotlib", "if True:\n    from matplotlib", "imports",
    ),
    "card with a computed value": (
        "method.py", 'title="How to keep a contract"', 'title="How to" + " keep it"', "card",
    ),
    "batch that is no TypedDict": ("method.py", "data.PointBatch", "data.Points", "card"),
    "skipped check without a reason": (
        "method.py", "compiles=True", 'compiles=True, skip_checks={"claims": "hard"}', "card",
    ),
    "argument that is not documented": ("method.py", "        width: Hidden units.\n", "", "documented"),
    "argument that is no plain type": (
        "method.py", "width: int = 8)", "width: int = 8, act: type[nn.Module] = nn.Tanh)",
        ("constructor", "checkpoint"),
    ),
    "hyper-parameters not saved": (
        "method.py", "self.save_hyperparameters()", 'self.save_hyperparameters("lr")', "hyperparameters",
    ),
    "config without a comment": ("configs/exemplary/smoke.yaml", "# Ten steps", "seed_everything: 0\n# Ten", "configs"),
    "no checkpoints in the smoke config": (
        "configs/exemplary/smoke.yaml", "checkpoint: {every_n_steps: 4}", "", "smoke",
    ),
    "test that fails": (
        "method.py", 'self._evaluate(batch, "test")', 'raise KeyError("target")', "smoke",
    ),
    "loss that is not a number": (
        "method.py", "self.log_dict({\"train/", "loss = loss / 0 * 0\n        self.log_dict({\"train/", "smoke",
    ),
    "loss that does not fall": ("method.py", ".parameters(), lr", ".parameters(), maximize=True, lr", "falls"),
    "trainable parameter without a gradient": (
        "method.py", "self.net.parameters(), lr",
        "[*self.net.parameters(), *self.teacher.requires_grad_().parameters()], lr", "gradients",
    ),
    "gradients of parameters that no optimiser has": (
        "method.py", "self.net.parameters(), lr", "self.net[2].parameters(), lr", "gradients",
    ),
    "metric of another name": ("method.py", '"train/loss": loss', '"loss": loss', "metrics"),
    "accuracy in per cent": ("method.py", 'float().mean()\n', 'float().mean() * 100\n', "metrics"),
    "figures that are none": (
        "method.py", 'return {"weights": figure}', 'return {"weights": 3}', ("figures", "warnings"),
    ),
    "warning": (
        "method.py", '"""Plain gradient descent."""',
        'import warnings\n\n        warnings.warn("old", DeprecationWarning)', "warnings",
    ),
    "object in the checkpoint": (
        "method.py", PREDICT,
        "    def on_save_checkpoint(self, content: Any) -> None:\n        content['path'] = Path('x')\n\n" + PREDICT,
        "checkpoint",
    ),
    "no bfloat16": (
        "method.py", LOSS, "assert not torch.is_autocast_enabled('cpu')\n        " + LOSS, "bf16",
    ),
    "sum over the batch": (
        "method.py", 'batch["y"])\n', 'batch["y"], reduction="sum") / 8\n', ("accumulation", "ranks"),
    ),
    "statistics of a rank": (
        "method.py", 'self.net(batch["x"])', 'self.net(batch["x"] - batch["x"].mean(0))', ("accumulation", "ranks"),
    ),
    "draws of its own": (
        "method.py", LOSS,
        "batch['x'] = batch['x'] + torch.randn(8, 4, generator=self.own)[: len(batch['x'])]\n        " + LOSS,
        ("accumulation", "resume", "ranks"),
    ),
    "state that is not in the checkpoint": (
        "method.py", "self.net(batch[\"x\"]), batch", "self.net(batch[\"x\"]) / self.count(), batch",
        ("accumulation", "resume"),
    ),
    "state that differs from run to run": (
        "method.py", LOSS, "self.seen += id(batch) % 97\n        " + LOSS, ("replay", "resume", "ranks"),
    ),
}  # fmt: skip

#: What mutants use besides.
HELPERS = {
    "argument that is no plain type": ("Hidden units.\n", "Hidden units.\n        act: Activation.\n"),
    "draws of its own": (
        "self.save_hyperparameters()",
        "self.own = torch.Generator().manual_seed(1)\n        self.save_hyperparameters()",
    ),
    "object in the checkpoint": ("import torch\n", "from pathlib import Path\n\nimport torch\n"),
    "state that is not in the checkpoint": (
        PREDICT,
        "    calls = 1\n\n    def count(self) -> int:\n        self.calls += 1\n        return self.calls\n\n"
        + PREDICT,
    ),
}  # fmt: skip


@pytest.fixture
def plugin(
    make_distribution: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Return a function that installs the exemplary plugin, with a text in one of its files replaced."""
    monkeypatch.chdir(tmp_path)

    def install(file: str = "", *changes: tuple[str, str]) -> Path:
        files = {}
        for path in SOURCE.rglob("*"):
            if path.suffix in (".py", ".yaml"):
                name = path.relative_to(SOURCE).as_posix()
                text = path.read_text()
                for old, new in changes if name == file else ():
                    assert old in text, f"{old!r} is not in {name} any more"
                    text = text.replace(old, new)
                files[f"exemplary/{name}"] = text
        points = {
            "zoo.methods": {"exemplary": "exemplary.method:Exemplary"},
            "zoo.datamodules": {"exemplary_points": "exemplary.data:Points"},
            "zoo.configs": {"exemplary": "exemplary"},
        }
        return make_distribution("exemplary-plugin", points, files)

    return install


@pytest.mark.slow
def test_a_method_that_keeps_the_contract_passes_all_checks(plugin: Callable[..., Path], tmp_path: Path) -> None:
    plugin()
    assert main(["check", "exemplary", "--update-golden", str(tmp_path)]) == 0
    report = check_method("exemplary", full=True, golden=tmp_path)
    assert report.ok, str(report)
    assert report.named("skipped") == ["claims"], str(report)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_breach_is_caught_by_its_check(mutant: str, plugin: Callable[..., Path]) -> None:
    file, old, new, expected = MUTANTS[mutant]
    plugin(file, (old, new), *([HELPERS[mutant]] if mutant in HELPERS else []))
    expected = (expected,) if isinstance(expected, str) else expected
    # a breach of the other kind does not touch what is compared between processes
    processes = {"imports", "resume", "ranks"} if not {"imports", "resume", "ranks"} & set(expected) else set()
    names = [check.name for check in CHECKS if not check.full and check.name not in processes]
    report = check_method("exemplary", only=names)
    assert tuple(report.named("failed")) == expected, str(report)


def test_golden_losses_catch_another_trajectory(plugin: Callable[..., Path], tmp_path: Path) -> None:
    plugin()
    assert main(["check", "exemplary", "--update-golden", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "exemplary.json").read_text())
    stored["losses"][7] += 1e-4
    stored["versions"]["torch"] = "0.1"
    (tmp_path / "exemplary.json").write_text(json.dumps(stored))
    report = check_method("exemplary", only=["golden"], golden=tmp_path)
    assert report.named("failed") == ["golden"]
    assert "loss 7 is" in report.outcomes[0].text
    assert "stored with torch 0.1" in report.outcomes[0].text
    stored["versions"]["python"] = "3.10.0"
    (tmp_path / "exemplary.json").write_text(json.dumps(stored))
    other = check_method("exemplary", only=["golden"], golden=tmp_path)
    assert other.named("skipped") == ["golden"], "its losses may come from other texts"
    assert "loss 7 is" in other.outcomes[0].text
    assert "stored with python 3.10.0" in other.outcomes[0].text
    assert check_method("exemplary", only=["golden"], golden=tmp_path / "none").named("skipped") == ["golden"]


#: Options that the card of a plugin gives to checks.
OPTIONS = {
    "documented": {"model.lr": 0.05},
    "hyperparameters": {"model.lr": 0.05},
    "finite": {"model.lr": 1e38},
    "figures": {"model.lr": 0.05},
    "misuse": {"model.lr": 0.05},
    "replay": {"trainer.limit_predict_batches": None},
    "resume": {"model.lr": 0.05},
}


def test_a_check_is_made_with_its_options_and_with_no_others(plugin: Callable[..., Path]) -> None:
    plugin(
        "method.py",
        ("compiles=True", f"compiles=True, check_options={OPTIONS!r}"),
        ('return {"weights": figure}', 'return {"weights": figure if self.hparams["lr"] == 0.05 else 3}'),
    )
    report = check_method("exemplary", only=["smoke", "gradients", *OPTIONS])
    text = {outcome.check.name: outcome.text for outcome in report.outcomes}
    assert report.named("failed", "blocked") == ["finite"], str(report)
    assert "the smoke config with the options of this check: loss is" in text["finite"]
    assert text["documented"] == "nothing here depends on model.lr 0.05"
    assert text["replay"] == "with trainer.limit_predict_batches None"
    for name in ("hyperparameters", "figures", "misuse", "resume"):
        assert text[name].endswith("with model.lr 0.05"), str(report)
    assert " with " not in text["smoke"] + text["gradients"]


def test_golden_losses_are_made_with_the_options_of_their_check(plugin: Callable[..., Path], tmp_path: Path) -> None:
    plugin("method.py", ("compiles=True", 'check_options={"golden": {"model.lr": 0.05}}'))
    assert main(["check", "exemplary", "--update-golden", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "exemplary.json").read_text())["options"] == {"model.lr": 0.05}
    assert check_method("exemplary", only=["golden"], golden=tmp_path).named("passed") == ["golden"]


@pytest.mark.parametrize(
    ("spoilt", "messages"),
    [
        ("return", ["val/acc is not logged by two processes"]),
        (
            'right = right * float("nan"); self.log("val/more", right, sync_dist=True)',
            ["val/acc is nan with two processes", "val/more is logged by two processes alone"],
        ),
    ],
)
def test_an_evaluation_by_two_processes_has_to_give_the_same_metrics(
    spoilt: str, messages: list[str], plugin: Callable[..., Path]
) -> None:
    log = "        self.log_dict({f"
    plugin("method.py", (log, f"        if self.trainer.world_size == 2:\n            {spoilt}\n{log}"))
    report = check_method("exemplary", only=["ranks_evaluation"])
    assert report.named("failed") == ["ranks_evaluation"], str(report)
    assert [message for message in messages if message not in report.outcomes[0].text] == []


def test_an_evaluation_that_logs_nothing_is_not_compared() -> None:
    assert metric_differences({"test/acc": 1.0}, {}) == ["nothing is logged as val/..."]
    assert metric_differences({"val/acc": 1.0, "train/x": 2.0}, {"val/acc": 1.0}) == []


def test_a_check_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match="there is no check 'resum'\ndid you mean 'resume'.* accepted: .*importable"):
        check_method("suave", only=["smoke", "resum"])


def test_a_skipped_check_shows_its_reason(plugin: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    plugin("method.py", ("compiles=True", 'skip_checks={"misuse": "it is too good for this"}'))
    assert main(["check", "exemplary", "--only", "misuse"]) == 0
    assert re.search(r"skipped +misuse .*it is too good for this", capsys.readouterr().out)


def test_a_failure_is_an_exit_code(plugin: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    plugin("method.py", ("        width: Hidden units.\n", ""))
    assert main(["check", "exemplary", "--only", "documented"]) == 1
    assert "not described under Args: of Exemplary: width" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(["no_such"], "unknown name 'no_such' in methods"), (["suave", "--only", "resum"], "did you mean 'resume'")],
)
def test_misuse(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    assert message in capsys.readouterr().err


def test_statements_are_sentences_of_the_contract(repository: Path) -> None:
    contract = " ".join((repository / "docs" / "contract.md").read_text().split())
    loose = [check.name for check in CHECKS for part in check.statement.split(": in mid-epoch") if part not in contract]
    assert loose == []
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_a_report_is_ok_only_if_nothing_failed_or_was_blocked() -> None:
    assert Report("x", ()).ok


def test_the_plugin_runs_every_check_of_every_method(plugin: Callable[..., Path], pytester: pytest.Pytester) -> None:
    plugin("method.py", ("        width: Hidden units.\n", ""))
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.zoo_methods("exemplary")
        def test_contract(zoo_check):
            zoo_check()

        def test_all(zoo_check):
            pass
        """
    )
    result = pytester.runpytest_inprocess("-k", "documented or constructor", "-p", "no:cacheprovider")
    from zoo import registry

    methods = {entry.name for entry in registry.entries("methods")}
    assert "exemplary" in methods
    result.assert_outcomes(passed=1 + 2 * len(methods), failed=1)
    result.stdout.fnmatch_lines(["*exemplary does not keep the contract*", "*each argument is described*", "*width*"])


def test_nothing_heavy_is_imported_when_pytest_loads_the_plugin() -> None:
    code = "import sys, zoo.testing.plugin; print([m for m in ('torch', 'numpy', 'lightning') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
