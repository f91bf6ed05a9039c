"""Adapters of contrastive perplexity: what is trained, merging, export, weights in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.contrastive_toy import (
    LLAMA,
    both_models,
    make_batch,
    make_model,
    step,
)
from zoo import run
from zoo.export import load_trained
from zoo.main import main
from zoo.methods.contrastive_perplexity.module import ContrastivePerplexity
from zoo.methods.contrastive_perplexity.networks import adapters_off, merge_adapters
from zoo.nn.lm import build_lm


@both_models
def test_adapters_alone_are_trained_and_merge_into_the_weights(lm: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(lm=lm, objective="paper_log", lora_rank=3, lora_alpha=6.0)
    batch = make_batch()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name} != set()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # B is zero, so A gets its gradient in the second step
        optimizer.zero_grad()
        step(model, batch)["total"].backward()
        assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
        optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == trained
    ids = batch["input_ids"][0]
    with torch.no_grad():
        expected = model.lm.eval()(input_ids=ids).logits
        with adapters_off(model.lm):
            assert not torch.allclose(model.lm(input_ids=ids).logits, expected, atol=1e-3)
        merged = model.merged()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        assert any("lora" in name for name, _ in model.lm.named_parameters()), "the module itself stays as it was"
        merged.save_pretrained(tmp_path)
        again = build_lm(str(tmp_path))
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_adapters_sit_where_they_are_asked_for() -> None:
    def places(**changes: Any) -> set[str]:
        model = make_model(lora_rank=2, **changes)
        return {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}

    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert places() == linear
    assert places(lora_targets=["q_proj", "v_proj"]) == {"q_proj", "v_proj"}
    assert places(lora_targets=[*sorted(linear), "lm_head"]) == {*linear, "lm_head"}


def test_an_adapted_head_is_part_of_chunked_logits() -> None:
    batch = make_batch()
    losses = []
    for chunk in (0, 5):
        model = make_model(objective="paper_log", lora_rank=2, lora_targets=["lm_head"], head_chunk=chunk)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.1)
        losses.append(step(model, batch)["total"])
    torch.testing.assert_close(*losses)


def test_merging_a_model_without_adapters_changes_nothing() -> None:
    lm = make_model().lm
    state = {name: value.clone() for name, value in lm.state_dict().items()}
    merged = merge_adapters(lm).state_dict()
    assert all(torch.equal(merged[name], value) for name, value in state.items())


def test_four_bits_need_loaded_weights_adapters_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for changes in ({"lora_rank": 4}, {"lm": "some/model"}):
        with pytest.raises(ValueError, match="four_bit: true needs a pre-trained model"):
            make_model(four_bit=True, **changes)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_model(lm="some/model", four_bit=True, lora_rank=4)


def test_the_export_of_a_run_with_adapters_is_one_model_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"trainer.max_steps": 3, "checkpoint.every_n_steps": 3, "trainer.limit_val_batches": 0}
    changes |= {"model.init_args.lora_rank": 2, "model.init_args.objective": "dpo", "model.init_args.lr": 0.1}
    run("fit", config="contrastive_perplexity/smoke", overrides=changes, run_dir=tmp_path / "run", wandb="disabled")
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out")]) == 0
    assert f"transformers.AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')" in capsys.readouterr().out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step=*.ckpt")
    tuned = load_trained(torch.load(checkpoint, weights_only=True))
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tuned.lm(input_ids=ids).logits  # type: ignore[operator, union-attr]
        got = build_lm(str(tmp_path / "out"))(input_ids=ids).logits
        with adapters_off(tuned.lm):
            before = tuned.lm(input_ids=ids).logits  # type: ignore[operator, union-attr]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)


def test_adapters_of_a_bfloat16_model_are_trained_in_float32(tmp_path: Path) -> None:
    make_model().lm.bfloat16().save_pretrained(tmp_path)
    model = make_model(lm=str(tmp_path), vocab_size=None, lora_rank=2, objective="sft_pos")
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    step(model, make_batch())["total"].backward()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- 4 bits, where bitsandbytes is installed


@pytest.fixture
def quantised(tmp_path: Path) -> ContrastivePerplexity:
    """A model in 4 bits whose adapters do something."""
    pytest.importorskip("bitsandbytes")
    wide = LLAMA | {"hidden_size": 64, "intermediate_size": 128}  # blocks of 64 values share a scale
    make_model(lm=wide).lm.save_pretrained(tmp_path / "base")
    model = make_model(lm=str(tmp_path / "base"), lora_rank=4, four_bit=True, objective="paper_log", head_chunk=5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


def test_four_bits_train_adapters_on_frozen_weights(quantised: ContrastivePerplexity) -> None:
    layer = quantised.lm.model.layers[0].self_attn.q_proj
    assert layer.get_base_layer().weight.dtype == torch.uint8
    assert {p.dtype for p in quantised.parameters() if p.requires_grad} == {torch.float32}
    logged = step(quantised, make_batch())
    logged["total"].backward()
    assert logged["total"].isfinite()
    assert all((p.grad is not None) == (".lora_" in name) for name, p in quantised.named_parameters())


def test_a_checkpoint_of_four_bits_holds_the_adapters(quantised: ContrastivePerplexity, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in quantised.state_dict().items()}
    assert state
    assert all(".lora_" in name for name in state)
    again = ContrastivePerplexity(**quantised.hparams)
    again.load_state_dict(state)
    ids = make_batch()["input_ids"][0]
    with torch.no_grad():
        expected = quantised.lm.eval()(input_ids=ids).logits
        assert torch.equal(again.lm.eval()(input_ids=ids).logits, expected)
    state.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(state)


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
def test_four_bits_are_exported_without_losing_the_adapter(
    targets: list[str] | None, quantised: ContrastivePerplexity, tmp_path: Path
) -> None:
    if targets:
        quantised = ContrastivePerplexity(**{**quantised.hparams, "lora_targets": targets})
    quantised.export(str(tmp_path / "out"))
    assert_same_logits(quantised, tmp_path / "out")


def test_four_bits_are_exported_after_an_evaluation(quantised: ContrastivePerplexity, tmp_path: Path) -> None:
    with torch.no_grad():
        quantised.lm.eval()(input_ids=make_batch()["input_ids"][0])
    quantised.export(str(tmp_path / "out"))
    assert_same_logits(quantised, tmp_path / "out")


def test_evaluations_and_checkpoints_leave_weights_in_four_bits_as_they_are(quantised: ContrastivePerplexity) -> None:
    batch = make_batch()
    adapters = [p for p in quantised.parameters() if p.requires_grad]

    def loss_and_gradients() -> list[torch.Tensor]:
        loss = step(quantised, batch)["total"]
        return [loss, *torch.autograd.grad(loss, adapters)]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            values = quantised.lm.eval()(input_ids=batch["input_ids"][0]).logits
        quantised.lm.train()
        return values

    trained, evaluated = loss_and_gradients(), logits()
    torch.testing.assert_close(loss_and_gradients(), trained)
    quantised.state_dict()
    torch.testing.assert_close(loss_and_gradients(), trained)
    torch.testing.assert_close(logits(), evaluated)


def assert_same_logits(quantised: ContrastivePerplexity, folder: Path) -> None:
    ids = make_batch()["input_ids"][0]
    with torch.no_grad():
        expected = quantised.lm.eval()(input_ids=ids).logits.float()
        merged = build_lm(str(folder))
        got = merged(input_ids=ids).logits.float()
    assert (got - expected).abs().max() < 0.05 * expected.abs().max(), "bfloat16 arithmetic"
    assert not hasattr(merged.config, "quantization_config")
