"""DynaMoE in the lm-evaluation-harness: what a threshold costs on the evaluated tokens, and a row for each of them."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from datamodules.text import BPETokenizer
from tests.methods.test_dynamoe_export import MODELS, SETTINGS, made
from tests.support.harness import QUIET, Request, importable, needs_harness, write_tasks
from zoo.main import main
from zoo.methods.dynamoe import export
from zoo.methods.dynamoe.losses import activity
from zoo.methods.dynamoe.module import DynaMoE
from zoo.methods.dynamoe.routes import ByRouter, Trace

PAIRS = [("The fox ", "jumps"), ("A", " dog runs home and on and on"), ("Foxes and dogs run ", "on")]


def folder_of(path: Path, name: str = "llama", bos: bool = False) -> Path:
    """A moefied model with a tokenizer; with `bos`, one that puts a token before every text."""
    from tokenizers.processors import TemplateProcessing

    model = made(name)
    export.save(model, path, SETTINGS)
    inner = BPETokenizer.train(["The fox jumps and the dog runs home."] * 3, 257).inner
    if bos:
        inner.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", inner.token_to_id("<|endoftext|>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(path)
    return path


@pytest.fixture
def zero_shot() -> Iterator[Any]:
    with importable("zoo.methods.dynamoe.zero_shot") as module:
        yield module


def requests() -> list[Request]:
    return [Request(pair) for pair in PAIRS]


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_and_activity_are_those_of_each_text_alone(zero_shot: Any, name: str, tmp_path: Path) -> None:
    lm, head = zero_shot.load(folder_of(tmp_path / "m", name), batch_size=3)
    assert head == "score"
    found = lm.loglikelihood(requests())
    costs = lm.costs()
    layers, model = export.nested_layers(lm.model), lm.model
    sizes = torch.tensor([[w / mlp.hidden_width for w in mlp.widths] for mlp in layers])
    used: list[torch.Tensor] = []
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        ids, after = lm.pair(context, continuation)
        trace = Trace()
        with torch.no_grad(), layers[0].control.using(ByRouter("score", 0.3), trace):
            logits = model(input_ids=torch.tensor([[*ids, *after][:-1]]), use_cache=False).logits[0, -len(after) :]
        used.append(activity(trace.stacked("widths").long(), sizes).flatten())
        assert value == pytest.approx(float(logits.log_softmax(-1)[range(len(after)), after].sum()), abs=1e-4)
        assert greedy is bool((logits.argmax(-1) == torch.tensor(after)).all())
    tokens = torch.cat(used)
    assert costs["tokens"] == len(tokens), "padding does not count"
    assert costs["activity"] == pytest.approx(float(tokens.mean()), abs=1e-6)
    assert costs["activity"] < 1
    lm.forget()
    assert lm.costs()["tokens"] == 0


def test_costs_are_those_of_the_method(zero_shot: Any, tmp_path: Path) -> None:
    lm, _ = zero_shot.load(folder_of(tmp_path / "m"))
    method = DynaMoE({**MODELS["llama"]}, router_units=8)
    lm.loglikelihood(requests())
    costs = lm.costs()
    expected = method.parameter_counts(costs["activity"])
    assert costs["active_parameters"] == pytest.approx(expected["parameters_active"])
    without = expected["parameters_active"] - expected["parameters_embedding"]
    assert costs["active_parameters_without_embedding"] == pytest.approx(without)
    assert costs["active_share"] == pytest.approx(expected["parameters_active"] / expected["parameters"])


def test_answers_are_those_of_generate_and_count_too(zero_shot: Any, tmp_path: Path) -> None:
    lm, _ = zero_shot.load(folder_of(tmp_path / "m"))
    ids = torch.tensor(lm.tokenizer.encode(["The fox"]))
    expected = lm.model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    assert list(lm.greedy(ids, 6)) == expected
    assert lm.costs()["tokens"] == ids.shape[1] + 5, "what is generated last is not read"


def test_the_tokenizers_first_token_stands_before_every_text(zero_shot: Any, tmp_path: Path) -> None:
    lm, _ = zero_shot.load(folder_of(tmp_path / "m", bos=True))
    plain, _ = zero_shot.load(folder_of(tmp_path / "plain"))
    eos = lm.tokenizer.eos_id
    assert lm.prefix == [eos]
    assert plain.prefix == []
    context, continuation = plain.pair("The fox", " runs")
    assert lm.pair("The fox", " runs") == ([eos, *context], continuation)
    assert lm.tokenizer.decode([eos, *context]) == "The fox"


def test_a_row_for_each_threshold_and_one_for_the_full_width(zero_shot: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m")
    lm, head = zero_shot.load(folder)
    before = lm.layers[0].control.route

    def total(lm: Any) -> dict[str, float]:
        return {"total": sum(value for value, _ in lm.loglikelihood(requests()))}

    rows = zero_shot.theta_grid(lm, head, [0.9, 0.1, 0.3, 0.3], total)
    assert [row["theta"] for row in rows] == [0.1, 0.3, 0.9, "full width"]
    activities = [row["activity"] for row in rows]
    assert activities == sorted(activities)
    assert activities[0] < activities[-1] == 1
    assert rows[-1]["active_share"] > 1, "the routers are there all the same"
    dense = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    expected = 0.0
    for context, continuation in PAIRS:
        ids, after = lm.pair(context, continuation)
        with torch.no_grad():
            logits = dense(input_ids=torch.tensor([[*ids, *after][:-1]])).logits[0, -len(after) :]
        expected += float(logits.log_softmax(-1)[range(len(after)), after].sum())
    assert rows[-1]["total"] == pytest.approx(expected, abs=1e-4)
    assert rows[0]["total"] != pytest.approx(expected, abs=1e-4)
    assert lm.layers[0].control.route is before
    with pytest.raises(ValueError, match="theta: 1.5 is not accepted; accepted: 0 to 1"):
        zero_shot.theta_grid(lm, head, [1.5], total)
    assert lm.layers[0].control.route is before


def test_a_folder_without_a_tokenizer_is_named(zero_shot: Any, tmp_path: Path) -> None:
    export.save(made(), tmp_path / "m", SETTINGS)
    with pytest.raises(ValueError, match="tokenizer: .* has none that can be loaded"):
        zero_shot.load(tmp_path / "m")
    lm, _ = zero_shot.load(tmp_path / "m", tokenizer=str(folder_of(tmp_path / "other")))
    assert lm.tokenizer.encode(["a"])


def test_the_command_says_how_to_get_the_harness(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("zoo.harness", "zoo.methods.dynamoe.zero_shot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["harness", str(tmp_path), "--tasks", "piqa"]) == 2
    assert "pip install 'method-zoo[lm-eval]'" in capsys.readouterr().err


@needs_harness
@pytest.mark.filterwarnings(*QUIET)
def test_a_moefied_model_in_the_real_harness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "m")
    questions = ["The fox", "A dog", "On and", "Home"]
    choices = [" runs", " sits and waits", " on"]
    tasks = {
        "dogs_choice": (
            "multiple_choice",
            [{"question": q, "choices": choices, "answer": i % 3} for i, q in enumerate(questions)],
        ),
        "dogs_next": ("loglikelihood", [{"question": q, "answer": " on"} for q in questions]),
        "dogs_answer": ("generate_until", [{"question": q, "answer": "on"} for q in questions]),
        "dogs_text": ("loglikelihood_rolling", [{"answer": "The fox runs home."}]),
    }
    command = ["harness", str(folder), "--tasks", ",".join(tasks), "--only-included"]
    command += ["--include", str(write_tasks(tmp_path / "tasks", tasks)), "--thresholds", "0.1", "0.3"]
    assert main([*command, "--out", str(tmp_path / "table.csv")]) == 0
    printed = capsys.readouterr().out.splitlines()
    header = next(line for line in printed if line.startswith("theta "))
    assert "active_parameters" in header
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["theta"] for row in rows] == ["0.1", "0.3", "full width"]
    assert float(rows[0]["activity"]) < float(rows[1]["activity"]) < float(rows[2]["activity"]) == 1
    # the full width is the dense model that transformers loads
    dense = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    encoder = BPETokenizer.load(str(folder))
    right = 0
    for i, question in enumerate(questions):
        values = []
        for choice in choices:
            ids, after = encoder.encode([question, choice])
            with torch.no_grad():
                logits = dense(input_ids=torch.tensor([[*ids, *after][:-1]])).logits[0, -len(after) :]
            values.append(float(logits.log_softmax(-1)[range(len(after)), after].sum()))
        right += values.index(max(values)) == i % 3
    assert float(rows[-1]["dogs_choice/acc"]) == right / 4
    assert {row["dogs_answer/exact_match"] for row in rows} == {"0.0"}
    assert float(rows[-1]["dogs_text/bits_per_byte"]) > 0
    assert main([*command[:2], "--tasks", "nonsense", *command[4:]]) == 2
    assert "tasks: nonsense not known to the harness" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "table.json"), "--limit", "1"]) == 0
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["limit"] == 1
    assert all(row["dogs_choice/acc"] in (0.0, 1.0) for row in content["rows"])
