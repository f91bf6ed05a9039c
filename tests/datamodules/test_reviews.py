"""Templated reviews: grammar, reward, draws that follow from seed, epoch and index."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from datamodules import reviews_grammar as grammar
from datamodules.loading import keyed_generator
from datamodules.reviews import STAGES, Reviews
from zoo.nn.lm import IGNORE


def text(*words: str) -> torch.Tensor:
    return torch.tensor([[grammar.TOKEN[word] for word in words]])


def worth(prompt: str, answer: str) -> float:
    tokens = text(*answer.split())
    return float(grammar.reward(text("<bos>", *prompt.split(), "?"), tokens, torch.ones_like(tokens, dtype=torch.bool)))


def test_the_vocabulary_is_that_of_the_specification() -> None:
    assert len(grammar.VOCABULARY) == len(set(grammar.VOCABULARY)) == 75
    assert (len(grammar.PRODUCTS), len(grammar.ASPECTS)) == (24, 12)
    assert len(grammar.POSITIVE) == len(grammar.NEGATIVE) == len(grammar.NEUTRAL) == 10


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("the price of the phone is great and solid . <eos>", 3.0),
        ("the price of the phone is great and poor . <eos>", 2.0),
        ("the price of the phone is awful and poor . <eos>", 1.0),
        ("the design of the phone is usual and plain . <eos>", 1.0),
        ("the design of the laptop is great and usual . <eos>", 0.5),
        ("the design of the laptop is awful and poor .", -2.0),
        ("the price of the phone is great great great great .", 2.0),
        ("the design price of the laptop phone . <eos>", 0.0),
    ],
)
def test_reward(answer: str, value: float) -> None:
    assert worth("phone price", answer) == value


def test_words_after_the_end_are_worth_nothing() -> None:
    tokens = text("the", "<eos>", "price", "great")
    mask = torch.tensor([[True, True, False, False]])
    assert float(grammar.reward(text("<bos>", "phone", "price", "?"), tokens, mask)) == 0.0


def test_the_careless_writer_errs_as_often_as_asked() -> None:
    generator = keyed_generator(0)
    product, aspect = grammar.draw_topics(20_000, generator)
    answers = grammar.noisy_answers(product, aspect, generator)
    right = (answers[:, 1] == aspect + grammar.TOKEN[grammar.ASPECTS[0]]).float().mean()
    assert float(right) == pytest.approx(0.8 + 0.2 / 12, abs=0.01)
    right = (answers[:, 4] == product + grammar.TOKEN[grammar.PRODUCTS[0]]).float().mean()
    assert float(right) == pytest.approx(0.8 + 0.2 / 24, abs=0.01)
    kinds = (answers[:, [6, 8]] - grammar.TOKEN[grammar.POSITIVE[0]]) // 10
    shares = torch.bincount(kinds.flatten()) / kinds.numel()
    torch.testing.assert_close(shares, torch.tensor([0.45, 0.25, 0.30]), rtol=0, atol=0.01)
    assert answers.shape[1] == grammar.ANSWER_LENGTH
    assert grammar.decode(answers[:1])[0].count(" ") == 9


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_follows_from_seed_epoch_and_index(stage: str) -> None:
    def batch(seed: int, epoch: int, index: int, **options: Any) -> dict[str, torch.Tensor]:
        batches = Reviews(stage, data_seed=seed, batch_size=8, steps_per_epoch=4, **options).training_batches()
        return dict(batches.batch(epoch, index))

    one, same = batch(0, 1, 2), batch(0, 1, 2)
    assert all(torch.equal(one[key], same[key]) for key in one)
    for other in (batch(1, 1, 2), batch(0, 2, 2), batch(0, 1, 3)):
        assert any(not torch.equal(one[key], other[key]) for key in one)


def test_the_ranks_share_a_batch() -> None:
    whole = Reviews("prompts", batch_size=9).training_batches()
    expected: Any = whole.batch(0, 0)
    parts: list[Any] = []
    for rank in range(2):
        whole.rank, whole.world_size = rank, 2
        parts.append(whole.batch(0, 0))
    for key in expected:
        assert torch.equal(torch.cat([part[key] for part in parts]), expected[key])
    assert expected["row"].tolist() == list(range(9))


def test_only_answers_are_learned_from_demonstrations() -> None:
    batch: Any = Reviews("demonstrations", batch_size=5).training_batches().batch(0, 0)
    assert (batch["labels"][:, :4] == IGNORE).all()
    assert torch.equal(batch["labels"][:, 4:], batch["input_ids"][:, 4:])
    pretraining: Any = Reviews("pretrain", batch_size=5).training_batches().batch(0, 0)
    assert torch.equal(pretraining["labels"], pretraining["input_ids"])


def test_sets_of_demonstrations_differ_and_are_of_the_size_asked_for() -> None:
    seen = []
    for number in (1, 2):
        batches = Reviews("demonstrations", number, 16, batch_size=16).training_batches()
        rows: Any = [batches.batch(0, index)["input_ids"] for index in range(3)]  # type: ignore[index]
        sets = [{tuple(row) for row in part.tolist()} for part in rows]
        assert sets[0] == sets[1] == sets[2], "each pass has all of them"
        seen.append(sets[0])
    assert seen[0] != seen[1]


def test_the_label_of_a_pair_is_wrong_as_often_as_asked() -> None:
    data = Reviews("preferences")
    for flipped in (0.0, 0.1):
        chosen, rejected = data.pairs((0,), 4000, flipped)
        mask = torch.ones(4000, 11, dtype=torch.bool)
        rewards = [grammar.reward(part[:, :4], part[:, 4:], mask) for part in (chosen, rejected)]
        clear = rewards[0] != rewards[1]
        wrong = (rewards[0] < rewards[1])[clear].float().mean()
        assert float(wrong) == pytest.approx(flipped, abs=0.015)
        assert torch.equal(chosen[:, :4], rejected[:, :4])


def test_evaluation_is_the_same_for_every_seed_and_disjoint_by_split() -> None:
    for stage in STAGES:
        one, two = (Reviews(stage, data_seed=seed, test_rows=7, eval_batch_size=4) for seed in (0, 1))
        a, b = one.held_out_batches("test"), two.held_out_batches("test")
        first: Any = a.batch(0, 0)
        assert len(a) == 2
        assert all(torch.equal(first[key], b.batch(0, 0)[key]) for key in first)  # type: ignore[literal-required]
    rows: Any = Reviews(test_rows=7, eval_batch_size=4).held_out_batches("test").batch(0, 1)
    assert rows["row"].tolist() == [4, 5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "prompt"}, "stage: 'prompt' is unknown; accepted: pretrain"),
        ({"flipped": 2.0}, "flipped: 2.0 is not accepted; accepted: 0 to 1"),
        ({"batch_size": 0}, "batch_size: 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reviews(**options)
