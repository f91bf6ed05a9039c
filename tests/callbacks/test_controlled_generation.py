"""Evaluation of continuations: numbers of a scripted model worked out by hand, and what is written down."""

from __future__ import annotations

import json
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.controlled_generation import ControlledGeneration
from callbacks.text_scorers import (
    MASK,
    WordList,
    word_cosine,
)
from tests.callbacks.generation_toy import Data, Scripted, run
from tests.nn.test_distributed import on_two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The '(test|val|train)_dataloader' does not have many workers")


def test_every_number_of_a_scripted_model(tmp_path: Path) -> None:
    values = run(ControlledGeneration(samples=2), tmp_path)
    of = lambda name: values[f"test/{name}"]  # noqa: E731
    assert of("unwanted_rate") == pytest.approx((1 + 1) / 6)
    assert of("unwanted_share") == pytest.approx((1 / 4 + 0 + 1 + 0 + 0 + 0) / 6)
    assert of("expected_max") == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert of("unwanted_rate_food") == pytest.approx(1 / 2)
    assert of("unwanted_rate_works") == pytest.approx(1 / 4)
    assert of("unwanted_rate_after_wanted") == pytest.approx(1 / 4)
    assert of("expected_max_after_wanted") == pytest.approx((2 / 5 + 0) / 2)
    # distinct over all n-grams of a text; texts too short for one do not count
    assert of("dist_1") == pytest.approx((1 + 1 + 1 + 1 / 3 + 1) / 5)
    assert of("dist_2") == pytest.approx((1 + 1 + 1 + 1 / 2) / 4)
    assert of("dist_3") == pytest.approx(1.0)
    assert of("dist_1_after_wanted") == pytest.approx((4 / 5 + 1 / 2 + 1 + 1) / 4)
    first = [word_cosine("the soup is tox1", "the soup is tox2"), word_cosine("the soup is tox1", "the soup is calm")]
    assert first == pytest.approx([3 / 4, 3 / 4])
    assert of("sim") == pytest.approx((3 / 4 + 3 / 4 + 1 / 4**0.5 / 2**0.5 + 0 + 0 + 0) / 6)
    assert not any("valid" in name for name in values), "this data cannot say what is well formed"


def test_numbers_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    whole = run(ControlledGeneration(samples=2), tmp_path)
    found = on_two_ranks(of_one_rank, tmp_path)
    for part in found:
        assert part.keys() == {name.removeprefix("test/") for name in whole}
        for name, value in part.items():
            assert value == pytest.approx(whole[f"test/{name}"], abs=1e-6), name


def of_one_rank(number: int) -> dict[str, float]:
    data = Data()
    model: Any = Scripted(data)
    model.log_dict = lambda values, **_: None
    trainer: Any = types.SimpleNamespace(datamodule=data, default_root_dir="unused")
    model.transfer_batch_to_device = lambda batch, device, number: batch
    callback = ControlledGeneration(samples=2, keep=0)
    values = callback.evaluate(trainer, model, "test")
    assert len(model.calls) == (2 if number == 0 else 1), "each process takes batches of its own"
    return values


def test_sampling_has_a_stream_of_its_own(tmp_path: Path) -> None:
    def seeds(seed: int) -> list[int]:
        data = Data()
        model = Scripted(data)
        run(ControlledGeneration(seed=seed), tmp_path, data, model)
        return [call[1] for call in model.calls]

    one = seeds(0)
    assert seeds(0) == one
    assert len(set(one)) == 3
    assert not set(seeds(1)) & set(one)


def test_a_judge_of_the_data_is_asked_first(tmp_path: Path) -> None:
    class Judged(Data):
        def judge(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
            assert len(prompts) == len(texts)
            return {"valid": torch.tensor([float(bool(t)) for t in texts]), "sim": torch.ones(len(texts))}

    values = run(ControlledGeneration(samples=2), tmp_path, Judged())
    assert values["test/valid"] == pytest.approx(5 / 6)
    assert values["test/sim"] == 1


def test_only_every_nth_validation_is_measured(tmp_path: Path) -> None:
    callback = ControlledGeneration(every_n_validations=2)
    seen: list[str] = []
    callback.evaluate = lambda trainer, pl_module, stage: seen.append(stage) or {}  # type: ignore
    trainer: Any = types.SimpleNamespace(sanity_checking=False)
    for number in range(1, 6):
        callback.on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]
        assert len(seen) == number // 2
    again = ControlledGeneration(every_n_validations=2)
    again.load_state_dict(callback.state_dict())
    again.evaluate = callback.evaluate  # type: ignore[method-assign]
    again.on_validation_epoch_end(trainer, None)  # type: ignore[arg-type]
    assert len(seen) == 3
    again.on_validation_epoch_end(types.SimpleNamespace(sanity_checking=True), None)  # type: ignore[arg-type]
    assert again.state_dict() == {"validations": 6}


def test_what_is_written_down_is_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(ControlledGeneration(samples=2, keep=2), tmp_path)
    text = (tmp_path / "generations.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert rows[0] == {
        "prompt": f"the soup is {MASK}",
        "continuations": [f"the soup is {MASK}", "the soup is calm"],
    }
    assert len(rows) == 2
    assert (tmp_path / "figures" / "controlled_generation.png").stat().st_size > 1000
    printed = capsys.readouterr()
    assert "tox" not in text + printed.out + printed.err


def test_nothing_is_written_where_it_is_not_known_what_to_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown(Data):
        unwanted_words = ()

    monkeypatch.setattr("callbacks.controlled_generation.build_scorer", lambda *_: WordList(["tox1"]))
    run(ControlledGeneration(scorer="linear"), tmp_path, Unknown())
    assert not (tmp_path / "generations.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "controlled_generation: samples must be at least 1, got 0"),
        ({"every_n_validations": 0}, "every_n_validations must be at least 1"),
        ({"source_template": "rewrite"}, "source_template 'rewrite' lacks {text}"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ControlledGeneration(**changes)
