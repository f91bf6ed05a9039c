"""What evaluations say: a note where nothing was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.toy import Toy
from zoo.evaluation import untrained_note
from zoo.main import main

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
