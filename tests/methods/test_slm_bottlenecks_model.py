"""The levers change what a step costs and not what it computes."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.methods.slm_bottlenecks import networks
from zoo.methods.slm_bottlenecks.costs import ATTENTIONS, Shape
from zoo.methods.slm_bottlenecks.losses import cross_entropy
from zoo.methods.slm_bottlenecks.networks import CausalLM, build_adamw
from zoo.nn.lm import IGNORE

SHAPE = Shape(61, 48, 2, 96, head_dim=16)


def make(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(SHAPE, **changes).to(dtype)


def tokens(batch: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(net: CausalLM) -> tuple[Tensor, list[Tensor]]:
    ids = tokens()
    loss = net(ids[:, :-1], ids[:, 1:])
    loss.backward()
    found = [p.grad for p in net.parameters()]
    assert all(g is not None for g in found)
    return loss.detach(), [g for g in found if g is not None]


@pytest.mark.parametrize("attention", [name for name in ATTENTIONS if name not in ("eager", "efficient")])
def test_fused_attention_is_eager_attention(attention: str) -> None:
    ids = tokens()
    plain, fused = make(attention="eager"), make(attention=attention)
    torch.testing.assert_close(plain.logits(ids), fused.logits(ids), rtol=0, atol=1e-5)
    for a, b in zip(gradients(plain)[1], gradients(fused)[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_fused_attention_is_eager_attention_in_bfloat16() -> None:
    ids = tokens()
    a, b = (make(torch.bfloat16, attention=name).logits(ids).float() for name in ("eager", "flash"))
    assert (a - b).norm() / a.norm() < 2e-2


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_later_tokens_do_not_reach_earlier_ones(attention: str) -> None:
    net, ids = make(attention=attention), tokens()
    other = ids.clone()
    other[:, 12] = (other[:, 12] + 1) % 61
    a, b = net.logits(ids), net.logits(other)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12:], b[:, 12:])


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(t)}
        return out


@pytest.mark.parametrize(("attention", "made"), [("eager", True), ("flash", False), ("sdpa", False)])
def test_only_eager_attention_makes_scores(attention: str, made: bool) -> None:
    with Shapes() as shapes:
        make(attention=attention).hidden(tokens(2, 20))
    assert ((2, 3, 20, 20) in shapes.found) == made
    assert made or not any(shape[-2:] == (20, 20) for shape in shapes.found)  # no mask either


def test_a_kernel_that_cannot_do_the_work_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks._KERNELS, "flash", SDPBackend.CUDNN_ATTENTION)
    with pytest.raises(RuntimeError, match="No viable backend"):
        make(attention="flash").hidden(tokens())


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_compiled_model_computes_the_same(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHAPE", replace(SHAPE, depth=1))
    expected = gradients(make(attention=attention))
    net = make(attention=attention)
    net.compile(backend="aot_eager")
    loss, found = gradients(net)
    torch.testing.assert_close(loss, expected[0])
    for a, b in zip(found, expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changes", [{"loss_chunks": 3}, {"loss_chunks": 100}, {"checkpointing": True}])
def test_chunks_and_checkpointing_change_no_gradient(changes: dict[str, Any]) -> None:
    expected, found = gradients(make()), gradients(make(**changes))
    torch.testing.assert_close(found[0], expected[0])
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_cross_entropy_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=generator), torch.randn(11, 8, generator=generator)
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 4] = IGNORE
    terms = []
    for h, y in zip(hidden.reshape(10, 8), labels.reshape(10).tolist(), strict=True):
        if y != IGNORE:
            logits = weight @ h
            terms.append(torch.logsumexp(logits, 0) - logits[y])
    expected = torch.stack(terms).mean()
    for chunks in (0, 1, 4, 10):
        torch.testing.assert_close(cross_entropy(hidden, weight, labels, chunks), expected)
    nothing = torch.full_like(labels, IGNORE)
    assert cross_entropy(hidden, weight, nothing) == 0  # not NaN


def test_chunked_loss_never_has_all_logits() -> None:
    with Shapes() as shapes:
        cross_entropy(torch.randn(2, 20, 8), torch.randn(11, 8), torch.zeros(2, 20, dtype=torch.long), chunks=4)
    assert (10, 11) in shapes.found
    assert (40, 11) not in shapes.found


def test_loss_is_that_of_transformers() -> None:
    net, ids = make(), tokens()
    theirs = net.lm(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(net(ids[:, :-1], ids[:, 1:]), theirs)


def test_optimiser_decays_matrices_alone_and_kernels_agree() -> None:
    weights = []
    for fused in (False, True):
        net = make()
        optimizer = build_adamw(net, 1e-2, (0.9, 0.95), 0.1, fused)
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert decayed == {id(p) for p in net.parameters() if p.ndim > 1}
        for _ in range(3):
            gradients(net)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_unknown_attention() -> None:
    with pytest.raises(ValueError, match="attention: 'flash2' is not accepted; did you mean 'flash'"):
        CausalLM(SHAPE, "flash2")


def test_scores_are_softmaxed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = F.softmax

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs.get("dtype"))
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "softmax", spy)
    make(torch.bfloat16, attention="eager").hidden(tokens())
    assert seen == [torch.float32] * SHAPE.depth
