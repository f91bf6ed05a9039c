"""Equations of SALSA and PPO against hand calculations, naive loops, closed forms and, where it is installed, trl."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.methods.salsa import losses

HAND_R, HAND_V = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
FULL = torch.ones(1, 3, dtype=torch.bool)


def random_batch(seed: int = 0, rows: int = 6, steps: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    mask = torch.arange(steps) < lengths[:, None]
    return torch.randn(rows, steps, generator=generator), torch.randn(rows, steps, generator=generator), mask


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    out = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        length = int(mask[b].sum())
        for t in range(length):
            for k in range(t, length):
                following = values[b, k + 1] if k + 1 < length else 0.0
                out[b, t] += (gamma * lam) ** (k - t) * (rewards[b, k] + gamma * following - values[b, k])
    return out


def test_gae_by_hand() -> None:
    advantages, returns = losses.gae(HAND_R, HAND_V, FULL, 1.0, 0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.45125, 0.475, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[0.95125, 0.975, 1.0]]))


def test_gae_limits() -> None:
    rewards, values, mask = random_batch()
    whole, _ = losses.gae(rewards, values, mask, 1.0, 1.0)
    to_go = torch.where(mask, rewards, 0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(whole, torch.where(mask, to_go - values, 0))
    single, _ = losses.gae(rewards, values, mask, 0.9, 0.0)
    torch.testing.assert_close(single, naive_gae(rewards, values, mask, 0.9, 0.0))


@pytest.mark.parametrize("lam", [0.3, 0.95])
def test_gae_is_the_naive_sum_and_the_value_after_the_end_is_zero(lam: float) -> None:
    rewards, values, mask = random_batch(3)
    advantages, returns = losses.gae(rewards, values, mask, 0.97, lam)
    torch.testing.assert_close(advantages, naive_gae(rewards, values, mask, 0.97, lam))
    torch.testing.assert_close(returns, torch.where(mask, advantages + values, 0))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_whitening_over_valid_tokens(seed: int) -> None:
    x, _, mask = random_batch(seed)
    if mask.sum() < 3:
        return
    white = losses.whiten(3 * x + 5, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-5)
    assert float(white[mask].var(unbiased=True)) == pytest.approx(1, abs=1e-3)
    assert (white[~mask] == 0).all()
    kept = losses.whiten(3 * x + 5, mask, shift_mean=False)
    assert float(kept[mask].mean()) == pytest.approx(float((3 * x + 5)[mask].mean()), abs=1e-4)


def test_kl_estimators() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(5).log_softmax(0), torch.randn(5).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    drawn = torch.multinomial(policy.exp(), 200_000, replacement=True)
    assert float(losses.k1(policy[drawn], reference[drawn]).mean()) == pytest.approx(float(exact), abs=0.01)
    k3 = losses.k3(policy[drawn], reference[drawn])
    assert float(k3.mean()) == pytest.approx(float(exact), abs=0.02)
    assert float(k3.min()) >= 0
    assert losses.k1(policy, policy).abs().max() == losses.k3(policy, policy).abs().max() == 0
    assert float(losses.k1(policy[drawn], reference[drawn]).min()) < 0


def test_the_mkl_penalty_is_the_mean_of_two_kl_terms() -> None:
    torch.manual_seed(1)
    policy, one, two = (torch.randn(2, 4) for _ in range(3))
    mean = 0.5 * (losses.k1(policy, one) + losses.k1(policy, two))
    torch.testing.assert_close(losses.k1(policy, losses.mkl_logprobs([one, two])), mean)


def test_the_score_is_added_at_the_last_token() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = losses.kl_rewards(torch.ones(2, 3), torch.tensor([5.0, 7.0]), mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 4.9, 0.0], [-0.1, -0.1, 6.9]]))


def test_truncation_keeps_the_first_end_and_nothing_after_it() -> None:
    tokens, mask = losses.truncate(torch.tensor([[5, 2, 6, 2], [5, 6, 7, 8], [2, 5, 5, 5]]), eos_id=2, pad_id=0)
    assert tokens.tolist() == [[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [2, 4, 1]
    assert losses.last_token(mask).tolist() == [1, 3, 0]
    assert losses.last_token(torch.tensor([[False, True, True, False]])).tolist() == [2]


def test_policy_loss_clips_on_the_side_that_gains() -> None:
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    found = losses.policy_loss(new, old, advantages, 0.2)
    torch.testing.assert_close(found, torch.tensor([[-1.2, -0.5, 1.5, 0.8]]))


def test_value_loss_takes_the_larger_error() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    torch.testing.assert_close(losses.value_loss(values, old, returns, 0.2), torch.tensor([[0.32, 0.405]]))


def test_leave_one_out_and_group_against_loops() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0, 4.0])
    expected = [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]
    torch.testing.assert_close(losses.leave_one_out(returns, 3), torch.tensor(expected))
    groups = losses.group_relative(returns, 3)
    assert float(groups[:3].mean()) == pytest.approx(0, abs=1e-6)
    assert float(groups[:3].std()) == pytest.approx(1, abs=1e-3)
    assert groups[3:].abs().max() == 0


def test_bradley_terry_closed_form_and_shift() -> None:
    a, b = torch.tensor([0.3, -2.0]), torch.tensor([1.0, 0.5])
    torch.testing.assert_close(losses.bradley_terry(a, b), torch.log(1 + torch.exp(b - a)))
    torch.testing.assert_close(losses.bradley_terry(a + 5, b + 5), losses.bradley_terry(a, b))


def test_the_tilted_mean_is_the_reward_of_the_closed_form_optimum() -> None:
    reference, reward, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.0, 1.0, 2.0]), 0.7
    optimum = torch.softmax(reference.log() + reward / beta, dim=0)
    drawn = torch.multinomial(reference, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    assert float(losses.tilted_mean(reward[drawn], beta)) == pytest.approx(float((optimum * reward).sum()), abs=0.01)


def test_ppo_finds_the_optimum_of_a_bandit() -> None:
    """One token, four of them, a uniform reference: PPO ends at softmax(log ref + r / beta)."""
    reward, beta = torch.tensor([0.0, 0.3, 0.6, 1.0]), 0.5
    reference = torch.full((4,), 0.25).log()
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4096, 1, dtype=torch.bool)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 150) + 1e-4
        with torch.no_grad():
            old_all = logits.log_softmax(0)
            drawn = torch.multinomial(old_all.exp(), 4096, replacement=True, generator=generator)
            old = old_all[drawn][:, None]
            kl = losses.k1(old, reference[drawn][:, None])
            rewards = losses.kl_rewards(kl, reward[drawn], mask, beta)
            advantages, _ = losses.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 0.95)
            advantages = losses.whiten(advantages, mask)
        for _ in range(2):
            new = logits.log_softmax(0)[drawn][:, None]
            loss = losses.policy_loss(new, old, advantages, 0.2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimum = torch.softmax(reference + reward / beta, dim=0)
    assert (logits.softmax(0) - optimum).abs().max() < 0.02


def test_wins_count_ties_half_and_the_interval_covers() -> None:
    scores = losses.wins(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 4.0, -1.0]))
    assert scores.tolist() == [0.5, 1.0, 0.0, 1.0]
    drawn = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    low, high = losses.bootstrap_interval(drawn)
    assert low < 0.3 < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 400), rel=0.15)


def test_parity_with_trl() -> None:
    """Functions of the PPO that trl had until 1.12."""
    ppo = pytest.importorskip(
        "trl.experimental.ppo.ppo_trainer", reason="a trl with PPO (before 1.13) is not installed"
    )
    from trl.experimental.utils import first_true_indices

    x, values, mask = random_batch(7)
    tokens = torch.randint(0, 5, (6, 7), generator=torch.Generator().manual_seed(0))
    ours, ours_mask = losses.truncate(tokens, 2, 4)
    torch.testing.assert_close(ours, ppo.truncate_response(2, 4, tokens))
    assert (ours_mask.sum(dim=1) == (first_true_indices(tokens == 2) + 1).clamp(max=7)).all()
    torch.testing.assert_close(losses.masked_mean(x, mask), ppo.masked_mean(x, mask))
    for shift_mean in (True, False):
        theirs = ppo.masked_whiten(x, mask, shift_mean=shift_mean)
        torch.testing.assert_close(losses.whiten(x, mask, shift_mean)[mask], theirs[mask])
    # its loop over steps, which is no function there, on answers of full length
    following, reversed_ = torch.zeros(6), []
    for t in reversed(range(7)):
        ahead = values[:, t + 1] if t < 6 else 0.0
        following = x[:, t] + 0.97 * ahead - values[:, t] + 0.97 * 0.9 * following
        reversed_.append(following)
    theirs = torch.stack(reversed_[::-1], dim=1)
    torch.testing.assert_close(losses.gae(x, values, torch.ones_like(mask), 0.97, 0.9)[0], theirs)
