"""Models whose output another model rewrites: a run of the same method, or a language model of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor


class TextSource(Protocol):
    """Continues prompts that are given as tokens of the module's data and as text."""

    def __call__(
        self, ids: Tensor, mask: Tensor, texts: Sequence[str], data: Any, generator: torch.Generator
    ) -> list[str]:
        """Return a continuation of each prompt: `ids` and `mask` are `[B, T]`, padded on the left."""


class RunSource:
    """The model of a checkpoint of a run of the same method.

    Args:
        checkpoint: Path of the checkpoint.
        module: The module that rewrites.
    """

    def __init__(self, checkpoint: str, module: LightningModule) -> None:
        with torch.random.fork_rng(devices=[]):  # random weights are drawn before those of the file are read
            source = type(module).load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
        self.model: Any = source.to(module.device).eval()

    def __call__(
        self, ids: Tensor, mask: Tensor, texts: Sequence[str], data: Any, generator: torch.Generator
    ) -> list[str]:
        return data.decode(self.model.generate(ids, mask, generator).tokens)


class ModelSource:
    """A language model of `transformers` with its own tokenizer, sampled as the module samples.

    Args:
        name: Path or name of the model.
        module: The module that rewrites; `max_new_tokens`, `temperature` and `top_p` are taken from its arguments.
    """

    def __init__(self, name: str, module: LightningModule) -> None:
        from transformers import AutoTokenizer

        from zoo.nn.lm import build_lm

        self.model: Any = build_lm(name).to(module.device)  # type: ignore[arg-type]
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        self.sampling = {key: module.hparams[key] for key in ("max_new_tokens", "temperature", "top_p")}

    def __call__(
        self, ids: Tensor, mask: Tensor, texts: Sequence[str], data: Any, generator: torch.Generator
    ) -> list[str]:
        from zoo.nn.sampling import generate, left_pad

        end = self.tokenizer.eos_token_id
        first = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        rows = [torch.tensor([*first, *self.tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
        prompts, there = left_pad(rows, end or 0)
        written = generate(
            self.model,
            prompts.to(ids.device),
            attention_mask=there.to(ids.device),
            eos_id=end,
            pad_id=end or 0,
            generator=generator,
            **self.sampling,
        )
        return self.tokenizer.batch_decode(
            [row[:n] for row, n in zip(written.tokens.tolist(), written.lengths.tolist(), strict=True)],
            skip_special_tokens=True,
        )


def load_source(source: str, module: LightningModule) -> TextSource:
    """Return the model that a path of a checkpoint (`.ckpt`), or a path or name of `transformers` names."""
    return RunSource(source, module) if source.endswith(".ckpt") else ModelSource(source, module)
