"""SALSA's module: what PPO and SALSA share, what the reference changes, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules.reviews import Reviews
from tests.methods.salsa_toy import LLAMA
from zoo.errors import RunError, UsageError
from zoo.methods.salsa import losses
from zoo.methods.salsa.module import Salsa
from zoo.methods.salsa.networks import (
    add_adapters,
    answer_likelihood,
    base_fingerprint,
    has_adapters,
    lm_state,
    load_lm,
    no_dropout,
)
from zoo.methods.salsa.rollout import Rollout, minibatch_rows
from zoo.methods.salsa.soup import soup
from zoo.nn.lm import build_lm
from zoo.nn.sampling import left_pad

GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
DATA = Reviews(batch_size=24, steps_per_epoch=2)
BATCH: dict[str, Tensor] = dict(DATA.training_batches().batch(0, 0))  # type: ignore[call-overload]


def make(seed: int = 0, **options: Any) -> Salsa:
    """A module that can take steps without a trainer."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {"lm": LLAMA, "answer_length": 6, "ppo_epochs": 1, "minibatches": 2}
    values |= {"lr": 1e-2, "value_lr": 1e-2, "collapse_entropy": 0.0}
    values |= {"vocab_size": DATA.vocab_size, "eos_id": DATA.eos_id, "pad_id": DATA.pad_id}
    module: Any = Salsa(**{**values, **options})
    module.gold = DATA.reward
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.lr_schedulers = lambda: None
    module.manual_backward = lambda loss: loss.backward()
    module.log_dict = lambda *_, **__: None
    return module


def trained(module: Salsa, steps: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(7)
    module.losses = [float(module.training_step(BATCH, i)) for i in range(steps)]  # type: ignore[assignment]
    return {n: v.clone() for n, v in module.state_dict().items() if n.startswith(("policy.", "value."))}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_alpha_zero_is_ppo_bit_by_bit() -> None:
    ppo, salsa = make(reference={"mode": "sft"}), make(reference={"mode": "soup", "alpha": 0.0})
    assert equal(trained(ppo), trained(salsa))
    assert ppo.losses == salsa.losses
    assert not equal(trained(make(reference={"mode": "soup", "alpha": 0.5})), trained(make(reference={"mode": "sft"})))


def test_without_beta_the_reference_has_no_influence() -> None:
    modes = [{"mode": "sft"}, {"mode": "soup", "alpha": 0.7}, {"mode": "other"}, {"mode": "mkl"}]
    first, *rest = [trained(make(beta=0.0, reference=mode), 1) for mode in modes]
    assert all(equal(first, other) for other in rest)


def test_the_kl_before_the_first_step() -> None:
    _, ppo = make(reference={"mode": "sft"}).collect(BATCH, 0)
    assert float(ppo["kl"]) == pytest.approx(0, abs=1e-6)
    module = make(reference={"mode": "soup"})
    rollout, salsa = module.collect({k: v.repeat(8, *[1] * (v.ndim - 1)) for k, v in BATCH.items()}, 0)
    assert float(salsa["kl_sft"]) == pytest.approx(0, abs=1e-6)
    assert float(salsa["kl"]) > 0.1
    answers = rollout[:4]
    sft, mixed = (answer_likelihood(module.frozen[k], *answers).logprobs for k in ("sft", "soup"))
    by_hand = torch.where(rollout.mask, sft - mixed, 0).sum(dim=1).mean()
    assert float(salsa["kl"]) == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"value": "shared"},
        {"lm": GPT2},
        {"advantage": "rloo", "samples_per_prompt": 3},
        {"advantage": "group", "samples_per_prompt": 2},
    ],
    ids=str,
)
def test_the_first_minibatch_has_ratio_one(options: dict[str, Any]) -> None:
    module = make(minibatches=1, **options)
    rollout, _ = module.collect(BATCH, 3)
    seen = module.update(rollout, torch.arange(len(rollout.row)))
    assert float(seen["ratio_mean"]) == pytest.approx(1, abs=1e-5)
    assert float(seen["ratio_var"]) == pytest.approx(0, abs=1e-8)
    assert float(seen["clip_fraction"]) == 0
    assert float(seen["policy_loss"]) == pytest.approx(-float(rollout.advantages[rollout.mask].mean()), abs=1e-5)
    assert float(seen["policy_loss"]) == pytest.approx(0, abs=1e-5)


def test_micro_batches_give_the_same_update() -> None:
    whole, parts = make(), make(micro_batch_size=5)
    for module in (whole, parts):
        trained(module, 1)
    for (name, a), b in zip(whole.policy.named_parameters(), parts.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_left_padding_does_not_change_likelihoods() -> None:
    for spec in (LLAMA, GPT2):
        torch.manual_seed(0)
        model = no_dropout(build_lm(spec, 30)).eval()
        prompts = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([4])]
        tokens, mask = torch.tensor([[3, 4, 2], [6, 2, 0]]), torch.tensor([[True, True, True], [True, True, False]])
        ids, prompt_mask = left_pad(prompts)
        found = answer_likelihood(model, ids, prompt_mask, tokens, mask).logprobs
        for row, prompt in enumerate(prompts):
            text = torch.cat([prompt, tokens[row][mask[row]]])[None]
            logs = model(text).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            single = logs.gather(1, text[0, len(prompt) :, None])[:, 0]
            torch.testing.assert_close(found[row][mask[row]], single, rtol=0, atol=1e-4)


def test_what_comes_after_the_end_counts_for_nothing() -> None:
    module = make(minibatches=1)
    rollout, _ = module.collect(BATCH, 3)
    short = rollout.mask.clone()
    short[:, 3:] = False
    garbled = torch.where(short, rollout.tokens, 9)
    grads = []
    for tokens in (rollout.tokens, garbled):
        module.zero_grad()
        part = rollout._replace(mask=short, tokens=tokens)
        new, values, _ = module.evaluate_policy(*part[:4])
        loss = torch.where(short, losses.policy_loss(new, part.logprobs, part.advantages, 0.2) + values, 0).sum()
        loss.backward()
        grads.append([p.grad.clone() for p in module.policy.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_networks_get_no_gradient_and_stay_as_they_are() -> None:
    module = make(reference={"mode": "mkl"})
    before = {n: v.clone() for n, v in module.frozen.state_dict().items()}
    trained(module)
    assert equal(before, dict(module.frozen.state_dict()))
    assert all(p.grad is None and not p.requires_grad for p in module.frozen.parameters())
    assert not any(net.training for net in module.frozen.values())


def test_a_large_beta_without_a_score_leads_to_the_soup() -> None:
    module: Any = make(beta=5.0, lr=1e-2, ppo_epochs=2)
    module.gold = lambda prompts, tokens, mask: torch.zeros(len(prompts))
    torch.manual_seed(0)
    many = {k: v.repeat(4, *[1] * (v.ndim - 1)) for k, v in BATCH.items()}
    many["row"] = torch.arange(len(many["row"]))
    before = float(module.collect(many, 1)[1]["kl"])
    for step in range(12):
        module.training_step(many, step)
    assert float(module.collect(many, 1)[1]["kl"]) < 0.5 * before


def test_the_mkl_reference_is_the_mean_of_log_probabilities() -> None:
    module = make(reference={"mode": "mkl"})
    rollout, watched = module.collect(BATCH, 0)
    parts = [answer_likelihood(module.frozen[k], *rollout[:4]).logprobs for k in ("sft", "other")]
    kl = torch.where(rollout.mask, rollout.logprobs - (parts[0] + parts[1]) / 2, 0).sum(dim=1).mean()
    assert float(watched["kl"]) == pytest.approx(float(kl), rel=1e-5)


def test_the_last_token_of_an_answer_bears_its_score() -> None:
    module: Any = make(beta=0.0, whiten_advantages=False, lam=1.0)
    module.gold = lambda prompts, tokens, mask: torch.full((len(prompts),), 2.0)
    rollout, _ = module.collect(BATCH, 0)
    assert (rollout.returns[rollout.mask] == 2.0).all(), "rewards to go without a KL are the score everywhere"


def test_group_advantages_compare_answers_to_the_same_prompt() -> None:
    module: Any = make(beta=0.0, advantage="rloo", samples_per_prompt=2, whiten_advantages=False)
    module.gold = lambda prompts, tokens, mask: torch.arange(len(prompts)).float()
    rollout, _ = module.collect(BATCH, 0)
    assert module.value is None
    assert rollout.advantages[:, 0].tolist() == [-1.0, 1.0] * 24
    assert rollout.row.tolist() == list(range(48))
    assert not torch.equal(rollout.tokens[0], rollout.tokens[1])


def test_minibatches_divide_the_global_batch() -> None:
    row = torch.arange(20)
    parts = list(minibatch_rows(row, 20, 3, 5))
    assert sorted(torch.cat(parts).tolist()) == row.tolist()
    assert {len(p) for p in parts} == {6, 7}
    again = [part for half in (row[:9], row[9:]) for part in minibatch_rows(half, 20, 3, 5)]
    for number, part in enumerate(parts):
        assert torch.cat([row[:9][again[number]], row[9:][again[3 + number]]]).tolist() == part.tolist()
    with pytest.raises(ValueError, match="more than the 2 answers"):
        list(minibatch_rows(torch.arange(2), 2, 3, 0))


def test_a_reward_that_is_no_number_stops_the_run() -> None:
    module: Any = make()
    module.gold = lambda prompts, tokens, mask: torch.tensor([float("nan")] + [0.0] * (len(prompts) - 1))
    with pytest.raises(RunError, match="not finite for 1 of 24 answers"):
        module.collect(BATCH, 0)


def test_prompts_that_do_not_fit_the_model_are_refused() -> None:
    long = {"prompt_ids": torch.ones(1, 27, dtype=torch.int64), "prompt_mask": torch.ones(1, 27, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"prompt of 27 tokens and an answer of 6 are more than the 32"):
        make().collect({**long, "row": torch.tensor([0])}, 0)


def test_a_collapse_is_reported_once_with_kl_and_entropy() -> None:
    module = make(collapse_entropy=100.0)
    with pytest.warns(RuntimeWarning, match=r"collapsed: its entropy is .* nats .* KL to the reference"):
        module.collect(BATCH, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.collect(BATCH, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_id": 2}, "pad_id: 2 is not accepted with eos_id 2"),
        ({"eos_id": None}, "no end-of-text token"),
        ({"reference": {"mode": "sop"}}, "did you mean 'soup'"),
        ({"reference": {"alfa": 1}}, r"reference.alfa is unknown; did you mean 'alpha'"),
        ({"reference": {"members": ["a.ckpt"]}}, "one is not enough for mode 'soup'"),
        ({"advantage": "rloo"}, "samples_per_prompt: 1"),
        ({"value_init": "reward"}, "needs a reward_model"),
        ({"beta": -1.0}, "beta: -1.0 is not accepted; accepted: 0 or more"),
        ({"answer_length": 40}, "answer_length: 40"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def checkpoint(path: Path, seed: int, base: str = "", **lm: Any) -> str:
    """A file as `sft` leaves it."""
    torch.manual_seed(seed)
    spec = {**LLAMA, **lm}
    model = build_lm(spec, DATA.vocab_size)
    state = {f"lm.{n}": v for n, v in model.state_dict().items()}
    torch.save(
        {"hyper_parameters": {"lm": spec, "vocab_size": DATA.vocab_size}, "state_dict": state, "base": base}, path
    )
    return str(path)


class _Trainer:
    ckpt_path: str | None = None
    strategy: Any = None


def test_members_are_loaded_and_mixed(tmp_path: Path) -> None:
    files = [checkpoint(tmp_path / f"{n}.ckpt", n, "same") for n in range(3)]
    states = [lm_state(load_lm(file)[0]) for file in files]
    for count, weights in ((2, [0.75, 0.25]), (3, [1 / 3] * 3)):
        module: Any = make(reference={"mode": "soup", "alpha": 0.25, "members": files[:count]}, init="sft")
        module.setup("fit")
        torch.testing.assert_close(lm_state(module.frozen["soup"]), soup(states[:count], weights))
        assert equal(lm_state(module.policy), states[0])
        assert equal({n.removeprefix("lm."): v for n, v in lm_state(module.value).items() if "head" not in n}, {n: v for n, v in states[0].items() if "head" not in n})  # fmt: skip  # noqa: E501
    begun: Any = make(reference={"members": files[:2]}, init="soup")
    begun.setup("fit")
    assert equal(lm_state(begun.policy), lm_state(begun.frozen["soup"]))


def test_members_of_different_models_are_refused(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "1.ckpt", 1, "aaa"), checkpoint(tmp_path / "2.ckpt", 2, "bbb")
    with pytest.raises(ValueError, match="fine-tuned from different models"):
        make(reference={"members": [one, two]}).setup("fit")
    wide = checkpoint(tmp_path / "3.ckpt", 3, intermediate_size=32)
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight is \[16, 24\] and \[16, 32\]"):
        make(reference={"members": [one, wide]}).setup("fit")


def test_files_that_are_gone_matter_only_without_a_checkpoint(tmp_path: Path) -> None:
    module: Any = make(reference={"members": [str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt")]})
    module.setup("fit")
    module._trainer = _Trainer()
    with pytest.raises(UsageError, match=r"there is no checkpoint .*a\.ckpt"):
        module.on_fit_start()
    module._trainer.ckpt_path = "x.ckpt"
    module.on_fit_start()


def test_checkpoints_without_frozen_networks_read_them_again(tmp_path: Path) -> None:
    files = [checkpoint(tmp_path / f"{n}.ckpt", n) for n in range(2)]
    options: dict[str, Any] = {"reference": {"members": files}, "keep_frozen": False}
    module, other = make(**options), make(seed=5, **options)
    module.setup("fit")
    trained(module, 1)
    saved: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(saved)
    assert not any(name.startswith("frozen.") for name in saved["state_dict"])
    other.setup("fit")
    other.on_load_checkpoint(saved)
    other.load_state_dict(saved["state_dict"])
    assert equal(dict(module.state_dict()), dict(other.state_dict()))


def test_adapters_alone_are_trained_and_the_checkpoint_gives_the_merged_policy(tmp_path: Path) -> None:
    module = make(lora_rank=2)
    names = {n for n, p in module.policy.named_parameters() if p.requires_grad}
    assert names
    assert all(".lora_" in n for n in names)
    trained(module)
    hyper = {k: module.hparams[k] for k in ("lm", "vocab_size", "lora_rank", "lora_alpha", "lora_targets")}
    torch.save({"hyper_parameters": hyper, "state_dict": module.state_dict()}, tmp_path / "x.ckpt")
    merged, _ = load_lm(str(tmp_path / "x.ckpt"))
    assert not has_adapters(merged)
    ids = BATCH["prompt_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, module.policy(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_that_of_the_weights_below_adapters() -> None:
    torch.manual_seed(0)
    model = build_lm(LLAMA, 30)
    before = base_fingerprint(model)
    assert base_fingerprint(add_adapters(model, 2)) == before


def test_a_rollout_can_be_divided() -> None:
    rollout = Rollout(*(torch.arange(4) + i for i in range(9)))
    assert [part.tolist() for part in rollout.take(torch.tensor([2]))] == [[2 + i] for i in range(9)]
