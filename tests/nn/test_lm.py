"""Language models from plain values, and the likelihood of their tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zoo.nn.lm import IGNORE, build_lm, lm_config, sequence_nll, token_logprobs

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}


def test_a_mapping_gives_a_model_of_these_sizes_from_the_global_generator() -> None:
    torch.manual_seed(3)
    model = build_lm(TINY, vocab_size=31)
    torch.manual_seed(3)
    again = build_lm(TINY, vocab_size=31)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training
    assert model.get_input_embeddings().weight.shape == (31, 16)
    assert model.generation_config.eos_token_id is None  # the class's default would end texts at token 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_gpt2_takes_its_own_names_and_the_common_ones() -> None:
    assert lm_config({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "num_hidden_layers": 3}, 20).n_layer == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"hidden_size": 16}, "model_type: is missing"),
        ({"model_type": "lama"}, "'lama' is not a causal language model; did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 16}, "hiden_size: 16 .* did you mean 'hidden_size'"),
        ({"model_type": "llama", "vocab_size": 10}, "vocab_size: 10 is less than the 31 tokens"),
    ],
)
def test_values_that_are_not_accepted_are_named(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_lm(spec, vocab_size=31)


def test_a_saved_model_comes_back_in_float32(tmp_path: Path) -> None:
    model = build_lm(TINY, vocab_size=31)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = build_lm(str(tmp_path), vocab_size=31)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    with pytest.raises(ValueError, match="has 31 tokens, the data 32"):
        build_lm(str(tmp_path), vocab_size=32)


def test_a_path_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model at .*absent"):
        build_lm(str(tmp_path / "absent"))


def test_likelihood_is_that_of_a_loop() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[1, 2] = IGNORE
    mask = torch.rand(3, 5) < 0.7
    logprobs, nll = token_logprobs(logits, labels), sequence_nll(logits, labels, mask)
    for b in range(3):
        total = 0.0
        for t in range(5):
            label = int(labels[b, t])
            expected = (
                0.0 if label == IGNORE else float(torch.log(logits[b, t].exp()[label] / logits[b, t].exp().sum()))
            )
            assert float(logprobs[b, t]) == pytest.approx(expected, abs=1e-5)
            total -= expected * bool(mask[b, t])
        assert float(nll[b]) == pytest.approx(total, abs=1e-5)
    torch.testing.assert_close(sequence_nll(logits, labels), -logprobs.sum(1))


def test_likelihood_of_half_precision_logits_is_computed_in_float32() -> None:
    logits = torch.randn(1, 4, 50, dtype=torch.bfloat16)
    labels = torch.randint(0, 50, (1, 4))
    torch.testing.assert_close(token_logprobs(logits, labels), token_logprobs(logits.float(), labels))
