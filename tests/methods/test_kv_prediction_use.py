"""What a user does with a trained pair: the command that continues a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

import zoo
from tests.methods.kv_prediction_toy import SHORT, fit_on_text
from zoo.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kvp") / "run"
    config = "kv_prediction/smoke"
    zoo.run("fit", config=config, overrides=SHORT, run_dir=folder, wandb="disabled")
    return folder


def test_a_prompt_is_continued_with_both_caches_and_times_are_told(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["generate", str(run), "3 1 1 4 4 3 1 10", "--max-new-tokens", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[predicted cache] ")
    assert lines[2].startswith("[base] ")
    assert all(len(line.partition("] ")[2].split()) == 5 for line in (lines[0], lines[2]))
    assert "TTFT" in lines[1]
    assert "TTFT" in lines[3]
    assert lines[4].startswith("time to first token: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "what now"], "the prompt 'what now'"),
        (["RUN", "3 99"], "accepted: 0 to 11"),
        (["RUN", ""], "a prompt of no tokens is not accepted"),
        (["RUN", "3 " * 70], "70 tokens and 32 more are too long for the base; accepted: 64 in all"),
        (["RUN", "3", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["nowhere", "3"], "no run with a checkpoint in nowhere"),
    ],
)
def test_prompts_and_runs_that_cannot_be(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", *[str(run) if word == "RUN" else word for word in words]]) == 2
    assert message in capsys.readouterr().err


def test_text_is_continued_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    run = fit_on_text(tmp_path)
    capsys.readouterr()
    assert main(["generate", str(run), "A text about", "--max-new-tokens", "4"]) == 0
    assert "TTFT" in capsys.readouterr().out
