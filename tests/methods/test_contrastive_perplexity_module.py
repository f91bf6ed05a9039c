"""Contrastive perplexity as a module: the sign check, starting weights, evaluation, schedules, arguments."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch.utils.data import DataLoader

from datamodules.perplexity_sets.synthetic import PerplexitySets
from tests.methods.contrastive_toy import (
    LLAMA,
    fit,
    make_batch,
    make_data,
    make_model,
    one_by_one,
    world_model,
)
from zoo.errors import RunError
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity


def prefer(model: ContrastivePerplexity, data: PerplexitySets, wanted: bool) -> None:
    """Make the wanted (or the unwanted) words likely everywhere."""
    lexicon = data.world.wanted if wanted else data.world.unwanted
    head = model.lm.lm_head.weight
    with torch.no_grad():
        head.zero_()
        model.lm.model.norm.weight.fill_(1.0)
        direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
        model.lm.model.embed_tokens.weight.copy_(direction.expand_as(model.lm.model.embed_tokens.weight))
        for layer in model.lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head[[data.world.token[word] for word in lexicon]] = direction / direction.norm()


@pytest.mark.parametrize("objective", ["paper", "paper_log", "official"])
@pytest.mark.parametrize("members", [{}, {"negatives": 0, "random_negatives": 2}], ids=["hard", "random"])
def test_training_that_would_go_the_wrong_way_is_refused(
    objective: str, members: dict[str, Any], tmp_path: Path
) -> None:
    data = make_data(**members)
    model = world_model(data, objective=objective)
    prefer(model, data, wanted=False)
    start = model.lm.lm_head.weight.detach().clone()
    with pytest.raises(RunError, match="the negatives are more likely than the positives: log-perplexity"):
        fit(model, data, tmp_path)
    assert torch.equal(model.lm.lm_head.weight, start)
    assert model.global_step == 0
    prefer(model, data, wanted=True)
    assert fit(model, data, tmp_path).global_step == 2


@pytest.mark.parametrize("changes", [{"distance": "one_sided"}, {"sign_check_batches": 0}, {"objective": "sft_pos"}])
def test_the_sign_is_checked_only_where_it_matters(changes: dict[str, Any], tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data, **changes)
    prefer(model, data, wanted=False)
    assert fit(model, data, tmp_path).global_step == 2


def test_the_sign_check_disturbs_neither_data_nor_weights(tmp_path: Path) -> None:
    losses = []
    for checked in (0, 3):
        data = make_data()
        seed_everything(0, verbose=False)
        model = world_model(data, sign_check_batches=checked, distance="one_sided")
        seen: list[float] = []
        model.log_dict = lambda values, seen=seen, **_: seen.append(float(values["train/loss"]))  # type: ignore
        fit(model, data, tmp_path, max_steps=4)
        assert model.lm.training
        losses.append(seen)
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_sign_check_reads_any_loader(tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data)
    prefer(model, data, wanted=False)
    batches = data.training_batches()
    loader: Any = DataLoader([batches.batch(0, i) for i in range(3)], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="more likely than the positives"):
        fit(model, loader, tmp_path, limit_val_batches=None)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"objective": "dpo"}])
def test_training_starts_from_the_weights_of_another_run(changes: dict[str, Any], tmp_path: Path) -> None:
    data = make_data(source="corpus", corpus_size=12)
    base = world_model(data, objective="sft_pos", lr=0.05)
    fit(base, data, tmp_path, enable_checkpointing=True, max_steps=3).save_checkpoint(tmp_path / "base.ckpt")
    model = world_model(data, init_from=str(tmp_path / "base.ckpt"), sign_check_batches=0, lr=1e-12, **changes)
    fit(model, make_data(), tmp_path, max_steps=1)
    ids = make_batch()["input_ids"][0]
    with torch.no_grad():
        expected = base.lm.eval()(input_ids=ids).logits
        torch.testing.assert_close(model.lm.eval()(input_ids=ids).logits, expected)
        if model.reference is not None:
            torch.testing.assert_close(model.reference(input_ids=ids).logits, expected)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    data = make_data()
    for name, lm in (("narrow", LLAMA | {"hidden_size": 8}), ("shallow", LLAMA | {"num_hidden_layers": 1})):
        torch.save({"state_dict": world_model(data, lm=lm).state_dict()}, tmp_path / f"{name}.ckpt")
        with pytest.raises(ValueError, match=r"init_from: \d+ weights do not fit the model"):
            fit(world_model(data, init_from=str(tmp_path / f"{name}.ckpt")), data, tmp_path)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        fit(world_model(data, init_from=str(tmp_path / "none.ckpt")), data, tmp_path)


def test_perplexities_are_per_token_and_mixtures_weigh_documents(tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data)
    trainer = fit(model, data, tmp_path, max_steps=1)
    trainer.test(model, datamodule=data, verbose=False)
    values = trainer.callback_metrics
    sums = []
    for unwanted in (False, True):
        batches, total = data.document_batches("test", unwanted), torch.zeros(2)
        for index in range(len(batches)):
            batch: Any = batches.batch(0, index)
            one = {key: batch[key][:, None] for key in ("input_ids", "attention_mask")}
            l, tokens = one_by_one(model.lm, {**one, "sizes": [1]})  # noqa: E741
            total += torch.stack([(l.flatten() * tokens).sum(), tokens.sum()])
        sums.append(total)
    for name, share in (("wanted", 0.0), ("mixed_50", 0.5), ("mixed_75", 0.75), ("unwanted", 1.0)):
        nll, tokens = (1 - share) * sums[0] + share * sums[1]
        assert values[f"test/ppl_{name}"].item() == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert set(model.figures()) == {"perplexities"}


def test_continuations_end_and_follow_their_generator() -> None:
    data = make_data()
    model = world_model(data, max_new_tokens=6).eval()
    batch = data.prompt_batches("test").batch(0, 0)
    one, two, three = (
        model.generate(batch["prompt_ids"], batch["prompt_mask"], torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, three.tokens)
    assert one.tokens.shape[1] <= 6
    assert model.predict_step(batch, 0).tokens.shape[0] == len(batch["prompt_ids"])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5]), ("cosine", [0.5, 1, 1, None, 0.5])],
)
def test_schedules(schedule: str, expected: list[float | None], tmp_path: Path) -> None:
    data = make_data()
    model = world_model(data, schedule=schedule, warmup_steps=2, lr=1e-3, sign_check_batches=0)
    rates: list[float] = []
    model.on_train_batch_start = lambda *_: rates.append(  # type: ignore[method-assign, assignment]
        model.trainer.optimizers[0].param_groups[0]["lr"] / 1e-3
    )
    fit(model, data, tmp_path, max_steps=6)
    for got, wanted in zip(rates[:5], expected, strict=True):
        assert wanted is None or got == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "ppo"}, "objective: 'ppo' is unknown; accepted: paper, paper_log, official, sft_pos"),
        ({"tau_mode": "outside"}, "tau_mode: 'outside'"),
        ({"prototype": "median"}, "prototype: 'median'"),
        ({"distance": "squared"}, "distance: 'squared'"),
        ({"objective": "official", "distance": "one_sided"}, "distance: 'one_sided' does not go with objective"),
        ({"schedule": "step"}, "schedule: 'step'"),
        ({"tau": 0.0}, "tau: 0.0 is not accepted; accepted: above 0"),
        ({"lr": -1.0}, "lr: -1.0"),
        ({"alpha": -0.1}, "alpha: -0.1 is not accepted; accepted: 0 or more"),
        ({"lambda_lm": -1.0}, "lambda_lm: -1.0"),
        ({"head_chunk": -1}, "head_chunk: -1"),
        ({"lora_rank": -1}, "lora_rank: -1"),
        ({"top_p": 0.0}, "top_p: 0.0"),
        ({"lm": {"model_type": "llamma"}}, "model_type: 'llamma' is not a causal language model"),
        ({"lora_rank": 2, "lora_targets": ["qkv"]}, "qkv"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
