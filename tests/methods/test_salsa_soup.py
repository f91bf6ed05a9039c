"""Soups: algebra, refusals, files, adapters, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from zoo.commands.soup import main, same_kind
from zoo.errors import UsageError
from zoo.methods.salsa.networks import add_adapters, lm_state, load_lm, merge_adapters
from zoo.methods.salsa.soup import (
    adapter_soup,
    average,
    check_members,
    distinct,
    file_member,
    fingerprint,
    memory_member,
    soup,
    soup_weights,
    write_safetensors,
    write_soup,
)
from zoo.nn.lm import build_lm

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def states(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a": torch.randn(5, 4, generator=generator),
            "b": torch.randn(3, generator=generator),
            "n": torch.tensor([7]),
            "h": torch.randn(4, 2, generator=generator).bfloat16(),
        }
        for _ in range(count)
    ]


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@given(st.integers(0, 100), st.floats(-0.5, 1.5))
@settings(max_examples=25, deadline=None)
def test_algebra(seed: int, alpha: float) -> None:
    one, two = states(2, seed)
    assert equal(soup([one, two], soup_weights(2, 0.0)), one)
    assert equal(soup([one, two], soup_weights(2, 1.0)), two)
    assert equal(soup([one, one], soup_weights(2, alpha)), one)
    assert equal(soup([one, two], soup_weights(2, 0.5)), soup([two, one], soup_weights(2, 0.5)))
    mixed = soup([one, two], soup_weights(2, alpha))
    torch.testing.assert_close(mixed["a"], (1 - alpha) * one["a"] + alpha * two["a"])
    assert mixed["h"].dtype == torch.bfloat16
    assert mixed["n"].tolist() == [7]


def test_the_order_of_members_does_not_matter() -> None:
    parts = states(4)
    torch.testing.assert_close(soup(parts, soup_weights(4)), soup(parts[::-1], soup_weights(4)), rtol=0, atol=1e-7)


def test_half_precision_is_averaged_in_more() -> None:
    parts = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)] * 50
    assert float(average(parts, [0.01] * 100)) == pytest.approx(1.0039, abs=0.004)


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        soup_weights(2, weights=[0.5, 0.6])
    with pytest.raises(ValueError, match="two members"):
        soup_weights(3, alpha=0.5)
    assert soup_weights(3, weights=[0.2, 0.3, 0.5]) == [0.2, 0.3, 0.5]


def test_other_shapes_and_other_bases_are_refused_by_name() -> None:
    one, two = states(2)
    with pytest.raises(ValueError, match=r"a is \[5, 4\] and \[4, 5\]"):
        soup([one, {**two, "a": two["a"].T}], [0.5, 0.5])
    with pytest.raises(ValueError, match="only one has c"):
        soup([one, {**two, "c": two["a"]}], [0.5, 0.5])
    with pytest.raises(ValueError, match="x and y were fine-tuned from different models"):
        check_members([{}, {}], ["abc", "def"], ["x", "y"])
    check_members([{}, {}, {}], ["abc", "", "abc"], ["x", "y", "z"])


def test_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    tied = build_lm({**LLAMA, "tie_word_embeddings": True}, 11)
    assert "lm_head.weight" in tied.state_dict()
    assert "lm_head.weight" not in lm_state(tied)
    assert len(distinct(tied.state_dict())) == len(tied.state_dict()) - 1
    assert fingerprint(lm_state(tied)) == fingerprint(lm_state(tied))


def test_files_are_streamed_to_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.methods.salsa.soup.CHUNK", 6)  # several pieces of each tensor
    parts = states(3)
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors", {"base": "abc"})
    members = [file_member(tmp_path / f"{number}.safetensors") for number in range(3)]
    write_soup(members, [0.2, 0.3, 0.5], tmp_path / "soup.safetensors")
    assert equal(load_file(tmp_path / "soup.safetensors"), soup(parts, [0.2, 0.3, 0.5]))
    assert file_member(tmp_path / "soup.safetensors").base == "abc"
    write_soup([memory_member("m", parts[0]), members[1]], [0.0, 1.0], tmp_path / "second.safetensors")
    assert equal(load_file(tmp_path / "second.safetensors"), parts[1])


def test_a_short_write_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="instead of 16"):
        write_safetensors(tmp_path / "x.safetensors", {"a": [4]}, {"a": torch.float32}, [torch.zeros(3)])
    assert not list(tmp_path.iterdir())


def adapted(seed: int, rank: int) -> Any:
    torch.manual_seed(0)
    model = build_lm(LLAMA, 11)
    torch.manual_seed(seed)
    add_adapters(model, rank, 8.0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model


def test_the_soup_of_adapters_is_the_soup_of_merged_weights() -> None:
    models = [adapted(1, 2), adapted(2, 3)]
    adapters = []
    for model, rank in zip(models, (2, 3), strict=True):
        state = {n.replace(".default.", "."): v for n, v in model.state_dict().items() if ".lora_" in n}
        adapters.append((state, {"r": rank, "lora_alpha": 8.0, "base_model_name_or_path": "x"}))
    tensors, config = adapter_soup(adapters, [0.4, 0.6])
    assert config["r"] == 5
    both = add_adapters(build_lm(LLAMA, 11), 5, float(config["lora_alpha"]))
    plain = {n: v for n, v in models[0].state_dict().items() if ".lora_" not in n}
    lora = {
        n.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): v for n, v in tensors.items()
    }
    both.load_state_dict({**plain, **lora})
    merged = soup([lm_state(merge_adapters(model)) for model in models], [0.4, 0.6])
    torch.testing.assert_close(lm_state(merge_adapters(both)), merged)
    with pytest.raises(ValueError, match="different models"):
        adapter_soup([adapters[0], (adapters[1][0], {**adapters[1][1], "base_model_name_or_path": "y"})], [0.5, 0.5])
    with pytest.raises(ValueError, match="cannot be averaged"):
        adapter_soup([({"a.magnitude": torch.zeros(1)}, {})], [1.0])


def saved(folder: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    model = build_lm(LLAMA, 11)
    model.save_pretrained(folder)
    return model


def test_the_command_averages_model_folders(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)
    out = tmp_path / "soup"
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--alpha", "0.25", "--out", str(out)]) == 0
    model, _ = load_lm(str(out))
    torch.testing.assert_close(lm_state(model), soup([lm_state(one), lm_state(two)], [0.75, 0.25]))
    assert json.loads((out / "soup.json").read_text())["weights"] == [0.75, 0.25]
    with pytest.raises(UsageError, match="is there already"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    with pytest.raises(UsageError, match="sum to 1"):
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--weights", "1", "1", "--out", str(tmp_path / "c")])
    with pytest.raises(UsageError, match="no weights at"):
        main([str(tmp_path / "a"), str(tmp_path / "none"), "--out", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()


def test_the_command_averages_adapter_folders(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        model = adapted(seed, 2)
        state = {
            f"base_model.model.{n}".replace(".default.", "."): v for n, v in model.state_dict().items() if ".lora_" in n
        }
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "adapter_model.safetensors")
        config = {"r": 2, "lora_alpha": 8, "base_model_name_or_path": "x", "peft_type": "LORA"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "soup")]) == 0
    assert json.loads((tmp_path / "soup" / "adapter_config.json").read_text())["r"] == 4


def test_a_reward_model_is_no_member_beside_language_models(tmp_path: Path) -> None:
    paths = []
    for number, method in enumerate(("sft", "reward_model", "sft")):
        paths.append(tmp_path / f"{number}.ckpt")
        torch.save({"hyper_parameters": {}, "state_dict": {}, "zoo": {"method": method}}, paths[-1])
    with pytest.raises(ValueError, match=r"1\.ckpt is a reward model and .*0\.ckpt is not \(sft\)"):
        same_kind(paths)
    same_kind([paths[0], paths[2]])
    same_kind([paths[1]])
    with pytest.raises(UsageError, match="is a reward model"):
        main([*map(str, paths[:2]), "--out", str(tmp_path / "soup")])
    assert not (tmp_path / "soup").exists()
