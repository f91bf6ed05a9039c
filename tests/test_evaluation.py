"""What evaluations say: one table, and a note where nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toy import Toy
from zoo.evaluation import print_results, untrained_note
from zoo.main import main
from zoo.output import short

TOY = str(Path(__file__).parent / "support" / "toy.yaml")
NOTE = "note: no checkpoint given: testing the weights a new network starts with"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_an_untrained_network_is_not_tested_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--config", TOY]) == 0
    assert capsys.readouterr().err.splitlines().count(NOTE) == 1
    assert main(["fit", "--config", TOY, "--run_dir", "r"]) == 0
    assert main(["test", "--resume", "r"]) == 0
    assert main(["test", "--config", TOY, "--ckpt_path", "r/checkpoints/step=10.ckpt"]) == 0
    assert "note:" not in capsys.readouterr().err


class Names(torch.nn.Module):
    """Takes a name where sizes could stand."""

    def __init__(self, lm: str | dict[str, Any], other: str = "", trained: bool = True) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1).requires_grad_(trained)


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"lm": {"hidden_size": 8}}, True),
        ({"lm": ""}, True),
        ({"lm": "some/model"}, False),
        ({"lm": {}, "other": "text"}, True),
        ({"lm": {}, "trained": False}, False),
    ],
)
def test_a_name_where_sizes_could_stand_brings_weights(options: dict[str, Any], noted: bool) -> None:
    assert bool(untrained_note("test", Names(**options), options)) is noted


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"pretrained": True}, False),
        ({"pretrained": False}, True),
        ({"study": "replay"}, False),
        ({"study": ""}, True),
        ({"reference": {"members": ["a.ckpt"]}}, False),
        ({"reference": {"mode": "sft"}}, True),
    ],
)
def test_options_that_bring_weights_or_need_none(options: dict[str, Any], noted: bool) -> None:
    assert bool(untrained_note("validate", Toy(2), options)) is noted


def test_where_a_fit_would_start_is_no_checkpoint() -> None:
    assert untrained_note("test", Toy(2), {"init_from": "a.ckpt"}) == f"{NOTE}; init_from is what a fit starts from"


@pytest.mark.parametrize("command", ["test", "validate"])
def test_numbers_stand_in_one_table_on_standard_output(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--config", TOY]) == 0
    out, err = capsys.readouterr()
    name = {"test": "test/acc", "validate": "val/acc"}[command]
    lines = [line.split() for line in out.splitlines() if "/acc" in line]
    assert [line[0] for line in lines] == [name]
    assert len(lines[0][1]) <= 6
    assert "DataLoader" not in out
    assert "step" not in out + err
    last = err.splitlines()[-1]
    assert last.startswith(f"{command} finished after")
    assert last.endswith(f"{name} {lines[0][1]}")


def test_loaders_share_one_list_and_names_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "test/" + "a_long_name_" * 8
    print_results("test", [{"test/acc_id": 0.7594000101089478, name: 1.0}, {"test/acc_ood": 0.1, "test/n": 16960.0}])
    out = capsys.readouterr().out
    rows = dict(line.split() for line in out.splitlines() if line.startswith("test/"))
    assert rows == {"test/acc_id": "0.7594", name: "1", "test/acc_ood": "0.1", "test/n": "16960"}
    print_results("test", [])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(16960.0, "16960"), (1234.56, "1235"), (0.7594000101, "0.7594"), (-2.0, "-2"), (3e-7, "3e-07"), (4e15, "4e+15")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
