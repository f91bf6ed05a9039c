"""Small worlds of text in which every sentence is wanted or unwanted by construction.

A world is a few templates with one noun and one or two slots, which words of the wanted or of the unwanted lexicon
fill. A document is two sentences about one noun. Which split a document belongs to follows from a hash of its first
sentence, so that no training document begins as a held-out document or prompt does. Second sentences are free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
#: Share of first sentences in each split, in tenths.
SPLITS = {"train": range(8), "val": range(8, 9), "test": range(9, 10)}


@dataclass(frozen=True)
class Documents:
    """`D` documents of two sentences.

    Args:
        noun: Index of the noun, int64 `[D]`.
        template: Index of each sentence's template, int64 `[D, 2]`.
        word: Index in the lexicon of each slot's word, int64 `[D, 2, 2]`; 0 in a slot that the template lacks.
        unwanted: Whether the word is of the unwanted lexicon, bool `[D, 2, 2]`; false in a slot that is lacking.
    """

    noun: Tensor
    template: Tensor
    word: Tensor
    unwanted: Tensor


@dataclass(frozen=True)
class World:
    """Templates and words.

    Args:
        templates: Sentences in which `N` stands for the noun and `A` for a word of a lexicon; the first has two `A`.
        groups: Nouns of each group, equally many.
        wanted: The wanted lexicon.
        unwanted: The unwanted lexicon, of the same size.
    """

    templates: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]

    @cached_property
    def nouns(self) -> tuple[str, ...]:
        """All nouns, group after group."""
        return tuple(noun for nouns in self.groups.values() for noun in nouns)

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Special tokens, function words, nouns, wanted and unwanted words; a token is an index into it."""
        function = dict.fromkeys(word for text in self.templates for word in text.split() if word not in ("N", "A"))
        return (*SPECIAL, *function, *self.nouns, *self.wanted, *self.unwanted)

    @cached_property
    def token(self) -> dict[str, int]:
        """Token of each word."""
        return {word: index for index, word in enumerate(self.vocabulary)}

    @cached_property
    def slots(self) -> Tensor:
        """Number of lexicon slots of each template, int64 `[T]`."""
        return torch.tensor([text.split().count("A") for text in self.templates])

    @cached_property
    def _layout(self) -> Tensor:
        """What stands where in a document of two templates, `[T, T, S]`: a token, or -1 - k for filler k."""
        rows = []
        for first in self.templates:
            for second in self.templates:
                row = [BOS]
                for sentence, text in enumerate((first, second)):
                    slot = 1 + 2 * sentence
                    for word in text.split():
                        row.append(-1 if word == "N" else -1 - slot if word == "A" else self.token[word])
                        slot += word == "A"
                rows.append([*row, EOS])
        longest = max(map(len, rows))
        table = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        return table.view(len(self.templates), len(self.templates), longest)

    def group_of(self, noun: Tensor) -> Tensor:
        """Index of the group of each noun, any shape."""
        return noun // (len(self.nouns) // len(self.groups))

    # -- documents -------------------------------------------------------------------------------------------------

    def _tidy(self, documents: Documents) -> Documents:
        """Clear the slots that a template lacks."""
        there = torch.arange(2) < self.slots[documents.template][..., None]
        return replace(documents, word=documents.word * there, unwanted=documents.unwanted & there)

    def in_split(self, documents: Documents, split: str) -> Tensor:
        """Whether the first sentence belongs to a split, bool `[D]`."""
        words = len(self.wanted)
        key = documents.noun * len(self.templates) + documents.template[:, 0]
        for slot in range(2):
            key = key * 2 * words + documents.word[:, 0, slot] + words * documents.unwanted[:, 0, slot]
        for _ in range(2):  # a multiplicative hash, so that no rule that a model could learn tells the splits apart
            key = (key * 2654435761) % 2**32
            key = key ^ (key >> 15)
        tenth = key % 10
        return (tenth >= SPLITS[split].start) & (tenth < SPLITS[split].stop)

    def draw(self, noun: Tensor, unwanted: Tensor, split: str, generator: torch.Generator) -> Documents:
        """Draw templates and words of documents of a split.

        Args:
            noun: Index of each document's noun, int64 `[D]`.
            unwanted: Which slots take unwanted words, bool `[D, 2, 2]`.
            split: `train`, `val` or `test`.
            generator: Source of randomness.
        """
        template = torch.randint(len(self.templates), (len(noun), 2), generator=generator)
        word = torch.randint(len(self.wanted), (len(noun), 2, 2), generator=generator)
        return self._redraw(Documents(noun, template, word, unwanted), split, generator, templates=True)

    def _redraw(self, documents: Documents, split: str, generator: torch.Generator, templates: bool) -> Documents:
        """Draw first sentences again until they are of the split."""
        template, word = documents.template.clone(), documents.word.clone()
        while True:
            tidy = self._tidy(replace(documents, template=template, word=word))
            other = torch.nonzero(~self.in_split(tidy, split))[:, 0]
            if not len(other):
                return tidy
            if templates:
                template[other, 0] = torch.randint(len(self.templates), (len(other),), generator=generator)
            word[other, 0] = torch.randint(len(self.wanted), (len(other), 2), generator=generator)

    def documents(self, count: int, unwanted: bool, split: str, generator: torch.Generator) -> Documents:
        """Draw documents all of whose words are wanted, or all of whose words are unwanted."""
        noun = torch.randint(len(self.nouns), (count,), generator=generator)
        return self.draw(noun, torch.full((count, 2, 2), unwanted), split, generator)

    def corpus(
        self, count: int, generator: torch.Generator, share: float = 0.4, strength: float = 0.85, switch: float = 0.05
    ) -> Documents:
        """Draw documents of the corpus that a base model is trained on, all of the training split.

        Args:
            count: How many.
            generator: Source of randomness.
            share: Share of documents with unwanted words.
            strength: Probability of an unwanted word in a slot of such a document.
            switch: Share of such documents whose second sentence is wanted again.
        """
        noun = torch.randint(len(self.nouns), (count,), generator=generator)
        kind = torch.rand(count, generator=generator)
        unwanted = (torch.rand(count, 2, 2, generator=generator) < strength) & (kind < share)[:, None, None]
        unwanted[:, 1] &= (kind >= share * switch)[:, None]
        return self.draw(noun, unwanted, "train", generator)

    def replace_slots(self, documents: Documents, split: str, generator: torch.Generator) -> Documents:
        """Turn documents into hard negatives: every word becomes an unwanted one, all else stays."""
        word = torch.randint(len(self.wanted), documents.word.shape, generator=generator)
        swapped = replace(documents, word=word, unwanted=torch.ones_like(documents.unwanted))
        return self._redraw(swapped, split, generator, templates=False)

    def render(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """Return tokens int64 `[D, S]`, `PAD` on the right, and their number in each document `[D]`."""
        layout = self._layout[documents.template[:, 0], documents.template[:, 1]]
        first_noun = self.token[self.nouns[0]]
        first_word = self.token[self.wanted[0]]
        words = first_word + documents.word + len(self.wanted) * documents.unwanted
        fillers = torch.cat([first_noun + documents.noun[:, None], words.flatten(1)], dim=1)
        tokens = torch.where(layout < 0, fillers.gather(1, (-1 - layout).clamp(min=0)), layout)
        return tokens, (tokens != PAD).sum(dim=1)

    def prompts(self, count: int, unwanted: bool, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw first sentences of the first template: tokens int64 `[D, P]`, all of one length, and groups `[D]`."""
        noun = torch.randint(len(self.nouns), (count,), generator=generator)
        template = torch.zeros(count, 2, dtype=torch.int64)
        word = torch.randint(len(self.wanted), (count, 2, 2), generator=generator)
        flags = torch.full((count, 2, 2), unwanted)
        drawn = self._redraw(Documents(noun, template, word, flags), split, generator, templates=False)
        tokens, _ = self.render(drawn)
        return tokens[:, : 1 + len(self.templates[0].split())], self.group_of(noun)

    # -- text ------------------------------------------------------------------------------------------------------

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the words of each row `[D, T]`, without special tokens."""
        return [" ".join(self.vocabulary[t] for t in row if t > EOS) for row in tokens.tolist()]

    @cached_property
    def _sentence(self) -> re.Pattern[str]:
        noun, word = "|".join(self.nouns), "|".join((*self.wanted, *self.unwanted))
        shapes = (
            " ".join(f"({noun})" if w == "N" else f"(?:{word})" if w == "A" else re.escape(w) for w in text.split())
            for text in self.templates
        )
        return re.compile("|".join(shapes))

    def noun_of(self, text: str) -> str:
        """Return the noun of a text that is one well-formed sentence, and `""` for any other."""
        match = self._sentence.fullmatch(text)
        return next(filter(None, match.groups()), "") if match else ""

    def judge(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
        """Say of each continuation whether it is one well-formed sentence, and about the noun of its prompt.

        Returns:
            `valid` and `sim`, float32 `[D]`, 1 or 0.
        """
        nouns = [self.noun_of(text) for text in texts]
        asked = [self.noun_of(prompt) for prompt in prompts]
        return {
            "valid": torch.tensor([float(bool(noun)) for noun in nouns]),
            "sim": torch.tensor([float(a in text.split()) for a, text in zip(asked, texts, strict=True)]),
        }


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_THINGS = {
    "food": ("soup", "bread", "cake", "salad", "stew"),
    "works": ("film", "novel", "song", "play", "photo"),
    "places": ("park", "hotel", "museum", "market", "beach"),
    "tools": ("lamp", "phone", "chair", "camera", "clock"),
}

#: The unwanted words of `toxicity` are placeholders: no offensive word is written anywhere.
WORLDS = {
    "toxicity": World(
        templates=(
            "the N is A and A .",
            "i think the N seems A .",
            "people say the N was really A .",
            "my friend finds the N A and A .",
        ),
        groups=_THINGS,
        wanted=_words(
            "bright calm clean cosy cool famous fine fresh funny gentle good kind light modern neat new nice old "
            "plain quiet simple small soft warm"
        ),
        unwanted=tuple(f"tox{number:02}" for number in range(24)),
    ),
    "formality": World(
        templates=(
            "we A and A the N .",
            "please A the N .",
            "they will A the N today .",
            "you should A and then A the N soon .",
        ),
        groups=_THINGS,
        wanted=_words(
            "acquire alter assess assist commence complete conceal demonstrate discard evaluate examine inspect "
            "obtain observe postpone purchase reject relocate repair request require retain select transmit"
        ),
        unwanted=_words(
            "grab tweak rate help start finish hide show dump test check eye get spot delay buy ditch move fix want "
            "need keep pick send"
        ),
    ),
}
