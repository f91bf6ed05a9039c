"""How unwanted a text is: by a list of words, by a trained linear model, by a classifier of `transformers`.

No text is printed as it is: `mask_words` hides the words of a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

MASK = "[masked]"
_WORD = re.compile(r"[\w'-]+")


class Scorer(Protocol):
    """Scores texts; one whose score is above `threshold` is unwanted."""

    threshold: float

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return scores in `[0, 1]`, float32 `[N]`."""


@lru_cache(maxsize=8)
def _listed(words: tuple[str, ...]) -> re.Pattern[str]:
    """What matches one of the words or phrases, the longest first, where it stands alone and whatever its case."""
    longest_first = sorted({word.strip() for word in words} - {""}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


class WordList:
    """Share of the words of a text that are on a list, whatever their case; a single one makes it unwanted.

    Args:
        words: The list, at least one word; a phrase counts as its words.
    """

    threshold = 0.0

    def __init__(self, words: Iterable[str]) -> None:
        self.words = tuple(words)
        if not any(word.strip() for word in self.words):
            raise ValueError("the list of unwanted words is empty")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        listed = _listed(self.words)
        found = [sum(len(match[0].split()) for match in listed.finditer(text)) for text in texts]
        return torch.tensor([n / max(len(text.split()), n, 1) for n, text in zip(found, texts, strict=True)])


class LinearModel:
    """Probability that the trained linear model of `alt-profanity-check` gives."""

    threshold = 0.5

    def __init__(self) -> None:
        if find_spec("profanity_check") is None:
            raise ValueError("scorer: 'linear' needs a package: pip install 'method-zoo[toxicity]'")

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:  # scikit-learn refuses an empty list
            return torch.empty(0)
        from profanity_check import predict_prob

        return torch.as_tensor(predict_prob(list(texts)), dtype=torch.float32)


class Classifier:
    """Probability of a class under a sequence classifier of `transformers`.

    Args:
        name: Path or name of the classifier.
        label: Index of the unwanted class.
        batch_size: Texts at once.
    """

    threshold = 0.5

    def __init__(self, name: str, label: int = 1, batch_size: int = 64) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=False).eval()
        if not 0 <= label < self.model.config.num_labels:
            raise ValueError(
                f"label: {label} is not accepted; {name} has classes 0 to {self.model.config.num_labels - 1}"
            )
        self.label, self.batch_size = label, batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        if torch.cuda.is_available():
            self.model.cuda()
        scores = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            scores.append(self.model(**inputs).logits.float().softmax(dim=1)[:, self.label].cpu())
        return torch.cat(scores) if scores else torch.empty(0)


def read_words(path: str | None) -> list[str]:
    """Read a list of words, one a line; None is the list of the package `better-profanity`.

    Raises:
        ValueError: If there is no such file, or the package is not installed.
    """
    if path is None:
        spec = find_spec("better_profanity")
        if spec is None or spec.origin is None:
            raise ValueError(
                "scorer: 'words' has no list of words: give word_list, or pip install 'method-zoo[toxicity]'"
            )
        file = Path(spec.origin).with_name("profanity_wordlist.txt")
    else:
        file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"word_list: there is no file {file}")
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def build_scorer(scorer: str, words: Iterable[str], label: int) -> Scorer:
    """Return a scorer by name: `words`, `linear`, or a path or name of a classifier."""
    if scorer == "words":
        return WordList(words)
    return LinearModel() if scorer == "linear" else Classifier(scorer, label)


def mask_words(text: str, words: Iterable[str]) -> str:
    """Hide the words and phrases of a list in a text."""
    hidden = tuple(words)
    return _listed(hidden).sub(MASK, text) if hidden else text


def distinct_ngrams(text: str, n: int) -> float | None:
    """Number of distinct n-grams over the number of n-grams of a text; None if it has none."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def word_cosine(left: str, right: str) -> float:
    """Cosine of the word counts of two texts; 0 if one is empty."""
    a, b = (Counter(_WORD.findall(text.lower())) for text in (left, right))
    norm = (sum(x * x for x in a.values()) * sum(x * x for x in b.values())) ** 0.5
    return sum(a[word] * b[word] for word in a) / norm if norm else 0.0


class SentenceEmbedding:
    """Cosine of mean-pooled embeddings, as Sentence-BERT has it (arXiv 1908.10084).

    Args:
        name: Path or name of an encoder of `transformers`.
        batch_size: Texts at once.
    """

    def __init__(self, name: str, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.model: Any = AutoModel.from_pretrained(name, trust_remote_code=False).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        if torch.cuda.is_available():
            self.model.cuda()
        rows = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            rows.append(((states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).cpu())
        return torch.cat(rows)

    def __call__(self, left: Sequence[str], right: Sequence[str]) -> Tensor:
        """Return the cosine of each pair, float32 `[N]`."""
        return torch.cosine_similarity(self._embed(left), self._embed(right), dim=1)
