"""Conversations of the hub in the form of UltraChat and UltraFeedback: demonstrations, preferences and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule
from datamodules.preferences_batches import PreferenceBatches, PromptBatches, SFTBatches

STAGES = ("demonstrations", "preferences", "prompts")
#: Splits of HuggingFaceH4/ultrachat_200k and HuggingFaceH4/ultrafeedback_binarized.
SPLITS = {
    "demonstrations": ("train_sft", "test_sft"),
    "preferences": ("train_prefs", "test_prefs"),
    "prompts": ("train_prefs", "test_prefs"),
}
#: Used where the tokenizer has no chat template of its own.
PLAIN_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}<|assistant|>\n"
Message = Mapping[str, str]


class Texts(NamedTuple):
    """Tokens of each row; what a stage does not have is empty."""

    prompts: list[Tensor]
    answers: list[Tensor]
    others: list[Tensor]
    """Answers that were not preferred."""


def read_rows(source: str, split: str) -> Iterable[Mapping[str, Any]]:
    """Rows of a data set of the hub, or of a local .jsonl, .json or .parquet file.

    Raises:
        ValueError: If the package `datasets` is missing.
        FileNotFoundError: If a local file is not there.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{source!r} needs the extra: pip install 'method-zoo[data]'") from error
    local = Path(source.format(split=split)).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if local.suffix in kinds:
        if not local.is_file():
            raise FileNotFoundError(f"no file {local}; accepted: a file, or the name of a data set of the hub")
        return load_dataset(kinds[local.suffix], data_files=str(local), split="train")  # type: ignore[no-any-return]
    return load_dataset(source, split=split)  # type: ignore[no-any-return]


def conversation(row: Mapping[str, Any], key: str, number: int) -> list[Message]:
    """The messages under a key of a row: a list of `{role, content}` that ends with the assistant's.

    Raises:
        ValueError: If they are missing or of another form.
    """
    found = row.get(key)
    if not isinstance(found, list) or not all(
        isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in found
    ):
        raise ValueError(f"row {number}: {key} is no list of messages with role and content; the row has {sorted(row)}")
    if len(found) < 2 or found[-1]["role"] != "assistant":
        raise ValueError(f"row {number}: {key} does not end with a message of the assistant after one of a user")
    return found


class ChatPreferences(ZooDataModule):
    """Conversations for the three stages of RLHF; batches are `SFTBatch`, `PreferenceBatch` or `PromptBatch`.

    The form is that of `HuggingFaceH4/ultrachat_200k` (`messages`) and `HuggingFaceH4/ultrafeedback_binarized`
    (`chosen` and `rejected`, lists of messages with the same prompt). A prompt is everything before the last message;
    the answer is the last message, the assistant's.

    Args:
        source: Data set of the hub, or a .jsonl, .json or .parquet file; `{split}` in the path stands for the split.
        tokenizer: Folder or name of a tokenizer of `transformers`.
        stage: `demonstrations`, `preferences` or `prompts`.
        train_split: Split of training; none for the usual one of the stage.
        eval_split: Split of validation (its first half) and test (its second).
        pad_token: Token that fills rows, for tokenizers without one, or whose padding is their end token.
        max_prompt_length: Most tokens of a prompt.
        max_length: Most tokens of a prompt with its answer; longer answers are cut, without an end.
        too_long: What happens to longer prompts: `drop`, or `error`.
        max_rows: Most rows of a split; none for all.
        batch_size: Rows of a global batch.
        eval_rows: Most rows of each of validation and test.
        eval_batch_size: Rows of a batch of evaluation.
        num_workers: Loader processes.
        data_seed: Seed of the order.

    Raises:
        ValueError: If a value is out of range, or the tokenizer has no end token, or none for padding.
    """

    def __init__(
        self,
        source: str,
        tokenizer: str,
        stage: str = "prompts",
        train_split: str | None = None,
        eval_split: str | None = None,
        pad_token: str | None = None,
        max_prompt_length: int = 512,
        max_length: int = 1024,
        too_long: str = "drop",
        max_rows: int | None = None,
        batch_size: int = 64,
        eval_rows: int = 1000,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        if stage not in STAGES:
            raise ValueError(f"stage: {stage!r} is unknown; accepted: {', '.join(STAGES)}")
        if too_long not in ("drop", "error"):
            raise ValueError(f"too_long: {too_long!r} is unknown; accepted: drop, error")
        for key, value in (
            ("max_prompt_length", max_prompt_length), ("batch_size", batch_size), ("eval_rows", eval_rows),
            ("eval_batch_size", eval_batch_size), ("max_rows", 1 if max_rows is None else max_rows),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{key}: {value} is not accepted; accepted: 1 or more")
        if max_length <= max_prompt_length:
            raise ValueError(f"max_length: {max_length} leaves no room after max_prompt_length {max_prompt_length}")
        self.source, self.stage, self.max_rows = source, stage, max_rows
        self.splits = (train_split or SPLITS[stage][0], eval_split or SPLITS[stage][1])
        self.max_prompt_length, self.max_length, self.too_long = max_prompt_length, max_length, too_long
        self.batch_size, self.eval_rows, self.eval_batch_size = batch_size, eval_rows, eval_batch_size
        self.tokenizer = load_tokenizer(tokenizer, pad_token)
        self._texts: dict[str, Texts] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    @property
    def eos_id(self) -> int:
        """Token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Token that fills rows."""
        return int(self.tokenizer.pad_token_id)

    def decode(self, tokens: Tensor) -> list[str]:
        """Text of each row `[N, T]`, without special tokens."""
        return list(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def encode_prompt(self, messages: Sequence[Message]) -> Tensor:
        """Tokens of the messages before an answer."""
        template = None if self.tokenizer.chat_template else PLAIN_TEMPLATE
        text = self.tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int32)

    def encode_answer(self, text: str, room: int) -> Tensor:
        """Tokens of an answer with its end token, or the first `room` of them."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.eos_id][:room], dtype=torch.int32)

    def read(self, split: str) -> Texts:
        """Read and tokenize a split.

        Raises:
            ValueError: If a row has another form, no prompt is short enough, or one is not and `too_long` is `error`.
        """
        if split in self._texts:
            return self._texts[split]
        out, dropped, longest = Texts([], [], []), 0, 0
        for number, row in enumerate(read_rows(self.source, split)):
            if self.max_rows is not None and number >= self.max_rows:
                break
            messages = conversation(row, "messages" if self.stage == "demonstrations" else "chosen", number)
            prompt = self.encode_prompt(messages[:-1])
            if len(prompt) > self.max_prompt_length:
                dropped, longest = dropped + 1, max(longest, len(prompt))
                continue
            room = self.max_length - len(prompt)
            out.prompts.append(prompt)
            if self.stage != "prompts":
                out.answers.append(self.encode_answer(messages[-1]["content"], room))
            if self.stage == "preferences":
                other = conversation(row, "rejected", number)
                out.others.append(self.encode_answer(other[-1]["content"], room))
        if dropped and (self.too_long == "error" or not out.prompts):
            raise ValueError(
                f"max_prompt_length: {dropped} prompts of {self.source} ({split}) are longer than "
                f"{self.max_prompt_length} tokens, the longest {longest}; accepted: a larger value, or too_long: drop"
            )
        self._texts[split] = out
        return out

    def batches(self, texts: Texts, size: int, seed: int | None) -> Batches:
        """Batches of the stage."""
        steps = len(texts.prompts) // size
        if self.stage == "demonstrations":
            return SFTBatches(texts.prompts, texts.answers, self.pad_id, size, seed, steps)
        if self.stage == "preferences":
            chosen, rejected = (
                [torch.cat([p, a]) for p, a in zip(texts.prompts, answers, strict=True)]
                for answers in (texts.answers, texts.others)
            )
            return PreferenceBatches(chosen, rejected, self.pad_id, size, seed, steps)
        return PromptBatches(texts.prompts, self.pad_id, size, seed, steps)

    def train_dataloader(self) -> ResumableLoader:
        """Rows in shuffled order."""
        texts = self.read(self.splits[0])
        if len(texts.prompts) < self.batch_size:
            raise ValueError(
                f"batch_size: {self.batch_size} is more than the {len(texts.prompts)} rows of {self.source} "
                f"({self.splits[0]})"
            )
        return self.loader(self.batches(texts, self.batch_size, self.data_seed))

    def _held_out(self, part: int) -> ResumableLoader:
        texts = self.read(self.splits[1])
        half = len(texts.prompts) // 2
        chosen = slice(part * half, part * half + min(half, self.eval_rows))
        return self.loader(self.batches(Texts(*(t[chosen] for t in texts)), self.eval_batch_size, None), True)

    def val_dataloader(self) -> ResumableLoader:
        """First half of the split of evaluation."""
        return self._held_out(0)

    def test_dataloader(self) -> ResumableLoader:
        """Its second half."""
        return self._held_out(1)

    def predict_dataloader(self) -> ResumableLoader:
        """That of the test."""
        return self.test_dataloader()


def load_tokenizer(name: str, pad_token: str | None) -> Any:
    """Load a tokenizer whose end and padding tokens are two.

    Raises:
        ValueError: If it cannot be loaded, has no end token, or its padding is the end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"tokenizer: {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name!r} has no end-of-text token; answers would never end")
    if pad_token is not None:
        if (
            tokenizer.convert_tokens_to_ids(pad_token) in (None, tokenizer.unk_token_id)
            and pad_token != tokenizer.unk_token
        ):
            raise ValueError(f"pad_token: {pad_token!r} is no token of {name!r}")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = (
            "has no padding token"
            if tokenizer.pad_token_id is None
            else "pads with its end token, which is then never learned"
        )
        raise ValueError(f"tokenizer: {name!r} {what}; accepted: pad_token, another token of its vocabulary")
    return tokenizer
