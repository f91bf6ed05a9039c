"""A scripted model and its data, whose continuations are known, and a run that evaluates them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.controlled_generation import ControlledGeneration
from zoo.nn.sampling import Samples, left_pad

WORDS = ["<pad>", "<unk>", "the", "soup", "song", "is", "calm", "and", "tox1", "tox2"]
#: Prompts, whether they are unwanted, their group, and two continuations of each.
SCRIPT: list[tuple[str, bool, int, list[str]]] = [
    ("the soup is tox1", True, 0, ["the soup is tox2", "the soup is calm"]),
    ("the song is tox1", True, 1, ["tox1 tox2", ""]),
    ("the song is tox2", True, 1, ["calm calm calm", "calm"]),
    ("the soup is calm", False, 0, ["tox1 and tox2 and calm", "and and"]),
    ("the song is calm", False, 1, ["the song", "the song"]),
]


class Prompts:
    """Prompts of the script in batches of two."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return 3

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        rows = SCRIPT[2 * index : 2 * index + 2]
        ids, mask = self.data.encode([row[0] for row in rows])
        unwanted = torch.tensor([row[1] for row in rows])
        group = torch.tensor([row[2] for row in rows])
        return {"prompt_ids": ids, "prompt_mask": mask, "prompt_is_unwanted": unwanted, "group": group}


class Data(LightningDataModule):
    """What the callback asks of a datamodule."""

    groups = ("food", "works")
    unwanted_words = ("tox1", "tox2")

    def prompt_batches(self, split: str) -> Prompts:
        return Prompts(self)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return left_pad([torch.tensor([WORDS.index(w) for w in text.split()] or [1]) for text in texts])

    def decode(self, tokens: Tensor) -> list[str]:
        return [" ".join(WORDS[t] for t in row if t > 1) for row in tokens.tolist()]

    def val_dataloader(self) -> Any:
        return DataLoader([torch.zeros(1)])  # type: ignore[arg-type]

    test_dataloader = val_dataloader


class Scripted(LightningModule):
    """Writes what the script says; what is not in it, it continues by its last word."""

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data, self.calls = data, list[tuple[list[str], int]]()

    def generate(self, ids: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Samples:
        assert generator is not None
        script = {row[0]: row[3] for row in SCRIPT}
        prompts, texts, seen = self.data.decode(ids), list[str](), dict[str, int]()
        for prompt in prompts:
            number = seen[prompt] = seen.get(prompt, -1) + 1
            choices = script.get(prompt, [prompt.split()[-1]] if prompt else [""])
            texts.append(choices[number % len(choices)])
        self.calls.append((prompts, generator.initial_seed()))
        rows = [torch.tensor([WORDS.index(w) for w in text.split()] or [0]) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return Samples(tokens, (tokens > 0).sum(dim=1))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None: ...

    test_step = validation_step


def run(callback: ControlledGeneration, folder: Path, data: Any = None, model: Any = None) -> dict[str, float]:
    data = data or Data()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.test(model or Scripted(data), datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(folder)


BERT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BERT |= {"vocab_size": len(WORDS), "max_position_embeddings": 16}
