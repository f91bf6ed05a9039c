"""Captions as tokens, by the tokenizer of a `transformers` model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class CaptionTokenizer:
    """Captions as tokens of a `transformers` model, each with its end.

    Args:
        name: Name or folder of a model with a tokenizer.
        context_length: Most tokens of a caption.
        truncate: Cut longer captions (their end stays the last token); else they are refused.

    Raises:
        ValueError: If there is no such tokenizer, or if it has no token that ends a text.
    """

    def __init__(self, name: str, context_length: int, truncate: bool) -> None:
        from transformers import AutoTokenizer

        self.context_length, self.truncate = context_length, truncate
        try:
            self.inner = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        end = self.inner.eos_token_id if self.inner.eos_token_id is not None else self.inner.sep_token_id
        if end is None:
            raise ValueError(f"tokenizer: {name!r} has no token that ends a caption")
        self.eos_id: int = end
        #: Many tokenizers of image-text models (CLIP, SigLIP) fill with the end token.
        self.pad_id: int = end if self.inner.pad_token_id is None else self.inner.pad_token_id
        self.vocab_size: int = len(self.inner)

    def encode(self, caption: str, where: str) -> list[int]:
        """Tokens of a caption, with those that the tokenizer adds.

        Raises:
            ValueError: If the caption is empty, or too long and not to be cut; `where` names it.
        """
        if not caption.strip():
            raise ValueError(f"{where}: the caption is missing")
        ids: list[int] = self.inner(caption, verbose=False)["input_ids"]
        ids = ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]
        if len(ids) > self.context_length:
            if not self.truncate:
                raise ValueError(
                    f"{where}: the caption has {len(ids)} tokens; accepted: context_length: {self.context_length} or "
                    "fewer (truncate: true cuts longer ones)"
                )
            ids = [*ids[: self.context_length - 1], self.eos_id]
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The words up to the end of the caption."""
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return str(self.inner.decode(tokens[:end], skip_special_tokens=True)).strip()


def padded(captions: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Captions as `[B, T]`, `T` the length of the longest, padded on the right."""
    rows = [torch.tensor(caption, dtype=torch.int64) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
