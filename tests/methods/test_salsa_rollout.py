"""What the update of SALSA is given: scores, KL, token advantages and the division into minibatches, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.salsa_toy import LLAMA
from tests.methods.test_salsa_losses import naive_gae, random_batch
from tests.methods.test_salsa_module import BATCH, DATA, make
from zoo.errors import RunError
from zoo.methods.salsa.networks import ScalarModel
from zoo.methods.salsa.rollout import final_scores, token_advantages, watched
from zoo.nn.lm import build_lm

EOS = DATA.eos_id
OPTIONS: dict[str, Any] = {
    "advantage": "gae", "gamma": 0.9, "lam": 0.6, "samples_per_prompt": 2, "whiten_rewards": False,
    "whiten_advantages": False,
}  # fmt: skip


def logprobs_by_hand(model: Any, prompt: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token of an answer, read one by one from whole forward passes."""
    found = []
    for place in range(len(tokens)):
        with torch.no_grad():
            logits = model(torch.cat([prompt, tokens[:place]])[None]).logits[0, -1]
        found.append(torch.log(torch.softmax(logits / temperature, dim=0)[tokens[place]]))
    return torch.stack(found)


# -- scores ---------------------------------------------------------------------------------------------------------


def test_an_answer_without_an_end_loses_the_penalty() -> None:
    scores = final_scores(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([True, False, False]), 1.5, "x")
    assert scores.tolist() == [1.0, -3.5, -1.0]
    kept = final_scores(torch.tensor([1.0, -2.0]), torch.tensor([True, False]), 0.0, "x")
    assert kept.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_says_where_it_is_from(bad: float) -> None:
    with pytest.raises(RunError, match=r"the reward of m\.ckpt is not finite for 1 of 2 answers"):
        final_scores(torch.tensor([0.0, bad]), torch.tensor([True, True]), 0.0, "m.ckpt")


def test_the_score_of_the_data_is_less_the_penalty_where_no_end_was_drawn() -> None:
    module: Any = make(missing_eos_penalty=2.0)
    module.gold = lambda prompts, tokens, mask: torch.tensor([3.0, 3.0, 3.0])
    prompts = torch.full((3, 2), 5)
    tokens = torch.tensor([[7, EOS], [7, 8], [7, EOS]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])  # an end behind the mask does not count
    assert module.score(prompts, torch.ones_like(prompts).bool(), tokens, mask).tolist() == [3.0, 1.0, 1.0]


def reward_checkpoint(path: Path, shift: float) -> tuple[str, ScalarModel]:
    """A file as `reward_model` leaves it, and its network."""
    torch.manual_seed(11)
    net = ScalarModel(build_lm(LLAMA, DATA.vocab_size))
    state = {f"net.{name}": value for name, value in net.state_dict().items()} | {"shift": torch.tensor(shift)}
    torch.save({"hyper_parameters": {"lm": LLAMA, "vocab_size": DATA.vocab_size}, "state_dict": state}, path)
    return str(path), net


def test_the_reward_model_reads_prompt_and_answer_and_demonstrations_have_mean_zero(tmp_path: Path) -> None:
    prompts, tokens = BATCH["prompt_ids"][:4], DATA.demonstrations((0,), 4)[1]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    tokens[1, 4], mask[1, 5:] = EOS, False
    _, net = reward_checkpoint(tmp_path / "r.ckpt", 0.0)
    with torch.no_grad():
        texts = [torch.cat([prompt, row[kept]]) for prompt, row, kept in zip(prompts, tokens, mask, strict=True)]
        raw = [net.lm.model(text[None]).last_hidden_state[0, -1] @ net.head.weight[0] for text in texts]
    plain = torch.stack(raw)
    assert float(plain.mean().abs()) > 0.05
    module = make(reward_model=reward_checkpoint(tmp_path / "r.ckpt", float(plain.mean()))[0])
    module.setup("fit")
    scores = module.score(prompts, torch.ones_like(prompts).bool(), tokens, mask)
    torch.testing.assert_close(scores, plain - plain.mean(), rtol=1e-4, atol=1e-5)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)


# -- the KL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["separate", "shared"])  # likelihoods of the sampler, and of a pass of the trainer
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_the_unchanged_policy_has_no_kl_at_any_temperature(value: str, temperature: float) -> None:
    module: Any = make(reference={"mode": "sft"}, temperature=temperature, value=value, beta=0.5)
    module.gold = lambda prompts, tokens, mask: torch.zeros(len(prompts))
    rollout, means = module.collect(BATCH, 0)
    assert float(means["kl"]) == pytest.approx(0, abs=1e-5)
    assert float(means["k3"]) == pytest.approx(0, abs=1e-6)
    assert float(means["rlhf_reward"]) == pytest.approx(0, abs=1e-5)
    reference = module.frozen.reference_logprobs(*rollout[:4])
    torch.testing.assert_close(reference[rollout.mask], rollout.logprobs[rollout.mask], rtol=1e-4, atol=1e-5)
    _, soup = make(reference={"mode": "soup"}, temperature=temperature, value=value).collect(BATCH, 0)
    assert float(soup["kl_sft"]) == pytest.approx(0, abs=1e-5)
    assert float(soup["kl"].abs()) > 0.01


@pytest.mark.parametrize("mode", ["sft", "other", "soup", "mkl"])
def test_the_reference_is_read_at_the_temperature_of_sampling(mode: str) -> None:
    module = make(reference={"mode": mode}, temperature=0.7)
    rollout, means = module.collect({name: value[:3] for name, value in BATCH.items()}, 1)
    parts = ["sft", "other"] if mode == "mkl" else [mode]
    sums = []
    for prompt, tokens, mask, logprobs in zip(*(rollout[i] for i in (0, 2, 3, 4)), strict=True):
        answer = tokens[mask]
        references = [logprobs_by_hand(module.frozen[part], prompt, answer, 0.7) for part in parts]
        mine = logprobs_by_hand(module.policy, prompt, answer, 0.7)
        torch.testing.assert_close(logprobs[mask], mine, rtol=1e-4, atol=1e-5)
        sums.append(float((mine - torch.stack(references).mean(dim=0)).sum()))
    assert float(means["kl"]) == pytest.approx(sum(sums) / 3, abs=1e-4)


def test_what_a_batch_is_logged_with() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    policy = torch.tensor([[-1.0, -2.0, -1.0], [-3.0, 9.0, 9.0]])
    reference, sft = torch.full((2, 3), -2.0), torch.zeros(2, 3)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [6.0, 50.0, 50.0]])
    scores, ended = torch.tensor([1.0, 4.0]), torch.tensor([True, False])
    found = watched(scores, policy, reference, entropy, mask, ended, 0.5, sft)
    assert {name: round(float(value), 5) for name, value in found.items() if name != "k3"} == {
        "score": 2.5,
        "kl": 0.5,  # (1 + 0 + 1) and -1
        "kl_sft": -3.5,
        "entropy": 3.0,
        "length": 2.0,
        "no_eos": 0.5,
        "rlhf_reward": 2.25,
    }
    ratios = [torch.exp(-(p - r)) - 1 + (p - r) for p, r in zip(policy[mask], reference[mask], strict=True)]
    assert float(found["k3"]) == pytest.approx(float(sum(ratios)) / 4, abs=1e-6)
    assert "kl_sft" not in watched(scores, policy, reference, entropy, mask, ended, 0.5)


# -- advantages -----------------------------------------------------------------------------------------------------


def test_advantages_of_gae_are_the_naive_sums_and_returns_are_not_whitened() -> None:
    rewards, values, mask = random_batch(5)
    raw = naive_gae(rewards, values, mask, 0.9, 0.6)
    advantages, returns = token_advantages(rewards, values, mask, OPTIONS)
    torch.testing.assert_close(advantages, raw)
    torch.testing.assert_close(returns, torch.where(mask, raw + values, 0))
    white, same = token_advantages(rewards, values, mask, {**OPTIONS, "whiten_advantages": True})
    torch.testing.assert_close(same, returns)
    torch.testing.assert_close(white[mask], (raw[mask] - raw[mask].mean()) / raw[mask].std())
    assert (white[~mask] == 0).all()


def test_whitened_rewards_keep_their_mean() -> None:
    rewards, values, mask = random_batch(6)
    rewards = 3 * rewards + 2
    kept = rewards[mask]
    white = torch.zeros_like(rewards)
    white[mask] = (kept - kept.mean()) / kept.std() + kept.mean()
    expected = naive_gae(white, values, mask, 0.9, 0.6)
    advantages, returns = token_advantages(rewards, values, mask, {**OPTIONS, "whiten_rewards": True})
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0), rtol=1e-4, atol=1e-5)


def test_without_a_value_network_all_tokens_of_an_answer_bear_its_advantage() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    rewards = torch.where(mask, torch.tensor([[1.0, 0.0, 3.0], [2.0, 9.0, 9.0], [-1.0, 2.0, 9.0], [0.0, 0.0, 5.0]]), 0)
    values = torch.full_like(rewards, 7.0)  # unused
    sums = [4.0, 2.0, 1.0, 5.0]
    half = 0.5**0.5
    for kind, expected in (("rloo", [2.0, -2.0, -4.0, 4.0]), ("group", [half, -half, -half, half])):
        advantages, returns = token_advantages(rewards, values, mask, {**OPTIONS, "advantage": kind})
        torch.testing.assert_close(advantages, mask * torch.tensor(expected)[:, None], rtol=1e-3, atol=1e-3)
        assert torch.equal(returns, mask * torch.tensor(sums)[:, None])


# -- minibatches ----------------------------------------------------------------------------------------------------


def minibatches_of_a_step(seed: int) -> list[tuple[int, ...]]:
    """Rows of each update of a training step of three epochs of two minibatches."""
    module: Any = make(ppo_epochs=3, minibatches=2)
    seen: list[tuple[int, ...]] = []

    def update(rollout: Any, rows: Tensor) -> dict[str, Tensor]:
        seen.append(tuple(rollout.row[rows].tolist()))
        return {"policy_loss": torch.zeros(())}

    module.update = update
    torch.manual_seed(seed)
    module.training_step(BATCH, 0)
    return seen


def test_each_epoch_divides_the_batch_anew() -> None:
    seen, rows = minibatches_of_a_step(0), sorted(BATCH["row"].tolist())
    assert len(seen) == 6
    epochs = [seen[2 * epoch : 2 * epoch + 2] for epoch in range(3)]
    assert all(sorted(first + second) == rows for first, second in epochs), "each epoch sees every answer once"
    assert len({frozenset(frozenset(part) for part in epoch) for epoch in epochs}) == 3
    assert minibatches_of_a_step(0) == seen
    assert minibatches_of_a_step(1) != seen
