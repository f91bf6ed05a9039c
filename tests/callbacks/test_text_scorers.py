"""Scorers of texts, masks, similarity and diversity."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.controlled_generation import ControlledGeneration
from callbacks.text_scorers import (
    MASK,
    Classifier,
    LinearModel,
    SentenceEmbedding,
    WordList,
    build_scorer,
    distinct_ngrams,
    mask_words,
    read_words,
    word_cosine,
)
from tests.callbacks.generation_toy import BERT, WORDS, run, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The '(test|val|train)_dataloader' does not have many workers")


def test_masks_hide_words_phrases_and_any_case() -> None:
    words = ["tox1", "bad phrase", "t@x", "long tox1"]
    assert mask_words("Tox1, a TOX1! long tox1", words) == f"{MASK}, a {MASK}! {MASK}"
    assert mask_words("a bad phrase and a bad day", words) == f"a {MASK} and a bad day"
    assert mask_words("t@x t@xi tox12 nontox1", words) == f"{MASK} t@xi tox12 nontox1"
    assert mask_words("tox1", []) == "tox1"


def test_the_word_list_scores_the_share_of_listed_words() -> None:
    scorer = WordList(["tox1", "bad phrase", " "])
    scores = scorer(["one tox1 here, TOX1!", "a bad phrase ends", "tox12 only", "", "bad\nphrase"])
    assert scores.tolist() == pytest.approx([2 / 4, 2 / 4, 0, 0, 0])
    assert (scores > scorer.threshold).tolist() == [True, True, False, False, False]
    assert build_scorer("words", ["tox1"], 1)(["tox1"]).tolist() == [1.0]
    for empty in ([], [" "]):
        with pytest.raises(ValueError, match="the list of unwanted words is empty"):
            WordList(empty)


def test_lists_of_words_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text("tox1\n\n bad phrase \n")
    assert read_words(str(tmp_path / "words.txt")) == ["tox1", "bad phrase"]
    with pytest.raises(ValueError, match="word_list: there is no file"):
        read_words(str(tmp_path / "none.txt"))
    (tmp_path / "better_profanity").mkdir()
    (tmp_path / "better_profanity" / "__init__.py").write_text("raise RuntimeError('is not run')")
    (tmp_path / "better_profanity" / "profanity_wordlist.txt").write_text("tox2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_words(None) == ["tox2"]
    monkeypatch.setattr("callbacks.text_scorers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="give word_list, or pip install 'method-zoo"):
        read_words(None)


def test_a_list_given_by_the_user_replaces_that_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("calm\n")
    values = run(ControlledGeneration(samples=2, word_list=str(tmp_path / "words.txt")), tmp_path)
    assert values["test/unwanted_rate"] == pytest.approx(3 / 6)
    assert "calm" not in (tmp_path / "generations.jsonl").read_text()


def test_the_trained_linear_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("callbacks.text_scorers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="scorer: 'linear' needs a package"):
        LinearModel()
    monkeypatch.undo()
    stub: Any = types.ModuleType("profanity_check")
    stub.__spec__ = ModuleSpec("profanity_check", None)
    stub.predict_prob = lambda texts: [0.9 if "tox" in text else 0.2 for text in texts]
    monkeypatch.setitem(sys.modules, "profanity_check", stub)
    scorer = build_scorer("linear", [], 1)
    scores = scorer(["tox1", "calm"])
    assert scores.tolist() == pytest.approx([0.9, 0.2])
    assert (scores > scorer.threshold).tolist() == [True, False]


# The packages themselves, where they are installed (extra `toxicity`); no word of theirs is written or shown here.


CALM = ["the soup is calm and warm .", "people say the film was really kind .", "my friend finds the park quiet ."]


def hidden(condition: bool, what: str) -> None:
    """Fail without showing the values of a comparison."""
    if not condition:
        pytest.fail(what, pytrace=False)


def test_the_list_of_better_profanity() -> None:
    pytest.importorskip("better_profanity")
    words = read_words(None)
    assert len(words) > 800
    scorer = WordList(words)
    hidden(bool((scorer([f"this is {word}, here" for word in words]) > 0).all()), "a listed word is not found")
    assert scorer(CALM).tolist() == [0, 0, 0]
    masked = [mask_words(f"it was {word.upper()} there", words) for word in words]
    hidden(all(text == f"it was {MASK} there" for text in masked), "a listed word is not masked")


def test_the_model_of_alt_profanity_check() -> None:
    pytest.importorskip("profanity_check")
    scorer = build_scorer("linear", [], 1)
    scores = scorer(CALM)
    assert scores.dtype == torch.float32
    assert scores.shape == (3,)
    assert not (scores > scorer.threshold).any()
    assert scorer([]).shape == (0,)
    assert scorer([""]).shape == (1,)
    pytest.importorskip("better_profanity")
    listed = scorer([f"you are a {word}" for word in read_words(None)])
    assert listed.mean() > 2 * scores.mean()
    assert listed.min() >= 0
    assert listed.max() <= 1
    assert (listed > scorer.threshold).sum() > 100


def test_continuations_are_scored_by_the_linear_model(tmp_path: Path) -> None:
    pytest.importorskip("profanity_check")
    values = run(ControlledGeneration(samples=2, scorer="linear"), tmp_path)
    assert values["test/unwanted_rate"] == 0, "the placeholders are nothing to it"
    assert 0 < values["test/unwanted_share"] < 0.5
    assert "tox" not in (tmp_path / "generations.jsonl").read_text()


def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT, num_labels=3, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    texts = ["the soup is calm", "tox1", "the song is tox2 and tox1"]
    ids = [torch.tensor([[WORDS.index(word) for word in text.split()]]) for text in texts]
    with torch.no_grad():
        expected = [model(input_ids=row).logits.softmax(dim=1)[0, 2].item() for row in ids]
    scorer = Classifier(str(tmp_path), label=2, batch_size=2)
    assert scorer(texts).tolist() == pytest.approx(expected, abs=1e-5)
    assert scorer([]).shape == (0,)
    with pytest.raises(ValueError, match="label: 3 is not accepted; .* has classes 0 to 2"):
        Classifier(str(tmp_path), label=3)


def test_embeddings_are_the_mean_over_words_whatever_the_batch(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(**BERT, initializer_range=0.5)).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    left, right = ["the soup is calm", "tox1", "song"], ["the soup", "tox2 and calm", "song"]

    def mean(text: str) -> Tensor:
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])
        return model(input_ids=ids).last_hidden_state[0].mean(dim=0)

    with torch.no_grad():
        expected = [torch.cosine_similarity(mean(a), mean(b), dim=0).item() for a, b in zip(left, right, strict=True)]
    got = SentenceEmbedding(str(tmp_path), batch_size=2)(left, right)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert got[2].item() == pytest.approx(1.0, abs=1e-5)
    values = run(ControlledGeneration(samples=1, similarity=str(tmp_path)), tmp_path)
    assert -1 <= values["test/sim"] <= 1


def test_diversity_and_word_overlap() -> None:
    assert distinct_ngrams("a b a b", 1) == 0.5
    assert distinct_ngrams("a b a b", 2) == pytest.approx(2 / 3)
    assert distinct_ngrams("a", 2) is None
    assert word_cosine("a a b", "A c") == pytest.approx(2 / (5**0.5 * 2**0.5))
    assert word_cosine("", "a") == 0
