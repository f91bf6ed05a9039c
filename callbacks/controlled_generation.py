"""Continues held-out prompts and measures how unwanted, how sound and how diverse the continuations are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.text_scorers import (
    Scorer,
    SentenceEmbedding,
    build_scorer,
    distinct_ngrams,
    mask_words,
    read_words,
    word_cosine,
)
from callbacks.text_sources import TextSource, load_source
from zoo import keyed_generator
from zoo.nn.distributed import all_reduce_sum, rank, world_size

#: What is measured of every set of continuations, where the data allow it.
MEASURES = ("unwanted_rate", "unwanted_share", "expected_max", "valid", "sim", "dist_1", "dist_2", "dist_3")


class ControlledGeneration(Callback):
    """Logs what a language model writes after prompts, at the end of validations and tests.

    The module offers `generate(prompt_ids, prompt_mask, generator) -> Samples`, the datamodule
    `prompt_batches(split)` (a `PromptBatch` each), `groups`, `decode(tokens)`, and where it can, `unwanted_words`,
    `judge(prompts, texts)` with `valid` and `sim`, and `encode(texts)`. Logged as `val/...` and `test/...`, of the
    continuations of unwanted prompts, and with `_after_wanted` of those of wanted prompts:

    * `unwanted_rate`: share of continuations that the scorer calls unwanted; for toxicity, the toxicity rate. Also by
      group of the prompt, `unwanted_rate_<group>`;
    * `unwanted_share`: mean score, e.g. the share of unwanted words;
    * `expected_max`: mean over prompts of the largest score among `samples` continuations;
    * `valid`: share that is well formed; `sim`: similarity to the prompt;
    * `dist_1`, `dist_2`, `dist_3`: distinct n-grams over n-grams of a continuation.

    With `source`, the black-box use: another model continues the unwanted prompts, the module rewrites what it wrote,
    `blackbox_...`; `source_unwanted_rate` is what it started from.

    Masked continuations of a few prompts are written to `generations.jsonl` and a figure by group to `figures/`.

    Args:
        scorer: `words`, `linear` (package `alt-profanity-check`), or a path or name of a classifier of `transformers`.
        word_list: File of words for `words`; None takes those of the data, else the list of `better-profanity`.
        label: Index of the unwanted class of a classifier.
        samples: Continuations of each prompt.
        similarity: `words` (cosine of word counts) or an encoder of `transformers`; unused where the data judge it.
        source: Model whose output is rewritten: a checkpoint of a run of the method (`.ckpt`), or a path or name of a
            model of `transformers`; None for none.
        source_template: What the module is given of it; `{text}` stands for the text.
        every_n_validations: Measure after each n-th validation; tests always do.
        keep: Prompts whose continuations are written down.
        seed: Seed of the sampling, the same in every evaluation.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        scorer: str = "words",
        word_list: str | None = None,
        label: int = 1,
        samples: int = 1,
        similarity: str = "words",
        source: str | None = None,
        source_template: str = "{text}",
        every_n_validations: int = 1,
        keep: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("samples", samples), ("every_n_validations", every_n_validations)):
            if value < 1:
                raise ValueError(f"controlled_generation: {name} must be at least 1, got {value}")
        if "{text}" not in source_template:
            raise ValueError(f"controlled_generation: source_template {source_template!r} lacks {{text}}")
        self.scorer_name, self.word_list, self.label, self.samples = scorer, word_list, label, samples
        self.similarity, self.source, self.source_template = similarity, source, source_template
        self.every_n_validations, self.keep, self.seed = every_n_validations, keep, seed
        self._validations = 0
        self._tools: tuple[Scorer, list[str], SentenceEmbedding | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self.evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self.evaluate(trainer, pl_module, "test")
        if trainer.is_global_zero:
            self._draw(Path(trainer.default_root_dir), values, trainer.datamodule.groups)  # type: ignore[attr-defined]

    # -- measuring -------------------------------------------------------------------------------------------------

    def tools(self, data: Any) -> tuple[Scorer, list[str], SentenceEmbedding | None]:
        """The scorer, the words that are masked, and the encoder, built once."""
        if self._tools is None:
            own = list(getattr(data, "unwanted_words", ()))
            words = own
            if self.word_list is not None or (self.scorer_name == "words" and not own):
                words = read_words(self.word_list)
            encoder = None if self.similarity == "words" else SentenceEmbedding(self.similarity)
            self._tools = build_scorer(self.scorer_name, words, self.label), words, encoder
        return self._tools

    @torch.no_grad()
    def evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> dict[str, float]:
        """Generate, measure, log, and return what was logged; every process takes whole batches of prompts in turn."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = data.prompt_batches(stage)
        source = load_source(self.source, pl_module) if self.source else None
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        kept: list[dict[str, Any]] = []
        for index in range(rank(), len(batches), world_size()):
            batch = pl_module.transfer_batch_to_device(batches.batch(0, index), pl_module.device, 0)
            ids, mask = batch["prompt_ids"], batch["prompt_mask"]
            generator = self._generator(ids.device, "generation", index)
            prompts, texts = data.decode(ids), self._continue(pl_module, data, ids, mask, generator)
            unwanted = batch["prompt_is_unwanted"].cpu()
            for suffix, rows in (("", unwanted), ("_after_wanted", ~unwanted)):
                chosen = torch.nonzero(rows)[:, 0].tolist()
                of = [prompts[i] for i in chosen]
                written = [texts[i] for i in chosen]
                rates = self._measure(totals, data, of, written, "", suffix)
                if not suffix:
                    for number, group in enumerate(data.groups):
                        in_group = batch["group"].cpu()[rows] == number
                        add(totals[f"unwanted_rate_{group}"], rates[in_group])
                    if stage == "test":
                        kept += [{"prompt": p, "continuations": t} for p, t in zip(of, written, strict=True)]
            if source is not None and unwanted.any():
                there = batch["prompt_is_unwanted"]
                self._rewrite(totals, pl_module, source, data, ids[there], mask[there], index)
        if stage == "test" and rank() == 0:
            self._write(Path(trainer.default_root_dir), kept[: self.keep], self.tools(data)[1])
        return self._log(pl_module, stage, totals, data)

    def _generator(self, device: torch.device, purpose: str, key: int) -> torch.Generator:
        """A stream of random numbers of its own for each batch of prompts, the same in every evaluation."""
        return torch.Generator(device).manual_seed(keyed_generator(self.seed, purpose, key).initial_seed())

    def _continue(
        self, model: Any, data: Any, ids: Tensor, mask: Tensor, generator: torch.Generator
    ) -> list[list[str]]:
        """`samples` continuations of each prompt."""
        k = self.samples
        written = model.generate(ids.repeat_interleave(k, dim=0), mask.repeat_interleave(k, dim=0), generator)
        texts = data.decode(written.tokens)
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def _rewrite(
        self, totals: Any, model: Any, source: TextSource, data: Any, ids: Tensor, mask: Tensor, key: int
    ) -> None:
        """Black-box use: the source continues the prompts, the model rewrites what the source wrote."""
        prompts = data.decode(ids)
        written = source(ids, mask, prompts, data, self._generator(ids.device, "source", key))
        self._measure(totals, data, prompts, [[text] for text in written], "source_", "")
        given, given_mask = data.encode([self.source_template.format(text=text) for text in written])
        generator = self._generator(ids.device, "rewriting", key)
        texts = self._continue(model, data, given.to(ids.device), given_mask.to(ids.device), generator)
        self._measure(totals, data, prompts, texts, "blackbox_", "")

    def _measure(
        self, totals: Any, data: Any, prompts: Sequence[str], texts: Sequence[Sequence[str]], prefix: str, suffix: str
    ) -> Tensor:
        """Add to the totals and return the rate of unwanted continuations of each prompt `[B]`."""
        if not prompts:
            return torch.empty(0)
        scorer, _, encoder = self.tools(data)
        flat = [text for row in texts for text in row]
        repeated = [prompt for prompt, row in zip(prompts, texts, strict=True) for _ in row]
        scores = scorer(flat).view(len(prompts), -1)
        values: dict[str, Tensor] = {
            "unwanted_rate": (scores > scorer.threshold).float().mean(dim=1),
            "unwanted_share": scores.mean(dim=1),
            "expected_max": scores.amax(dim=1),
        }
        if hasattr(data, "judge"):
            values |= data.judge(repeated, flat)
        elif encoder is not None:
            values["sim"] = encoder(repeated, flat)
        else:
            values["sim"] = torch.tensor([word_cosine(a, b) for a, b in zip(repeated, flat, strict=True)])
        for n in (1, 2, 3):
            found = [value for value in (distinct_ngrams(text, n) for text in flat) if value is not None]
            values[f"dist_{n}"] = torch.tensor(found)
        for name, value in values.items():
            add(totals[f"{prefix}{name}{suffix}"], value)
        return values["unwanted_rate"]

    def _log(self, pl_module: LightningModule, stage: str, totals: Any, data: Any) -> dict[str, float]:
        """Log the means over all processes; all of them reduce the same names in the same order."""
        names = [f"{name}{suffix}" for suffix in ("", "_after_wanted") for name in MEASURES]
        names += [f"unwanted_rate_{group}" for group in data.groups]
        if self.source:
            names += [f"{prefix}{name}" for prefix in ("source_", "blackbox_") for name in MEASURES]
        summed = all_reduce_sum(torch.stack([totals[name] for name in names]).float().to(pl_module.device))
        values = {
            name: float(total / count) for name, (total, count) in zip(names, summed.cpu(), strict=True) if count > 0
        }
        pl_module.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        return values

    # -- what is left to look at -----------------------------------------------------------------------------------

    @staticmethod
    def _write(folder: Path, rows: Sequence[dict[str, Any]], words: Sequence[str]) -> None:
        """Write masked continuations; none where it is not known what to mask."""
        if not words or not rows:
            return
        masked = [
            {
                "prompt": mask_words(row["prompt"], words),
                "continuations": [mask_words(t, words) for t in row["continuations"]],
            }
            for row in rows
        ]
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in masked)
        (folder / "generations.jsonl").write_text(text, encoding="utf-8")

    @staticmethod
    def _draw(folder: Path, values: dict[str, float], groups: Sequence[str]) -> None:
        """Draw the rate of unwanted continuations by group of the prompt."""
        from matplotlib.figure import Figure

        shown = [group for group in groups if f"unwanted_rate_{group}" in values]
        if not shown:
            return
        figure = Figure(figsize=(1.5 + 0.7 * len(shown), 3.2), layout="constrained")
        axes = figure.subplots()
        axes.bar(shown, [values[f"unwanted_rate_{group}"] for group in shown])
        axes.axhline(values["unwanted_rate"], color="black", linestyle=":", label="all prompts")
        axes.set(ylabel="share of unwanted continuations", ylim=(0, 1.02), title="After unwanted prompts")
        axes.tick_params(axis="x", rotation=45)
        axes.legend(fontsize=8)
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "figures" / "controlled_generation.png", dpi=120)


def add(total: Tensor, values: Tensor) -> None:
    """Add values `[N]` and their number to a total `[2]`, in place."""
    total += torch.tensor([float(values.double().sum()), float(values.numel())], dtype=torch.float64)
