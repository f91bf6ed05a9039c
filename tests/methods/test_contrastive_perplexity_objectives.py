"""The objectives of contrastive perplexity and of its baselines as a module computes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.contrastive_toy import (
    GPT2,
    fit,
    make_batch,
    make_data,
    make_model,
    one_by_one,
    step,
    world_model,
)
from tests.nn.test_distributed import on_two_ranks
from zoo.methods.contrastive_perplexity.losses import (
    contrastive_perplexity,
    official_loss,
    perplexity,
    prototype,
)
from zoo.methods.contrastive_perplexity.module import OBJECTIVES
from zoo.methods.contrastive_perplexity.networks import adapters_off


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("r", [0, 2])
def test_the_loss_is_the_equation_on_perplexities_of_single_sentences(objective: str, r: int) -> None:
    model = make_model(objective=objective, tau=0.4, alpha=1.3, lambda_lm=0.7, beta=0.6, gamma=0.2)
    batch = make_batch(p=3, n=2, r=r)
    l, _tokens = one_by_one(model.lm, batch)  # noqa: E741
    pos, neg, random = l.split([3, 2, r], dim=1)
    every_neg = torch.cat([neg, random], dim=1)
    if objective == "paper":
        phi = perplexity(pos), perplexity(every_neg)
        expected = contrastive_perplexity(*phi, prototype(phi[0]), 1.3, 0.4, "inside") + 0.7 * pos.mean()
    elif objective == "paper_log":
        expected = contrastive_perplexity(pos, every_neg, prototype(pos), 1.3, 0.4, "inside") + 0.7 * pos.mean()
    elif objective == "official":
        expected = official_loss(pos, neg, random, prototype(pos), 1.3, 0.4) + 0.7 * pos.mean()
    elif objective == "sft_pos":
        expected = pos.mean()
    elif objective == "unlikelihood_neg":
        expected = -every_neg.mean()
    elif objective == "dpo":
        expected = torch.tensor(math.log(2))  # policy and reference are one before the first step
    else:
        expected = -torch.nn.functional.logsigmoid(0.6 * (neg - pos[:, :2]) - 0.2).mean()
    logged = step(model, batch)
    torch.testing.assert_close(logged["total"], expected, atol=1e-5, rtol=1e-5)
    assert logged["log_ppl_pos"].item() == pytest.approx(pos.mean().item(), abs=1e-5)
    assert logged["gap"].item() == pytest.approx((every_neg.mean() - pos.mean()).item(), abs=1e-5)


def test_switches_reach_the_objective() -> None:
    batch = make_batch(anchors=3)
    arguments: dict[str, Any] = {"objective": "paper_log", "tau": 0.3}
    one = step(make_model(**arguments), batch)["total"].item()
    for change in ({"tau_mode": "cancel"}, {"prototype": "batch"}, {"alpha": 2.0}, {"distance": "one_sided"}):
        assert step(make_model(**(arguments | change)), batch)["total"].item() != pytest.approx(one, abs=1e-6)
    detached = make_model(**arguments, detach_prototype=True)
    loss = step(detached, batch)["total"]
    assert loss.item() == pytest.approx(one, abs=1e-6)
    loss.backward()
    attached = make_model(**arguments)
    step(attached, batch)["total"].backward()
    assert not torch.allclose(detached.lm.lm_head.weight.grad, attached.lm.lm_head.weight.grad)


def test_what_is_watched() -> None:
    model, batch = make_model(objective="paper_log"), make_batch()
    l, _ = model.log_perplexities(batch)  # noqa: E741
    below = (l[:, 3:] < l[:, :3].mean(dim=1, keepdim=True)).float().mean()
    logged = step(model, batch)
    assert logged["frac_neg_below_prototype"].item() == pytest.approx(below.item())
    assert {"loss", "contrastive", "log_ppl_pos", "log_ppl_neg", "gap"} <= logged.keys()


@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_compares_log_likelihoods_of_whole_sentences(rank: int) -> None:
    model = make_model(objective="dpo", beta=0.5, lora_rank=rank)
    with torch.no_grad():  # as after some steps: the model is not its reference any more
        for parameter in (p for p in model.lm.parameters() if p.requires_grad):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    batch = make_batch(p=2, n=3, r=1)
    l, tokens = one_by_one(model.lm, batch)  # noqa: E741
    if model.reference is None:
        with adapters_off(model.lm):
            of_reference, _ = one_by_one(model.lm, batch)
    else:
        of_reference, _ = one_by_one(model.reference, batch)

    def loss(weights: Tensor) -> float:
        """Over the pairs of k-th positive and k-th negative, one by one."""
        gains = ((of_reference - l) * weights).tolist()  # log-likelihood ratios
        margins = [row[k] - row[2 + k] for row in gains for k in range(2)]
        return sum(math.log1p(math.exp(-0.5 * margin)) for margin in margins) / len(margins)

    lengths = tokens.view_as(l).float()
    assert (lengths[:, :2] != lengths[:, 2:4]).any()
    assert abs(loss(lengths) - loss(torch.ones_like(l))) > 0.01  # a mean over tokens is something else
    assert step(model, batch)["total"].item() == pytest.approx(loss(lengths), abs=1e-5)


@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_moves_pairs_apart_and_leaves_its_reference(rank: int) -> None:
    model = make_model(objective="dpo", beta=0.5, lora_rank=rank)
    batch = make_batch(p=2, n=2)
    trained = [p for p in model.lm.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    with torch.no_grad():
        if model.reference is None:
            with adapters_off(model.lm):
                reference = model.log_perplexities(batch)[0]
        else:
            reference = model.log_perplexities(batch, model.reference)[0]
    before = model.log_perplexities(batch)[0].detach()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = step(model, batch)["total"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    after = model.log_perplexities(batch)[0].detach()

    def gap(l: Tensor) -> float:  # noqa: E741
        return (l[:, 2:] - l[:, :2]).mean().item()

    assert gap(after) > gap(before) + 0.02
    with torch.no_grad():
        if model.reference is None:
            with adapters_off(model.lm):
                now = model.log_perplexities(batch)[0]
            assert model.lm.training
            assert all(p.requires_grad for p in trained)
        else:
            now = model.log_perplexities(batch, model.reference)[0]
            assert not any(p.requires_grad for p in model.reference.parameters())
    assert torch.equal(reference, now)


def test_the_reference_of_dpo_has_no_dropout_and_causes_no_warning(tmp_path: Path) -> None:
    model = world_model(make_data(), objective="dpo", lm=GPT2 | {"resid_pdrop": 0.5})
    fit(model, make_data(), tmp_path)
    assert model.reference is not None
    assert not any(part.training for part in model.reference.modules())
    assert all(part.training for part in model.lm.modules())


def test_without_negatives_only_the_positives_can_be_learned() -> None:
    batch = make_batch(p=2, n=0)
    assert step(make_model(objective="sft_pos"), batch)["total"].isfinite()
    with pytest.raises(ValueError, match="objective: 'paper_log' needs negatives"):
        step(make_model(objective="paper_log"), batch)


def batch_prototype(number: int) -> dict[str, Tensor]:
    l_pos = torch.tensor([[1.0, 2.0], [4.0, 3.0]])[number : number + 1].requires_grad_()
    l_neg = torch.tensor([[5.0, 2.5], [4.5, 6.0]])[number : number + 1].requires_grad_()
    c = prototype(l_pos, "batch")
    loss = contrastive_perplexity(l_pos, l_neg, c)
    (loss / 2).backward()
    assert l_pos.grad is not None
    return {"c": c.detach(), "loss": loss.detach(), "grad": l_pos.grad}


def test_the_batch_prototype_of_two_processes_is_that_of_all_anchors(tmp_path: Path) -> None:
    found = on_two_ranks(batch_prototype, tmp_path)
    l_pos = torch.tensor([[1.0, 2.0], [4.0, 3.0]], requires_grad=True)
    l_neg = torch.tensor([[5.0, 2.5], [4.5, 6.0]])
    c = prototype(l_pos, "batch")
    loss = contrastive_perplexity(l_pos, l_neg, c)
    loss.backward()
    assert [part["c"].item() for part in found] == [2.5, 2.5]
    assert sum(part["loss"].item() for part in found) / 2 == pytest.approx(loss.item())
    torch.testing.assert_close(torch.cat([part["grad"] for part in found]), l_pos.grad)
