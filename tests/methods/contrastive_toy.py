"""Small models and batches of contrastive perplexity, and what a training step of theirs gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.perplexity_sets.synthetic import PerplexitySets
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
GPT2 |= {"initializer_range": 0.3, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
both_models = pytest.mark.parametrize("lm", [LLAMA, GPT2], ids=["llama", "gpt2"])
VOCAB = 23


def make_model(**changes: Any) -> ContrastivePerplexity:
    arguments: dict[str, Any] = {"lm": LLAMA, "vocab_size": VOCAB, "eos_id": 2}
    torch.manual_seed(0)
    return ContrastivePerplexity(**(arguments | changes))


def make_batch(p: int = 3, n: int = 2, r: int = 0, anchors: int = 2, seed: int = 0) -> dict[str, Any]:
    """Sentences of 3 to 7 random tokens, filled up with the token 9, which is a word too."""
    generator = torch.Generator().manual_seed(seed)
    shape = (anchors, p + n + r)
    length = torch.randint(3, 8, shape, generator=generator)
    mask = torch.arange(7) < length[..., None]
    ids = torch.randint(3, VOCAB, (*shape, 7), generator=generator).where(mask, torch.tensor(9))
    return {"input_ids": ids, "attention_mask": mask, "sizes": [p, n, r], "anchor_id": torch.arange(anchors)}


def step(model: ContrastivePerplexity, batch: dict[str, Any]) -> dict[str, Tensor]:
    """What a step logs, and `total`, its loss with gradient."""
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign, assignment]
    total = model.training_step(batch, 0)
    return {"total": total} | {key.removeprefix("train/"): value for key, value in logged.items()}


@torch.no_grad()
def one_by_one(lm: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-perplexity of each sentence by `transformers`' own loss, and its predicted tokens, without any padding."""
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    rows = [row[keep][None] for row, keep in zip(ids, mask, strict=True)]
    losses = torch.stack([lm(input_ids=row, labels=row).loss for row in rows])
    return losses.view(mask.shape[0] // sum(batch["sizes"]), -1), torch.tensor([row.shape[1] - 1 for row in rows])


def make_data(**changes: Any) -> PerplexitySets:
    arguments: dict[str, Any] = {"num_anchors": 12, "positives": 2, "negatives": 2, "candidates": 3, "batch_size": 3}
    arguments |= {"val_documents": 6, "test_documents": 6, "val_prompts": 4, "test_prompts": 4, "eval_batch_size": 4}
    return PerplexitySets(**(arguments | changes))


def world_model(data: PerplexitySets, **changes: Any) -> ContrastivePerplexity:
    return make_model(vocab_size=data.vocab_size, eos_id=data.eos_id, **({"objective": "paper_log"} | changes))


def fit(model: ContrastivePerplexity, data: Any, folder: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {"max_steps": 2, "limit_val_batches": 0, "logger": False, "accelerator": "cpu"}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    trainer = Trainer(**(arguments | {"enable_checkpointing": False} | changes))
    with_loader = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data}
    trainer.fit(model, **with_loader)  # type: ignore[arg-type]
    return trainer
