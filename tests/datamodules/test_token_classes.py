"""Text with puzzles: the puzzles are right, their classes are what can be predicted, batches follow from the seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.token_classes import (
    ARITHMETIC,
    BOILERPLATE,
    COPY,
    RANDOM,
    SYMBOLS,
    TEXT,
    TokenClasses,
    retrieval_line,
    sum_line,
)

PROSE = "The quick brown fox number {} jumps over the lazy dog and goes home, as foxes of this kind will do."
DRAWS = st.lists(st.integers(0, 2**31 - 1), min_size=8, max_size=8)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenClasses:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    for i in range(120):
        (tmp_path / "texts" / f"{i}.txt").write_text("\n\n".join(PROSE.format(i * 100 + j) for j in range(3)))
    made = TokenClasses(
        str(tmp_path / "texts"), "bytes", block_size=60, longest_span=40, batch_size=6, train_batches=3,
        eval_batch_size=5, test_batches=2, calibration_batches=1, val_fraction=0.2, test_fraction=0.2,
    )  # fmt: skip
    made.setup("fit")
    return made


@given(DRAWS)
def test_sums_are_right_and_only_their_digits_are_arithmetic(draws: list[int]) -> None:
    tokens, classes = sum_line(draws)
    words = [SYMBOLS[t] for t in tokens]
    numbers = [int("".join(words[part][::-1])) for part in (slice(1, 3), slice(4, 6), slice(7, 10))]
    assert numbers[0] + numbers[1] == numbers[2]
    assert (words[0], words[3], words[6], words[10]) == ("add", "+", "=", ";")
    assert [i for i, c in enumerate(classes) if c == ARITHMETIC] == [7, 8, 9]
    assert [i for i, c in enumerate(classes) if c == RANDOM] == [1, 2, 4, 5]


@given(DRAWS)
def test_what_is_asked_for_was_stored(draws: list[int]) -> None:
    tokens, classes = retrieval_line(draws)
    words = [SYMBOLS[t] for t in tokens]
    stored = {words[i + 1]: words[i + 3] for i in range(0, 15, 5)}
    assert len(stored) == 3
    for i in (15, 20):
        assert (words[i], words[i + 2], words[i + 4]) == ("get", "-", ";")
        assert stored[words[i + 1]] == words[i + 3]
        assert classes[i : i + 5] == [BOILERPLATE, RANDOM, BOILERPLATE, COPY, BOILERPLATE]
    assert len(tokens) == len(classes) == 25


def test_labels_are_shifted_and_random_ones_do_not_count(data: TokenClasses) -> None:
    batch = data.train_dataloader().dataset[0, 0]
    ids, labels, classes = batch["input_ids"], batch["labels"], batch["token_class"]
    assert ids.shape == labels.shape == classes.shape == (6, 60)
    assert torch.equal(labels == -100, classes == RANDOM)
    inside = labels[:, :-1] != -100
    assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
    symbols = ids[:, 1:] >= 257
    assert torch.equal(symbols, classes[:, :-1] != TEXT)
    assert {BOILERPLATE, TEXT, RANDOM} <= set(classes.unique().tolist())
    assert int(ids.max()) < data.vocab_size == 257 + len(SYMBOLS)


def test_batches_follow_from_seed_epoch_and_number(data: TokenClasses) -> None:
    loader = data.train_dataloader().dataset
    first = loader[0, 1]["input_ids"]
    assert torch.equal(loader[0, 1]["input_ids"], first)
    assert not torch.equal(loader[1, 1]["input_ids"], first)
    assert not torch.equal(loader[0, 2]["input_ids"], first)
    halves = []
    for rank in (0, 1):
        part = data.train_dataloader().dataset
        part.rank, part.world_size = rank, 2
        halves.append(part[0, 1]["input_ids"])
    assert torch.equal(torch.cat(halves), first)


def test_parts_differ_and_test_has_a_second_loader(data: TokenClasses) -> None:
    test, calibration = data.test_dataloader()
    assert (len(data.train_dataloader()), len(test), len(calibration)) == (3, 2, 1)
    texts = [set(map(tuple, batch["input_ids"].tolist())) for batch in (*test, *calibration, *data.val_dataloader())]
    assert not set.intersection(*texts)
    data.counts["calibration"] = 0
    assert len(data.test_dataloader()) == 1


def test_text_alone_and_the_text_of_tokens(data: TokenClasses) -> None:
    assert data.token_texts([104, 105, 257, 257 + 36]) == ["h", "i", "0", "add"]
    data.puzzles = False
    batch = data.train_dataloader().dataset[0, 0]
    assert batch["token_class"].unique().tolist() == [TEXT]
    assert data.vocab_size == 257
    assert int(batch["input_ids"].max()) < 257


@pytest.mark.parametrize(("key", "value"), [("block_size", 1), ("longest_span", 3), ("train_batches", 0)])
def test_sizes_that_are_too_small_are_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}: {value} is not accepted"):
        TokenClasses(**{key: value})  # type: ignore[arg-type]
