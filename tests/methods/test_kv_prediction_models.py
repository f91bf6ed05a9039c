"""Where models come from: transformers with equal logits, OpenELM's format, checkpoints, layers of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.methods.kv_prediction.models import build_model, check_pair, from_transformers, keep_layers, weights_hash
from zoo.methods.kv_prediction.networks import CausalLM, Shape
from zoo.methods.kv_prediction.openelm import openelm_shape
from zoo.nn.lm import build_lm

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 31,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": {},
    "llama, tied, own head size": {"model_type": "llama", "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
}


def theirs(name: str) -> Any:
    torch.manual_seed(0)
    model = build_lm({**TINY, "model_type": name, **FAMILIES[name]})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.3 if "norm" in key or "bias" in key else 0.1) * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_of_a_transformers_model_has_its_logits(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    ids = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        own = from_transformers(model).eval()
        assert torch.allclose(own.logits(own(ids)[0]), expected, atol=1e-5)
        model.save_pretrained(tmp_path)
        loaded = build_model(str(tmp_path), "base", 31)
        assert torch.allclose(loaded.logits(loaded(ids)[0]), expected, atol=1e-5)
    assert loaded.shape.context == 64


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not of the form .* accepted: llama, mistral, qwen2, qwen3"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act: 'gelu' of this llama model is not supported"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias or mlp_bias: True"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window: 8 of this mistral model"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type: 'linear'",
        ),
        ({"layers": [0, 1]}, "accepted: {layers: \\[0, 2, ...\\], of: MODEL}"),
        ({"layers": [0], "off": "x"}, "accepted: {layers: \\[0, 2, ...\\], of: MODEL}"),
        ({**TINY, "model_type": "llama", "vocab_size": 20}, "vocab_size: 20 is less than the 31 tokens"),
        ("nowhere.ckpt", "auxiliary: no checkpoint at nowhere.ckpt"),
        ("./nowhere", "no model at nowhere"),
    ],
)
def test_models_that_cannot_be_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(spec, "auxiliary", 31)


def test_layers_of_a_model_are_copies_in_order() -> None:
    model = CausalLM(Shape(31, 16, 4, heads=(4, 2, 4), kv_heads=(2, 2, 4), mlp=(8, 16, 24)))
    kept = keep_layers(model, [0, 2])
    assert kept.shape.kv_heads == (2, 4)
    assert torch.equal(kept.layers[1].mlp.up_proj.weight, model.layers[2].mlp.up_proj.weight)  # type: ignore[union-attr]
    assert torch.equal(kept.embed_tokens.weight, model.embed_tokens.weight)
    with torch.no_grad():
        kept.embed_tokens.weight.add_(1)
    assert not torch.equal(kept.embed_tokens.weight, model.embed_tokens.weight)
    with pytest.raises(ValueError, match="layers: \\[1, 2\\]"):
        keep_layers(model, [1, 2])


def test_models_with_other_tokens_are_refused(tmp_path: Path) -> None:
    base, other = CausalLM(Shape(31, 8, 4, (2,), (2,), (8,))), CausalLM(Shape(32, 8, 4, (2,), (2,), (8,)))
    with pytest.raises(ValueError, match="auxiliary: a vocabulary of 32 tokens is not that of the base, 31"):
        check_pair(base, other, {}, {})
    check_pair(base, base, {}, {})
    specs = [str(tmp_path / name) for name in ("one", "two")]
    for spec, words in zip(specs, (["a", "b"], ["b", "a"]), strict=True):
        save_tokenizer(spec, words)
    with pytest.raises(ValueError, match="auxiliary: the tokenizer of .*two is not that of .*one"):
        check_pair(base, base, specs[0], specs[1])
    check_pair(base, base, specs[0], specs[0])


def save_tokenizer(folder: str, words: list[str]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)


def test_the_hash_is_of_all_weights_and_their_names() -> None:
    torch.manual_seed(0)
    model = CausalLM(Shape(31, 8, 4, (2,), (2,), (8,)))
    before = weights_hash(model)
    assert weights_hash(model) == before
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6  # type: ignore[union-attr, index]
    assert weights_hash(model) != before


# ---------------------------------------------------------------- OpenELM

ELM = {
    "model_type": "openelm",
    "vocab_size": 31,
    "model_dim": 16,
    "head_dim": 4,
    "num_query_heads": [4, 8],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [0.5, 2.0],
    "ffn_dim_divisor": 8,
    "normalize_qk_projections": True,
    "max_context_length": 64,
}


def openelm_weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    weights = {"token_embeddings.weight": torch.randn(31, 16, generator=g), "norm.weight": torch.rand(16, generator=g)}
    for i, (heads, kv, mlp) in enumerate(((4, 1, 8), (8, 2, 32))):
        sizes: dict[str, tuple[int, ...]] = {
            "attn.qkv_proj": ((heads + 2 * kv) * 4, 16),
            "attn.out_proj": (16, heads * 4),
            "attn.q_norm": (4,),
            "attn.k_norm": (4,),
            "ffn.proj_1": (2 * mlp, 16),
            "ffn.proj_2": (16, mlp),
            "attn_norm": (16,),
            "ffn_norm": (16,),
        }
        weights |= {f"layers.{i}.{k}.weight": 0.5 * torch.randn(*v, generator=g) for k, v in sizes.items()}
    return {f"transformer.{name}": value for name, value in weights.items()}


def openelm_logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """One sequence through OpenELM, head by head."""
    w = {name.removeprefix("transformer."): value for name, value in weights.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x: Tensor) -> Tensor:
        out = x.clone()
        for t in range(len(x)):
            for i in range(2):
                angle = torch.tensor(t * 10000 ** (-2 * i / 4))
                a, b = x[t, i], x[t, i + 2]
                out[t, i], out[t, i + 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return out

    x = w["token_embeddings.weight"][ids]
    for i, (heads, kv) in enumerate(((4, 1), (8, 2))):
        layer = {name.removeprefix(f"layers.{i}."): value for name, value in w.items()}
        rows = (norm(x, layer["attn_norm.weight"]) @ layer["attn.qkv_proj.weight"].T).unflatten(1, (-1, 4))
        outs = []
        for h in range(heads):
            group = h // (heads // kv)
            q = turn(norm(rows[:, h], layer["attn.q_norm.weight"]))
            k = turn(norm(rows[:, heads + group], layer["attn.k_norm.weight"]))
            scores = (q @ k.T / 2).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
            outs.append(scores.softmax(-1) @ rows[:, heads + kv + group])
        x = x + torch.cat(outs, 1) @ layer["attn.out_proj.weight"].T
        gate, up = (norm(x, layer["ffn_norm.weight"]) @ layer["ffn.proj_1.weight"].T).chunk(2, 1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["ffn.proj_2.weight"].T
    return norm(x, w["norm.weight"]) @ w["token_embeddings.weight"].T


def test_an_openelm_on_disk_has_the_logits_of_its_definition(tmp_path: Path) -> None:
    weights, ids = openelm_weights(), torch.randint(31, (7,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "config.json").write_text(json.dumps(ELM))
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    model = build_model(str(tmp_path), "base", 31)
    assert model.shape.heads == (4, 8)
    assert model.shape.mlp == (8, 32)
    with torch.no_grad():
        assert torch.allclose(model.logits(model(ids[None])[0])[0], openelm_logits(weights, ids), atol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps({**ELM, "ffn_with_glu": False}))
    with pytest.raises(ValueError, match="ffn_with_glu: False of this openelm model is not supported"):
        build_model(str(tmp_path), "base", 31)


def test_sizes_of_the_published_openelm_270m_follow_from_its_multipliers() -> None:
    multipliers = [0.5, 0.73, 0.97, 1.2, 1.43, 1.67, 1.9, 2.13, 2.37, 2.6, 2.83, 3.07, 3.3, 3.53, 3.77, 4.0]
    heads = [12] * 3 + [16] * 7 + [20] * 6
    config = {**ELM, "model_dim": 1280, "head_dim": 64, "ffn_dim_divisor": 256, "ffn_multipliers": multipliers}
    shape = openelm_shape({**config, "num_query_heads": heads, "num_kv_heads": [h // 4 for h in heads]})
    assert shape.mlp[:4] == (768, 1024, 1280, 1536)
    assert shape.mlp[-1] == 5120
    with pytest.raises(ValueError, match="head_dim missing"):
        openelm_shape({key: value for key, value in ELM.items() if key != "head_dim"})
