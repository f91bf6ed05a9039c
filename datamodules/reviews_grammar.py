"""Reviews from a template: prompts, answers of a noisy writer, and a reward that can be computed."""

# ruff: noqa: SIM905 - lists of words read better as text
from __future__ import annotations

import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
FUNCTION = ("the", "of", "is", "and", ".", "?")
PRODUCTS = (
    "phone laptop camera kettle toaster blender bicycle tent backpack guitar piano lamp "
    "sofa chair desk watch printer router speaker monitor keyboard heater fan drill"
).split()
ASPECTS = "price design battery weight sound screen quality comfort speed noise warranty packaging".split()
POSITIVE = "excellent great superb wonderful solid pleasant brilliant reliable lovely impressive".split()
NEGATIVE = "awful poor terrible weak dreadful flimsy disappointing faulty ugly mediocre".split()
NEUTRAL = "average ordinary usual standard plain typical common normal regular basic".split()
VOCABULARY = (*SPECIAL, *FUNCTION, *PRODUCTS, *ASPECTS, *POSITIVE, *NEGATIVE, *NEUTRAL)
TOKEN = {word: token for token, word in enumerate(VOCABULARY)}
#: Tokens of a prompt and of an answer, `<bos> PRODUCT ASPECT ?` and
#: `the ASPECT of the PRODUCT is ADJECTIVE and ADJECTIVE . <eos>`.
PROMPT_LENGTH, ANSWER_LENGTH = 4, 11
_ADJECTIVES = TOKEN[POSITIVE[0]]  # positive, negative, neutral in a row


def prompts(product: Tensor, aspect: Tensor) -> Tensor:
    """Tokens int64 `[N, 4]` for indices `[N]`."""
    out = torch.tensor([BOS, 0, 0, TOKEN["?"]]).repeat(len(product), 1)
    out[:, 1], out[:, 2] = product + TOKEN[PRODUCTS[0]], aspect + TOKEN[ASPECTS[0]]
    return out


def answers(product: Tensor, aspect: Tensor, adjectives: Tensor) -> Tensor:
    """Tokens int64 `[N, 11]` for indices `[N]` and adjectives `[N, 2]` (0 to 29: positive, negative, neutral)."""
    words = "the ? of the ? is ? and ? .".split()
    out = torch.tensor([*(TOKEN[word] for word in words), EOS]).repeat(len(product), 1)
    out[:, 1], out[:, 4] = aspect + TOKEN[ASPECTS[0]], product + TOKEN[PRODUCTS[0]]
    out[:, 6], out[:, 8] = (adjectives + _ADJECTIVES).unbind(dim=1)
    return out


def draw_topics(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Products and aspects, each int64 `[count]`."""
    return (
        torch.randint(len(PRODUCTS), (count,), generator=generator),
        torch.randint(len(ASPECTS), (count,), generator=generator),
    )


def draw_unrelated(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts and answers that have nothing to do with each other: the language without the task."""
    asked, told = draw_topics(count, generator), draw_topics(count, generator)
    return prompts(*asked), answers(*told, torch.randint(30, (count, 2), generator=generator))


def noisy_answers(
    product: Tensor,
    aspect: Tensor,
    generator: torch.Generator,
    right: float = 0.8,
    shares: tuple[float, float, float] = (0.45, 0.25, 0.30),
) -> Tensor:
    """Answers of a careless writer, int64 `[N, 11]`.

    Args:
        product: What is asked about, `[N]`.
        aspect: The same.
        generator: Source of randomness.
        right: Probability that the product, and that the aspect, is the one asked about; else it is a random one.
        shares: Probabilities of positive, negative and neutral adjectives.
    """
    count = len(product)
    other = draw_topics(count, generator)
    keep = torch.rand(2, count, generator=generator) < right
    kind = torch.multinomial(torch.tensor(shares), 2 * count, replacement=True, generator=generator).view(count, 2)
    adjectives = 10 * kind + torch.randint(10, (count, 2), generator=generator)
    return answers(torch.where(keep[0], product, other[0]), torch.where(keep[1], aspect, other[1]), adjectives)


def reward(prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """What an answer is worth, float32 `[B]` from -2 to 3.

    1 if the aspect told of is the one asked for, 1 if the product is, `clamp((positive - negative) / 2, -1, 1)` for the
    adjectives, -1 without an end. Told of is the first aspect, the first product.

    Args:
        prompt_ids: int64 `[B, P]`, padded on the left.
        tokens: int64 `[B, T]`.
        mask: bool `[B, T]`.
    """
    tokens = tokens.masked_fill(~mask, PAD)

    def first(words: list[str], among: Tensor) -> Tensor:
        inside = (among >= TOKEN[words[0]]) & (among <= TOKEN[words[-1]])
        place = inside.int().argmax(dim=1, keepdim=True)
        return torch.where(inside.any(dim=1), among.gather(1, place)[:, 0], -1)

    def count(words: list[str]) -> Tensor:
        return ((tokens >= TOKEN[words[0]]) & (tokens <= TOKEN[words[-1]])).sum(dim=1)

    total = ((count(POSITIVE) - count(NEGATIVE)) / 2).clamp(-1, 1)
    for words in (ASPECTS, PRODUCTS):
        total = total + (first(words, tokens) == first(words, prompt_ids)).float()
    return total - (tokens == EOS).logical_not().all(dim=1).float()


def decode(tokens: Tensor) -> list[str]:
    """Text of each row `[N, T]`, without special tokens."""
    return [" ".join(VOCABULARY[t] for t in row if t > EOS and t < len(VOCABULARY)) for row in tokens.tolist()]
