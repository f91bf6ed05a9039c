"""Log-perplexities of sentences: whatever the padding, in chunks of tokens or sentences, checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.methods.contrastive_toy import GPT2, both_models, make_batch, make_model, one_by_one, step
from zoo.methods.contrastive_perplexity.losses import log_perplexity
from zoo.methods.contrastive_perplexity.networks import sentence_logprobs


@both_models
def test_log_perplexity_is_that_of_transformers_whatever_the_padding(lm: dict[str, Any]) -> None:
    model, batch = make_model(lm=lm), make_batch()
    expected, tokens = one_by_one(model.lm, batch)
    got, counts = model.log_perplexities(batch)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert counts.flatten().tolist() == tokens.tolist()
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    order = (torch.arange(7) + mask.sum(dim=1, keepdim=True)) % 7  # the same tokens flush right
    left = log_perplexity(*sentence_logprobs(model.lm, ids.gather(1, order), mask.gather(1, order)))
    torch.testing.assert_close(left, expected.flatten(), atol=1e-5, rtol=1e-5)


def assert_same_step(plain: Any, chunked: Any, batch: Any) -> None:
    """Both models have the same loss on a batch and the same gradients."""
    losses = [step(model, batch)["total"] for model in (plain, chunked)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), chunked.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=1e-6, rtol=1e-4, msg=name)


@both_models
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_logits_in_chunks_give_the_same_loss_and_gradients(lm: dict[str, Any], chunk: int) -> None:
    batch = make_batch(r=1)
    plain, chunked = (make_model(lm=lm, objective="paper_log", lambda_lm=0.5, head_chunk=c) for c in (0, chunk))
    assert_same_step(plain, chunked, batch)


def test_logits_in_chunks_never_hold_all_tokens() -> None:
    model, batch = make_model(objective="sft_pos", head_chunk=4), make_batch()
    seen: list[int] = []
    model.lm.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    step(model, batch)["total"].backward()
    assert max(seen) == 4
    assert sum(seen) >= int(batch["attention_mask"].sum()) - 10


@both_models
@pytest.mark.parametrize("changes", [{}, {"head_chunk": 4}, {"gradient_checkpointing": True}, {"lora_rank": 2}])
def test_sentences_in_chunks_give_the_same_loss_and_gradients(lm: dict[str, Any], changes: dict[str, Any]) -> None:
    batch, shared = make_batch(r=1), {"lm": lm, "objective": "paper_log", "lambda_lm": 0.5, **changes}
    plain, chunked = (make_model(**shared, sentence_chunk=c) for c in (0, 5))  # 12 sentences: 5, 5 and 2
    assert_same_step(plain, chunked, batch)


def test_sentences_in_chunks_hold_the_activations_of_one_chunk() -> None:
    model, batch = make_model(objective="paper_log", sentence_chunk=3), make_batch()
    passes: list[int] = []
    model.lm.model.register_forward_hook(lambda *_: passes.append(1))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = step(model, batch)["total"]
    assert len(passes) == 4, "10 sentences"
    assert max(kept) <= batch["input_ids"].numel(), "no activation stays: a number of each token at most"
    loss.backward()
    assert len(passes) == 8


def test_the_same_dropout_is_drawn_when_a_chunk_is_passed_again() -> None:
    model, batch = make_model(lm=GPT2 | {"resid_pdrop": 0.5}, objective="sft_pos", sentence_chunk=3), make_batch()
    loss = step(model, batch)["total"]
    loss.backward()
    name, weight = "lm.transformer.h.0.mlp.c_fc.bias", model.lm.transformer.h[0].mlp.c_fc.bias
    grad = weight.grad.clone()
    assert grad.abs().max() > 0, name
    change = 1e-2 * grad / grad.norm()
    values = []
    for sign in (1, -1):
        torch.manual_seed(0)
        again = make_model(lm=GPT2 | {"resid_pdrop": 0.5}, objective="sft_pos", sentence_chunk=3)
        with torch.no_grad():
            again.lm.transformer.h[0].mlp.c_fc.bias.add_(sign * change)
        values.append(step(again, batch)["total"].item())
    assert (values[0] - values[1]) / 2 == pytest.approx((grad * change).sum().item(), rel=0.05)


def test_checkpointed_activations_change_nothing() -> None:
    models = [make_model(objective="paper_log", gradient_checkpointing=flag) for flag in (False, True)]
    for model in models:
        step(model, make_batch())["total"].backward()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
