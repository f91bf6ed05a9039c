"""Nested MLPs over models of several classes: the same function, the same storage, two executions that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.methods.dynamoe.losses import difficulty
from zoo.methods.dynamoe.networks import Importances, NestedMLP, add_routers, matrix, nest, router_parameters
from zoo.methods.dynamoe.routes import ByRouter, Fixed, Gumbel, Oracle, Route, Trace
from zoo.nn.lm import build_lm

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2},
    "llama_bias": {"model_type": "llama", **SMALL, "intermediate_size": 26, "num_key_value_heads": 2, "mlp_bias": True},
    "mistral": {"model_type": "mistral", **SMALL, "intermediate_size": 24, "num_key_value_heads": 1},
    "qwen2": {"model_type": "qwen2", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": 40,
             "n_positions": 32},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL, "intermediate_size": 24},
}  # fmt: skip


def made(name: str = "llama", experts: int = 4, routers: bool = True, head: str = "score") -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = build_lm(MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases are zero and norms are one else
    layers, control = nest(model, experts)
    if routers:
        add_routers(layers, 8, head)
        for parameter in router_parameters(layers):
            nn.init.normal_(parameter)
    return model, layers, control


def ids(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_full_expert_is_the_dense_model_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    plain = build_lm(MODELS[name])
    names = {n: p.data_ptr() for n, p in plain.named_parameters()}
    with torch.no_grad():
        before = plain(input_ids=ids()).logits
        layers, control = nest(plain, 4)
        assert {n: p.data_ptr() for n, p in plain.named_parameters()} == names  # nothing added, nothing copied
        assert torch.equal(plain(input_ids=ids()).logits, before)
        for widths in (torch.full((2,), 3), torch.full((2, 3, 10), 3)):
            for execution in ("masked", "grouped"):
                with control.using(Fixed(widths), execution=execution):
                    assert torch.equal(plain(input_ids=ids()).logits, before)
    assert all(isinstance(layer, NestedMLP) for layer in layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_experts_are_views(name: str) -> None:
    _, layers, _ = made(name)
    for linear in (layers[0].up, layers[0].down):
        assert matrix(linear)[:5].untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", MODELS)
def test_sums_of_blocks_and_masks_are_the_slices(name: str) -> None:
    _, layers, _ = made(name)
    x = torch.randn(5, 16)
    with torch.no_grad():
        hidden = layers[0].hidden(x)
        together = layers[0].outputs(hidden)
        for e in range(4):
            direct = layers[0].sliced(x, e)
            assert torch.allclose(together[:, e], direct, atol=1e-5)
            assert torch.allclose(layers[0].masked(hidden, torch.tensor(e)), direct, atol=1e-5)
        assert torch.equal(layers[0].scores(hidden)[:, -1], torch.ones(5))


@pytest.mark.parametrize("name", MODELS)
def test_grouped_execution_is_masked_execution(name: str) -> None:
    model, _, control = made(name)
    outputs = {}
    for route in (Fixed(torch.randint(4, (2, 3, 10))), ByRouter("score", 0.3), Fixed(torch.tensor([0, 2]))):
        for execution in ("masked", "grouped"):
            trace = Trace()
            with torch.no_grad(), control.using(route, trace, execution=execution):
                outputs[execution] = model(input_ids=ids()).logits
        assert torch.allclose(outputs["masked"], outputs["grouped"], atol=1e-5)
        assert len(trace.stacked("widths").unique()) > 1


@pytest.mark.parametrize("name", MODELS)
def test_sorting_leaves_the_function_and_puts_the_important_first(name: str) -> None:
    model, layers, _ = made(name, routers=False)
    with torch.no_grad():
        before = model(input_ids=ids()).logits
        importances = Importances(layers)
        importances.add(model, [{"input_ids": ids()}])
        first = [sums.clone() for sums in importances.sums]
        importances.sort()
        assert torch.allclose(model(input_ids=ids()).logits, before, atol=1e-5)
    again = Importances(layers)
    again.add(model, [{"input_ids": ids()}])
    for old, new in zip(first, again.sums, strict=True):
        assert torch.allclose(new, old.sort(descending=True).values, rtol=1e-4)


def test_padding_does_not_count_for_importance() -> None:
    model, layers, _ = made(routers=False)
    padded, mask = ids().clone(), torch.ones(3, 10).long()
    padded[:, 7:], mask[:, 7:] = 0, 0
    sums = []
    for batch in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": padded[:, :7]}):
        found = Importances(layers)
        found.add(model, [batch])
        sums.append(found.sums)
    for one, other in zip(*sums, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_neurons_beyond_the_widest_in_use_get_no_gradient() -> None:
    model, layers, control = made()
    widths = torch.randint(3, (2, 3, 10))  # at most expert 2: 18 of 24 neurons
    for execution in ("masked", "grouped"):
        model.zero_grad()
        with control.using(Fixed(widths), execution=execution):
            model(input_ids=ids()).logits.square().sum().backward()
        for mlp in layers:
            assert not mlp.up.weight.grad[18:].any()
            assert not mlp.down.weight.grad[:, 18:].any()
            assert mlp.up.weight.grad[:18].any(dim=1).all()


def test_routing_passes_no_gradient_from_the_model_to_the_router_or_back() -> None:
    model, layers, control = made()
    trace = Trace()
    with control.using(ByRouter("score", 0.3), trace, scored=True):
        model(input_ids=ids()).logits.square().sum().backward(retain_graph=True)
    assert all(p.grad is None for p in router_parameters(layers))
    assert not trace.stacked("scores").requires_grad
    model.zero_grad()
    trace.stacked("predictions").square().sum().backward()
    assert all(p.grad is not None for p in router_parameters(layers))
    routers = {id(p) for p in router_parameters(layers)}
    assert all(p.grad is None for p in model.parameters() if id(p) not in routers)


def test_scores_belong_to_the_states_that_the_layers_saw() -> None:
    model, _, control = made(routers=False)
    trace = Trace()
    with torch.no_grad(), control.using(Oracle(0.5), trace, scored=True):
        model(input_ids=ids())
    assert torch.equal(trace.stacked("widths"), difficulty(trace.stacked("scores"), 0.5))
    assert len(trace.stacked("widths").unique()) > 1


def test_soft_weights_of_experts_pass_gradients_to_the_router() -> None:
    model, layers, control = made(head="label")
    trace = Trace()
    with control.using(Gumbel(torch.rand(3, 10, 2, 4).clamp(0.01, 0.99)), trace):
        soft = model(input_ids=ids()).logits
    weights = trace.stacked("widths")
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 10))
    assert bool(((weights < 1e-6) | (weights > 0.999)).all())
    with torch.no_grad(), control.using(Fixed(weights.argmax(-1))):
        assert torch.allclose(model(input_ids=ids()).logits, soft, atol=1e-5)
    soft.square().sum().backward()
    assert all(bool(p.grad.any()) for p in router_parameters(layers))


def test_one_expert_is_the_dense_model() -> None:
    model, layers, control = made(experts=1)
    assert router_parameters(layers) == []
    with torch.no_grad():
        before = model(input_ids=ids()).logits
        with control.using(ByRouter("score", 0.5), execution="grouped"):
            assert torch.equal(model(input_ids=ids()).logits, before)


def test_new_routers_start_with_the_full_model() -> None:
    for head, knob in (("score", 0.5), ("label", None)):
        model, layers, control = made(routers=False)
        add_routers(layers, 8, head)
        trace = Trace()
        with torch.no_grad(), control.using(ByRouter(head, knob), trace):
            model(input_ids=ids())
        assert bool((trace.stacked("widths") == 3).all())


def test_generation_with_a_cache_is_generation_without() -> None:
    for name in ("llama", "gpt2"):
        model, _, control = made(name)
        control.route, control.execution = ByRouter("score", 0.3), "grouped"
        kept = [
            model.generate(ids(2, 4), max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)
        ]
        assert torch.equal(*kept)
        assert kept[0].shape == (2, 10)
        control.route = Route()


def test_an_mlp_that_is_not_understood_is_named() -> None:
    with pytest.raises(ValueError, match=r"MLP class Phi3MLP is not supported; accepted: .* gate_proj, up_proj"):
        nest(
            build_lm(
                {"model_type": "phi3", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
            ),
            4,
        )
    with pytest.raises(ValueError, match=r"has 0 modules called mlp in 2 layers.*accepted: models such as Llama"):
        nest(build_lm({"model_type": "opt", **SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}), 4)


def test_wrong_routers_are_refused() -> None:
    _, layers, _ = made(routers=False)
    with pytest.raises(ValueError, match="head: 'both' is unknown; accepted: score, label"):
        add_routers(layers, 8, "both")
    with pytest.raises(ValueError, match="router_units: 0 is not accepted"):
        add_routers(layers, 0, "score")
    with pytest.raises(ValueError, match="experts: 30 is not accepted for 24 hidden neurons"):
        nest(build_lm(MODELS["llama"]), 30)
