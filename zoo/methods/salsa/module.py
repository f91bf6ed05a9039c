"""SALSA as a LightningModule: PPO, RLOO or GRPO whose KL reference may be a soup of fine-tuned models.

Longer than other files: 150 lines explain the options; the step stands here as one algorithm, its parts are beside it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo.card import Card
from zoo.errors import UsageError
from zoo.methods.salsa import evaluation, losses
from zoo.methods.salsa.frozen import FrozenNetworks, member_states, mixed
from zoo.methods.salsa.generation import Drawn, Engine, InProcess, Sampling, build_engine, drawn_seed
from zoo.methods.salsa.networks import (
    ScalarModel,
    add_adapters,
    answer_likelihood,
    check_tokens,
    lm_state,
    load_below_adapters,
    load_reward,
    load_weights,
    no_dropout,
    shard_each,
)
from zoo.methods.salsa.options import check_options, read_reference
from zoo.methods.salsa.rollout import (
    Rollout,
    ended,
    final_scores,
    in_parts,
    minibatch_rows,
    pieces,
    token_advantages,
    watched,
)
from zoo.methods.salsa.soup import check_members
from zoo.nn.distributed import all_reduce_sum
from zoo.nn.lm import build_lm
from zoo.nn.schedules import linear_ramp, total_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Salsa(LightningModule):
    """Fine-tune a language model by reinforcement learning near a reference: `max E[r] - beta KL(policy || reference)`.

    PPO is `reference: {mode: sft}`, or a soup with `alpha: 0`; SALSA is `reference: {mode: soup, alpha: 0.5}`. All else
    is the same, the policy starts at the first member in both.

    Args:
        lm: Values of a configuration of `transformers`, or a path or name of a pre-trained model: the network of all
            members. Without members its weights are the first one.
        reference: `mode`: `sft` (the first member), `other` (the second), `soup` or `mkl` (mean of the KL terms to the
            first two). `members`: fine-tuned models, each a checkpoint of `sft`, a folder or a hub name; without any,
            random weights for trying things out. `alpha`: weight of the second in a soup of two, 0.5; a soup of more is
            their mean.
        init: Where the policy starts: at the first member (`sft`), as in the paper, or at the `soup` of all of them.
        beta: Weight of the KL in the reward.
        reward_model: Checkpoint of `reward_model`; none takes the programmatic reward of the data.
        missing_eos_penalty: Taken off the score of an answer that does not end.
        advantage: `gae` (PPO with a value network), `rloo` (leave one out) or `group` (relative to the group).
        value: Value network of `gae`: `separate`, or a head on the policy's hidden states (`shared`).
        value_init: What a separate value network starts from: the first member (`sft`) or the `reward` model.
        samples_per_prompt: Answers to each prompt; at least 2 without a value network.
        answer_length: Most tokens of an answer.
        temperature: Of sampling; it divides the logits in all log-probabilities too.
        gamma: Discount.
        lam: Of generalised advantage estimation.
        whiten_rewards: Whether token rewards are divided by their deviation.
        whiten_advantages: Whether advantages get mean 0 and variance 1 over the batch.
        clip: Of ratios.
        value_clip: Of values.
        value_weight: Weight of the value loss; it matters for a `shared` network and for `Adam` with an epsilon.
        ppo_epochs: Passes over a batch of answers.
        minibatches: Parts of the batch, each an optimiser step.
        micro_batch_size: Answers of a forward pass of each process; 0 for all.
        lr: Learning rate of the policy, AdamW.
        value_lr: Learning rate of a separate value network.
        adam_eps: Epsilon of AdamW.
        max_grad_norm: Norm to which gradients are clipped, of policy and value network each.
        schedule: Learning rate: `constant`, or `linear` to zero.
        lora_rank: Rank of low-rank adapters of the policy; 0 trains all weights.
        lora_alpha: Scale of the adapters times their rank.
        lora_targets: Names of the layers with adapters; none for all linear layers but the head.
        engine: What draws answers: `in_process` or `vllm`.
        engine_options: Further arguments of `vllm.LLM`; `model` is the folder or hub name that it is built from.
        track_sft: Whether the KL to the first member is logged where it is not the reference.
        keep_frozen: Whether checkpoints hold the frozen networks; else they are read again from their files.
        collapse_entropy: Mean entropy per token below which a collapse of the policy is reported, nats.
        eval_seed: Seed of the answers in evaluation, the same for all runs.
        opponent: Checkpoint whose answers are compared with the policy's in the test.
        best_of: In the test, also the best of so many answers by the score; 0 for none.
        surface: In the test, the reward of the soups of the members over alpha and the plane of three, before any
            training; written to metrics and figures.
        judge: An OpenAI-compatible endpoint that compares answers with the opponent's in the test, besides the reward:
            `url`, `model`, and `key_variable`, the environment variable that holds the key.
        vocab_size: Number of tokens, from the data.
        eos_id: Token that ends a text, from the data.
        pad_id: Token that fills rows, from the data.

    Raises:
        ValueError: If a value is out of range, or two do not go together.

    Departures:
        How the paper computes PPO, and its hyper-parameters, could not be found out; the algorithm is that of arXiv
        2403.17031, with the score at the last token. Optimiser steps are counted, one for each minibatch.
    """

    card = Card(
        title="SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF",
        summary="RLHF with an average of fine-tuned models as the reference; PPO, RLOO, GRPO and their soup variants",
        arxiv="2411.01798",
        year=2024,
        batch="datamodules.preferences_batches.PromptBatch",
        kind="language, alignment",
        links={"vocab_size": "vocab_size", "eos_id": "eos_id", "pad_id": "pad_id"},
        skip_checks={
            "accumulation": "each batch of answers takes several optimiser steps; micro_batch_size divides these",
        },
    )

    automatic_optimization: bool

    def __init__(
        self,
        lm: str | dict[str, Any],
        reference: dict[str, Any] | None = None,
        init: str = "sft",
        beta: float = 0.05,
        reward_model: str | None = None,
        missing_eos_penalty: float = 0.0,
        advantage: str = "gae",
        value: str = "separate",
        value_init: str = "sft",
        samples_per_prompt: int = 1,
        answer_length: int = 53,
        temperature: float = 1.0,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        clip: float = 0.2,
        value_clip: float = 0.2,
        value_weight: float = 0.1,
        ppo_epochs: int = 4,
        minibatches: int = 1,
        micro_batch_size: int = 0,
        lr: float = 3e-6,
        value_lr: float = 3e-6,
        adam_eps: float = 1e-5,
        max_grad_norm: float = 1.0,
        schedule: str = "constant",
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        engine: str = "in_process",
        engine_options: dict[str, Any] | None = None,
        track_sft: bool = True,
        keep_frozen: bool = True,
        collapse_entropy: float = 0.01,
        eval_seed: int = 0,
        opponent: str | None = None,
        best_of: int = 0,
        surface: bool = False,
        judge: dict[str, Any] | None = None,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        super().__init__()
        check_tokens(eos_id, pad_id)
        check_options(locals())
        self.mode, self.alpha, self.members = read_reference(reference)
        self.save_hyperparameters()
        self.automatic_optimization = False
        network: Any = no_dropout(build_lm(lm, vocab_size))
        limit = getattr(network.config, "max_position_embeddings", None)
        if limit is not None and answer_length + 1 > limit:
            raise ValueError(
                f"answer_length: {answer_length} and a prompt are more than the {limit} tokens of the model"
            )
        self.frozen = FrozenNetworks(network, self.mode, self.alpha, track_sft, reward_model is not None, temperature)
        self.register_buffer("shift", torch.zeros(()))
        if not self.members:  # for trying things out: the second one is random too
            self.frozen.spread([lm_state(network), lm_state(build_lm(lm, vocab_size))], "lm")
        self.value: ScalarModel | nn.Linear | None = None
        if advantage == "gae" and value == "separate":
            self.value = ScalarModel(copy.deepcopy(network), init_std=0.0).train()
        elif advantage == "gae":
            self.value = nn.Linear(network.config.hidden_size, 1, bias=False)
            nn.init.zeros_(self.value.weight)
        self.policy = add_adapters(network, lora_rank, lora_alpha, lora_targets).train()
        self.sampling = Sampling(answer_length, temperature, int(eos_id), int(pad_id))  # type: ignore[arg-type]
        self._engine: Engine | None = None
        #: What the last evaluation found for each prompt, and what it drew.
        self.evaluated: dict[str, list[Tensor]] = {}
        self.drawn: dict[str, Any] = {}
        self._warned, self._sharded = False, False
        self._missing: list[str] = []
        self.course: list[dict[str, float]] = []

    shift: Tensor

    # Setting up

    def setup(self, stage: str) -> None:
        """Load the members, make the reference, start the policy.

        A checkpoint is restored after this hook and brings all of it; files that are gone are no error then.
        """
        hp = self.hparams
        files = [*self.members, *([hp["reward_model"]] if hp["reward_model"] else [])]
        self._missing = [file for file in files if file.endswith(".ckpt") and not Path(file).expanduser().is_file()]
        if self._missing:
            return
        if self.members:
            states, bases = member_states(self.members, hp["vocab_size"])
            check_members([{n: v.shape for n, v in s.items()} for s in states], bases, self.members)
            self.frozen.spread(states, self.members[0])
            begin = states[0] if hp["init"] == "sft" else mixed(states, self.alpha)
            for net in (self.policy, getattr(self.value, "lm", None)):
                if net is not None:
                    load_below_adapters(net, begin, self.members[0])
        if hp["reward_model"]:
            net, shift = load_reward(hp["reward_model"], hp["vocab_size"])
            load_weights(self.frozen["reward"], net.state_dict(), hp["reward_model"])
            self.shift.fill_(shift)
            if hp["value_init"] == "reward" and isinstance(self.value, ScalarModel):
                load_weights(self.value, net.state_dict(), hp["reward_model"])

    def _check_loaded(self) -> None:
        """Refuse to start without the files that no checkpoint stands in for."""
        if self._missing and (not self.trainer.ckpt_path or not self.hparams["keep_frozen"]):
            raise UsageError(
                f"there is no checkpoint {self._missing[0]}", "reference.members and reward_model name files"
            )

    def on_fit_start(self) -> None:
        """See `_check_loaded`."""
        self._check_loaded()
        # Lightning warns of networks that are in evaluation mode when a fit begins, on purpose or not
        self.frozen.train()

    def on_train_start(self) -> None:
        """The frozen networks are in evaluation mode, which for want of dropout changes nothing."""
        self.frozen.eval()

    on_validation_start = on_test_start = on_predict_start = _check_loaded

    def configure_model(self) -> None:
        """Shard each network by itself under FSDP2: several backward passes happen within a training step."""
        if not self._sharded:
            self._sharded = shard_each(self, [self.policy, *self.frozen.values(), self.value])

    def configure_optimizers(self) -> Any:
        """AdamW with a group for each of policy and value network; the schedule counts optimiser steps."""
        hp = self.hparams
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad], "lr": hp["lr"]}]
        if self.value is not None:
            lr = hp["value_lr"] if hp["value"] == "separate" else hp["lr"]
            groups.append({"params": [p for p in self.value.parameters() if p.requires_grad], "lr": lr})
        optimizer = torch.optim.AdamW(groups, eps=hp["adam_eps"], weight_decay=0.0, fused=True)
        if hp["schedule"] == "constant":
            return optimizer
        steps = total_steps(self.trainer)
        if self.trainer.max_steps <= 0:  # then Lightning counts batches
            steps *= hp["ppo_epochs"] * hp["minibatches"]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: linear_ramp(s, steps, 1.0, 0.0))]

    # Answers

    def answer(
        self, batch: Mapping[str, Tensor], rows: Tensor, seed: int, policy: Any = None, likelihood: bool = False
    ) -> Drawn:
        """Draw an answer of the policy, or of another one, to each prompt; see `generation.Engine`."""
        limit = getattr(self.policy.config, "max_position_embeddings", None)
        longest = batch["prompt_ids"].shape[1] + self.sampling.length
        if limit is not None and longest > limit:
            raise ValueError(
                f"a prompt of {batch['prompt_ids'].shape[1]} tokens and an answer of {self.sampling.length} are more "
                f"than the {limit} tokens of the model; accepted: shorter prompts or a smaller answer_length"
            )
        if self._engine is None:
            hp = self.hparams
            self._engine = build_engine(hp["engine"], hp["lm"], self.sampling, hp["engine_options"] or {})
        engine = self._engine if policy is None else InProcess(self.sampling)
        engine.sync(self.policy if policy is None else policy)
        return engine(batch["prompt_ids"], batch["prompt_mask"], rows, seed, likelihood)

    @torch.no_grad()
    def score(self, *answers: Tensor) -> Tensor:
        """Score of each answer `[B]`: by the reward model or the data, less the penalty for answers without an end.

        Raises:
            RunError: If a score is not finite.
        """
        prompt_ids, _, tokens, mask = answers
        learned = "reward" in self.frozen
        scores = self.frozen.rewards(*answers) - self.shift if learned else self.gold(prompt_ids, tokens, mask)
        has_end = ended(tokens, mask, self.sampling.eos_id)
        source = self.hparams["reward_model"] or "the data"
        return final_scores(scores, has_end, self.hparams["missing_eos_penalty"], source)

    def gold(self, prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Programmatic reward of the data, `[B]`.

        Raises:
            ValueError: If the data have none.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "reward"):
            raise ValueError("reward_model: none is given, and the data have no programmatic reward")
        return data.reward(prompt_ids, tokens, mask).float()

    # Training

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Answers, their scores and advantages, then epochs of minibatches; returns minus the objective."""
        seed = drawn_seed(self.device)
        rollout, means = self.collect(batch, seed)
        size = int(all_reduce_sum(torch.tensor(float(len(rollout.row)), device=self.device)))
        seen: list[dict[str, Tensor]] = []
        for epoch in range(self.hparams["ppo_epochs"]):
            for rows in minibatch_rows(rollout.row, size, self.hparams["minibatches"], seed + epoch):
                seen.append(self.update(rollout, rows))
        means |= {name: torch.stack([one[name] for one in seen]).mean() for name in seen[0]}
        self.log_dict({f"train/{name}": value for name, value in means.items()}, on_step=True, on_epoch=False)
        return -means["rlhf_reward"]

    @torch.no_grad()
    def collect(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Rollout, dict[str, Tensor]]:
        """Draw answers, and compute all that the update needs to know of them; also means to be logged."""
        hp, k = self.hparams, self.hparams["samples_per_prompt"]
        many = {key: batch[key].repeat_interleave(k, dim=0) for key in ("prompt_ids", "prompt_mask", "row")}
        row = many["row"] * k + torch.arange(len(many["row"]), device=self.device) % k
        drawn = self.answer(many, row, seed, likelihood=not isinstance(self.value, nn.Linear))
        tokens, mask = drawn.tokens, drawn.mask
        answers = (many["prompt_ids"], many["prompt_mask"], tokens, mask)
        parts = in_parts(answers, hp["micro_batch_size"])
        if drawn.logprobs is None or drawn.entropy is None:
            columns = zip(*(self.evaluate_policy(*part, entropy=True) for part in parts), strict=True)
            logprobs, values, entropy = (torch.cat(column) for column in columns)
        else:  # they were drawn by the very weights that are trained, so that a pass would say it once more
            logprobs, entropy = drawn.logprobs, drawn.entropy
            values = torch.cat([self.separate_values(*part) for part in parts])
        reference = torch.cat([self.frozen.reference_logprobs(*part) for part in parts])
        scores = torch.cat([self.score(*part) for part in parts])
        kl = torch.where(mask, losses.k1(logprobs, reference), 0)
        rewards = losses.kl_rewards(kl, scores, mask, hp["beta"])
        advantages, returns = token_advantages(rewards, values, mask, hp)
        tracked = "sft" in self.frozen and self.mode != "sft"
        sft = torch.cat([self.frozen.logprobs("sft", *part) for part in parts]) if tracked else None
        has_end = ended(tokens, mask, self.sampling.eos_id)
        means = watched(scores, logprobs, reference, entropy, mask, has_end, hp["beta"], sft)
        self._watch_collapse(means)
        return Rollout(*answers, logprobs, values, advantages, returns, row), means

    def evaluate_policy(self, *answers: Tensor, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of answers under the policy, values before each token, entropies if asked for; `[B, T]`."""
        head = self.value if isinstance(self.value, nn.Linear) else None
        found = answer_likelihood(
            self.policy, *answers, temperature=self.sampling.temperature, hidden=head is not None, entropy=entropy
        )
        if head is not None and found.hidden is not None:
            values = head(found.hidden).squeeze(-1).float()
        else:
            values = self.separate_values(*answers)
        return found.logprobs, values, torch.zeros_like(values) if found.entropy is None else found.entropy

    def separate_values(self, *answers: Tensor) -> Tensor:
        """Values before each token by a network of their own, 0 without one; `[B, T]`."""
        if not isinstance(self.value, ScalarModel):
            return torch.zeros(answers[2].shape, device=self.device)
        ids, mask = torch.cat([answers[0], answers[2]], dim=1), torch.cat([answers[1], answers[3]], dim=1)
        return self.value(ids, mask)[:, -answers[2].shape[1] - 1 : -1]

    def update(self, rollout: Rollout, rows: Tensor) -> dict[str, Tensor]:
        """One optimiser step on a minibatch; returns what is to be logged."""
        hp = self.hparams
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        tokens = all_reduce_sum(rollout.mask[rows].sum().float())
        sums = torch.zeros(5, device=self.device)
        for chosen, counts in pieces(rows, hp["micro_batch_size"]):
            part = rollout.take(chosen)
            mask = part.mask & counts[:, None]
            new, values, _ = self.evaluate_policy(*part[:4])
            policy = losses.policy_loss(new, part.logprobs, part.advantages, hp["clip"])
            loss = losses.share_of_mean(policy, mask, tokens)
            error = torch.zeros_like(policy)
            if self.value is not None:
                error = losses.value_loss(values, part.values, part.returns, hp["value_clip"])
                loss = loss + hp["value_weight"] * losses.share_of_mean(error, mask, tokens)
            self.manual_backward(loss)
            with torch.no_grad():
                ratio = torch.where(mask, torch.exp(new - part.logprobs), 1)
                shares = [policy, error, ratio, (ratio - 1).square(), ((ratio - 1).abs() > hp["clip"]).float()]
                sums += torch.stack([torch.where(mask, share, 0).sum() for share in shares])
        for net in (self.policy, self.value):
            if net is not None:
                trained = [p for p in net.parameters() if p.grad is not None]
                nn.utils.clip_grad_norm_(trained, hp["max_grad_norm"])
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        names = ("policy_loss", "value_loss", "ratio_mean", "ratio_var", "clip_fraction")
        return dict(zip(names, all_reduce_sum(sums) / tokens.clamp(min=1), strict=True))

    def _watch_collapse(self, means: Mapping[str, Tensor]) -> None:
        """Say once that the policy writes the same thing again and again."""
        if not self._warned and float(means["entropy"]) < self.hparams["collapse_entropy"]:
            self._warned = True
            warnings.warn(
                f"the policy has collapsed: its entropy is {float(means['entropy']):.2g} nats per token (below "
                f"collapse_entropy {self.hparams['collapse_entropy']}), its KL to the reference "
                f"{float(means['kl']):.3g}; a larger beta or a smaller lr keeps it",
                RuntimeWarning,
                stacklevel=2,
            )

    # Evaluation: see `zoo.methods.salsa.evaluation`

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self.evaluated, self.drawn = {}, {}

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Answer fixed prompts with random numbers that are the same in each validation."""
        evaluation.evaluate_prompts(self, batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same for the prompts of the test, kept for what is compared at its end."""
        self.drawn.setdefault("answers", []).append(evaluation.evaluate_prompts(self, batch))
        self.drawn.setdefault("batches", []).append(dict(batch))

    def on_validation_epoch_end(self) -> None:
        """Log means over all prompts, and add a point to the course."""
        means, _ = evaluation.mean_of_prompts(self, "val")
        if not self.trainer.sanity_checking:
            self.course.append({"step": float(self.global_step), **{name: float(x) for name, x in means.items()}})

    def on_test_epoch_end(self) -> None:
        """Log means, and compare with the opponent, the best of several answers, and the soups of the members."""
        evaluation.finish_test(self)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Answer prompts; tokens and mask."""
        return self.answer(batch, batch["row"], self.hparams["eval_seed"])[:2]

    def figures(self) -> dict[str, Figure]:
        """Reward against KL over the training; after a test with `surface`, reward over alpha and over the plane."""
        from zoo.methods.salsa.figures import drawn_figures

        return drawn_figures(self.course, self.drawn)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the course; leave out frozen networks that can be read again."""
        checkpoint["salsa_course"] = self.course
        if not self.hparams["keep_frozen"] and self.members:
            kept = {n: v for n, v in checkpoint["state_dict"].items() if not n.startswith("frozen.")}
            checkpoint["state_dict"] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the course; put the frozen networks in, which were read from their files."""
        self.course = checkpoint.get("salsa_course", [])
        own = {n: v for n, v in self.state_dict().items() if n.startswith("frozen.")}
        checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
