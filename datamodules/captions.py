"""Captions made from an image: its class, brightness, shape, size and texture in the words of a few templates."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.loading import keyed_generator

#: Names of the classes, by data set: one of each class, and coarse ones that several classes share.
NOUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fashion_mnist": (
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
        ("top", "bottom", "top", "bagdress", "top", "shoe", "top", "shoe", "bagdress", "shoe"),
    ),
    "digits": (
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        ("even", "odd", "even", "odd", "even", "odd", "even", "odd", "even", "odd"),
    ),
}
#: What stands for a class that a caption does not tell.
ANYTHING = "item"
#: Attributes, each a value of `attributes`, and their words.
WORDS: dict[str, tuple[str, ...]] = {
    "brightness": ("dark", "medium", "bright"),
    "aspect": ("narrow", "wide"),
    "size": ("small", "mid-size", "large"),
    "texture": ("smooth", "plain", "rough"),
}
TEMPLATES = (
    "a {brightness} {size} {class}",
    "photo of a {aspect} {class} with {texture} texture",
    "{class} , {brightness} and {texture}",
    "this {class} is {size} and {aspect}",
    "the {texture} {class} looks {brightness}",
    "one {aspect} {size} {class} on black",
)
#: What a class is asked for with, without a picture.
PROMPT = "photo of a {class}"
FOREGROUND = 0.15


def attributes(images: Tensor) -> dict[str, Tensor]:
    """Measure images; each value is compared with the other images of the set.

    Args:
        images: uint8 `[N, c, H, W]`, of objects on black.

    Returns:
        For each key of `WORDS` the index of its word, int64 `[N]`: thirds of the set by brightness (mean of the pixels
        that are foreground), size (number of such pixels) and texture (mean absolute difference of neighbours), halves
        by aspect (rows over columns of the bounding box).
    """
    x = images.float().mean(dim=1) / 255
    inside = x > FOREGROUND
    count = inside.sum(dim=(1, 2)).clamp(min=1)
    rows, columns = inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)
    gradient = x.diff(dim=1).abs().mean(dim=(1, 2)) + x.diff(dim=2).abs().mean(dim=(1, 2))
    return {
        "brightness": quantile_index((x * inside).sum(dim=(1, 2)) / count, 3),
        "aspect": quantile_index(-rows / columns.clamp(min=1), 2),
        "size": quantile_index(count.float(), 3),
        "texture": quantile_index(gradient, 3),
    }


def quantile_index(values: Tensor, parts: int) -> Tensor:
    """Number of the quantile `[N]` (0 .. parts - 1) that each of the values `[N]` is in."""
    bounds = torch.quantile(values, torch.arange(1, parts) / parts)
    return torch.bucketize(values, bounds)


class Vocabulary:
    """The words of all templates; token 0 is padding, 1 the end of a caption, 2 an unknown word.

    Args:
        nouns: Names of the classes.
    """

    pad_id, eos_id, unk_id = 0, 1, 2

    def __init__(self, nouns: tuple[str, ...]) -> None:
        plain = {w for template in (*TEMPLATES, PROMPT) for w in template.split() if not w.startswith("{")}
        words = [*dict.fromkeys(nouns), ANYTHING, *(w for part in WORDS.values() for w in part), *sorted(plain)]
        self.words = ["<pad>", "<eos>", "<unk>", *words]
        self.index = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Tokens of a caption, with its end."""
        return [*(self.index.get(word, self.unk_id) for word in caption.split()), self.eos_id]

    def decode(self, tokens: list[int]) -> str:
        """The words up to the end of the caption."""
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return " ".join(self.words[i] for i in tokens[:end] if i != self.pad_id)


def draw_captions(
    images: Tensor,
    target: Tensor,
    nouns: tuple[str, ...],
    vocabulary: Vocabulary,
    p_class: float,
    p_wrong: float,
    seed: int,
) -> Tensor:
    """Write one caption for each image.

    Args:
        images: uint8 `[N, c, H, W]`.
        target: Classes `[N]`.
        nouns: Name of each class.
        vocabulary: Gives the tokens.
        p_class: Probability that the class is named; `item` otherwise.
        p_wrong: Probability that the class is drawn anew from all, before it is named.
        seed: Seed of the draws.

    Returns:
        Tokens int64 `[N, L]`, with their end, padded on the right.
    """
    n = len(images)
    generator = keyed_generator(seed, "captions", n)
    template = torch.randint(len(TEMPLATES), (n,), generator=generator)
    other = torch.randint(len(nouns), (n,), generator=generator)
    named = torch.where(torch.rand(n, generator=generator) < p_wrong, other, target)
    noun_ids = torch.tensor([vocabulary.index[noun] for noun in nouns])
    told = torch.rand(n, generator=generator) < p_class
    slots = {"{class}": torch.where(told, noun_ids[named], vocabulary.index[ANYTHING])}
    for name, value in attributes(images).items():
        slots[f"{{{name}}}"] = torch.tensor([vocabulary.index[word] for word in WORDS[name]])[value]
    length = 1 + max(len(text.split()) for text in TEMPLATES)
    captions = torch.full((n, length), vocabulary.pad_id)
    for number, text in enumerate(TEMPLATES):
        rows = template == number
        words = text.split()
        for place, word in enumerate(words):
            captions[rows, place] = slots[word][rows] if word in slots else vocabulary.index[word]
        captions[rows, len(words)] = vocabulary.eos_id
    return captions
