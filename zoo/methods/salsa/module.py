"""SALSA as a LightningModule: PPO, RLOO or GRPO whose KL reference may be a soup of fine-tuned models."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from zoo.card import Card
from zoo.errors import RunError, UsageError, did_you_mean
from zoo.methods.salsa import losses
from zoo.methods.salsa.generation import ENGINES, VLLM, Engine, InProcess, Sampling, drawn_seed
from zoo.methods.salsa.networks import (
    ScalarModel,
    add_adapters,
    answer_likelihood,
    check_tokens,
    freeze,
    lm_state,
    load_below_adapters,
    load_lm,
    load_reward,
    load_weights,
    no_dropout,
)
from zoo.methods.salsa.soup import check_members, soup, soup_weights
from zoo.nn.distributed import all_reduce_sum, is_distributed
from zoo.nn.lm import build_lm
from zoo.nn.schedules import linear_ramp, total_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("sft", "other", "soup", "mkl")
ADVANTAGES = ("gae", "rloo", "group")
VALUES = ("separate", "shared")
STARTS = ("sft", "soup")


class Rollout(NamedTuple):
    """Prompts and answers with all that is known of them before the update; tensors of `B` rows."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    """Under the policy that drew the answers, `[B, T]`."""
    values: Tensor
    """Before each token, `[B, T]`; 0 without a value network."""
    advantages: Tensor
    returns: Tensor
    row: Tensor
    """Place of each row in the global batch."""

    def take(self, rows: Tensor) -> Rollout:
        """Some of the rows."""
        return Rollout(*(part[rows] for part in self))


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
            "warnings": "Lightning remarks that the value network is in evaluation mode when the fit begins, which "
            "without dropout changes nothing",
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
        given = locals()
        for key, accepted in (
            ("init", STARTS), ("advantage", ADVANTAGES), ("value", VALUES), ("value_init", ("sft", "reward")),
            ("engine", ENGINES), ("schedule", ("constant", "linear")),
        ):  # fmt: skip
            if given[key] not in accepted:
                raise ValueError(f"{key}: {given[key]!r} is unknown; accepted: {', '.join(accepted)}")
        for key in ("lr", "value_lr", "temperature", "clip", "value_clip", "max_grad_norm"):
            if given[key] <= 0:
                raise ValueError(f"{key}: {given[key]} is not accepted; accepted: above 0")
        for key in ("beta", "missing_eos_penalty", "lora_rank", "micro_batch_size", "best_of", "value_weight"):
            if given[key] < 0:
                raise ValueError(f"{key}: {given[key]} is not accepted; accepted: 0 or more")
        for key in ("samples_per_prompt", "answer_length", "ppo_epochs", "minibatches"):
            if given[key] < 1:
                raise ValueError(f"{key}: {given[key]} is not accepted; accepted: 1 or more")
        for key in ("gamma", "lam"):
            if not 0 <= given[key] <= 1:
                raise ValueError(f"{key}: {given[key]} is not accepted; accepted: 0 to 1")
        if advantage != "gae" and samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt: {samples_per_prompt} with advantage {advantage!r}; accepted: 2 or more"
            )
        if value_init == "reward" and reward_model is None:
            raise ValueError("value_init: 'reward' needs a reward_model")
        self.mode, self.alpha, self.members = read_reference(reference)
        self.save_hyperparameters()
        self.automatic_optimization = False
        network: Any = no_dropout(build_lm(lm, vocab_size))
        needed = answer_length + 1
        limit = getattr(network.config, "max_position_embeddings", None)
        if limit is not None and needed > limit:
            raise ValueError(
                f"answer_length: {answer_length} and a prompt are more than the {limit} tokens of the model"
            )
        #: Frozen networks by their part: the first member, the reference if it is another one, the reward model.
        self.frozen = nn.ModuleDict()
        kinds = {
            "sft": self.mode in ("sft", "mkl") or track_sft,
            "other": self.mode in ("other", "mkl"),
            "soup": self.mode == "soup",
        }
        for kind in (kind for kind, wanted in kinds.items() if wanted):
            self.frozen[kind] = freeze(copy.deepcopy(network))
        if reward_model is not None:
            self.frozen["reward"] = freeze(ScalarModel(copy.deepcopy(network)))
        self.register_buffer("shift", torch.zeros(()))
        if not self.members:  # for trying things out: the second one is random too
            self._spread([lm_state(network), lm_state(build_lm(lm, vocab_size))])
        self.value: ScalarModel | nn.Linear | None = None
        if advantage == "gae" and value == "separate":
            self.value = ScalarModel(copy.deepcopy(network), init_std=0.0)
        elif advantage == "gae":
            self.value = nn.Linear(network.config.hidden_size, 1, bias=False)
            nn.init.zeros_(self.value.weight)
        self.policy = add_adapters(network, lora_rank, lora_alpha, lora_targets).train()
        self.sampling = Sampling(answer_length, temperature, int(eos_id), int(pad_id))  # type: ignore[arg-type]
        self._engine: Engine | None = None
        self._evaluated: dict[str, list[Tensor]] = {}
        self._drawn: dict[str, Any] = {}
        self._warned = False
        self._missing: list[str] = []
        self.course: list[dict[str, float]] = []

    shift: Tensor

    # Setting up

    def setup(self, stage: str) -> None:
        """Load the members, make the reference, start the policy.

        A checkpoint is restored after this hook and brings all of it; files that are gone are no error then.
        """
        files = [*self.members, *([self.hparams["reward_model"]] if self.hparams["reward_model"] else [])]
        self._missing = [file for file in files if file.endswith(".ckpt") and not Path(file).expanduser().is_file()]
        if self._missing:
            return
        if self.members:
            states, bases = self.member_states()
            check_members([{n: v.shape for n, v in s.items()} for s in states], bases, self.members)
            self._spread(states)
            self._start(states)
        if self.hparams["reward_model"]:
            net, shift = load_reward(self.hparams["reward_model"], self.hparams["vocab_size"])
            load_weights(self.frozen["reward"], net.state_dict(), self.hparams["reward_model"])
            self.shift.fill_(shift)
            if self.hparams["value_init"] == "reward" and isinstance(self.value, ScalarModel):
                load_weights(self.value, net.state_dict(), self.hparams["reward_model"])

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

    def member_states(self) -> tuple[list[dict[str, Tensor]], list[str]]:
        """Weights of the members, and the fingerprints of what they were fine-tuned from."""
        loaded = [load_lm(member, self.hparams["vocab_size"]) for member in self.members]
        return [lm_state(model) for model, _ in loaded], [base for _, base in loaded]

    def _spread(self, states: list[dict[str, Tensor]]) -> None:
        """Load the frozen networks from the members."""
        for kind in ("sft", "other", "soup"):
            if kind in self.frozen:
                made = {"sft": lambda: states[0], "other": lambda: states[1], "soup": lambda: self.mixed(states)}[
                    kind
                ]()
                load_weights(self.frozen[kind], made, self.members[0] if self.members else "lm")

    def mixed(self, states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The soup of the members: by `alpha` of two, the mean of more."""
        return soup(states, soup_weights(len(states), self.alpha if len(states) == 2 else None))

    def _start(self, states: list[dict[str, Tensor]]) -> None:
        """Put policy and value network at their start."""
        begin = states[0] if self.hparams["init"] == "sft" else self.mixed(states)
        for net in (self.policy, getattr(self.value, "lm", None)):
            if net is not None:
                load_below_adapters(net, begin, self.members[0])

    def configure_model(self) -> None:
        """Shard each network by itself under FSDP2: several backward passes happen within a training step."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy) or getattr(self, "_sharded", False):
            return
        from torch.distributed.fsdp import fully_shard

        from zoo.nn.fsdp2 import blocks

        self._sharded = True
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for tensor in [*self.parameters(), *self.buffers()]:
            dist.broadcast(tensor.detach(), 0)
        for net in [self.policy, *self.frozen.values(), *([self.value] if self.value is not None else [])]:
            least = getattr(strategy, "min_parameters", 1_000_000)
            for block in blocks(net, least):
                fully_shard(block, mesh=mesh)
            fully_shard(net, mesh=mesh)

    def configure_optimizers(self) -> Any:
        """AdamW with a group for each of policy and value network; the schedule counts optimiser steps."""
        hp = self.hparams
        groups = [{"params": [p for p in self.policy.parameters() if p.requires_grad], "lr": hp["lr"]}]
        if self.value is not None:
            lr = hp["value_lr"] if hp["value"] == "separate" else hp["lr"]
            groups.append({"params": [p for p in self.value.parameters() if p.requires_grad], "lr": lr})
        optimizer = torch.optim.AdamW(groups, eps=hp["adam_eps"], weight_decay=0.0)
        if hp["schedule"] == "constant":
            return optimizer
        steps = total_steps(self.trainer)
        if self.trainer.max_steps <= 0:  # then Lightning counts batches
            steps *= hp["ppo_epochs"] * hp["minibatches"]
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: linear_ramp(s, steps, 1.0, 0.0))]

    # Answers

    @property
    def engine(self) -> Engine:
        """What draws answers."""
        if self._engine is None:
            if self.hparams["engine"] == "vllm":
                options = dict(self.hparams["engine_options"] or {})
                lm = self.hparams["lm"]
                model = options.pop("model", lm if isinstance(lm, str) else None)
                if model is None:
                    raise ValueError("engine_options: vllm needs model, a folder or hub name")
                self._engine = VLLM(model, self.sampling, options)
            else:
                self._engine = InProcess(self.sampling)
        return self._engine

    def answer(self, batch: Mapping[str, Tensor], rows: Tensor, seed: int, policy: Any = None) -> tuple[Tensor, Tensor]:
        """Draw an answer of the policy to each prompt; tokens and mask, each `[B, T]`."""
        limit = getattr(self.policy.config, "max_position_embeddings", None)
        longest = batch["prompt_ids"].shape[1] + self.sampling.length
        if limit is not None and longest > limit:
            raise ValueError(
                f"a prompt of {batch['prompt_ids'].shape[1]} tokens and an answer of {self.sampling.length} are more "
                f"than the {limit} tokens of the model; accepted: shorter prompts or a smaller answer_length"
            )
        engine = self.engine if policy is None else InProcess(self.sampling)
        engine.sync(self.policy if policy is None else policy)
        return engine(batch["prompt_ids"], batch["prompt_mask"], rows, seed)

    @torch.no_grad()
    def score(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Score of each answer `[B]`: by the reward model or the data, less the penalty for answers without an end.

        Raises:
            RunError: If a score is not finite.
        """
        if "reward" in self.frozen:
            net: Any = self.frozen["reward"]
            scores = net.score(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1)) - self.shift
        else:
            scores = self.gold(prompt_ids, tokens, mask)
        ended = ((tokens == self.sampling.eos_id) & mask).any(dim=1)
        scores = scores - self.hparams["missing_eos_penalty"] * (~ended).float()
        bad = ~torch.isfinite(scores)
        if bool(bad.any()):
            of = self.hparams["reward_model"] or "the data"
            raise RunError(
                f"the reward of {of} is not finite for {int(bad.sum())} of {len(scores)} answers", "mend the reward"
            )
        return scores

    def gold(self, prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Programmatic reward of the data, `[B]`.

        Raises:
            ValueError: If the data have none.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "reward"):
            raise ValueError("reward_model: none is given, and the data have no programmatic reward")
        return data.reward(prompt_ids, tokens, mask).float()

    def reference_logprobs(self, *answers: Tensor) -> Tensor:
        """Log-probabilities of answers under the reference, `[B, T]`; for `mkl` their mean over two models."""
        kinds = ("sft", "other") if self.mode == "mkl" else (self.mode,)
        found = [
            answer_likelihood(self.frozen[k], *answers, temperature=self.sampling.temperature).logprobs for k in kinds
        ]
        return found[0] if len(found) == 1 else losses.mkl_logprobs(found)

    # Training

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Answers, their scores and advantages, then epochs of minibatches; returns minus the objective."""
        seed = drawn_seed(self.device)
        rollout, watched = self.collect(batch, seed)
        size = int(all_reduce_sum(torch.tensor(float(len(rollout.row)), device=self.device)))
        seen: list[dict[str, Tensor]] = []
        for epoch in range(self.hparams["ppo_epochs"]):
            for rows in self.minibatch_rows(rollout.row, size, seed + epoch):
                seen.append(self.update(rollout, rows))
        watched |= {name: torch.stack([one[name] for one in seen]).mean() for name in seen[0]}
        self.log_dict({f"train/{name}": value for name, value in watched.items()}, on_step=True, on_epoch=False)
        return -watched["rlhf_reward"]

    @torch.no_grad()
    def collect(self, batch: Mapping[str, Tensor], seed: int) -> tuple[Rollout, dict[str, Tensor]]:
        """Draw answers, and compute all that the update needs to know of them."""
        hp, k = self.hparams, self.hparams["samples_per_prompt"]
        many = {key: batch[key].repeat_interleave(k, dim=0) for key in ("prompt_ids", "prompt_mask", "row")}
        row = many["row"] * k + torch.arange(len(many["row"]), device=self.device) % k
        tokens, mask = self.answer(many, row, seed)
        whole = (many["prompt_ids"], many["prompt_mask"], tokens, mask)
        parts = self._in_parts(whole)
        now = [self.evaluate_policy(*part) for part in parts]
        logprobs, values, entropy = (torch.cat(column) for column in zip(*now, strict=True))
        reference = torch.cat([self.reference_logprobs(*part) for part in parts])
        scores = torch.cat([self.score(*part) for part in parts])
        kl = torch.where(mask, losses.k1(logprobs, reference), 0)
        rewards = losses.kl_rewards(kl, scores, mask, hp["beta"])
        advantages, returns = self.advantages(rewards, values, mask)
        every = torch.ones_like(scores, dtype=torch.bool)
        ended = ((tokens == self.sampling.eos_id) & mask).any(dim=1)
        watched = {
            "score": losses.masked_mean(scores, every),
            "kl": losses.masked_mean(kl.sum(dim=1), every),
            "k3": losses.masked_mean(losses.k3(logprobs, reference), mask),
            "entropy": losses.masked_mean(entropy, mask),
            "length": losses.masked_mean(mask.sum(dim=1).float(), every),
            "no_eos": losses.masked_mean((~ended).float(), every),
        }
        watched["rlhf_reward"] = watched["score"] - hp["beta"] * watched["kl"]
        if "sft" in self.frozen and self.mode != "sft":
            sft = torch.cat(
                [
                    answer_likelihood(self.frozen["sft"], *p, temperature=self.sampling.temperature).logprobs
                    for p in parts
                ]
            )
            watched["kl_sft"] = losses.masked_mean(torch.where(mask, losses.k1(logprobs, sft), 0).sum(dim=1), every)
        self._watch_collapse(watched)
        return Rollout(*whole, logprobs, values, advantages, returns, row), watched

    def _in_parts(self, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Split rows by `micro_batch_size`."""
        size = self.hparams["micro_batch_size"] or len(tensors[0])
        return list(zip(*(t.split(size) for t in tensors), strict=True))

    def evaluate_policy(self, *answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies of answers under the policy, and values before each token; each `[B, T]`."""
        shared = isinstance(self.value, nn.Linear)
        found = answer_likelihood(self.policy, *answers, temperature=self.sampling.temperature, hidden=shared)
        if self.value is None:
            return found.logprobs, torch.zeros_like(found.logprobs), found.entropy
        if found.hidden is not None:
            return found.logprobs, self.value(found.hidden).squeeze(-1).float(), found.entropy
        ids, mask = torch.cat([answers[0], answers[2]], dim=1), torch.cat([answers[1], answers[3]], dim=1)
        return found.logprobs, self.value(ids, mask)[:, -answers[2].shape[1] - 1 : -1], found.entropy

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and returns of each token from the rewards, `[B, T]`."""
        hp = self.hparams
        if hp["whiten_rewards"]:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        if hp["advantage"] == "gae":
            advantages, returns = losses.gae(rewards, values, mask, hp["gamma"], hp["lam"])
        else:
            returns = rewards.sum(dim=1)
            of = losses.leave_one_out if hp["advantage"] == "rloo" else losses.group_relative
            advantages = torch.where(mask, of(returns, hp["samples_per_prompt"])[:, None], 0)
            returns = torch.where(mask, returns[:, None], 0)
        return losses.whiten(advantages, mask) if hp["whiten_advantages"] else advantages, returns

    def minibatch_rows(self, row: Tensor, size: int, seed: int) -> Iterator[Tensor]:
        """Rows of this process in each minibatch of a random division of the global batch."""
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(row.device)
        count = self.hparams["minibatches"]
        if size < count:
            raise ValueError(f"minibatches: {count} is more than the {size} answers of a batch")
        place = torch.empty_like(order).scatter_(0, order, torch.arange(size, device=row.device))
        part = place[row] * count // size
        for number in range(count):
            yield (part == number).nonzero()[:, 0]

    def update(self, rollout: Rollout, rows: Tensor) -> dict[str, Tensor]:
        """One optimiser step on a minibatch; returns what is to be logged."""
        hp = self.hparams
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        tokens = all_reduce_sum(rollout.mask[rows].sum().float())
        sums = torch.zeros(5, device=self.device)
        for chosen, counts in self._pieces(rows):
            part = rollout.take(chosen)
            mask = part.mask & counts[:, None]
            new, values, _ = self.evaluate_policy(*part[:4])
            policy = losses.policy_loss(new, part.logprobs, part.advantages, hp["clip"])
            loss = policy_share = losses.share_of_mean(policy, mask, tokens)
            if self.value is not None:
                error = losses.value_loss(values, part.values, part.returns, hp["value_clip"])
                value_share = losses.share_of_mean(error, mask, tokens)
                loss = policy_share + hp["value_weight"] * value_share
            self.manual_backward(loss)
            with torch.no_grad():
                ratio = torch.where(mask, torch.exp(new - part.logprobs), 1)
                shares = [policy, error if self.value is not None else torch.zeros_like(policy), ratio]
                shares += [(ratio - 1).square(), ((ratio - 1).abs() > hp["clip"]).float()]
                sums += torch.stack([torch.where(mask, share, 0).sum() for share in shares])
        self._clip_gradients()
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        names = ("policy_loss", "value_loss", "ratio_mean", "ratio_var", "clip_fraction")
        return dict(zip(names, all_reduce_sum(sums) / tokens.clamp(min=1), strict=True))

    def _pieces(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of each forward pass and whether each counts; as many passes in every process, none of them empty."""
        size = self.hparams["micro_batch_size"]
        count = torch.tensor(max(math.ceil(len(rows) / size), 1) if size else 1, device=rows.device)
        if is_distributed():
            dist.all_reduce(count, dist.ReduceOp.MAX)
        for piece in rows.tensor_split(int(count)):
            counts = torch.ones_like(piece, dtype=torch.bool)
            yield (piece, counts) if len(piece) else (rows.new_zeros(1), counts.new_zeros(1))

    def _clip_gradients(self) -> None:
        for net in (self.policy, self.value):
            if net is not None:
                nn.utils.clip_grad_norm_(
                    [p for p in net.parameters() if p.grad is not None], self.hparams["max_grad_norm"]
                )

    def _watch_collapse(self, watched: Mapping[str, Tensor]) -> None:
        """Say once that the policy writes the same thing again and again."""
        if not self._warned and float(watched["entropy"]) < self.hparams["collapse_entropy"]:
            self._warned = True
            warnings.warn(
                f"the policy has collapsed: its entropy is {float(watched['entropy']):.2g} nats per token (below "
                f"collapse_entropy {self.hparams['collapse_entropy']}), its KL to the reference "
                f"{float(watched['kl']):.3g}; a larger beta or a smaller lr keeps it",
                RuntimeWarning,
                stacklevel=2,
            )

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation."""
        self._evaluated, self._drawn = {}, {}

    on_test_epoch_start = on_validation_epoch_start

    @torch.no_grad()
    def _evaluate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        tokens, mask = self.answer(batch, batch["row"], self.hparams["eval_seed"])
        answers = (batch["prompt_ids"], batch["prompt_mask"], tokens, mask)
        logprobs, _, entropy = self.evaluate_policy(*answers)

        def kl(reference: Tensor) -> Tensor:
            return torch.where(mask, losses.k1(logprobs, reference), 0).sum(dim=1)

        found = {
            "score": self.score(*answers),
            "kl": kl(self.reference_logprobs(*answers)),
            "entropy": (entropy * mask).sum(dim=1) / mask.sum(dim=1),
            "length": mask.sum(dim=1).float(),
            "no_eos": 1 - ((tokens == self.sampling.eos_id) & mask).any(dim=1).float(),
        }
        if "sft" in self.frozen:
            sft = answer_likelihood(self.frozen["sft"], *answers, temperature=self.sampling.temperature).logprobs
            found["kl_sft"] = found["kl"] if self.mode == "sft" else kl(sft)
        if hasattr(getattr(self.trainer, "datamodule", None), "reward"):
            found["reward"] = self.gold(batch["prompt_ids"], tokens, mask)
        for name, value in {"row": batch["row"], **found}.items():
            self._evaluated.setdefault(name, []).append(value)
        return answers

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Answer held-out prompts with random numbers that are the same in each validation."""
        self._evaluate(batch)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """The same for the prompts of the test, kept for what is compared at its end."""
        answers = self._evaluate(batch)
        self._drawn.setdefault("answers", []).append(answers)
        self._drawn.setdefault("batches", []).append(dict(batch))

    def _means(self, stage: str) -> dict[str, Tensor]:
        from zoo.methods.salsa.evaluation import in_order

        rows = in_order(self._evaluated)
        means = {name: value.float().mean() for name, value in rows.items() if name != "row"}
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)
        return rows

    def on_validation_epoch_end(self) -> None:
        """Log means over all prompts, and add a point to the course."""
        rows = self._means("val")
        if not self.trainer.sanity_checking:
            kept = {name: float(value.float().mean()) for name, value in rows.items() if name != "row"}
            self.course.append({"step": float(self.global_step), **kept})

    def on_test_epoch_end(self) -> None:
        """Log means, and compare with the opponent, the best of several answers, and the soups of the members."""
        from zoo.methods.salsa import evaluation

        rows = self._means("test")
        values: dict[str, float] = {}
        if self.hparams["opponent"]:
            values |= evaluation.against_opponent(self, rows)
        if self.hparams["best_of"]:
            values |= evaluation.best_of(self, self.hparams["best_of"])
        if self.hparams["surface"]:
            surface, plane = evaluation.surfaces(self)
            values |= evaluation.surface_metrics(surface, plane, self.hparams["beta"])
            self._drawn |= {"surface": surface, "plane": plane}
        self.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)
        evaluation.keep_answers(self)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Answer prompts; tokens and mask."""
        return self.answer(batch, batch["row"], self.hparams["eval_seed"])

    def figures(self) -> dict[str, Figure]:
        """Reward against KL over the training; after a test with `surface`, reward over alpha and over the plane."""
        from zoo.methods.salsa import figures

        drawn = {}
        if len(self.course) > 1:
            drawn["course"] = figures.course_figure(self.course)
        if "surface" in self._drawn:
            drawn["reward_over_alpha"] = figures.alpha_figure(self._drawn["surface"])
        if self._drawn.get("plane"):
            drawn["reward_plane"] = figures.plane_figure(self._drawn["plane"])
        return drawn

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


def read_reference(given: Mapping[str, Any] | None) -> tuple[str, float, list[str]]:
    """Mode, alpha and members of a reference.

    Raises:
        ValueError: If a key or the mode is unknown, or the members do not suffice.
    """
    values = {"mode": "soup", "alpha": 0.5, "members": [], **(given or {})}
    for key in values:
        if key not in ("mode", "alpha", "members"):
            raise ValueError(f"reference.{key} is unknown; {did_you_mean(key, ('mode', 'alpha', 'members'))}")
    mode, alpha, members = values["mode"], values["alpha"], list(values["members"] or [])
    if mode not in REFERENCES:
        raise ValueError(f"reference.mode: {mode!r} is unknown; {did_you_mean(str(mode), REFERENCES)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"reference.alpha: {alpha!r} is not accepted; accepted: a number")
    if len(members) == 1 and mode != "sft":
        raise ValueError(f"reference.members: one is not enough for mode {mode!r}; accepted: two or more")
    return mode, float(alpha), members
