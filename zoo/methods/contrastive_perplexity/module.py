"""Contrastive perplexity as a LightningModule, with the objectives that it is compared with."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.card import Card
from zoo.errors import RunError
from zoo.methods.contrastive_perplexity.losses import (
    contrastive_perplexity,
    dpo_loss,
    log_perplexity,
    official_loss,
    perplexity,
    prototype,
    simpo_loss,
)
from zoo.methods.contrastive_perplexity.networks import (
    adapters_off,
    build_network,
    load_base,
    merge_adapters,
    sentence_logprobs,
)
from zoo.nn.distributed import all_reduce_sum
from zoo.nn.optim import decay_groups
from zoo.nn.pretrained import read_weights
from zoo.nn.sampling import Samples, check_sampling, generate
from zoo.nn.schedules import linear_ramp, total_steps, warmup_cosine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The method in three readings.
CONTRASTIVE = ("paper", "paper_log", "official")
#: Those and the baselines.
OBJECTIVES = (*CONTRASTIVE, "sft_pos", "unlikelihood_neg", "dpo", "simpo")
_CHOICES = {
    "objective": OBJECTIVES,
    "tau_mode": ("cancel", "inside"),
    "distance": ("absolute", "one_sided"),
    "prototype": ("per_anchor", "batch"),
    "schedule": ("constant", "linear", "cosine"),
}
#: The two loaders of validation and test.
DOCUMENTS = ("wanted", "unwanted")


class ContrastivePerplexity(LightningModule):
    """Tune a language model on sets of wanted (positive) and unwanted (negative) sentences.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a pre-trained model.
        objective: `paper`: distances of perplexities, a ratio of sums. `paper_log`: the same of log-perplexities.
            `official`: what the released code computes. Baselines: `sft_pos` maximises the likelihood of the positives
            (on a corpus it trains a base model), `unlikelihood_neg` minimises that of the negatives, `dpo` and `simpo`
            prefer the k-th positive to the k-th negative.
        tau: Temperature.
        tau_mode: `cancel`: as printed, where it has no effect. `inside`: it divides the distance.
        alpha: Weight of the negatives; for `official` a number that is added to their logits (100 there).
        distance: `absolute`, or `one_sided` so that no negative is made more likely (not of the paper; not for
            `official`).
        prototype: Mean over the positives of an anchor (`per_anchor`) or of the batch (`batch`, the released code).
        detach_prototype: Whether no gradient flows through the prototype.
        lambda_lm: Weight of the positives' negative log-likelihood beside the contrastive loss (not of the paper).
        beta: Strength of `dpo`, scale of the reward of `simpo`.
        gamma: Target margin of `simpo`.
        lora_rank: Rank of low-rank adapters; 0 trains all weights.
        lora_alpha: Scale of the adapters times their rank.
        lora_dropout: Dropout at the adapters' inputs.
        lora_targets: Names of the layers with adapters; none for all linear layers but the head.
        four_bit: Load the frozen weights in 4 bits.
        gradient_checkpointing: Compute activations again in the backward pass.
        head_chunk: Tokens for which logits are held at once; 0 for all.
        sentence_chunk: Sentences whose activations are held at once, at the price of one more forward pass; 0 for all.
        init_from: Checkpoint of a run of this method that the training starts from.
        sign_check_batches: Batches of training data on which, before the first step, negatives must be less likely than
            positives, as the objective assumes; 0 for no check. For the contrastive objectives.
        lr: Peak learning rate of AdamW.
        betas: Its momenta.
        weight_decay: Weight decay of matrices.
        schedule: Learning rate after the warm-up: `constant`, `linear` or `cosine` to zero.
        warmup_steps: Steps of linear warm-up.
        max_new_tokens: Most tokens that `generate` adds.
        temperature: Of generation; 0 takes the most likely token.
        top_p: Nucleus of generation.
        vocab_size: Number of tokens, from the data.
        eos_id: Token that ends a text, from the data.
        pad_id: Token that fills rows, from the data.

    Raises:
        ValueError: If a value is out of range or two do not go together.

    Departures:
        The mean over anchors, not the sum of Eq. 2. Padding never counts, as it does in the released code.
    """

    card = Card(
        title="Contrastive Perplexity for Controlled Generation: An Application in Detoxifying Large Language Models",
        summary="Detoxify or steer a language model by the perplexities of sets of wanted and unwanted sentences",
        arxiv="2401.08491",
        year=2024,
        batch="datamodules.perplexity_sets.batches.PerplexityBatch",
        kind="language, controlled generation",
        links={"vocab_size": "vocab_size", "eos_id": "eos_id", "pad_id": "pad_id"},
        compiles=False,
    )

    sums: Tensor

    def __init__(
        self,
        lm: str | dict[str, Any],
        objective: str = "paper",
        tau: float = 1.0,
        tau_mode: str = "inside",
        alpha: float = 1.0,
        distance: str = "absolute",
        prototype: str = "per_anchor",
        detach_prototype: bool = False,
        lambda_lm: float = 0.0,
        beta: float = 0.1,
        gamma: float = 0.5,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: list[str] | None = None,
        four_bit: bool = False,
        gradient_checkpointing: bool = False,
        head_chunk: int = 0,
        sentence_chunk: int = 0,
        init_from: str | None = None,
        sign_check_batches: int = 8,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_steps: int = 0,
        max_new_tokens: int = 10,
        temperature: float = 0.7,
        top_p: float = 0.9,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        for key, accepted in _CHOICES.items():
            if (value := locals()[key]) not in accepted:
                raise ValueError(f"{key}: {value!r} is unknown; accepted: {', '.join(accepted)}")
        for key, number in (("tau", tau), ("lr", lr), ("beta", beta)):
            if number <= 0:
                raise ValueError(f"{key}: {number} is not accepted; accepted: above 0")
        for key, number in (
            ("alpha", alpha),
            ("lambda_lm", lambda_lm),
            ("lora_rank", lora_rank),
            ("head_chunk", head_chunk),
            ("sentence_chunk", sentence_chunk),
            ("sign_check_batches", sign_check_batches),
        ):
            if number < 0:
                raise ValueError(f"{key}: {number} is not accepted; accepted: 0 or more")
        if objective == "official" and distance == "one_sided":
            raise ValueError("distance: 'one_sided' does not go with objective 'official'; accepted: absolute")
        check_sampling(temperature, 0, top_p)
        self.save_hyperparameters()
        adapters = (lora_rank, lora_alpha, lora_dropout, lora_targets or ())
        self.lm = build_network(lm, vocab_size, *adapters, four_bit, gradient_checkpointing)
        # with adapters the reference is the model without them
        copied = objective == "dpo" and not lora_rank
        self.reference = copy.deepcopy(self.lm).requires_grad_(False) if copied else None
        self.register_buffer("sums", torch.zeros(2, 2), persistent=False)
        self.curve: list[dict[str, float]] = []
        self._sentences: dict[str, list[Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Load `init_from` before training; a resumed run has its weights in the checkpoint."""
        if stage == "fit" and self.hparams["init_from"] and not self.trainer.ckpt_path:
            weights = read_weights(self.hparams["init_from"])
            for model in filter(None, (self.lm, self.reference)):
                load_base(model, weights)

    def on_train_start(self) -> None:
        """Check the sign before the first step; the reference has no dropout."""
        if self.reference is not None:
            self.reference.eval()
        count = self.hparams["sign_check_batches"]
        if count == 0 or self.hparams["objective"] not in CONTRASTIVE or self.global_step:
            return
        loader: Any = self.trainer.train_dataloader
        if hasattr(loader.dataset, "batch"):  # batches by number, so that the loader's position stays what it is
            self.check_sign([loader.dataset[0, index] for index in range(min(count, len(loader)))])
        else:
            self.check_sign(list(itertools.islice(loader, count)))

    @torch.no_grad()
    def check_sign(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Refuse to start where negatives are more likely than positives: they would be made more likely still.

        Raises:
            RunError: If they are, on average over the batches of all processes.
        """
        self.lm.eval()
        total = torch.zeros(2, 2, device=self.device)
        for batch in batches:
            on_device = self.transfer_batch_to_device(batch, self.device, 0)
            l, _ = self.log_perplexities(on_device)  # noqa: E741 - the letter of the equations
            l_pos, *l_neg = self.parts(l, on_device)
            for row, part in enumerate((l_pos, torch.cat(l_neg, dim=1))):
                total[row] += torch.stack([part.sum(), torch.tensor(float(part.numel()), device=self.device)])
        self.lm.train()
        pos, neg = (total := all_reduce_sum(total))[:, 0] / total[:, 1]
        if neg <= pos and self.hparams["distance"] == "absolute":
            raise RunError(
                f"before training the negatives are more likely than the positives: log-perplexity {neg:.3f} against "
                f"{pos:.3f}; the objective would make them more likely still",
                "take a base model that prefers the positives, model.distance one_sided, or "
                "model.sign_check_batches 0 to go on all the same",
            )

    # -- training ---------------------------------------------------------------------------------------------------

    def log_perplexities(self, batch: Mapping[str, Any], model: Any = None) -> tuple[Tensor, Tensor]:
        """Log-perplexity `[B, K]` of every sentence of a batch of sets, and its number of predicted tokens."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        chunks = self.hparams["head_chunk"], self.hparams["sentence_chunk"]
        logprobs, counts = sentence_logprobs(model or self.lm, ids.flatten(0, 1), mask.flatten(0, 1), *chunks)
        l = log_perplexity(logprobs, counts)  # noqa: E741 - the letter of the equations
        return l.view(ids.shape[:2]), counts.sum(dim=1).view(ids.shape[:2])

    @staticmethod
    def parts(l: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
        """Split `[B, K]` into positives `[B, p]`, hard negatives `[B, n]` and random negatives `[B, r]`."""
        pos, neg, random = l.split(batch["sizes"], dim=1)
        return pos, neg, random

    def contrastive(self, l_pos: Tensor, l_neg: Tensor, l_random: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the method from the log-perplexities of the three parts, and what to watch."""
        hp = self.hparams
        as_phi = perplexity if hp["objective"] == "paper" else torch.Tensor.float
        phi_pos, phi_neg, phi_random = as_phi(l_pos), as_phi(l_neg), as_phi(l_random)
        c = prototype(phi_pos, hp["prototype"], hp["detach_prototype"])
        all_neg = torch.cat([phi_neg, phi_random], dim=1)
        if hp["objective"] == "official":
            loss = official_loss(phi_pos, phi_neg, phi_random, c, hp["alpha"], hp["tau"])
        else:
            loss = contrastive_perplexity(phi_pos, all_neg, c, hp["alpha"], hp["tau"], hp["tau_mode"], hp["distance"])
        watched = {"contrastive": loss, "frac_neg_below_prototype": (all_neg < c).float().mean()}
        return loss + hp["lambda_lm"] * l_pos.mean() if hp["lambda_lm"] else loss, watched

    def preference(self, batch: Mapping[str, Any], l: Tensor, tokens: Tensor) -> Tensor:  # noqa: E741
        """DPO or SimPO on the pairs of k-th positive and k-th negative."""
        hp = self.hparams
        l_pos, l_neg, _ = self.parts(l, batch)
        pairs = min(l_pos.shape[1], l_neg.shape[1])
        if hp["objective"] == "simpo":
            return simpo_loss(l_pos[:, :pairs], l_neg[:, :pairs], hp["beta"], hp["gamma"])
        with torch.no_grad():
            if self.reference is None:
                with adapters_off(self.lm):
                    ref, _ = self.log_perplexities(batch)
            else:
                ref, _ = self.log_perplexities(batch, self.reference)
        (pi_pos, pi_neg, _), (ref_pos, ref_neg, _) = (self.parts(-x * tokens, batch) for x in (l, ref))
        return dpo_loss(pi_pos[:, :pairs], pi_neg[:, :pairs], ref_pos[:, :pairs], ref_neg[:, :pairs], hp["beta"])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """One forward pass over all sentences of all anchors, then the objective on their perplexities."""
        l, tokens = self.log_perplexities(batch)  # noqa: E741 - the letter of the equations
        l_pos, l_neg, l_random = self.parts(l, batch)
        objective, watched = self.hparams["objective"], {"log_ppl_pos": l_pos.mean()}
        negatives = torch.cat([l_neg, l_random], dim=1)
        if objective != "sft_pos" and not negatives.numel():
            raise ValueError(f"objective: {objective!r} needs negatives, the data give none of them")
        if negatives.numel():
            watched |= {"log_ppl_neg": negatives.mean(), "gap": negatives.mean() - l_pos.mean()}
        if objective == "sft_pos":
            loss = l_pos.mean()
        elif objective == "unlikelihood_neg":
            loss = -negatives.mean()
        elif objective in CONTRASTIVE:
            loss, more = self.contrastive(l_pos, l_neg, l_random)
            watched |= more
        else:
            loss = self.preference(batch, l, tokens)
        logged = {"train/loss": loss, **{f"train/{name}": value for name, value in watched.items()}}
        self.log_dict({name: value.detach() for name, value in logged.items()}, on_step=True, on_epoch=False)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, warm-up, and the schedule."""
        hp, steps = self.hparams, total_steps(self.trainer)
        optimizer = torch.optim.AdamW(
            decay_groups(self.lm.parameters(), hp["weight_decay"]), lr=hp["lr"], betas=tuple(hp["betas"])
        )

        def factor(step: int) -> float:
            warmup = hp["warmup_steps"]
            if hp["schedule"] == "cosine" or step < warmup:
                return warmup_cosine(step, steps, warmup)
            return 1.0 if hp["schedule"] == "constant" else linear_ramp(step - warmup, max(steps - warmup, 1), 1.0, 0.0)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def merged(self) -> Any:
        """Return a copy of the language model with its adapters merged into the weights, to be saved or served."""
        return merge_adapters(copy.deepcopy(self.lm)).eval()

    def export(self, folder: str) -> str:
        """Write the tuned model with its adapters merged, for `zoo export`, and return how to load it."""
        self.merged().save_pretrained(folder)
        return f"transformers.AutoModelForCausalLM.from_pretrained({folder!r})"

    # -- evaluation -------------------------------------------------------------------------------------------------

    def generate(self, prompt_ids: Tensor, prompt_mask: Tensor, generator: torch.Generator | None = None) -> Samples:
        """Continue prompts `[B, T]`, padded on the left; see `zoo.nn.sampling.generate`."""
        hp = self.hparams
        return generate(
            self.lm,
            prompt_ids,
            hp["max_new_tokens"],
            prompt_mask,
            hp["temperature"],
            top_p=hp["top_p"],
            eos_id=hp["eos_id"],
            pad_id=hp["pad_id"],
            generator=generator,
        )

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.sums.zero_()
        self._sentences = {name: [] for name in DOCUMENTS}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Sum the negative log-likelihood of held-out documents, wanted ones in the first loader."""
        logprobs, counts = sentence_logprobs(
            self.lm, batch["input_ids"], batch["attention_mask"], self.hparams["head_chunk"]
        )
        self.sums[dataloader_idx] += torch.stack([-torch.where(counts, logprobs, 0).sum(), counts.sum().float()])
        self._sentences[DOCUMENTS[dataloader_idx]].append(log_perplexity(logprobs, counts).cpu())

    test_step = validation_step

    def _log_perplexities(self, stage: str) -> dict[str, Tensor]:
        """Log perplexities per token of wanted and unwanted documents and of mixtures of them, as the paper does."""
        sums = all_reduce_sum(self.sums)
        shares = {"ppl_wanted": 0.0, "ppl_mixed_50": 0.5, "ppl_mixed_75": 0.75, "ppl_unwanted": 1.0}
        values = {}
        for name, share in shares.items():
            nll, tokens = (1 - share) * sums[0] + share * sums[1]
            values[name] = (nll / tokens).exp()
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, sync_dist=True)
        return values

    def on_validation_epoch_end(self) -> None:
        """Log perplexities and add a point to their curve."""
        values = self._log_perplexities("val")
        if not self.trainer.sanity_checking:
            self.curve.append({"step": float(self.global_step), **{k: float(v) for k, v in values.items()}})

    def on_test_epoch_end(self) -> None:
        """Log perplexities."""
        self._log_perplexities("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Samples:
        """Continue prompts."""
        return self.generate(batch["prompt_ids"], batch["prompt_mask"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the curve."""
        checkpoint["contrastive_perplexity_curve"] = self.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the curve."""
        self.curve = checkpoint.get("contrastive_perplexity_curve", [])

    def figures(self) -> dict[str, Figure]:
        """Perplexities of the sentences of the last evaluation, and their course over training."""
        from zoo.methods.contrastive_perplexity.figures import course_figure, perplexity_figure

        drawn = {}
        if self._sentences and all(self._sentences.values()):
            drawn["perplexities"] = perplexity_figure({name: torch.cat(x) for name, x in self._sentences.items()})
        if len(self.curve) > 1:
            drawn["course"] = course_figure(self.curve)
        return drawn
