"""The equations of contrastive perplexity and of the baselines it is compared with (arXiv 2401.08491).

Letters: `B` anchors, each with `p` positives (wanted text) and `n` negatives (unwanted text of the same meaning); `l`
is the log-perplexity of a sentence, its mean negative log-likelihood per token in nats, and `phi` what the objective
compares: `exp(l)` in the paper, `l` in the official code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.distributed import all_reduce_sum

Prototype = Literal["per_anchor", "batch"]
TauMode = Literal["cancel", "inside"]
Distance = Literal["absolute", "one_sided"]

#: Largest log-perplexity that is exponentiated; a perplexity beyond it, 22026, says nothing more.
MAX_LOG_PERPLEXITY = 10.0


def log_perplexity(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1 in logs: `l = -(1/M) sum_t log p(x_t | x_<t)` over the `M` tokens of each sentence.

    Args:
        logprobs: `log p(x_t | x_<t)` in nats, `[N, T]`; anything where `mask` is false.
        mask: Which positions are predicted tokens, bool `[N, T]`; at least one in a row.

    Returns:
        float32 `[N]`.
    """
    return -torch.where(mask, logprobs.float(), 0).sum(dim=1) / mask.sum(dim=1)


def perplexity(l: Tensor) -> Tensor:  # noqa: E741 - the letter of the equation
    """Eq. 1: `phi = exp(l)`, with `l` held below `MAX_LOG_PERPLEXITY`; any shape."""
    return l.clamp(max=MAX_LOG_PERPLEXITY).exp()


def prototype(phi_pos: Tensor, kind: Prototype = "per_anchor", detach: bool = False) -> Tensor:
    """Eq. 5: `c_i = (1/p) sum_{x in P_i} phi(x)`.

    Args:
        phi_pos: `[B, p]`.
        kind: `per_anchor` as in the paper; `batch` is one mean over the positives of all anchors, as in the official
            code, there of the micro-batch of one process, here of the global batch.
        detach: Whether no gradient flows through the prototype; it does in the official code.

    Returns:
        `[B, 1]`, or `[1, 1]` for `batch`.
    """
    if kind == "per_anchor":
        c = phi_pos.mean(dim=1, keepdim=True)
    else:
        count = torch.tensor(float(phi_pos.numel()), device=phi_pos.device)
        c = (all_reduce_sum(phi_pos.sum()) / all_reduce_sum(count)).reshape(1, 1)
    return c.detach() if detach else c


def contrastive_perplexity(
    phi_pos: Tensor,
    phi_neg: Tensor,
    c: Tensor,
    alpha: float = 1.0,
    tau: float = 1.0,
    tau_mode: TauMode = "cancel",
    distance: Distance = "absolute",
) -> Tensor:
    """Eqs. 2-4 and 6 in logs, the mean over anchors of `-log J_i`.

    `J_i = sum_P s / (sum_P s + alpha sum_N s)` with `s = exp(-|phi - c|) / tau`.

    Args:
        phi_pos: `[B, p]`.
        phi_neg: `[B, n]`.
        c: Prototype, `[B, 1]` or `[1, 1]`.
        alpha: Weight of the negatives, at least 0.
        tau: Temperature.
        tau_mode: `cancel` reads Eq. 4 as printed: `1/tau` is a factor of every `s` and cancels in Eq. 3. `inside`
            divides the distance by it: `s = exp(-|phi - c| / tau)`.
        distance: `absolute`: `|phi - c|`. It pushes a negative that lies below the prototype further down, that is,
            makes it more likely. `one_sided` takes `phi - c` for the negatives, so that all of them are pushed up.

    Returns:
        A scalar, at least 0; `log((p + alpha n) / p)` if all perplexities are equal.
    """
    scale = tau if tau_mode == "inside" else 1.0
    gap_neg = phi_neg - c
    log_s_pos = -(phi_pos - c).abs() / scale
    log_s_neg = -(gap_neg.abs() if distance == "absolute" else gap_neg) / scale
    log_weight = math.log(alpha) if alpha > 0 else -math.inf
    log_all = torch.cat([log_s_pos, log_s_neg + log_weight], dim=1).logsumexp(dim=1)
    return (log_all - log_s_pos.logsumexp(dim=1)).mean()


def official_loss(
    l_pos: Tensor, l_neg: Tensor, l_random: Tensor, c: Tensor, alpha: float = 100.0, tau: float = 1.0
) -> Tensor:
    """What the official code computes: similarities as logits of a softmax, with `alpha` added to the negatives'.

    `z_j = exp(-|l_j - c|) / tau + alpha [j in N]`, `L = -1/(p + 1 + r) mean_i sum_{j in P_i} log softmax(z)_j`.

    Args:
        l_pos: Log-perplexities of the positives `[B, p]`.
        l_neg: Of the hard negatives `[B, n]`.
        l_random: Of random negatives `[B, r]`, unwanted text of other anchors; `r` may be 0.
        c: Prototype, `[B, 1]` or `[1, 1]`.
        alpha: Added to the logits of the hard negatives.
        tau: Temperature.

    Returns:
        A scalar.

    Departures:
        Padding is no part of a sentence's log-perplexity, as it is in the official code.
    """
    p, r = l_pos.shape[1], l_random.shape[1]
    z = torch.exp(-(torch.cat([l_pos, l_neg, l_random], dim=1) - c).abs()) / tau
    z = z + alpha * F.pad(torch.ones_like(l_neg), (p, r))
    return -z.log_softmax(dim=1)[:, :p].sum(dim=1).mean() / (p + 1 + r)


def dpo_loss(log_pi_pos: Tensor, log_pi_neg: Tensor, log_ref_pos: Tensor, log_ref_neg: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, Eq. 7): `-log sigmoid(beta ((pi_w - ref_w) - (pi_l - ref_l)))`, the mean over pairs.

    Args:
        log_pi_pos: Log-likelihoods of wanted sentences under the model, summed over tokens; any shape.
        log_pi_neg: Of the unwanted ones.
        log_ref_pos: The same under the frozen reference.
        log_ref_neg: The same under the frozen reference.
        beta: Strength of the pull towards the reference.
    """
    margin = (log_pi_pos - log_ref_pos) - (log_pi_neg - log_ref_neg)
    return -F.logsigmoid(beta * margin).mean()


def simpo_loss(l_pos: Tensor, l_neg: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (arXiv 2405.14734, Eq. 6): `-log sigmoid(beta (l_l - l_w) - gamma)`, the mean over pairs.

    Args:
        l_pos: Log-perplexities of wanted sentences; any shape. Their negatives are mean log-likelihoods.
        l_neg: Of the unwanted ones.
        beta: Scale of the reward.
        gamma: Target margin of the rewards.
    """
    return -F.logsigmoid(beta * (l_neg - l_pos) - gamma).mean()
