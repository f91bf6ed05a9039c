"""Synthetic worlds: grammar, splits that do not leak, hard negatives, batches as functions of seed, epoch and index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.loading import keyed_generator
from datamodules.perplexity_sets.synthetic import PerplexitySets, make_sets
from datamodules.perplexity_sets.worlds import BOS, EOS, PAD, WORLDS, World

both = pytest.mark.parametrize("world", list(WORLDS.values()), ids=list(WORLDS))


def sentences(world: World, row: Tensor) -> list[str]:
    words = world.decode(row[None])[0].split(" . ")
    return [f"{words[0]} .", words[1]] if len(words) == 2 else [" ".join(words)]


def unwanted_tokens(world: World, tokens: Tensor) -> Tensor:
    return tokens >= world.token[world.unwanted[0]]


@both
def test_documents_are_two_sentences_on_one_noun(world: World) -> None:
    tokens, length = world.render(world.corpus(300, keyed_generator(0)))
    assert len(set(world.vocabulary)) == len(world.vocabulary)
    assert tokens[:, 0].eq(BOS).all()
    for row, n in zip(tokens, length.tolist(), strict=True):
        assert row[n - 1] == EOS
        assert row[n:].eq(PAD).all()
        first, second = sentences(world, row)
        assert world.noun_of(first) == world.noun_of(second) != ""


@both
def test_the_corpus_is_mixed_as_asked(world: World) -> None:
    corpus = world.corpus(6000, keyed_generator(1), share=0.4, strength=0.85, switch=0.25)
    has = corpus.unwanted.flatten(2).any(dim=2)
    assert has.any(dim=1).float().mean() == pytest.approx(0.4, abs=0.03)
    switched = has[:, 0] & ~has[:, 1]
    assert switched.float().mean() / has[:, 0].float().mean() == pytest.approx(0.25 + 0.75 * 0.085, abs=0.05)
    two = world.slots[corpus.template[:, 0]] == 2
    dirty = has.any(dim=1) & two
    assert corpus.unwanted[dirty, 0].float().mean() == pytest.approx(0.85, abs=0.05)
    clean = world.corpus(500, keyed_generator(1), share=0.0)
    assert not unwanted_tokens(world, world.render(clean)[0]).any()


@both
def test_hard_negatives_differ_in_the_lexicon_words_alone(world: World) -> None:
    sets = make_sets(world, anchors=30, candidates=6, seed=0)
    pos, neg = sets.positives, sets.negatives
    assert torch.equal(pos.length, neg.length)
    changed = pos.tokens != neg.tokens
    assert torch.equal(changed, unwanted_tokens(world, neg.tokens))
    assert not unwanted_tokens(world, pos.tokens).any()
    wanted = (pos.tokens >= world.token[world.wanted[0]]) & ~unwanted_tokens(world, pos.tokens)
    assert torch.equal(wanted, changed), "every slot is replaced"
    first, last = (min(world.token[noun] for noun in world.nouns), max(world.token[noun] for noun in world.nouns))
    nouns = pos.tokens.where((pos.tokens >= first) & (pos.tokens <= last), torch.tensor(-1)).amax(dim=2)
    assert torch.equal(nouns, nouns[:, :1].expand_as(nouns)), "a set is about one noun"


@both
def test_no_first_sentence_is_in_two_splits(world: World) -> None:
    def firsts(tokens: Tensor) -> set[str]:
        return {sentences(world, row)[0] for row in tokens}

    seen = firsts(world.render(world.corpus(4000, keyed_generator(3)))[0])
    sets = make_sets(world, 60, 15, 0)
    for part in (sets.positives, sets.negatives):
        seen |= firsts(part.tokens.flatten(0, 1))
    held: list[set[str]] = []
    for split in ("val", "test"):
        for unwanted in (False, True):
            generator = keyed_generator(5, split)
            documents = world.render(world.documents(400, unwanted, split, generator))[0]
            assert unwanted_tokens(world, documents).any() == unwanted
            prompts, _ = world.prompts(400, unwanted, split, generator)
            assert unwanted_tokens(world, prompts).sum(dim=1).tolist() == [2 * unwanted] * 400
            held.append(firsts(documents) | firsts(prompts))
    for texts in held:
        assert len(texts) > 100
        assert not texts & seen
    assert not (held[0] | held[1]) & (held[2] | held[3])


def test_splits_do_not_follow_a_rule_of_the_words() -> None:
    world = WORLDS["toxicity"]
    documents = world.documents(4000, False, "test", keyed_generator(0))
    for values, size in ((documents.noun, len(world.nouns)), (documents.word[:, 1, 0], len(world.wanted))):
        share = torch.bincount(values, minlength=size) / len(values)
        assert share.min() > 0.5 / size


def test_judging_a_continuation() -> None:
    world = WORLDS["toxicity"]
    texts = ["i think the soup seems calm .", "my friend finds the cake old and tox03 .", "soup soup .", ""]
    judged = world.judge(["the soup is old and new ."] * 4, texts)
    assert judged["valid"].tolist() == [1, 1, 0, 0]
    assert judged["sim"].tolist() == [1, 0, 1, 0]
    assert world.noun_of("i think the soup seems calm . i") == ""


def make(**changes: Any) -> PerplexitySets:
    return PerplexitySets(**({"num_anchors": 20, "test_documents": 30, "test_prompts": 20, "batch_size": 4} | changes))


def test_a_batch_is_a_function_of_seed_epoch_and_index() -> None:
    batches, again = make().training_batches(), make().training_batches()
    one, two = batches.batch(1, 2), again.batch(1, 2)
    assert all(torch.equal(one[key], two[key]) for key in ("input_ids", "attention_mask", "anchor_id"))
    assert not torch.equal(one["input_ids"][:, :, :12], batches.batch(2, 2)["input_ids"][:, :, :12])
    assert not torch.equal(one["anchor_id"], make(data_seed=1).training_batches().batch(1, 2)["anchor_id"])
    seen = torch.cat([batches.batch(0, i)["anchor_id"] for i in range(len(batches))])
    assert sorted(seen.tolist()) == list(range(20))


def test_ranks_see_slices_of_one_batch() -> None:
    for changes in ({}, {"source": "corpus", "batch_size": 6}, {"random_negatives": 3}):
        whole = make(**changes).training_batches()
        parts = [make(**changes).training_batches() for _ in range(2)]
        for rank, part in enumerate(parts):
            part.rank, part.world_size = rank, 2
        pieces = [part.batch(0, 1) for part in parts]
        for key in ("input_ids", "attention_mask", "anchor_id"):
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), whole.batch(0, 1)[key])


def test_sets_hold_positives_hard_and_random_negatives() -> None:
    data = make(positives=3, negatives=4, random_negatives=2)
    batch = data.training_batches().batch(0, 0)
    assert batch["input_ids"].shape[:2] == (4, 9)
    assert batch["sizes"] == [3, 4, 2]
    world, tokens = data.world, batch["input_ids"]
    dirty = unwanted_tokens(world, tokens).any(dim=2)
    assert torch.equal(dirty, (torch.arange(9) >= 3).expand(4, 9))
    positives, negatives = tokens[:, :3], tokens[:, 3:6]
    same = (positives == negatives) | unwanted_tokens(world, negatives)
    assert same.all(), "the k-th negative is the k-th positive with other words"
    group = {noun: i for i, nouns in enumerate(world.groups.values()) for noun in nouns}
    for row in tokens:
        of = [group[world.noun_of(sentences(world, item)[0])] for item in row]
        assert len(set(of[:7])) == 1
        assert all(other != of[0] for other in of[7:])
    assert len({tuple(item.tolist()) for item in tokens[0, :3]}) == 3, "without replacement"
    assert torch.equal(batch["attention_mask"], tokens != PAD)


def test_documents_and_prompts() -> None:
    data = make(eval_batch_size=8)
    wanted, unwanted = (data.document_batches("test", kind) for kind in (False, True))
    assert len(wanted) == 4
    assert sum(len(wanted.batch(0, i)["input_ids"]) for i in range(4)) == 30
    assert not unwanted_tokens(data.world, wanted.tokens).any()
    assert unwanted_tokens(data.world, unwanted.tokens).any(dim=1).all()
    prompts = data.prompt_batches("test")
    assert prompts.unwanted.tolist() == [True] * 20 + [False] * 20
    assert torch.equal(unwanted_tokens(data.world, prompts.tokens).any(dim=1), prompts.unwanted)
    assert int(prompts.group.max()) < len(data.groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": "moon"}, "world: 'moon' is unknown; accepted: toxicity, formality"),
        ({"source": "web"}, "source: 'web'"),
        ({"positives": 16}, "positives: 16 of each anchor are asked for, it has 15"),
        ({"negatives": 16}, "negatives: 16 of each"),
        ({"positives": 0}, "positives: 0"),
        ({"random_negatives": -1}, "random_negatives: -1"),
        ({"switch_share": 1.5}, "switch_share: 1.5"),
        ({"batch_size": 21}, "batch_size: 21 is not accepted; accepted: 1 to 20"),
        ({"test_prompts": 0}, "test_prompts: 0 is not accepted; accepted: 1 or more"),
        ({"eval_batch_size": 0}, "eval_batch_size: 0 is not accepted"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_prompts_of_other_words_are_refused_and_not_shown() -> None:
    data = make()
    ids, mask = data.encode(["the soup is calm", "the soup"])
    assert data.decode(ids) == ["the soup is calm", "the soup"]
    assert mask.sum(dim=1).tolist() == [5, 3]
    with pytest.raises(ValueError, match="2 words of a prompt are unknown to this world") as caught:
        data.encode(["the soup is strange", "rewrite the soup"])
    assert "strange" not in str(caught.value)
