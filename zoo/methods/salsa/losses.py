"""Equations of supervised fine-tuning, reward models, PPO and SALSA.

The body of arXiv 2411.01798 was not at hand; its abstract gives objective and soup. How PPO is computed follows arXiv
1707.06347 (PPO), arXiv 1506.02438 (GAE) and what is known of RLHF implementations (arXiv 2403.17031). Everywhere: `B`
responses of `T` tokens, `mask` bool `[B, T]` true on the tokens of a response with its end-of-text token. Statistics
are those of the batch of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.distributed import all_reduce_sum, world_size


def truncate(tokens: Tensor, eos_id: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut responses after their first end-of-text token.

    Args:
        tokens: int64 `[B, T]`.
        eos_id: Token that ends a text.
        pad_id: Fills the rest.

    Returns:
        Tokens int64 `[B, T]` and mask bool `[B, T]`.
    """
    ends = (tokens == eos_id).int()
    mask = ends.cumsum(dim=1) - ends == 0
    return tokens.masked_fill(~mask, pad_id), mask


def last_token(mask: Tensor) -> Tensor:
    """Index of the last real token of each row, int64 `[B]`, for padding on either side; 0 for an empty row."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)


# Statistics


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the `mask` of all processes, a scalar, the same on all of them; 0 where nothing counts."""
    sums = all_reduce_sum(torch.stack([torch.where(mask, x, 0).sum(), mask.sum().to(x.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def share_of_mean(x: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """This process's share of a mean over all processes: the mean over ranks of the shares is that mean.

    The gradient that DDP and FSDP apply, a mean over ranks, is then the one of the global mean, however unequally the
    counted tokens are spread.

    Args:
        x: `[B, T]`.
        mask: bool `[B, T]`.
        count: Tokens that count on all processes, a scalar.
    """
    return torch.where(mask, x, 0).sum() * world_size() / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to unit variance (unbiased) over the mask of all processes, and to mean 0.

    Args:
        x: `[B, T]`.
        mask: bool `[B, T]`; the result is 0 elsewhere.
        shift_mean: Whether the mean becomes 0; else it stays as it was.
        eps: Added to the variance.
    """
    mean = masked_mean(x, mask)
    count = all_reduce_sum(mask.sum().to(x.dtype))
    var = masked_mean((x - mean).square(), mask) * count / (count - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(var + eps)
    return torch.where(mask, white if shift_mean else white + mean, 0)


# Kullback-Leibler divergence


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at sampled tokens: `log pi - log ref`, nats; unbiased, may be negative."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimate `r - 1 - log r` with `r = ref / pi`: unbiased, never negative."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def mkl_logprobs(members: Sequence[Tensor]) -> Tensor:
    """Reference of the ablation with several KL terms: the mean of the log-probabilities of `members`, each `[B, T]`.

    The mean of the KL terms to the members is the `k1` against it, and, up to a constant, the KL to the normalised
    geometric mean of the members' distributions.
    """
    return torch.stack(list(members)).mean(dim=0)


def kl_rewards(kl: Tensor, scores: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Reward of each token: `-beta` times its KL estimate, the score added at the last token.

    Args:
        kl: `[B, T]`.
        scores: Of the whole responses, `[B]`.
        mask: bool `[B, T]`.
        beta: Weight of the penalty.
    """
    rewards = torch.where(mask, -beta * kl, 0)
    return rewards.scatter_add(1, last_token(mask)[:, None], scores[:, None].to(rewards.dtype))


def tilted_mean(scores: Tensor, beta: float) -> Tensor:
    """Mean score of the optimum `pi* ~ ref exp(r / beta)` of the objective, estimated from samples of the reference.

    Args:
        scores: `[N]`, of samples of the reference.
        beta: Weight of the KL, above 0.
    """
    return (torch.softmax(scores.double() / beta, dim=0) * scores.double()).sum()


# Advantages


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, Eq. 16), the value after the end being 0.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lam A_{t+1}`.

    Args:
        rewards: `[B, T]`.
        values: Values before each token, `[B, T]`.
        mask: bool `[B, T]`.
        gamma: Discount.
        lam: 0: one step; 1: rewards to go minus the value.

    Returns:
        Advantages, not whitened, and returns `A + V`, each `[B, T]` and 0 off the mask.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.empty_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + gamma * lam * following
        advantages[:, t] = following
    advantages = torch.where(mask, advantages, 0)
    return advantages, advantages + values


def leave_one_out(returns: Tensor, samples: int) -> Tensor:
    """RLOO (arXiv 2402.14740, Eq. 8): a return minus the mean return of the other answers to the same prompt.

    Args:
        returns: `[B]`, the `samples` answers to a prompt next to each other.
        samples: Answers to a prompt, 2 or more.

    Returns:
        `[B]`.
    """
    groups = returns.view(-1, samples)
    return ((samples * groups - groups.sum(dim=1, keepdim=True)) / (samples - 1)).flatten()


def group_relative(returns: Tensor, samples: int, eps: float = 1e-4) -> Tensor:
    """GRPO (arXiv 2402.03300, section 4.1.2): a return minus the mean of its group, over the group's deviation.

    Args:
        returns: `[B]`, the `samples` answers to a prompt next to each other.
        samples: Answers to a prompt, 2 or more.
        eps: Added to the standard deviation (unbiased).

    Returns:
        `[B]`.
    """
    groups = returns.view(-1, samples)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + eps)).flatten()


# Losses


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (arXiv 1707.06347, Eq. 7) of each token, as a loss.

    Args:
        new: Log-probabilities of the tokens under the policy that is trained, `[B, T]`.
        old: The same under the policy that sampled them.
        advantages: `[B, T]`.
        clip: Largest change of a ratio that is rewarded.

    Returns:
        `[B, T]`.
    """
    ratio = torch.exp(new - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error of each value, the larger one of the value and of the value clipped to `old +- clip`.

    All arguments and the result are `[B, T]`.
    """
    clipped = torch.clamp(values, old - clip, old + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood that the chosen answers win, `-log sigmoid(r_w - r_l)`; rewards `[B] -> [B]`, nats."""
    return -F.logsigmoid(chosen - rejected)


# Comparisons


def wins(left: Tensor, right: Tensor) -> Tensor:
    """1 where the left score is higher, 0.5 where they tie, 0 elsewhere; `[N]`."""
    return (left > right).double() + 0.5 * (left == right).double()


def bootstrap_interval(
    values: Tensor,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    statistic: Callable[[Tensor], Tensor] = lambda x: x.mean(dim=-1),
) -> tuple[float, float]:
    """Percentile interval of a statistic under resampling of the values.

    Args:
        values: `[N]`, at least one.
        level: Probability that the interval covers.
        draws: Resamples.
        seed: Seed of the resampling.
        statistic: `[..., N] -> [...]`.
    """
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    stats = []
    for count in [min(100, draws - start) for start in range(0, draws, 100)]:  # a few at once: N may be large
        picked = torch.randint(len(values), (count, len(values)), generator=generator)
        stats.append(statistic(values[picked]))
    low, high = torch.quantile(torch.cat(stats), torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high
