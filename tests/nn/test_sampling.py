"""Sampling: filters against loops, generation against recomputation without cache and against transformers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.nn.lm import build_lm
from zoo.nn.sampling import Samples, filter_logits, generate, left_pad, sample_next

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # far from uniform
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}


def model_of(spec: dict[str, object], vocab_size: int = 23) -> torch.nn.Module:
    torch.manual_seed(1)
    return build_lm(spec, vocab_size)


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 23, (n,), generator=generator) for n in (7, 1, 4)]


def naive_greedy(model: torch.nn.Module, prompt: Tensor, steps: int, eos: int | None = None) -> list[int]:
    text = prompt.tolist()
    for _ in range(steps):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        if text[-1] == eos:
            break
    return text[len(prompt) :]


def kept(samples: Samples) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(samples.tokens, samples.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("spec", [LLAMA, GPT2])
def test_greedy_with_cache_and_left_padding_is_the_loop_without(spec: dict[str, object]) -> None:
    model = model_of(spec)
    ids, mask = left_pad(prompts())
    assert kept(generate(model, ids, 9, mask, temperature=0)) == [naive_greedy(model, p, 9) for p in prompts()]


def test_a_text_ends_at_its_end_token_and_the_others_go_on() -> None:
    model = model_of(LLAMA)
    free = [naive_greedy(model, p, 9) for p in prompts()]
    eos = free[0][3]
    ids, mask = left_pad(prompts())
    samples = generate(model, ids, 9, mask, temperature=0, eos_id=eos, pad_id=22)
    assert kept(samples) == [naive_greedy(model, p, 9, eos) for p in prompts()]
    assert set(samples.tokens[~samples.mask].tolist()) <= {22}
    assert samples.mask.sum(1).tolist() == samples.lengths.tolist()


@pytest.mark.parametrize("eos", [None, 3])
def test_greedy_is_that_of_transformers(eos: int | None) -> None:
    model = model_of(LLAMA)
    ids, mask = left_pad(prompts())
    theirs = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask.long(), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0
    )[:, ids.shape[1] :]
    ours = generate(model, ids, 8, mask, temperature=0, eos_id=eos).tokens
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.5), (1, 0.9), (0, 1e-6), (50, 1.0)])
def test_filters_are_those_of_a_loop(top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 11) * 2
    filtered = filter_logits(logits, top_k, top_p)
    for row, result in zip(logits, filtered, strict=True):
        order = row.argsort(descending=True).tolist()
        if 0 < top_k < len(order):
            order = order[:top_k]
        weights = [float(row[i].exp()) for i in order]
        keep: set[int] = set()
        mass = 0.0
        for token, weight in zip(order, weights, strict=True):
            if mass >= top_p:
                break
            keep.add(token)
            mass += weight / sum(weights)
        assert {i for i in range(11) if result[i] > -torch.inf} == keep
        assert torch.equal(result[sorted(keep)], row[sorted(keep)])


def test_filters_agree_with_transformers() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(20, 40) * 3
    theirs = TemperatureLogitsWarper(0.7)(None, logits)
    theirs = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, theirs))
    torch.testing.assert_close(filter_logits(logits / 0.7, 12, 0.8), theirs)


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    draws = sample_next(logits.expand(40_000, 4), temperature=0.5, top_k=3, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([4.0, 2.0, 0.0, -torch.inf]).softmax(0)
    torch.testing.assert_close(torch.bincount(draws, minlength=4) / 40_000, expected, atol=0.01, rtol=0)


def test_randomness_comes_from_the_generator_or_from_torch() -> None:
    model = model_of(LLAMA)
    ids = torch.stack([prompts()[0]] * 3)
    draws = [generate(model, ids, 12, generator=torch.Generator().manual_seed(7)).tokens for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(7)
    other = generate(model, ids, 12).tokens
    assert torch.equal(other, draws[0])
    assert not torch.equal(generate(model, ids, 12).tokens, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature: -1.0"), ({"top_k": -1}, "top_k: -1"), ({"top_p": 0.0}, "top_p: 0.0")],
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(None, torch.ones(1, 1, dtype=torch.int64), 1, **options)  # type: ignore[arg-type]


def test_right_padding_and_empty_prompts_are_refused() -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(None, ids, 1, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    with pytest.raises(ValueError, match="must have a token each"):
        generate(None, ids[:, :0], 1)
