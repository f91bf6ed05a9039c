"""KV Prediction as a LightningModule; the same module trains a model alone, as base, auxiliary or baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.card import Card
from zoo.methods.kv_prediction.evaluation import Sums, all_arms, base_arm, predicted_arm, recoveries, score, timed
from zoo.methods.kv_prediction.losses import REDUCTIONS, cache_loss, canonical_map, pruned_map, token_loss, total_loss
from zoo.methods.kv_prediction.models import build_model, check_pair, restore_base, strip_base, weights_hash
from zoo.methods.kv_prediction.networks import CausalLM, KVPredictor, unused_for_entries
from zoo.methods.kv_prediction.prefill import Prefill, continue_from, full, predicted
from zoo.nn.lm import IGNORE
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import total_steps, trapezoid, warmup_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHOICES = {
    "mode": ("predict", "alone"),
    "consistency_reduction": REDUCTIONS,
    "consistency_positions": ("all", "labels"),
    "self_entries": ("predicted", "own"),
    "schedule": ("trapezoid", "cosine"),
}
#: Maps from base to auxiliary layers by name; `uniform` and `reversed` are ablations.
LAYER_MAPS = ("canonical", "pruned", "uniform", "reversed")


def layer_map_of(choice: str | list[int], auxiliary_depth: int, base_depth: int, kept: list[int] | None) -> list[int]:
    """Return the auxiliary layer of each base layer.

    Args:
        choice: A name of `LAYER_MAPS`, or the map itself.
        auxiliary_depth: Layers of the auxiliary model.
        base_depth: Layers of the base.
        kept: Layers of the base that the auxiliary has, if it is made of them.

    Raises:
        ValueError: If the name is unknown, or `pruned` is asked for an auxiliary that is no part of the base.
    """
    if not isinstance(choice, str):
        return list(choice)
    if choice not in LAYER_MAPS:
        raise ValueError(f"layer_map: {choice!r} is unknown; accepted: {', '.join(LAYER_MAPS)}, or a list of layers")
    if choice == "pruned":
        if kept is None:
            raise ValueError("layer_map: pruned needs auxiliary: {layers: [0, ...]}, layers of the base")
        return pruned_map(kept, base_depth)
    canonical = canonical_map(auxiliary_depth, base_depth)
    if choice == "reversed":
        return [auxiliary_depth - 1 - j for j in reversed(canonical)]
    return [i * auxiliary_depth // base_depth for i in range(base_depth)] if choice == "uniform" else canonical


class KVPrediction(LightningModule):
    """A small auxiliary model reads the prompt; linear maps of its cache stand in for the cache of a big base model.

    Args:
        base: The big model: sizes as `transformers` names them (`{model_type: llama, hidden_size: 64, ...}`, random
            weights); a checkpoint of this method with `mode: alone`; path or name of a Llama, Mistral, Qwen2, Qwen3 or
            OpenELM; or `{layers: [0, 2], of: MODEL}`, some layers of one of these. It is frozen.
        auxiliary: The small model, named in the same way; in `{layers: [0, 2]}` they are those of the base.
        mode: `predict`: the method. `alone`: train the model that `base` names by next-token prediction; that gives the
            base, the auxiliary to start from, and the baselines of a small or a layer-pruned model.
        layer_map: Auxiliary layer of each base layer: `canonical`, `pruned` (for `{layers: ...}`), a list, or the
            ablations `uniform` and `reversed`.
        base_weight: Weight of the cross-entropy of the base that attends to the predicted cache.
        auxiliary_weight: Weight of the auxiliary model's own cross-entropy.
        consistency_weight: Weight of the L1 distance of predicted from true cache.
        consistency_reduction: `mean` over layers: 1 / n_B on the sum, the paper's choice. `sum`: its released configs.
        consistency_positions: `all`, or those whose label counts (`labels`), as in the released code; there only
            padding does not count.
        self_entries: What a position sees of itself in training: its `predicted` entry, as in the paper, or the base's
            `own`, as the last token of a prompt does at inference. With the first, an auxiliary that knows the answer
            can put it where inference does not look.
        freeze_auxiliary: Whether the linear maps alone are trained (an ablation).
        z_weight: Weight of the z-loss in both cross-entropies (the released code has 1e-4).
        lr: Peak learning rate of AdamW.
        predictor_lr: That of the linear maps; null for `lr`.
        betas: Momenta of AdamW.
        weight_decay: Weight decay of matrices.
        schedule: After the warm-up: `trapezoid`, constant and then a line, or `cosine`; both end at `final_lr`.
        warmup_steps: Steps of linear warm-up.
        decay_from: Fraction of the steps after which the trapezoid falls.
        final_lr: Last learning rate as a fraction of the peak.
        horizons: Numbers of answer tokens over which the negative log-likelihood is measured.
        compare: Whether a test also measures the base, the auxiliary alone, no prompt, and pruned prompts.
        retentions: Fractions of the prompt that pruning keeps in a test besides the one at equal cost; null for none.
        max_new_tokens: Tokens that `predict` generates.
        export: Whether a fit writes `predictor.safetensors` to the run directory.
        vocab_size: Number of tokens, from the data.
        tokenizer_id: What the tokens mean, from the data.

    Raises:
        ValueError: If a value is out of range or the models do not go together.

    Departures:
        Checkpoints hold the base only if it was made from sizes; else its hash, and it is read again.
    """

    card = Card(
        title="KV Prediction for Improved Time to First Token",
        summary="A small model's cache, mapped linearly, stands in for the big model's cache of the prompt",
        arxiv="2410.08391",
        year=2024,
        batch="datamodules.text.TextBatch",
        kind="language, inference cost",
        links={"vocab_size": "vocab_size", "tokenizer_id": "tokenizer_id"},
        compiles=False,
    )

    base: CausalLM

    def __init__(
        self,
        base: str | dict[str, Any],
        auxiliary: str | dict[str, Any] | None = None,
        mode: str = "predict",
        layer_map: str | list[int] = "canonical",
        base_weight: float = 1.0,
        auxiliary_weight: float = 1.0,
        consistency_weight: float = 1.0,
        consistency_reduction: str = "mean",
        consistency_positions: str = "all",
        self_entries: str = "predicted",
        freeze_auxiliary: bool = False,
        z_weight: float = 0.0,
        lr: float = 1e-3,
        predictor_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        schedule: str = "trapezoid",
        warmup_steps: int = 0,
        decay_from: float = 0.5,
        final_lr: float = 0.05,
        horizons: list[int] | None = None,
        compare: bool = True,
        retentions: list[float] | None = None,
        max_new_tokens: int = 16,
        export: bool = True,
        vocab_size: int = 0,
        tokenizer_id: str = "",
    ) -> None:
        super().__init__()
        for key, accepted in _CHOICES.items():
            if (value := locals()[key]) not in accepted:
                raise ValueError(f"{key}: {value!r} is unknown; accepted: {', '.join(accepted)}")
        for key, number in (("lr", lr), ("predictor_lr", lr if predictor_lr is None else predictor_lr)):
            if not number > 0:
                raise ValueError(f"{key}: {number} is not accepted; accepted: above 0")
        for key, number in (
            ("base_weight", base_weight),
            ("auxiliary_weight", auxiliary_weight),
            ("consistency_weight", consistency_weight),
            ("z_weight", z_weight),
        ):
            if not 0 <= number < math.inf:
                raise ValueError(f"{key}: {number} is not accepted; accepted: 0 or more")
        for retention in retentions or ():
            if not 0 < retention <= 1:
                raise ValueError(f"retentions: {retention} is not accepted; accepted: above 0, at most 1")
        for key, least in (("max_new_tokens", max_new_tokens), *(("horizons", h) for h in horizons or ())):
            if least < 1:
                raise ValueError(f"{key}: {least} is not accepted; accepted: 1 or more")
        if (auxiliary is None) != (mode == "alone"):
            raise ValueError(f"auxiliary: {auxiliary!r} does not go with mode: {mode}; only predict has an auxiliary")
        self.save_hyperparameters()
        self.horizons = horizons or [1, 16, 64]
        self.base = build_model(base, "base", vocab_size, tokenizer_id)
        self.auxiliary: CausalLM | None = None
        self.predictor: KVPredictor | None = None
        self.base_hash = ""
        if auxiliary is not None:
            self.auxiliary = build_model(auxiliary, "auxiliary", vocab_size, tokenizer_id, of=self.base)
            check_pair(self.base, self.auxiliary, base, auxiliary)
            kept = auxiliary["layers"] if isinstance(auxiliary, dict) and set(auxiliary) == {"layers"} else None
            chosen = layer_map_of(layer_map, self.auxiliary.shape.depth, self.base.shape.depth, kept)
            self.predictor = KVPredictor(self.auxiliary.shape, self.base.shape, chosen)
            self.base.requires_grad_(False)
            if freeze_auxiliary:
                self.auxiliary.requires_grad_(False)
            elif auxiliary_weight == 0:
                for parameter in unused_for_entries(self.auxiliary, chosen):
                    parameter.requires_grad_(False)
            self.base_hash = weights_hash(self.base)
        self._sums = Sums()
        self._times: dict[str, list[float]] = {}
        self._points: dict[str, dict[str, float]] = {}

    def train(self, mode: bool = True) -> KVPrediction:
        """Set the mode of what is trained; the frozen base stays in evaluation mode."""
        super().train(mode)
        if self.predictor is not None:
            self.base.eval()
        return self

    @property
    def pair(self) -> tuple[CausalLM, KVPredictor]:
        """Auxiliary model and linear maps of `mode: predict`."""
        assert self.auxiliary is not None
        assert self.predictor is not None
        return self.auxiliary, self.predictor

    # -- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Predict the cache of all positions, run the base over it, and compare it with the true one."""
        hp, ids, labels = self.hparams, batch["input_ids"], batch["labels"]
        if self.predictor is None:
            loss = token_loss(self.base.logits(self.base(ids)[0]), labels, hp["z_weight"])
            self.log_dict({"train/loss": loss.detach()}, on_step=True, on_epoch=False)
            return loss
        auxiliary, predictor = self.pair
        if hp["auxiliary_weight"] and not hp["freeze_auxiliary"]:
            stream, entries = auxiliary(ids)
            of_auxiliary = token_loss(auxiliary.logits(stream), labels, hp["z_weight"])
        else:
            entries, of_auxiliary = auxiliary.entries(ids), torch.zeros((), device=self.device)
        guessed = predictor(entries)
        stream, _ = self.base(ids, given=guessed, own_self=hp["self_entries"] == "own")
        of_base = token_loss(self.base.logits(stream), labels, hp["z_weight"])
        with torch.no_grad():
            true = self.base.normed(self.base.entries(ids))
        mask = labels != IGNORE if hp["consistency_positions"] == "labels" else None
        consistency = cache_loss(self.base.normed(guessed), true, mask, hp["consistency_reduction"])
        loss = total_loss(
            of_base, of_auxiliary, consistency, hp["base_weight"], hp["auxiliary_weight"], hp["consistency_weight"]
        )
        logged = {"loss": loss, "base": of_base, "auxiliary": of_auxiliary, "consistency": consistency}
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()}, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, warm-up and the schedule."""
        hp, steps = self.hparams, total_steps(self.trainer)
        groups: list[dict[str, Any]] = []
        rates = [(self.base, hp["lr"]), (self.auxiliary, hp["lr"]), (self.predictor, hp["predictor_lr"] or hp["lr"])]
        for part, lr in rates:
            if part is not None:
                found = decay_groups(part.parameters(), hp["weight_decay"])
                groups += [{**group, "lr": lr} for group in found if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=hp["lr"], betas=tuple(hp["betas"]))

        def factor(step: int) -> float:
            if hp["schedule"] == "cosine":
                return warmup_cosine(step, steps, hp["warmup_steps"], hp["final_lr"])
            return trapezoid(step, steps, hp["warmup_steps"], hp["decay_from"], hp["final_lr"])

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_end(self) -> None:
        """Write the predictor for use elsewhere."""
        if self.predictor is not None and self.hparams["export"] and self.trainer.is_global_zero:
            from zoo.methods.kv_prediction.export import save_predictor

            save_predictor(Path(self.trainer.default_root_dir) / "predictor.safetensors", self)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def check_length(self, prompt: Tensor, more: int) -> None:
        """Check that a prompt `[B, N]` and `more` tokens fit the models.

        Raises:
            ValueError: If there is no token, or there are more than one of the models was made for.
        """
        tokens = prompt.shape[1]
        if tokens < 1:
            raise ValueError("prompt: a prompt of no tokens is not accepted; accepted: one token or more")
        for name, model in (("base", self.base), ("auxiliary", self.auxiliary)):
            if model is not None and model.shape.context and tokens + more > model.shape.context:
                raise ValueError(
                    f"prompt: {tokens} tokens and {more} more are too long for the {name}; accepted: "
                    f"{model.shape.context} in all (its max_position_embeddings)"
                )

    def prefill(self, prompt: Tensor, more: int) -> Prefill:
        """First token's logits and the cache to go on with, after prompts `[B, N]`; `more` tokens can be added."""
        self.check_length(prompt, more)
        if self.predictor is None:
            return full(self.base, prompt, more)
        return predicted(self.base, *self.pair, prompt, more)

    def predicted_logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        """Logits of the base with a predicted cache at all positions, as in training; for likelihoods.

        Args:
            ids: int64 `[B, S]`.
            last: Number of positions at the end whose logits are wanted; None for all.

        Returns:
            `[B, S, V]`, or `[B, last, V]`.
        """
        auxiliary, predictor = self.pair
        stream = self.base(ids, given=predictor(auxiliary.entries(ids)))[0]
        return self.base.logits(stream if last is None else stream[:, -last:])

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._sums, self._times = Sums(), {}

    on_test_epoch_start = on_validation_epoch_start

    def _evaluate(self, batch: Mapping[str, Any], compare: bool) -> None:
        prompt, answer, rows = batch["prompt_ids"], batch["answer_ids"], batch["row"]
        tokens, more = prompt.shape[1], answer.shape[1]
        self.check_length(prompt, more)
        if self.predictor is None:
            arms = {"": base_arm(self.base, tokens)}
        elif compare:
            arms = all_arms(self.base, *self.pair, tokens, self.hparams["retentions"] or ())
        else:
            arms = {"": predicted_arm(self.base, *self.pair, tokens)}
        for name, arm in arms.items():
            start, milliseconds = timed(arm, prompt, rows, more)
            self._sums.add(name, score(continue_from(arm.model, start, answer), answer, self.horizons, batch["group"]))
            if compare:
                reference = arms["base"].cost if "base" in arms else arm.cost
                self._sums.add(name, {"cost": (torch.tensor(float(arm.cost / reference)), 1)})
                self._times.setdefault(name, []).append(milliseconds)
        if self.predictor is not None:
            logits = self.predicted_logits(torch.cat([prompt, answer[:, :-1]], dim=1), more)
            self._sums.add("all_predicted", score(logits, answer, self.horizons, batch["group"]))

    def _means(self) -> dict[str, float]:
        means = self._sums.means(self.device)
        return means | recoveries(means, sorted({key.rpartition("/")[0] for key in means} - {"base", "no_prompt"}))

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Score the answers to prompts."""
        self._evaluate(batch, compare=False)

    def on_validation_epoch_end(self) -> None:
        """Log the means."""
        self.log_dict({f"val/{name}": value for name, value in self._means().items()}, sync_dist=True)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Score the answers to prompts in all ways."""
        self._evaluate(batch, compare=self.hparams["compare"])

    def on_test_epoch_end(self) -> None:
        """Log the means, costs as fractions of the base's, and the median time of a batch's first tokens."""
        means = self._means()
        for name, times in self._times.items():
            means[f"{name}/ttft_ms" if name else "ttft_ms"] = sorted(times)[len(times) // 2]
        if self.auxiliary is not None:
            counts = [sum(p.numel() for p in model.parameters()) for model in (self.base, self.auxiliary)]
            means["reduction_by_parameters"] = counts[0] / counts[1]
        self._points = {}
        for key, value in means.items():
            folder, _, name = key.rpartition("/")
            self._points.setdefault(folder, {})[name] = value
        self.log_dict({f"test/{name}": value for name, value in means.items()}, sync_dist=True)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Continue prompts greedily; int64 `[B, max_new_tokens]`."""
        from zoo.methods.kv_prediction.generation import generate

        return generate(self, batch["prompt_ids"], self.hparams["max_new_tokens"])

    def figures(self) -> dict[str, Figure]:
        """Quality against cost of all ways to the first token, after a test."""
        from zoo.methods.kv_prediction.figures import pareto_figure

        return {"pareto": pareto_figure(self._points)} if "base" in self._points else {}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what the model is; a frozen base that comes from somewhere else is left out, but for its hash."""
        facts = {"mode": self.hparams["mode"], "shape": self.base.shape.plain(), "base_hash": self.base_hash}
        checkpoint["kv_prediction"] = facts | {"tokenizer_id": self.hparams["tokenizer_id"]}
        if self.predictor is not None and isinstance(self.hparams["base"], str):
            strip_base(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the base back."""
        restore_base(checkpoint, self.base, self.base_hash)
