"""The cost model: the paper's parameter counts, FLOPs as PyTorch counts them, throughput and MFU as Lightning does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.throughput import Throughput
from torch.utils.flop_counter import FlopCounterMode

from zoo.methods.slm_bottlenecks import costs
from zoo.methods.slm_bottlenecks.costs import GIB, SIZES, Shape
from zoo.methods.slm_bottlenecks.losses import LossLaw, dollars_to_target, fit_loss_law, loss_per_dollar
from zoo.methods.slm_bottlenecks.networks import CausalLM

TABLE_3 = {"100m": 130_569_920, "500m": 526_550_016, "1b": 970_458_240, "2b": 1_969_027_008}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_paper(size: str) -> None:
    with torch.device("meta"):
        net = CausalLM(SIZES[size])
    assert SIZES[size].parameters == TABLE_3[size]
    assert sum(p.numel() for p in net.parameters()) == TABLE_3[size]


def test_the_width_of_the_papers_table_gives_another_count() -> None:
    by_table = Shape(32000, 864, 9, 2332, head_dim=32)
    assert by_table.parameters == 136_587_168
    assert Shape(32000, 1536, 15).intermediate == SIZES["500m"].intermediate == 4147


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_are_what_pytorch_counts(attention: str) -> None:
    shape, batch, seq_len = Shape(96, 64, 3, 100, head_dim=16), 2, 24
    net, ids = CausalLM(shape, attention), torch.zeros(batch, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(ids, ids).backward()
    angles = 2 * (shape.head_dim // 2) * seq_len  # the rotary angles are a matrix product too
    expected = batch * seq_len * costs.flops_per_token(shape, seq_len, "matmul")
    if attention == "sdpa":  # the counter does not know the processor's fused kernel
        expected -= batch * seq_len * 12 * shape.depth * shape.width * seq_len
    assert counter.get_total_flops() - expected in (0, angles)
    # norms are what separates the rules
    torchtitan = costs.flops_per_token(shape, seq_len)
    assert torchtitan - costs.flops_per_token(shape, seq_len, "matmul") == 6 * (2 * 3 + 1) * 64
    assert costs.flops_per_token(shape, seq_len, "nanogpt") - torchtitan == 6 * 96 * 64


def test_flops_by_hand() -> None:
    # 6 (N - V D) + 6 L H (d_qk + d_v) T, as torchtitan's get_dense_model_nparams_and_flops has it
    for size, giga in {"100m": 0.7157, "500m": 3.147, "1b": 5.902, "2b": 12.07}.items():
        shape = SIZES[size]
        counted = 6 * (TABLE_3[size] - shape.vocab_size * shape.width)
        counted += 6 * shape.depth * shape.heads * (64 + 64) * 1024
        assert costs.flops_per_token(shape, 1024) == counted
        assert counted / 1e9 == pytest.approx(giga, rel=5e-4)
    with pytest.raises(ValueError, match="rule: 'palm' is not accepted; accepted: matmul"):
        costs.flops_per_token(SIZES["1b"], 1024, "palm")


def test_throughput_and_mfu_are_lightnings() -> None:
    batch, seq_len, window, step = 4, 1024, 5, 0.05
    flops = costs.flops_per_token(SIZES["100m"], seq_len)
    lightning = Throughput(available_flops=989e12, world_size=4, window_size=window)
    for i in range(1, window + 4):
        tokens = i * batch * seq_len
        lightning.update(time=i * step, batches=i, samples=i * batch, lengths=tokens, flops=batch * seq_len * flops)
    theirs = lightning.compute()
    # a window of W entries has W - 1 intervals
    ours = costs.tokens_per_second((window - 1) * batch * seq_len, (window - 1) * step)
    assert theirs["device/items_per_sec"] == pytest.approx(ours)
    assert theirs["items_per_sec"] == pytest.approx(4 * ours)
    assert theirs["device/mfu"] == pytest.approx(costs.mfu(ours, flops, "H100-80GB"))


def test_mfu_inverts_to_the_throughput() -> None:
    flops = costs.flops_per_token(SIZES["1b"], 1024)
    share = costs.mfu(18_000, flops, "A100-80GB")
    assert share is not None
    assert share == pytest.approx(0.34, abs=0.005)  # what the paper's 12.33k tokens a dollar amount to
    assert share * 312e12 / flops == pytest.approx(18_000)


def test_no_mfu_rather_than_a_wrong_one() -> None:
    assert costs.mfu(1e5, 1e9, "NVIDIA GeForce RTX 5090") is None
    assert costs.mfu(1e5, 1e9, "cpu") is None
    assert costs.mfu(1e5, 1e9, "H100-80GB", "32-true") is None


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 40e9, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 80e9, "A100-80GB"),
        ("NVIDIA A100 PCIe", 79 * GIB, "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", 80e9, "H100-80GB"),
        ("NVIDIA H100 PCIe", 80e9, "H100-PCIe"),
        ("NVIDIA H100 NVL", 94e9, "H100-NVL"),
        ("NVIDIA H200", 141e9, "H200"),
        ("NVIDIA L4", 24e9, "NVIDIA L4"),
    ],
)
def test_names_of_devices(name: str, memory: float, expected: str) -> None:
    assert costs.device_of(name, memory) == expected


@given(st.floats(1, 1e7), st.integers(1, 64), st.floats(0.01, 100))
def test_tokens_per_dollar(speed: float, n: int, price: float) -> None:
    one = costs.tokens_per_dollar(speed, 1, price)
    assert costs.tokens_per_dollar(n * speed, n, price) == pytest.approx(one)  # perfect scaling costs nothing
    assert costs.tokens_per_dollar(speed, 1, 2 * price) == pytest.approx(one / 2)
    assert costs.tokens_per_dollar(speed, 1, price, "usd") == pytest.approx(3600 * one)
    assert costs.tokens_per_dollar(0.0, n, price) == 0.0


def test_the_papers_dollar() -> None:
    # 63.65k tokens a dollar on one A100-80GB are 92.9k tokens a second
    assert costs.tokens_per_dollar(92_929, 1, costs.PAPER_RATIOS["A100-80GB"]) == pytest.approx(63_650, rel=1e-4)
    with pytest.raises(ValueError, match="price: 0 is not accepted; accepted: a number above 0"):
        costs.tokens_per_dollar(1.0, 1, 0)
    with pytest.raises(ValueError, match="unit: 'eur' is not accepted"):
        costs.tokens_per_dollar(1.0, 1, 1, "eur")
    with pytest.raises(ValueError, match="there is none for 'H200'; accepted: A100-40GB"):
        costs.price_of("H200", costs.PAPER_RATIOS)


def test_communication() -> None:
    assert costs.communication_bytes(100.0, "single", 1) == 0
    for comm, passes in {"ddp": 2, "fsdp_grad_op": 2, "fsdp_full": 3}.items():
        assert costs.communication_bytes(100.0, comm, 4) == pytest.approx(passes * 75)
        assert costs.communication_bytes(100.0, comm, 1) == 0
    with pytest.raises(ValueError, match="comm: 'zero' is not accepted"):
        costs.communication_bytes(1.0, "zero", 2)


def test_states() -> None:
    two = SIZES["2b"].parameters
    assert costs.state_bytes(two, "bf16-mixed") == 16 * two == pytest.approx(31.5e9, rel=2e-3)
    assert costs.state_bytes(two) == 8 * two
    assert costs.state_bytes(two, comm="ddp", n=8) == costs.state_bytes(two)
    assert costs.state_bytes(two, comm="fsdp_full", n=8) == two
    assert costs.state_bytes(two, comm="fsdp_grad_op", n=8) == pytest.approx(2 * two + 6 * two / 8)


def test_memory_has_the_right_order() -> None:
    shape = SIZES["1b"]
    flash, eager = (costs.memory_bytes(shape, 16, 1024, attention) for attention in ("flash", "eager"))
    scores = 16 * shape.depth * shape.heads * 1024**2
    assert eager - flash == 6 * scores  # probabilities in float32 and once more in bfloat16
    assert costs.memory_bytes(shape, 16, 1024, checkpointing=True) < flash
    whole, chunked = costs.logit_bytes(shape, 16, 1024), costs.logit_bytes(shape, 16, 1024, chunks=8)
    assert whole == 8 * chunked == 16 * 1024 * 32000 * 10
    assert flash - costs.memory_bytes(shape, 16, 1024, loss_chunks=8) == whole - chunked


def test_attention_weighs_more_in_small_models() -> None:
    shares = [costs.attention_share(Shape(2048, width, 2), 1024) for width in (64, 128, 256, 512)]
    assert [round(share, 2) for share in shares] == [0.73, 0.57, 0.40, 0.25]


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="width: 864 is no multiple of head_dim 64"):
        Shape(32000, 864, 9)
    with pytest.raises(ValueError, match="depth: 0 is not accepted; accepted: 1 or more"):
        Shape(32000, 64, 0)


LAW = LossLaw(floor=1.7, scale=1e9, exponent=0.2)


def test_law_is_found_again() -> None:
    tokens = [2.0**k * 1e5 for k in range(10)]
    found = fit_loss_law(tokens, [LAW.loss(n) for n in tokens])
    for n in (1e5, 1e7, 1e9):
        assert found.loss(n) == pytest.approx(LAW.loss(n), rel=1e-3)
    with pytest.raises(ValueError, match="3 points are too few"):
        fit_loss_law(tokens[:3], [3.0, 2.0, 1.0])


def test_loss_per_dollar_is_a_product_of_factors() -> None:
    n, step = 1e8, 1e3
    slope = (LAW.loss(n) - LAW.loss(n + step)) / step
    assert LAW.loss_per_token(n) == pytest.approx(slope, rel=1e-4)
    # nats/token x tokens/second / (dollars/second) = nats/dollar
    speed, dollars_per_second = 1e5, 2.5 / 3600
    per_dollar = costs.tokens_per_dollar(speed, 1, 2.5, "usd")
    assert loss_per_dollar(LAW, n, per_dollar) == pytest.approx(slope * speed / dollars_per_second, rel=1e-4)


def test_dollars_to_a_target() -> None:
    tokens = LAW.tokens_to(3.0)
    assert LAW.loss(tokens) == pytest.approx(3.0)
    assert dollars_to_target(LAW, 3.0, 1e6) == pytest.approx(tokens / 1e6)
    assert dollars_to_target(LAW, 3.0, 0.0) == float("inf")
    with pytest.raises(ValueError, match="a loss of 1.5 is not reached"):
        replace(LAW, floor=1.6).tokens_to(1.5)
