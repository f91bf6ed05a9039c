"""Prompts: facts whose answers follow from the tokens alone, text that goes on, the same data everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.prompts import Hop, TextPrompts, draw_cycles, walk
from datamodules.text import IGNORE


def follow(data: Hop, facts: list[int]) -> dict[int, int]:
    """What follows what, read from the fact tokens."""
    if data.joint_facts:
        pairs = [divmod(token - data.symbols - len(data.hops), data.symbols) for token in facts]
    else:
        pairs = list(zip(facts[::2], facts[1::2], strict=True))
    return dict(pairs)


def steps_on(successor: dict[int, int], x: int, steps: int) -> int:
    for _ in range(steps):
        x = successor[x]
    return x


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("length", [1, 3])
def test_answers_follow_from_the_facts_of_their_own_prompt(joint: bool, length: int) -> None:
    data = Hop(
        symbols=9, facts=5, hops=[1, 3], joint_facts=joint, answer_length=length, eval_prompts=40, eval_batch_size=16
    )
    width = 5 if joint else 10
    seen = set()
    for batch in data.test_dataloader():
        assert batch["prompt_ids"].shape[1] == width + 2
        for prompt, answer in zip(batch["prompt_ids"].tolist(), batch["answer_ids"].tolist(), strict=True):
            successor = follow(data, prompt[:width])
            assert len(successor) == 5
            assert steps_on(successor, prompt[-1], 5) == prompt[-1]  # one cycle
            marker, x = prompt[-2:]
            steps = data.hops[marker - 9]
            assert batch["group"] == f"hop{steps}"
            assert answer == [steps_on(successor, x, steps + i) for i in range(length)]
            seen.add(tuple(prompt))
    assert len(seen) > 70


@pytest.mark.parametrize("joint", [False, True])
def test_a_training_sequence_asks_and_answers_and_labels_are_answers(joint: bool) -> None:
    data = Hop(symbols=8, facts=4, queries=3, answer_length=2, batch_size=32, joint_facts=joint, data_seed=3)
    batch = next(iter(data.train_dataloader()))
    width = 4 if joint else 8
    assert batch["input_ids"].shape == batch["labels"].shape == (32, width + 3 * 4 - 1)
    assert int(batch["input_ids"].max()) < data.vocab_size
    kinds = set()
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        successor = follow(data, ids[:width])
        assert labels[: width + 1] == [IGNORE] * (width + 1)
        for query in range(3):
            start = width + 4 * query
            marker, x = ids[start : start + 2]
            kinds.add(marker)
            steps = data.hops[marker - 8]
            expected = [steps_on(successor, x, steps), steps_on(successor, x, steps + 1)]
            assert labels[start + 1 : start + 3] == expected
            assert labels[start : start + 1] == [IGNORE]
            assert labels[start + 3 : start + 4] in ([IGNORE], [])
    assert kinds == {8, 9}


def test_a_marker_may_come_last() -> None:
    first, last = Hop(eval_prompts=8), Hop(eval_prompts=8, marker_last=True)
    a, b = (torch.cat([batch["prompt_ids"] for batch in d.test_dataloader()]) for d in (first, last))
    assert torch.equal(a[:, -2:].flip(1), b[:, -2:])
    assert torch.equal(a[:, :-2], b[:, :-2])
    a, b = (next(iter(d.train_dataloader()))["input_ids"] for d in (first, last))
    assert torch.equal(a[:, 12:14].flip(1), b[:, 12:14])


def test_facts_are_shuffled_and_start_places_are_even() -> None:
    g = torch.Generator().manual_seed(0)
    cycles, facts = draw_cycles(500, 7, 4, g)
    firsts = facts[:, 0]
    assert 0.15 < float((firsts == cycles[:, 0]).float().mean()) < 0.35
    assert all(len(set(row)) == 4 for row in cycles.tolist())
    walked = walk(cycles, torch.tensor([[3]]).expand(500, 1), torch.tensor([[2]]).expand(500, 1), 2)
    assert torch.equal(walked[:, 0], cycles[:, [1, 2]])


def test_training_depends_on_the_seed_and_evaluation_does_not() -> None:
    one, two = Hop(data_seed=1), Hop(data_seed=2)
    assert not torch.equal(*(next(iter(d.train_dataloader()))["input_ids"] for d in (one, two)))
    assert torch.equal(*(next(iter(d.val_dataloader()))["prompt_ids"] for d in (one, two)))
    val, test = (next(iter(loader))["prompt_ids"] for loader in (one.val_dataloader(), one.test_dataloader()))
    assert not torch.equal(val, test)


def test_ranks_see_slices_of_one_batch() -> None:
    data = Hop(eval_prompts=10, eval_batch_size=10)
    for loader in (data.train_dataloader(), data.test_dataloader()):
        whole: Any = loader.dataset.batch(0, 1)
        parts: list[Any] = []
        for rank in (0, 1):
            loader.dataset.rank, loader.dataset.world_size = rank, 2
            parts.append(loader.dataset.batch(0, 1))
        for key, value in whole.items():
            if isinstance(value, Tensor):
                assert torch.equal(torch.cat([part[key] for part in parts]), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"facts": 11}, "facts: 11 is more than the 10 symbols; accepted: 2 to 10"),
        ({"facts": 1}, "facts: 1 is not accepted; accepted: 2 or more"),
        ({"hops": []}, "hops: \\[\\] is not accepted; accepted: different numbers from 1 to 5"),
        ({"hops": [6]}, "hops: \\[6\\] is not accepted"),
        ({"hops": [1, 1]}, "hops: \\[1, 1\\] is not accepted"),
        ({"queries": 0}, "queries: 0 is not accepted; accepted: 1 or more"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hop(**options)


def test_the_meaning_of_tokens_has_a_name() -> None:
    names = {
        Hop().tokenizer_id,
        Hop(symbols=11).tokenizer_id,
        Hop(hops=[1]).tokenizer_id,
        Hop(joint_facts=True).tokenizer_id,
        Hop(marker_last=True).tokenizer_id,
    }
    assert len(names) == 5
    assert Hop(joint_facts=True).vocab_size == 10 + 2 + 100


def test_text_is_cut_into_prompt_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        prose = "\n\n".join(
            f"Paragraph {i} {j} of a text about foxes and dogs that goes on for a while." for j in range(4)
        )
        (texts / f"{i}.txt").write_text(prose)
    options: dict[str, Any] = {"corpus": str(texts), "tokenizer": "bytes", "val_fraction": 0.3, "test_fraction": 0.3}
    data = TextPrompts(prompt_length=24, block_size=32, eval_batch_size=5, eval_blocks=12, batch_size=2, **options)
    data.prepare_data()
    data.setup("test")
    batches = list(data.test_dataloader())
    assert [len(b["row"]) for b in batches] == [5, 5, 2]
    assert torch.cat([b["row"] for b in batches]).tolist() == list(range(12))
    for batch in batches:
        assert batch["prompt_ids"].shape[1:] == (24,)
        assert batch["answer_ids"].shape[1:] == (8,)
        assert batch["group"] == ""
    blocks = data.blocks["test"][:5, :-1].long()
    assert torch.equal(torch.cat([batches[0]["prompt_ids"], batches[0]["answer_ids"]], dim=1), blocks)
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (2, 32)
    with pytest.raises(ValueError, match="prompt_length: 32 is not accepted; accepted: 1 to 31, less than block_size"):
        TextPrompts(prompt_length=32, block_size=32, **options)
