"""Decoders against the model's own forward, where each is taken, and what is drawn with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.methods.salsa import generation
from zoo.methods.salsa.decoding import Decoder, LlamaDecoder, ModelDecoder, decoder_of
from zoo.methods.salsa.generation import InProcess, Sampling
from zoo.methods.salsa.networks import add_adapters, answer_likelihood
from zoo.nn.lm import build_lm
from zoo.nn.sampling import left_pad

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
ROTATION = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip  # noqa: E501
VOCABULARY = 11


def built(spec: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build_lm(spec, VOCABULARY)
    for name, p in model.named_parameters():
        if "norm" in name and "weight" in name:  # else all of them are 1
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def prompts(rows: int = 5, length: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.ones_like(ids, dtype=torch.bool)


@torch.no_grad()
def follows_the_model(decoder: Decoder, model: Any, ids: Tensor, mask: Tensor) -> None:
    """Read in pieces, drop rows midway, and compare with one pass over each whole text."""
    more = torch.randint(3, VOCABULARY, (len(ids), 3), generator=torch.Generator().manual_seed(2))
    rows, text = torch.arange(len(ids)), ids
    for step in range(4):
        logits = decoder(text if step == 0 else text[:, -1:])
        for place, row in enumerate(rows.tolist()):
            whole = text[place][torch.cat([mask[row], mask.new_ones(step)])]
            torch.testing.assert_close(logits[place], model(whole[None]).logits[0, -1], rtol=1e-5, atol=1e-5)
        if step == 1:
            kept = torch.tensor([0, 2])
            decoder.keep(kept)
            rows, text = rows[kept], text[kept]
        if step < 3:
            text = torch.cat([text, more[rows, step, None]], dim=1)


@pytest.mark.parametrize(
    "changed",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"head_dim": 8}, {"rope_parameters": ROTATION}],
    ids=str,
)
def test_the_short_way_is_the_llama(changed: dict[str, Any]) -> None:
    model, (ids, mask) = built({**LLAMA, **changed}), prompts()
    decoder = decoder_of(model, mask, 7)
    assert isinstance(decoder, LlamaDecoder)
    follows_the_model(decoder, model, ids, mask)


@pytest.mark.parametrize("spec", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_any_model_is_read_in_pieces(spec: dict[str, Any], padded: bool) -> None:
    model = built(spec)
    ids, mask = left_pad([torch.tensor([5, 6, 7]), torch.tensor([4]), torch.tensor([9, 3])]) if padded else prompts()
    decoder = ModelDecoder(model, mask, ids.shape[1] + 3)
    assert decoder.can_drop
    follows_the_model(decoder, model, ids, mask)


def test_what_is_no_plain_llama_takes_its_own_forward() -> None:
    ids, mask = prompts()

    def taken(model: Any, mask: Tensor = mask) -> type:
        return type(decoder_of(model, mask, 8))

    assert taken(built(LLAMA)) is LlamaDecoder
    assert taken(built(LLAMA), left_pad([ids[0], ids[1, :2]])[1]) is ModelDecoder
    hooked = built(LLAMA)
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    others = [
        built(GPT2),
        built({**LLAMA, "model_type": "mistral"}),
        built({**LLAMA, "attention_bias": True}),
        built({**LLAMA, "rope_parameters": dynamic}),
        built(LLAMA).bfloat16(),
        add_adapters(built(LLAMA), 2),
        hooked,
    ]
    assert [taken(model) for model in others] == [ModelDecoder] * len(others)
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(built(LLAMA)) is ModelDecoder


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_decoders_draw_the_same_answers_and_say_how_likely_they_were(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model, (ids, mask) = built(LLAMA), prompts(40)
    engine = InProcess(Sampling(12, temperature, 2, 0))
    engine.sync(model)
    drawn = engine(ids, mask, torch.arange(40), 3, likelihood=True)
    assert 5 < int((drawn.mask.sum(dim=1) < 12).sum()) < 40, "some answers end, others do not"
    assert engine(ids, mask, torch.arange(40), 3).logprobs is None
    found = answer_likelihood(model, ids, mask, drawn.tokens, drawn.mask, temperature=temperature, entropy=True)
    assert drawn.logprobs is not None
    assert drawn.entropy is not None
    assert found.entropy is not None
    for left, right in ((drawn.logprobs, found.logprobs), (drawn.entropy, found.entropy)):
        torch.testing.assert_close(left[drawn.mask], right[drawn.mask], rtol=1e-5, atol=1e-5)
        assert (left[~drawn.mask] == 0).all()
    monkeypatch.setattr(generation, "decoder_of", ModelDecoder)
    other = engine(ids, mask, torch.arange(40), 3, likelihood=True)
    assert torch.equal(other.tokens, drawn.tokens)
    torch.testing.assert_close(other.logprobs, drawn.logprobs, rtol=1e-5, atol=1e-5)


def test_rows_that_have_ended_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = built(LLAMA), prompts(64)
    seen: list[int] = []

    class Counting(LlamaDecoder):
        def __init__(self, model: Any, mask: Tensor, capacity: int) -> None:
            super().__init__(model, len(mask), capacity)

        def __call__(self, ids: Tensor) -> Tensor:
            seen.append(len(ids))
            return super().__call__(ids)

    monkeypatch.setattr(generation, "decoder_of", Counting)
    engine = InProcess(Sampling(40, 1.0, 2, 0))
    engine.sync(model)
    drawn = engine(ids, mask, torch.arange(64), 0)
    lengths = drawn.mask.sum(dim=1)
    assert len(seen) == int(lengths.max()), "no step after the last end"
    assert seen == sorted(seen, reverse=True)
    for step, rows in enumerate(seen):
        going = int((lengths > step).sum())
        assert going <= rows < 2 * going or rows == 64
    for row in (0, 17, 63):
        alone = engine(ids[row, None], mask[row, None], torch.tensor([row]), 0)
        assert torch.equal(alone.tokens[0], drawn.tokens[row])


def test_in_half_precision_likelihoods_are_left_to_the_trainer() -> None:
    engine, (ids, mask) = InProcess(Sampling(3, 1.0, 2, 0)), prompts()
    engine.sync(built(LLAMA).bfloat16())
    assert engine(ids, mask, torch.arange(5), 0, likelihood=True).logprobs is None
