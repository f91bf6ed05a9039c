"""Text mixed with small puzzles, so that it is known of each token what kind of work it takes to predict it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule, keyed_generator
from datamodules.text import IGNORE, Text

#: Kinds of tokens by number: what follows from the form alone; what was said before; a digit of a sum; text; what was
#: drawn at random and cannot be predicted (its label does not count).
CLASSES = ("boilerplate", "copy", "arithmetic", "text", "random")
BOILERPLATE, COPY, ARITHMETIC, TEXT, RANDOM = range(len(CLASSES))
#: Tokens that the puzzles add behind those of the tokenizer.
SYMBOLS = (*"0123456789", *"abcdefghijklmnopqrstuvwxyz", "add", "key", "get", "+", "=", ":", "-", ";")
_PLACE = {symbol: place for place, symbol in enumerate(SYMBOLS)}

#: Tokens and their classes.
Piece = tuple[list[int], list[int]]


class TokenClassBatch(TypedDict):
    """`B` sequences of `T` tokens."""

    input_ids: Tensor
    """int64 `[B, T]`."""
    labels: Tensor
    """int64 `[B, T]`, already shifted; -100 where the label was drawn at random."""
    token_class: Tensor
    """int64 `[B, T]`: class of the *label*, that is of the work at this position; see `CLASSES`."""


def sum_line(draws: Sequence[int]) -> Piece:
    """`add a b + c d = e f g ;`: a sum of two numbers below 100, all of them with their last digit first.

    Args:
        draws: Whole numbers from 0 on, two are used.

    Returns:
        Places in `SYMBOLS`, and classes.
    """
    left, right = draws[0] % 100, draws[1] % 100
    total = left + right
    words = ["add", *_reversed(left, 2), "+", *_reversed(right, 2), "=", *_reversed(total, 3), ";"]
    classes = [BOILERPLATE, RANDOM, RANDOM, BOILERPLATE, RANDOM, RANDOM, BOILERPLATE, *[ARITHMETIC] * 3, BOILERPLATE]
    return [_PLACE[word] for word in words], classes


def _reversed(number: int, digits: int) -> str:
    return f"{number:0{digits}d}"[::-1]


def retrieval_line(draws: Sequence[int], pairs: int = 3, questions: int = 2) -> Piece:
    """`key k : v ;` for some pairs of letters, then `get k - v ;` for some of the keys.

    Args:
        draws: Whole numbers from 0 on, `2 * pairs + questions` are used.
        pairs: Pairs of key and value, with different keys.
        questions: How often one is asked for.

    Returns:
        Places in `SYMBOLS`, and classes.
    """
    first = _PLACE["a"]
    letters, keys = list(range(26)), []
    for draw in draws[:pairs]:
        keys.append(first + letters.pop(draw % len(letters)))
    values = [first + draw % 26 for draw in draws[pairs : 2 * pairs]]
    tokens: list[int] = []
    classes: list[int] = []
    for key, value in zip(keys, values, strict=True):
        tokens += [_PLACE["key"], key, _PLACE[":"], value, _PLACE[";"]]
        classes += [BOILERPLATE, RANDOM, BOILERPLATE, RANDOM, BOILERPLATE]
    for draw in draws[2 * pairs : 2 * pairs + questions]:
        tokens += [_PLACE["get"], keys[draw % pairs], _PLACE["-"], values[draw % pairs], _PLACE[";"]]
        classes += [BOILERPLATE, RANDOM, BOILERPLATE, COPY, BOILERPLATE]
    return tokens, classes


class Mixture(Batches):
    """Sequences in which spans of text and puzzles take turns.

    Args:
        spans: int32 `[M, S]`: beginnings of spans of text, the longest that are used.
        shortest: Fewest tokens of a span.
        offset: First token of the puzzles, or None for text alone.
        block_size: Tokens of a sequence.
        batch_size: Sequences in a (global) batch.
        count: Batches of an epoch.
        key: Seed and name of the part.
    """

    def __init__(
        self,
        spans: Tensor,
        shortest: int,
        offset: int | None,
        block_size: int,
        batch_size: int,
        count: int,
        key: tuple[int, str],
    ) -> None:
        self.spans, self.shortest, self.offset = spans, shortest, offset
        self.block_size, self.batch_size, self.count, self.key = block_size, batch_size, count, key

    def __len__(self) -> int:
        return self.count

    def sequence(self, epoch: int, number: int) -> tuple[list[int], list[int]]:
        """Tokens and classes of one sequence, `block_size + 1` of each."""
        generator = keyed_generator(*self.key, epoch, number)
        tokens: list[int] = []
        classes: list[int] = []
        text = True
        while len(tokens) <= self.block_size:
            draws = torch.randint(2**31, (48,), generator=generator).tolist()
            if text or self.offset is None:
                length = self.shortest + draws[0] % (self.spans.shape[1] - self.shortest + 1)
                tokens += self.spans[draws[1] % len(self.spans), :length].tolist()
                classes += [TEXT] * length
            else:
                for line in range(1 + draws[0] % 4):
                    own = draws[1 + 10 * line : 11 + 10 * line]
                    places, kinds = (sum_line if own[0] % 2 else retrieval_line)(own[1:])
                    tokens += [self.offset + place for place in places]
                    classes += kinds
            text = not text
        return tokens[: self.block_size + 1], classes[: self.block_size + 1]

    def batch(self, epoch: int, index: int) -> TokenClassBatch:
        numbers = range(index * self.batch_size, (index + 1) * self.batch_size)
        made = [self.sequence(epoch, number) for number in numbers[self.rows(self.batch_size)]]
        tokens, classes = (torch.tensor(rows) for rows in zip(*made, strict=True))
        labels = tokens[:, 1:].masked_fill(classes[:, 1:] == RANDOM, IGNORE)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "token_class": classes[:, 1:].contiguous()}


class TokenClasses(ZooDataModule):
    """Spans of a text corpus and lines of small puzzles in turn; batches are `TokenClassBatch`.

    The puzzles have tokens of their own behind those of the tokenizer: sums of two numbers, and letters that were
    stored and are asked for. Training, validation and test have different documents and different puzzles. `test` has a
    second loader, of validation text, for what has to be calibrated.

    Args:
        corpus: As in the data `text`: `python`, `packages`, `hf:NAME` or a path.
        tokenizer: As there: `bytes`, `bpe`, a tokenizer.json or a `transformers` model.
        vocab_size: Tokens of `bpe`, without those of the puzzles.
        puzzles: False leaves text alone, all of class `text`; for models that have a vocabulary already.
        block_size: Tokens of a sequence.
        shortest_span: Fewest tokens of a span of text.
        longest_span: Most tokens of one.
        batch_size: Sequences in a (global) batch.
        train_batches: Batches of an epoch; each epoch has new ones.
        eval_batch_size: Sequences in a batch of evaluation.
        val_batches: Batches of validation.
        test_batches: Batches of test.
        calibration_batches: Batches of the second loader of test; 0 for none.
        val_fraction: Fraction of the documents for validation.
        test_fraction: Fraction of the documents for test.
        num_workers: Loader processes.
        data_seed: Seed of all sequences.
    """

    def __init__(
        self,
        corpus: str = "packages",
        tokenizer: str = "bpe",
        vocab_size: int = 2048,
        puzzles: bool = True,
        block_size: int = 128,
        shortest_span: int = 24,
        longest_span: int = 71,
        batch_size: int = 8,
        train_batches: int = 500,
        eval_batch_size: int = 32,
        val_batches: int = 1,
        test_batches: int = 3,
        calibration_batches: int = 8,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        for key, value, least in (
            ("block_size", block_size, 2),
            ("shortest_span", shortest_span, 1),
            ("longest_span", longest_span, shortest_span),
            ("batch_size", batch_size, 1),
            ("train_batches", train_batches, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("val_batches", val_batches, 1),
            ("test_batches", test_batches, 1),
            ("calibration_batches", calibration_batches, 0),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        self.text = Text(
            corpus=corpus,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            block_size=longest_span,
            batch_size=1,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        self.puzzles, self.block_size, self.shortest_span = puzzles, block_size, shortest_span
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.counts = {
            "train": train_batches,
            "val": val_batches,
            "test": test_batches,
            "calibration": calibration_batches,
        }

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those of the puzzles among them."""
        return self.text.vocab_size + len(SYMBOLS) * self.puzzles

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Text of each token."""
        words = self.text.vocab_size
        return [SYMBOLS[i - words] if i >= words else self.text.encoder.decode([i]) for i in ids]

    def prepare_data(self) -> None:
        """Look for the files of the corpus; tokenize them if that is not in the cache."""
        self.text.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the tokens."""
        self.text.trainer = self.trainer
        self.text.setup(stage)

    def _loader(self, part: str) -> ResumableLoader:
        train = part == "train"
        batches = Mixture(
            self.text.blocks["val" if part == "calibration" else part][:, :-1],
            self.shortest_span,
            self.text.vocab_size if self.puzzles else None,
            self.block_size,
            self.batch_size if train else self.eval_batch_size,
            self.counts[part],
            (self.data_seed, part),
        )
        return self.loader(batches, same_every_epoch=not train)

    def train_dataloader(self) -> ResumableLoader:
        """New sequences in each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> ResumableLoader:
        """Sequences of the validation documents."""
        return self._loader("val")

    def test_dataloader(self) -> list[ResumableLoader]:
        """Sequences of the test documents and, for calibration, of the validation documents."""
        return [self._loader(part) for part in ("test", "calibration") if self.counts[part]]

    def predict_dataloader(self) -> ResumableLoader:
        """Sequences of the test documents."""
        return self._loader("test")
