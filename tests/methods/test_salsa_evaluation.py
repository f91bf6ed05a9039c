"""What a test of SALSA says: the KL to the right model, who wins, the best of several answers, soups by their weights.

Two claims rest on the win rate; its two-row test fixes which side counts.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.salsa_toy import LLAMA
from tests.methods.test_salsa_module import BATCH, DATA, checkpoint, make
from tests.methods.test_salsa_rollout import logprobs_by_hand
from zoo.methods.salsa import evaluation
from zoo.methods.salsa.generation import InProcess
from zoo.methods.salsa.networks import load_lm

FEW = {name: value[:6] for name, value in BATCH.items()}


def after_test(batches: list[dict[str, Tensor]], steps: int = 1, **options: Any) -> tuple[Any, dict[str, float]]:
    """A module after some training and a test without a trainer, and what it logged."""
    module: Any = make(eval_seed=4, **options)
    torch.manual_seed(7)
    for step in range(steps):
        module.training_step(BATCH, step)
    logged: dict[str, float] = {}
    module.log_dict = lambda values, **_: logged.update({name: float(value) for name, value in values.items()})
    data = SimpleNamespace(reward=DATA.reward)
    module._trainer = SimpleNamespace(datamodule=data, loggers=[], default_root_dir="")
    module.on_test_epoch_start()
    for number, batch in enumerate(batches):
        module.test_step(batch, number)
    module.on_test_epoch_end()
    return module, logged


# -- each prompt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sft", "other", "soup", "mkl"])
def test_the_kl_is_that_to_the_reference_and_kl_sft_that_to_the_first_member(mode: str) -> None:
    module, logged = after_test([FEW], reference={"mode": mode}, temperature=0.7)
    _, _, tokens, masks = module.drawn["answers"][0]
    parts = {"sft": ["sft"], "other": ["other"], "soup": ["soup"], "mkl": ["sft", "other"]}[mode]
    kl, kl_sft = [], []
    for prompt, answer, mask in zip(FEW["prompt_ids"], tokens, masks, strict=True):
        mine = logprobs_by_hand(module.policy, prompt, answer[mask], 0.7)
        under = {part: logprobs_by_hand(module.frozen[part], prompt, answer[mask], 0.7) for part in {*parts, "sft"}}
        kl.append(float((mine - torch.stack([under[part] for part in parts]).mean(dim=0)).sum()))
        kl_sft.append(float((mine - under["sft"]).sum()))
    rows = evaluation.in_order(module.evaluated)
    assert rows["kl"].tolist() == pytest.approx(kl, abs=1e-4)
    assert rows["kl_sft"].tolist() == pytest.approx(kl_sft, abs=1e-4)
    assert logged["test/kl"] == pytest.approx(sum(kl) / 6, abs=1e-4)
    assert logged["test/kl_sft"] == pytest.approx(sum(kl_sft) / 6, abs=1e-4)
    assert abs(logged["test/kl_sft"]) > 0.01
    assert (mode == "sft") == (abs(logged["test/kl"] - logged["test/kl_sft"]) < 1e-6)


def test_an_untrained_policy_has_no_kl_to_where_it_began() -> None:
    _, ppo = after_test([FEW], steps=0, reference={"mode": "sft"}, temperature=0.7)
    assert ppo["test/kl"] == pytest.approx(0, abs=1e-5)
    _, salsa = after_test([FEW], steps=0, reference={"mode": "soup"}, temperature=0.7)
    assert salsa["test/kl_sft"] == pytest.approx(0, abs=1e-5)
    assert abs(salsa["test/kl"]) > 0.01
    _, plain = after_test([FEW], steps=0, reference={"mode": "soup"}, track_sft=False)
    assert "test/kl_sft" not in plain


def test_the_means_of_a_test_are_over_all_prompts() -> None:
    parts = [{name: value[rows] for name, value in BATCH.items()} for rows in (slice(4, 9), slice(0, 4))]
    module, logged = after_test(parts, missing_eos_penalty=1.0)
    order = torch.cat([part["row"] for part in parts]).argsort()
    asked = torch.cat([part["prompt_ids"] for part in parts])[order]
    tokens, mask = (torch.cat([answers[i] for answers in module.drawn["answers"]])[order] for i in (2, 3))
    ends = ((tokens == DATA.eos_id) & mask).any(dim=1)
    assert 0 < int(ends.sum()) < 9, "some answers end, others do not"
    reward = DATA.reward(asked, tokens, mask)
    assert logged["test/reward"] == pytest.approx(float(reward.mean()), abs=1e-6)
    assert logged["test/score"] == pytest.approx(float((reward - (~ends).float()).mean()), abs=1e-6)
    assert logged["test/no_eos"] == pytest.approx(float((~ends).float().mean()))
    assert logged["test/length"] == pytest.approx(float(mask.sum()) / 9)
    assert evaluation.in_order(module.evaluated)["reward"].tolist() == pytest.approx(reward.tolist())


# -- the opponent ---------------------------------------------------------------------------------------------------


class Scripted:
    """Stands for a module: the answers of a policy and a seed are a column of numbers, their rewards are looked up.

    Args:
        said: `{(policy, seed): (scores, rewards)}`, each `[N]`; the module's own policy is `"own"`.
        options: Hyper-parameters.
        batches: Rows of each batch.
    """

    policy, device, members = "own", "cpu", ()

    def __init__(self, said: dict[Any, tuple[list[float], list[float]]], batches: list[list[int]], **options: Any):
        self.hparams = {"eval_seed": 4, "judge": None, "opponent": "o.ckpt", "vocab_size": 9, **options}
        self.said = said
        self.trainer = SimpleNamespace(datamodule=SimpleNamespace(reward=None))
        self.drawn = {"batches": [self.batch(rows) for rows in batches]}

    @staticmethod
    def batch(rows: list[int]) -> dict[str, Tensor]:
        row = torch.tensor(rows)
        return {"prompt_ids": row[:, None], "prompt_mask": torch.ones(len(rows), 1).bool(), "row": row}

    def answer(self, batch: Any, rows: Tensor, seed: int, policy: Any = None) -> tuple[Any, ...]:
        self.lookup = self.said[policy, seed]
        return rows[:, None], torch.ones(len(rows), 1).bool(), None

    def score(self, *answers: Tensor) -> Tensor:
        return torch.tensor(self.lookup[0])[answers[2][:, 0]]

    def gold(self, prompt_ids: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return torch.tensor(self.lookup[1])[tokens[:, 0]]


def opponent_named(monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    """The model that loading `o.ckpt` gives."""
    model = nn.Linear(1, 1)
    found = {("o.ckpt", 9): (model, "")}
    monkeypatch.setattr(evaluation, "load_lm", lambda *key: found[key])
    return model


def test_the_win_rate_is_that_of_the_policy_over_the_opponent(monkeypatch: pytest.MonkeyPatch) -> None:
    opponent = opponent_named(monkeypatch)
    module = Scripted({(opponent, 4): ([9.0, 9.0], [1.0, 1.0])}, [[1], [0]])
    ours = {"reward": torch.tensor([3.0, 1.0]), "score": torch.tensor([0.0, 0.0])}
    found = evaluation.against_opponent(module, ours)
    assert found["win_rate"] == 0.75, "a win and a tie"
    assert found["ties"] == 0.5
    assert found["opponent_reward"] == 1.0
    assert found["gain"] == 1.0
    assert (found["win_rate_low"], found["win_rate_high"]) == (0.5, 1.0)
    assert (found["gain_low"], found["gain_high"]) == (0.0, 2.0)
    by_score = evaluation.against_opponent(module, {"score": torch.tensor([0.0, 9.0])})
    assert (by_score["win_rate"], by_score["gain"]) == (0.25, -4.5), "without a reward the scores are compared"


def test_rows_are_compared_prompt_by_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The means are alike, and the policy wins three of four."""
    opponent = opponent_named(monkeypatch)
    module = Scripted({(opponent, 4): ([0.0] * 4, [0.0, 1.0, 2.0, 7.0])}, [[2, 0], [3, 1]])
    found = evaluation.against_opponent(module, {"reward": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert (found["win_rate"], found["ties"], found["gain"]) == (0.75, 0.0, 0.0)


def test_the_opponent_answers_the_same_prompts_on_the_same_random_numbers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "o.ckpt", 5)
    parts = [{name: value[rows] for name, value in BATCH.items()} for rows in (slice(12, 24), slice(0, 12))]
    module, logged = after_test(parts, opponent=path)
    engine = InProcess(module.sampling)
    rewards = []
    for policy in (module.policy, load_lm(path)[0]):
        engine.sync(policy)
        tokens, mask, *_ = engine(BATCH["prompt_ids"], BATCH["prompt_mask"], BATCH["row"], 4)
        rewards.append(DATA.reward(BATCH["prompt_ids"], tokens, mask).tolist())
    points = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(*rewards, strict=True)]
    assert {0.0, 1.0} <= set(points)
    assert sum(points) / 24 != 0.5
    assert logged["test/win_rate"] == pytest.approx(sum(points) / 24)
    assert logged["test/opponent_reward"] == pytest.approx(sum(rewards[1]) / 24, abs=1e-6)
    assert logged["test/gain"] == pytest.approx((sum(rewards[0]) - sum(rewards[1])) / 24, abs=1e-6)


def test_against_itself_all_prompts_are_ties(tmp_path: Path) -> None:
    module: Any = make()
    state = {f"lm.{name}": value for name, value in module.policy.state_dict().items()}
    hyper = {"lm": LLAMA, "vocab_size": DATA.vocab_size}
    torch.save({"hyper_parameters": hyper, "state_dict": state}, tmp_path / "o.ckpt")
    _, logged = after_test([BATCH], steps=0, opponent=str(tmp_path / "o.ckpt"))
    assert (logged["test/win_rate"], logged["test/ties"], logged["test/gain"]) == (0.5, 1.0, 0.0)


# -- the best of several, soups -------------------------------------------------------------------------------------


def test_the_best_of_several_answers_is_chosen_by_the_score_and_valued_by_the_reward() -> None:
    said: dict[Any, tuple[list[float], list[float]]] = {
        ("own", 5): ([1.0, 5.0], [10.0, 20.0]),
        ("own", 6): ([2.0, 3.0], [30.0, 40.0]),
    }
    found = evaluation.best_of(Scripted(said, [[1], [0]]), 2)
    assert found == {"best_of_score": 3.5, "best_of_reward": 25.0}


def test_rewards_of_the_first_prompts_only() -> None:
    module = Scripted({("own", 4): ([0.0] * 4, [1.0, 2.0, 3.0, 4.0])}, [[3, 0], [2, 1], [3]])
    assert evaluation.rewards_of(module, "own", 4, most=3)["reward"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("count", [2, 3])
def test_soups_are_labelled_by_their_weights(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Members are unit vectors: the weights of a soup can be read off, and its reward says which it was."""
    states = [{"weight": row[None]} for row in torch.eye(count)]
    value = torch.tensor([1.0, 10.0, 100.0])[:count]
    asked: list[tuple[int, int]] = []

    def rewards_of(module: Any, model: Any, seed: int, most: int = 0) -> dict[str, Tensor]:
        asked.append((seed, most))
        return {"reward": (model.weight[0] * value).sum()[None]}

    monkeypatch.setattr(evaluation, "rewards_of", rewards_of)
    monkeypatch.setattr(evaluation, "member_states", lambda members, vocab_size: (states[: len(members)], []))
    monkeypatch.setattr(evaluation, "load_lm", lambda *_: (nn.Linear(count, 1, bias=False), ""))
    module = Scripted({}, [])
    module.members = [f"{k}.ckpt" for k in range(count)]  # type: ignore[assignment]
    surface, plane = evaluation.surfaces(module)
    for alpha in evaluation.ALPHAS:  # alpha is the weight of the second
        assert float(surface.pop(f"{alpha:+.2f}")) == pytest.approx((1 - alpha) + 10 * alpha, rel=1e-5)
    assert {seed for seed, _ in asked} == {4}
    if count == 2:
        assert (surface, plane) == ({}, {})
        return
    assert float(surface.pop("centroid")) == pytest.approx(37.0)
    assert not surface
    assert plane["reward"] == pytest.approx([a + 10 * b + 100 * c for a, b, c in plane["points"]], rel=1e-4, abs=1e-4)
    assert [most for _, most in asked] == [0] * 8 + [evaluation.PLANE_PROMPTS] * len(plane["points"])


def test_a_surface_needs_members() -> None:
    with pytest.raises(ValueError, match=r"surface: true needs two or more reference\.members"):
        evaluation.surfaces(Scripted({}, []))
