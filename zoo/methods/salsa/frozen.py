"""The networks of SALSA that are never trained: the first member, the reference of the KL, the reward model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.methods.salsa.losses import mkl_logprobs
from zoo.methods.salsa.networks import ScalarModel, answer_likelihood, freeze, lm_state, load_lm, load_weights
from zoo.methods.salsa.soup import soup, soup_weights


def member_states(members: Sequence[str], vocab_size: int | None) -> tuple[list[dict[str, Tensor]], list[str]]:
    """Weights of fine-tuned models, and the fingerprints of what they were fine-tuned from.

    Args:
        members: Checkpoints, folders or hub names.
        vocab_size: Number of tokens of the data.
    """
    loaded = [load_lm(member, vocab_size) for member in members]
    return [lm_state(model) for model, _ in loaded], [base for _, base in loaded]


def mixed(states: Sequence[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The soup of some models: by `alpha` of two, the mean of more."""
    return soup(states, soup_weights(len(states), alpha if len(states) == 2 else None))


class FrozenNetworks(nn.ModuleDict):
    """The networks that are needed, each by its part: `sft`, `other`, `soup`, `reward`.

    Args:
        network: Their architecture; it is copied.
        mode: Mode of the reference.
        alpha: Weight of the second member in a soup of two.
        track_sft: Whether the first member is kept where it is not the reference.
        reward: Whether there is a reward model.
        temperature: Divides the logits, as in sampling.
    """

    def __init__(
        self, network: Any, mode: str, alpha: float, track_sft: bool, reward: bool, temperature: float
    ) -> None:
        super().__init__()
        self.mode, self.alpha, self.temperature = mode, alpha, temperature
        if mode in ("sft", "mkl") or track_sft:
            self["sft"] = freeze(copy.deepcopy(network))
        if mode in ("other", "mkl"):
            self["other"] = freeze(copy.deepcopy(network))
        if mode == "soup":
            self["soup"] = freeze(copy.deepcopy(network))
        if reward:
            self["reward"] = freeze(ScalarModel(copy.deepcopy(network)))

    def spread(self, states: Sequence[dict[str, Tensor]], what: str) -> None:
        """Load the members, and their soup; errors begin with `what`."""
        if "sft" in self:
            load_weights(self["sft"], states[0], what)
        if "other" in self:
            load_weights(self["other"], states[1], what)
        if "soup" in self:
            load_weights(self["soup"], mixed(states, self.alpha), what)

    def logprobs(self, part: str, *answers: Tensor) -> Tensor:
        """Log-probabilities of answers under one of the networks, `[B, T]`."""
        return answer_likelihood(self[part], *answers, temperature=self.temperature).logprobs

    def reference_logprobs(self, *answers: Tensor) -> Tensor:
        """Log-probabilities of answers under the reference, `[B, T]`; for `mkl` their mean over two models."""
        if self.mode != "mkl":
            return self.logprobs(self.mode, *answers)
        return mkl_logprobs([self.logprobs(part, *answers) for part in ("sft", "other")])

    def rewards(self, prompt_ids: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the reward model says of answers, not shifted, `[B]`."""
        net: Any = self["reward"]
        return net.score(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1))
