"""Conversations in the form of UltraChat and UltraFeedback: prompts, answers, padding, refusals; tiny files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from datamodules.preferences import ChatPreferences
from zoo.nn.lm import IGNORE

pytest.importorskip("datasets", reason="the data sets of the hub are read by the package datasets")

WORDS = "<pad> <eos> <unk> < | > user assistant system hello there good bad answer question one two three".split()  # noqa: SIM905


def tokenizer(folder: Path, **special: Any) -> str:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    given = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", **special}
    PreTrainedTokenizerFast(tokenizer_object=inner, **given).save_pretrained(folder)
    return str(folder)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ultrafeedback(count: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        asked = [message("user", "question one" if i % 2 else "hello there question")]
        rows.append(
            {
                "prompt": asked[0]["content"],
                "prompt_id": str(i),
                "chosen": [*asked, message("assistant", "good answer")],
                "rejected": [*asked, message("assistant", "bad")],
                "messages": [*asked, message("assistant", "good answer")],
                "score_chosen": 8.0,
                "score_rejected": 3.0,
            }
        )
    return rows


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train_prefs", "test_prefs", "train_sft", "test_sft"):
        text = "".join(json.dumps(row) + "\n" for row in ultrafeedback(8))
        (tmp_path / f"{split}.jsonl").write_text(text)
    return str(tmp_path / "{split}.jsonl")


def make(tmp_path: Path, source: str, **options: Any) -> ChatPreferences:
    given = {"batch_size": 4, "max_prompt_length": 30, "max_length": 40, "tokenizer": tokenizer(tmp_path / "tok")}
    return ChatPreferences(source, **{**given, **options})


def test_preferences(tmp_path: Path, source: str) -> None:
    data = make(tmp_path, source, stage="preferences")
    batch = next(iter(data.train_dataloader()))
    assert batch["chosen_ids"].shape[0] == 4
    for key in ("chosen", "rejected"):
        last = batch[f"{key}_mask"].sum(dim=1) - 1
        ends = batch[f"{key}_ids"].gather(1, last[:, None])
        assert (ends == data.eos_id).all()
        assert (batch[f"{key}_ids"][~batch[f"{key}_mask"]] == data.pad_id).all()
    assert data.decode(batch["chosen_ids"][:1])[0].endswith("good answer")
    assert data.decode(batch["rejected_ids"][:1])[0].endswith("bad")


def test_demonstrations_learn_the_last_message_with_its_end(tmp_path: Path, source: str) -> None:
    data = make(tmp_path, source, stage="demonstrations")
    batch = next(iter(data.train_dataloader()))
    for labels in batch["labels"]:
        assert [WORDS[t] for t in labels[labels != IGNORE].tolist()] == ["good", "answer", "<eos>"]


def test_prompts_are_padded_on_the_left_and_end_before_the_answer(tmp_path: Path, source: str) -> None:
    data = make(tmp_path, source, stage="prompts")
    batch = next(iter(data.train_dataloader()))
    assert batch["prompt_mask"][:, -1].all()
    assert not batch["prompt_mask"].all()
    assert [WORDS[t] for t in batch["prompt_ids"][0, -5:].tolist()][-2] == "assistant"
    rows = torch.cat([part["row"] for part in data.val_dataloader()])
    assert rows.tolist() == [0, 1, 2, 3]


def test_long_prompts(tmp_path: Path, source: str) -> None:
    data = make(tmp_path, source, max_prompt_length=8, batch_size=2)
    assert len(data.read("train_prefs").prompts) == 4, "the longer half is dropped"
    with pytest.raises(ValueError, match=r"4 prompts of .* are longer than 8 tokens, the longest 9"):
        make(tmp_path, source, max_prompt_length=8, too_long="error").read("train_prefs")
    with pytest.raises(ValueError, match="8 prompts"):
        make(tmp_path, source, max_prompt_length=2).read("train_prefs")


def test_long_answers_are_cut_without_an_end(tmp_path: Path, source: str) -> None:
    data = make(tmp_path, source, stage="demonstrations", max_prompt_length=9, max_length=10)
    assert {len(a) for a in data.read("train_sft").answers} == {1, 2}
    assert all(int(a[-1]) != data.eos_id for a in data.read("train_sft").answers)


def test_tokenizers_without_end_or_padding_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match="has no end-of-text token"):
        make(tmp_path, source, tokenizer=tokenizer(tmp_path / "a", eos_token=None))
    same = tokenizer(tmp_path / "b", pad_token="<eos>")
    with pytest.raises(ValueError, match=r"pads with its end token.*accepted: pad_token"):
        make(tmp_path, source, tokenizer=same)
    assert make(tmp_path, source, tokenizer=same, pad_token="<pad>").pad_id == 0
    with pytest.raises(ValueError, match="pad_token: 'nothing' is no token"):
        make(tmp_path, source, tokenizer=same, pad_token="nothing")


def test_rows_of_another_form_are_named(tmp_path: Path, source: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "hello"}) + "\n")
    with pytest.raises(ValueError, match=r"row 0: chosen is no list of messages .* the row has \['text'\]"):
        make(tmp_path, str(bad)).read("train_prefs")
    row = {"chosen": [message("user", "hello"), message("user", "there")]}
    (tmp_path / "worse.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="does not end with a message of the assistant"):
        make(tmp_path, str(tmp_path / "worse.jsonl")).read("train_prefs")
    with pytest.raises(FileNotFoundError, match="no file"):
        make(tmp_path, str(tmp_path / "gone.jsonl")).read("train_prefs")
    with pytest.raises(ValueError, match="batch_size: 9 is more than the 8 rows"):
        make(tmp_path, source, batch_size=9).train_dataloader()
