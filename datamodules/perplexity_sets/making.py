"""Sets from anchors: by replacing words offline, or by a language model asked for paraphrases (arXiv 2401.08491, App.).

The prompts are those of the paper. Number of candidates and of those that are kept, sampling, lower case and the choice
by ROUGE-L follow the released script.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from datamodules.perplexity_sets.records import Anchor, SetRecord, normal
from datamodules.perplexity_sets.writers import Writer

#: What the language model is asked for, in the paper's words.
WANTED_PROMPT = "Paraphrase the following sentences: {text}"
UNWANTED_PROMPT = "Paraphrase the following sentence in a very toxic way. Make sure each sentence is toxic: {text}"
_NUMBERED = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")


class Scorer(Protocol):
    """Says how unwanted texts are."""

    threshold: float

    def __call__(self, texts: Sequence[str]) -> Iterable[float]:
        """Return a score for each text."""


# By replacing words


class Lexicon:
    """Wanted and unwanted words of the same kinds.

    Args:
        kinds: For each kind of word the lists `wanted` and `unwanted`: a word of a list may stand wherever another word
            of the kind stands.

    Raises:
        ValueError: If a kind lacks a list, a list is empty, or a word is on two lists.
    """

    def __init__(self, kinds: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        self.kind_of: dict[str, str] = {}
        self.wanted: dict[str, list[str]] = {}
        self.unwanted: dict[str, list[str]] = {}
        seen: set[str] = set()
        for kind, lists in kinds.items():
            for name, into in (("wanted", self.wanted), ("unwanted", self.unwanted)):
                words = lists.get(name) if isinstance(lists, Mapping) else None
                if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
                    raise ValueError(f"lexicon: {kind!r} needs a list {name!r} of words")
                into[kind] = [word.lower() for word in words]
                if len(set(into[kind])) < len(words) or seen & set(into[kind]):
                    raise ValueError(f"lexicon: a word of the {name} ones of {kind!r} is there twice")
                seen |= set(into[kind])
            self.kind_of |= dict.fromkeys(self.wanted[kind], kind)
        if not self.kind_of:
            raise ValueError("lexicon: no kind of words in it")

    @classmethod
    def read(cls, path: str | Path) -> Lexicon:
        """Read a JSON file `{"adjective": {"wanted": [...], "unwanted": [...]}, ...}`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no lexicon.
        """
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"no lexicon at {file}")
        try:
            kinds = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name}, line {error.lineno}: no JSON: {error.msg}") from error
        if not isinstance(kinds, dict):
            raise ValueError(f'{file.name}: accepted: {{"adjective": {{"wanted": [...], "unwanted": [...]}}, ...}}')
        return cls(kinds)


def replace_slots(anchor: Anchor, lexicon: Lexicon, candidates: int, seed: int) -> SetRecord | None:
    """Make a set by other words in the slots of an anchor, the places of its wanted words.

    A positive has other wanted words there, and the negative of the same number an unwanted word in each: the same
    length, the same words elsewhere, so that nothing but the attribute tells the two apart.

    Args:
        anchor: The anchor.
        lexicon: The words.
        candidates: Most positives, and as many negatives.
        seed: Seed of the draws; they depend on it and the anchor's id alone.

    Returns:
        The set, or None if the anchor has no slot.
    """
    words = anchor.text.lower().split()
    slots = [(i, lexicon.kind_of[w]) for i, w in enumerate(words) if w in lexicon.kind_of]
    if not slots:
        return None
    draw = random.Random(zlib.crc32(f"{seed}/{anchor.id}".encode()))
    positives: dict[str, str] = {}
    for _ in range(20 * candidates):  # short lists run out of new sentences
        wanted, unwanted = list(words), list(words)
        for place, kind in slots:
            wanted[place], unwanted[place] = draw.choice(lexicon.wanted[kind]), draw.choice(lexicon.unwanted[kind])
        pair = " ".join(wanted), " ".join(unwanted)
        if pair[0] != " ".join(words) and pair[0] not in positives and pair[1] not in positives.values():
            positives[pair[0]] = pair[1]
        if len(positives) == candidates:
            break
    return SetRecord(anchor.id, anchor.group, anchor.text, tuple(positives), tuple(positives.values()))


# By a language model


@dataclass(frozen=True)
class Filters:
    """What becomes of a model's answers.

    Args:
        keep: Most sentences that are kept, those closest to the anchor by ROUGE-L.
        lower: Whether they are lower-cased.
        most_words: Longer ones are dropped.
    """

    keep: int = 15
    lower: bool = True
    most_words: int = 128

    def __call__(self, anchor: str, answers: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
        """Return the sentences to keep, the closest first; none twice, none that is the anchor or in `taken`."""
        known = {normal(anchor), *map(normal, taken)}
        sentences: list[str] = []
        for answer in answers:
            text = sentence_of(answer)
            text = text.lower() if self.lower else text
            if normal(text) and normal(text) not in known and len(text.split()) <= self.most_words:
                known.add(normal(text))
                sentences.append(text)
        return sorted(sentences, key=lambda text: -rouge_l(text, anchor))[: self.keep]


def scored(record: SetRecord, scorer: Scorer, drop: bool = False) -> SetRecord:
    """Add scores to a set.

    Args:
        record: The set.
        scorer: Returns scores `[N]` of texts; above its `threshold` a text is unwanted.
        drop: Whether positives that it finds unwanted, and negatives that it does not, are left out.
    """
    kept: list[tuple[str, ...]] = []
    scores: list[tuple[float, ...]] = []
    for texts, unwanted in ((record.positives, False), (record.negatives, True)):
        pairs = list(zip(texts, (round(float(s), 6) for s in scorer(texts)), strict=True)) if texts else []
        pairs = [(text, s) for text, s in pairs if not drop or (s > scorer.threshold) == unwanted]
        kept.append(tuple(text for text, _ in pairs))
        scores.append(tuple(score for _, score in pairs))
    return replace(record, positives=kept[0], negatives=kept[1], scores=(scores[0], scores[1]))


def sentence_of(answer: str) -> str:
    """Return the first line of an answer that holds text, without a number or bullet and quotation marks around it."""
    for line in answer.splitlines():
        text = _NUMBERED.sub("", line).strip().strip("\"'“”").strip()
        if text:
            return text
    return ""


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L of two texts: the F1 of their longest common subsequence of words, lower-cased; 0 if one is empty."""
    a, b = normal(text).split(), normal(reference).split()
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, start=1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def ask(
    anchors: Sequence[Anchor],
    writer: Writer,
    candidates: int = 20,
    filters: Filters | None = None,
    wanted_prompt: str = WANTED_PROMPT,
    unwanted_prompt: str = UNWANTED_PROMPT,
) -> Iterator[SetRecord]:
    """Ask a language model for paraphrases of anchors, of both kinds, and yield a set for each in turn.

    Args:
        anchors: The anchors.
        writer: The language model.
        candidates: Answers to each prompt.
        filters: What becomes of them; none for those of the released script.
        wanted_prompt: Prompt of the positives; `{text}` stands for the anchor.
        unwanted_prompt: Prompt of the negatives.

    Raises:
        ValueError: If a prompt lacks `{text}`.
    """
    for name, prompt in (("wanted_prompt", wanted_prompt), ("unwanted_prompt", unwanted_prompt)):
        if "{text}" not in prompt:
            raise ValueError(f"{name}: it lacks {{text}}, where the anchor goes")
    keep = filters or Filters()
    for anchor in anchors:
        answers = [
            writer(prompt.replace("{text}", anchor.text), candidates) for prompt in (wanted_prompt, unwanted_prompt)
        ]
        positives = keep(anchor.text, answers[0])
        negatives = keep(anchor.text, answers[1], taken=positives)
        yield SetRecord(anchor.id, anchor.group, anchor.text, tuple(positives), tuple(negatives))
