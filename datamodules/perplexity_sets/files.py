"""Sets, held-out documents and prompts from files, tokenized for a language model."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.perplexity_sets.batches import DocumentBatches, PromptBatches, Sentences, SetBatches, Sets
from datamodules.perplexity_sets.loaders import SetsDataModule
from datamodules.perplexity_sets.records import SetRecord, read_records, refuse_overlap
from datamodules.text import BPETokenizer, ByteTokenizer, Tokenizer
from zoo.nn.sampling import left_pad

SHORT_ANCHORS = ("refuse", "drop")


def in_validation(record: SetRecord, share: float) -> bool:
    """Whether a held-out anchor is for validation, by its id alone; the others are for testing."""
    return zlib.crc32(record.id.encode()) % 1000 < 1000 * share


class PerplexitySetFiles(SetsDataModule):
    """Sets of wanted and unwanted sentences from files, see `datamodules.perplexity_sets.records`.

    Training draws from the sets of `train`. Held-out anchors are divided into validation and testing; their wanted and
    unwanted sentences are the two kinds of documents, their unwanted sentences (or those of `prompts`) the prompts.

    Args:
        train: File of the training sets.
        heldout: File of other anchors; none of them may be in `train`, nor their unwanted sentences.
        tokenizer: `bytes`, a `tokenizer.json`, or path or name of a model of `transformers`.
        positives: Positives `p` of an anchor, drawn without replacement in each step.
        negatives: Hard negatives `n` of an anchor.
        random_negatives: Negatives `r` of anchors of other groups.
        short_anchors: What happens to an anchor of `train` with fewer members: `refuse` or `drop`.
        val_share: Share of the held-out anchors that validate; the others test.
        prompts_per_anchor: Unwanted prompts of each held-out anchor, the first ones; the anchor is a wanted prompt.
        max_length: Tokens of a sentence, the start and the end among them; longer ones are cut.
        max_prompt_length: Tokens of a prompt; longer ones lose their beginning.
        batch_size: Anchors of a global batch.
        eval_batch_size: Documents, or prompts, of a batch in evaluation.
        num_workers: Loader processes.
        data_seed: Seed of order and draws.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a value is out of range, a line is wrong (with its number), or anchors are in both files.
    """

    def __init__(
        self,
        train: str,
        heldout: str,
        tokenizer: str = "bytes",
        positives: int = 5,
        negatives: int = 5,
        random_negatives: int = 0,
        short_anchors: str = "refuse",
        val_share: float = 0.2,
        prompts_per_anchor: int = 1,
        max_length: int = 256,
        max_prompt_length: int = 128,
        batch_size: int = 2,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(positives, negatives, random_negatives, num_workers, data_seed)
        if short_anchors not in SHORT_ANCHORS:
            raise ValueError(f"short_anchors: {short_anchors!r} is unknown; accepted: {', '.join(SHORT_ANCHORS)}")
        if not 0 <= val_share <= 1:
            raise ValueError(f"val_share: {val_share} is not accepted; accepted: 0 to 1")
        for key, value, least in (
            ("max_length", max_length, 2),
            ("max_prompt_length", max_prompt_length, 2),
            ("prompts_per_anchor", prompts_per_anchor, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        self.train_file, self.heldout_file, self.tokenizer_name = train, heldout, tokenizer
        self.short_anchors, self.val_share, self.prompts_per_anchor = short_anchors, val_share, prompts_per_anchor
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    # -- facts and text --------------------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> tuple[Tokenizer, int]:
        """The tokenizer, and the token that sentences begin with: its own, else the one that ends them."""
        if self.tokenizer_name == "bytes":
            return ByteTokenizer(), ByteTokenizer.eos_id
        tokenizer = BPETokenizer.load(self.tokenizer_name)
        first = None
        if not self.tokenizer_name.endswith(".json"):
            from transformers import AutoTokenizer

            first = AutoTokenizer.from_pretrained(self.tokenizer_name, trust_remote_code=False).bos_token_id
        return tokenizer, tokenizer.eos_id if first is None else first

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._tokens[0].vocab_size

    @property
    def eos_id(self) -> int:
        """Token that ends a sentence."""
        return self._tokens[0].eos_id

    @property
    def pad_id(self) -> int:
        """Token that fills rows: the one that ends a sentence; the masks tell the two apart."""
        return self.eos_id

    @cached_property
    def records(self) -> tuple[list[SetRecord], list[SetRecord]]:
        """Training and held-out sets."""
        train = read_records(self.train_file, self.positives, self.negatives, self.short_anchors)
        heldout = read_records(self.heldout_file, 1, 1, self.short_anchors)
        refuse_overlap(train, heldout)
        return train, heldout

    @cached_property
    def groups(self) -> list[str]:
        """Names of the groups, sorted."""
        return sorted({record.group for records in self.records for record in records})

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the text of each row `[D, T]`, up to its end."""
        tokenizer, first = self._tokens
        texts = []
        for row in tokens.tolist():
            while row and row[0] in (first, self.eos_id):  # start, or padding on the left
                row = row[1:]
            end = row.index(self.eos_id) if self.eos_id in row else len(row)
            texts.append(tokenizer.decode(row[:end]))
        return texts

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of prompts `[D, T]`, padded on the left, and where they are, bool `[D, T]`."""
        tokenizer, first = self._tokens
        most = self.max_prompt_length - 1
        return left_pad([torch.tensor([first, *row[-most:]]) for row in tokenizer.encode(texts)], self.pad_id)

    def _sentences(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens int32 `[D, S]` with start and end, padded on the right, and their number `[D]`."""
        tokenizer, first = self._tokens
        rows = [
            torch.tensor([first, *row[: self.max_length - 2], self.eos_id], dtype=torch.int32)
            for row in tokenizer.encode(texts)
        ]
        length = torch.tensor([len(row) for row in rows])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id), length

    # -- batches ---------------------------------------------------------------------------------------------------

    def _pool(self, lists: Sequence[Sequence[str]]) -> Sentences:
        """Tokens of the sentences of each anchor, as one table."""
        tokens, length = self._sentences([text for texts in lists for text in texts] or [""])
        count = torch.tensor([len(texts) for texts in lists])
        there = torch.arange(max(int(count.max()), 1)) < count[:, None]
        table = torch.full((*there.shape, tokens.shape[1]), self.pad_id, dtype=torch.int32)
        lengths = torch.zeros(there.shape, dtype=torch.int64)
        rows = int(count.sum())
        table[there], lengths[there] = tokens[:rows], length[:rows]
        return Sentences(table, lengths, count)

    def training_batches(self) -> SetBatches:
        """Batches of the training sets.

        Raises:
            ValueError: If there are fewer anchors than a batch has, or than random negatives of other groups need.
        """
        train = self.records[0]
        if self.batch_size > len(train):
            raise ValueError(f"batch_size: {self.batch_size} is not accepted; accepted: 1 to {len(train)} (anchors)")
        group = torch.tensor([self.groups.index(record.group) for record in train])
        others = len(train) - int(torch.bincount(group).max())
        if self.random_negatives > others:
            raise ValueError(
                f"random_negatives: {self.random_negatives} anchors of other groups are asked for, "
                f"the largest group has {others} others"
            )
        if self.random_negatives and not all(record.negatives for record in train):
            raise ValueError(
                "random_negatives: an anchor without negatives can give none; short_anchors drop and negatives 1"
            )
        pools = [self._pool([r.positives for r in train]), self._pool([r.negatives for r in train])]
        longest = max(pool.tokens.shape[2] for pool in pools)
        pools = [replace(p, tokens=F.pad(p.tokens, (0, longest - p.tokens.shape[2]), value=self.pad_id)) for p in pools]
        sets = Sets(pools[0], pools[1], group)
        return SetBatches(sets, self.positives, self.negatives, self.random_negatives, self.batch_size, self.data_seed)

    def _heldout(self, split: str) -> list[SetRecord]:
        chosen = [r for r in self.records[1] if in_validation(r, self.val_share) == (split == "val")]
        if not chosen:
            raise ValueError(f"heldout: none of its anchors falls to {split} with val_share {self.val_share}")
        return chosen

    def document_batches(self, split: str, unwanted: bool) -> DocumentBatches:
        """Held-out sentences, all of them wanted or all unwanted."""
        records = self._heldout(split)
        texts = [text for r in records for text in (r.negatives if unwanted else r.positives)]
        return DocumentBatches(*self._sentences(texts), self.eval_batch_size)

    def prompt_batches(self, split: str) -> PromptBatches:
        """Held-out unwanted sentences, then the anchors themselves."""
        records = self._heldout(split)
        unwanted = [(text, r.group) for r in records for text in r.negatives[: self.prompts_per_anchor]]
        prompts = unwanted + [(r.input, r.group) for r in records]
        tokens, mask = self.encode([text for text, _ in prompts])
        kind = torch.arange(len(prompts)) < len(unwanted)
        group = torch.tensor([self.groups.index(name) for _, name in prompts])
        return PromptBatches(tokens, mask, kind, group, self.eval_batch_size)
