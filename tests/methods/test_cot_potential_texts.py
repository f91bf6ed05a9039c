"""A model and a tokenizer of a folder, problems and traces of JSONL files: the whole of an analysis."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zoo.api import run
from zoo.errors import UsageError
from zoo.nn.lm import build_lm

ANSWER = "\\boxed{4}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a tokenizer of bytes, which has learned to answer 4 or 5 after a line break."""
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<e>": 256}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")
    torch.manual_seed(0)
    model: Any = build_lm(
        {"model_type": "qwen3", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}, 257,
    ).train()  # fmt: skip
    rows = [
        tokenizer(f"Q {a} + {b}?\n")["input_ids"] + tokenizer(f"{a}{b}.\nso \\boxed{{{c}}}")["input_ids"] + [256]
        for a, b in ((1, 3), (2, 2))
        for c in (4, 5)
    ]
    ids = torch.tensor(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 120)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def call_of(folder: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    problems = tmp_path / "problems.jsonl"
    rows = [{"key": k, "question": q, "answer": "4"} for k, q in (("a", "1 + 3?"), ("b", "2 + 2?"))]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = {
        "model.lm": folder,
        "model.temperature": 1.0,
        "model.top_p": 1.0,
        "model.samples": 40,
        "model.budget": 40,
        "model.chunker": "newline",
        "model.analysis": {"traces_per_problem": 6, "pass_samples": 8, "guess_samples": 16},
        "data.source": "jsonl",
        "data.path": str(problems),
        "data.tokenizer": folder,
        "data.template": "Q {question}\n",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
    }
    return {"config": "cot_potential/paper", "wandb": "disabled", "overrides": overrides | more}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_problems_of_a_file_by_a_model_of_a_folder(folder: str, tmp_path: Path) -> None:
    own = tmp_path / "test"
    found = run("test", run_dir=own, **call_of(folder, tmp_path))
    curves = rows_of(own / "analysis" / "curves.jsonl")
    assert {row["key"].split("/")[0] for row in curves} == {"a", "b"}
    for row in curves:
        assert row["correct"]
        assert "".join(row["chunks"]).endswith(ANSWER)
        # right and wrong answers are equally likely until the digit is there
        assert all(0.15 < p < 0.85 for p in row["pot"][:-1])
        assert row["pot"][-1] == 1.0
        assert all(low <= p <= high for low, p, high in zip(row["low"], row["pot"], row["high"], strict=True))
    assert 0.1 < found.metrics["test/pass_at_1"] < 0.9
    assert found.metrics["test/model_decoded_tokens"] > 0
    page = (own / "analysis" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="chunk') == sum(len(row["chunks"]) for row in curves)
    assert (own / "figures" / "curves.png").is_file()
    # what was drawn is on disk: the same analysis again draws nothing
    samples = {p.name: p.read_bytes() for p in (own / "samples").iterdir()}
    again = run("test", resume=own, wandb="disabled")
    assert {p.name: p.read_bytes() for p in (own / "samples").iterdir()} == samples
    assert again.metrics["test/pass_at_1"] == found.metrics["test/pass_at_1"]
    assert again.metrics["test/model_decoded_tokens"] == 0


def test_the_other_studies_of_texts(folder: str, tmp_path: Path) -> None:
    sizes = {"traces_per_problem": 6, "kept_per_problem": 1, "candidates": 6, "choice_samples": 12}
    studies = ["curves", "optimise", "transfer", "proxies"]
    more = {"model.studies": studies, "model.analysis": sizes, "model.chunk_size": 7, "data.problem_batch": 2}
    found = run("test", run_dir=tmp_path / "test", **call_of(folder, tmp_path, **more))
    rows = rows_of(tmp_path / "test" / "analysis" / "optimise.jsonl")
    optimised = [row for row in rows if row["arm"] == "optimised"]
    # chunks of seven tokens cut the box in two; a trace goes on until the model has ended it
    assert all("".join(row["chunks"]) == row["text"] and row["text"].endswith(ANSWER) for row in optimised)
    assert all(len(row["chunks"]) >= 2 for row in optimised)
    assert found.metrics["test/optimised_final_potential"] == 1.0
    assert {"transfer_acc_0", "transfer_foreign_acc"} <= {name.removeprefix("test/") for name in found.metrics}
    for row in rows_of(tmp_path / "test" / "analysis" / "proxies.jsonl"):
        assert len(row["surprisal"]) == len(row["entropy"]) == len(row["gain"])
        assert row["forced"][0] is None  # texts do not say how to ask for the answer
    # a run's own curves are traces for another model
    given = {"data.traces": str(tmp_path / "test" / "analysis" / "curves.jsonl"), "model.studies": ["transfer"]}
    again = run("test", run_dir=tmp_path / "again", **call_of(folder, tmp_path, **given))
    assert again.metrics["test/transfer_traces"] == found.metrics["test/transfer_traces"] == 2
    assert (tmp_path / "again" / "analysis" / "report.html").is_file()


def test_given_traces_right_or_wrong(folder: str, tmp_path: Path) -> None:
    traces = tmp_path / "traces.jsonl"
    texts = {"a": f"13.\nso {ANSWER}", "b": "22.\nso \\boxed{5}"}
    traces.write_text("".join(json.dumps({"key": k, "trace": t}) + "\n" for k, t in texts.items()), encoding="utf-8")
    call = call_of(folder, tmp_path, **{"data.traces": str(traces)})
    run("predict", run_dir=tmp_path / "predict", **call)
    rows = {row["key"].split("/")[0]: row for row in rows_of(tmp_path / "predict" / "analysis" / "curves.jsonl")}
    assert [rows[k]["pot"][-1] for k in "ab"] == [1.0, 0.0]
    assert [rows[k]["correct"] for k in "ab"] == [True, False]
    assert ["".join(rows[k]["chunks"]) for k in "ab"] == [texts["a"], texts["b"]]
    assert all(a <= b for row in rows.values() for a, b in pairwise(row["boundaries"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model.budget": 3}, "budget: 3"),
        ({"data.tokenizer": "/no/such/folder"}, "tokenizer: '/no/such/folder' cannot be loaded"),
        ({"model.lm": "/no/such/folder"}, "no model at"),
        ({"data.path": "/no/such/file.jsonl"}, "there is no file"),
    ],
)
def test_misuse_is_answered_in_a_sentence(folder: str, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    traces = tmp_path / "traces.jsonl"
    traces.write_text(json.dumps({"key": "a", "trace": f"13.\nso {ANSWER}"}) + "\n", encoding="utf-8")
    call = call_of(folder, tmp_path, **{"data.traces": str(traces)}, **more)
    with pytest.raises(UsageError, match=message):
        run("predict", run_dir=tmp_path / "bad", **call)
