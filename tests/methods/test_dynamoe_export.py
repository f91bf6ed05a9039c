"""Model directories: dense for everybody, dynamic with our loader; `zoo moefy`; thresholds for a wanted activity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import zoo
from datamodules.text import BPETokenizer
from zoo.main import main
from zoo.methods.dynamoe import export
from zoo.methods.dynamoe.module import DynaMoE
from zoo.methods.dynamoe.networks import add_routers, nest, router_parameters
from zoo.methods.dynamoe.routes import ByRouter
from zoo.nn.lm import build_lm

SETTINGS = {"head": "score", "router_units": 8, "similarity": "inner", "theta": 0.3, "tau": None}
IDS = torch.arange(12).reshape(2, 6) + 3
PROSE = "The quick brown fox number {} jumps over the lazy dog and goes home, as foxes of this kind will do."
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "vocab_size": 257},
    "mistral": {"model_type": "mistral", **SMALL, "intermediate_size": 24, "num_key_value_heads": 1, "vocab_size": 257},
    "qwen2": {"model_type": "qwen2", **SMALL, "intermediate_size": 24, "num_key_value_heads": 2, "vocab_size": 257},
    "qwen3": {
        "model_type": "qwen3",
        **SMALL,
        "intermediate_size": 24,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 257,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 257},
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def made(name: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = build_lm(MODELS[name])
    layers, control = nest(model, 4)
    add_routers(layers, 8, "score")
    for parameter in router_parameters(layers):
        nn.init.normal_(parameter, 0.3, 0.5)
    control.route, control.execution = ByRouter("score", 0.3), "grouped"
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_directory_is_the_dense_model_for_everybody_and_the_dynamic_one_for_us(name: str, tmp_path: Path) -> None:
    model = made(name)
    export.save(model, tmp_path / "m", SETTINGS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=False)
    loaded = export.load(tmp_path / "m")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
        full = plain(input_ids=IDS).logits
        assert not torch.allclose(expected, full)
        export.set_threshold(loaded, "score", 1.0)
        assert torch.equal(loaded(input_ids=IDS).logits, full)
    again = export.load(tmp_path / "m", theta=0.3)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(IDS, **options), model.generate(IDS, **options))
    assert plain.generate(IDS, **options).shape == (2, 11)


def test_routers_of_another_model_are_refused(tmp_path: Path) -> None:
    export.save(made(seed=0), tmp_path / "a", SETTINGS)
    export.save(made(seed=1), tmp_path / "b", SETTINGS)
    for name in (export.SETTINGS, export.ROUTERS):
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(ValueError, match="were trained on another model than the weights beside them"):
        export.load(tmp_path / "b")


def test_a_plain_model_an_unknown_format_and_a_wrong_threshold_are_named(tmp_path: Path) -> None:
    build_lm(MODELS["llama"]).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no dynamoe.json in .*; accepted: a folder that `zoo moefy` wrote"):
        export.load(tmp_path / "plain")
    export.save(made(), tmp_path / "m", SETTINGS)
    with pytest.raises(ValueError, match="theta: 1.2 is not accepted; accepted: 0 to 1"):
        export.load(tmp_path / "m", theta=1.2)
    with pytest.raises(ValueError, match="execution: 'sparse' is unknown"):
        export.load(tmp_path / "m", execution="sparse")
    settings = json.loads((tmp_path / "m" / export.SETTINGS).read_text())
    (tmp_path / "m" / export.SETTINGS).write_text(json.dumps({**settings, "format": 9}))
    with pytest.raises(ValueError, match="format 9 is unknown; accepted: 1"):
        export.load(tmp_path / "m")
    with pytest.raises(ValueError, match="has no nested MLPs"):
        export.set_threshold(build_lm(MODELS["llama"]), "score", 0.5)


def test_a_threshold_is_found_for_an_activity() -> None:
    model = made()
    batches = [{"input_ids": torch.randint(257, (8, 20), generator=torch.Generator().manual_seed(0))}]

    def measure(theta: float) -> float:
        return export.mean_activity(model, batches, ByRouter("score", theta))

    lowest = measure(0.0)
    for target in (lowest + 0.1, 0.8, 1.0):
        theta = export.calibrate(measure, target)
        assert measure(theta) >= target
        assert theta < 1e-3 or measure(theta - 1e-3) < target
    assert export.calibrate(measure, lowest / 2) == 0.0
    with pytest.raises(ValueError, match="activity: 0 is not accepted; accepted: above 0, at most 1"):
        export.calibrate(measure, 0)


def test_padding_is_no_activity() -> None:
    model = made()
    ids = torch.randint(257, (4, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 14).long()
    mask[:, 10:] = 0
    padded = {"input_ids": torch.cat([ids, torch.zeros(4, 4).long()], 1), "attention_mask": mask}
    found = [export.mean_activity(model, [b], ByRouter("score", 0.3)) for b in (padded, {"input_ids": ids})]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text("\n\n".join(PROSE.format(i * 100 + j) for j in range(3)))
    return tmp_path / "texts"


@pytest.mark.parametrize("name", MODELS)
def test_moefy_a_dense_model(name: str, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    dense = build_lm(MODELS[name])
    dense.save_pretrained(tmp_path / "dense")
    argv = ["moefy", str(tmp_path / "dense"), str(tmp_path / "out"), "--corpus", str(texts), "--tokenizer", "bytes"]
    argv += ["--length", "32", "--router-steps", "30", "--activity", "0.6", "--router-units", "8"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "written" in printed
    assert "no tokenizer is written: bytes are no tokenizer of transformers" in printed
    loaded = export.load(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():  # sorted neurons, the same function
        assert torch.allclose(plain(input_ids=IDS).logits, dense(input_ids=IDS).logits, atol=1e-5)
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 10)
    theta = json.loads((tmp_path / "out" / export.SETTINGS).read_text())["theta"]
    assert 0 < theta < 1
    assert main(argv) == 2
    assert "is there already" in capsys.readouterr().err


def test_the_models_own_tokenizer_goes_with_it(tmp_path: Path, texts: Path) -> None:
    inner = BPETokenizer.train([PROSE] * 3, 257).inner
    build_lm(MODELS["llama"]).save_pretrained(tmp_path / "dense")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>").save_pretrained(tmp_path / "dense")
    argv = ["moefy", str(tmp_path / "dense"), str(tmp_path / "out"), "--corpus", str(texts), "--length", "16"]
    assert main([*argv, "--router-steps", "2", "--router-units", "4"]) == 0
    given = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert given(PROSE)["input_ids"] == inner.encode(PROSE).ids
    assert given.eos_token == "<|endoftext|>"


def test_the_tokenizer_of_a_run_goes_with_its_model(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"corpus": str(texts), "tokenizer": "bpe", "vocab_size": 280, "val_fraction": 0.2, "test_fraction": 0.2}
    smoke = {f"data.init_args.{key}": value for key, value in data.items()}
    short: dict[str, Any] = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "data.class_path": "token_classes"}
    run = tmp_path / "run"
    zoo.run("fit", config="dynamoe/smoke", overrides={**short, **smoke}, run_dir=run, wandb="disabled")
    assert main(["moefy", str(run), str(tmp_path / "out"), "--activity", "0.7"]) == 0
    assert "no tokenizer" not in capsys.readouterr().out
    given = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert len(given) == 280
    assert given.decode(given(PROSE)["input_ids"]) == PROSE
    model = export.load(tmp_path / "out")
    ids = given(PROSE, return_tensors="pt")["input_ids"][:, :8]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
    # the tokenizer was trained on the corpus: another corpus, another tokenizer
    (texts / "0.txt").write_text("\n\n".join(PROSE.format(i).replace("fox", "otter") for i in range(30)))
    assert main(["moefy", str(run), str(tmp_path / "later"), "--theta", "0.7"]) == 0
    assert "no tokenizer is written: the corpus of the run has changed" in capsys.readouterr().out
    named = ["--tokenizer", str(tmp_path / "out")]
    assert main(["moefy", str(run), str(tmp_path / "named"), "--theta", "0.7", *named]) == 0
    assert (tmp_path / "named" / "tokenizer.json").is_file()


def test_moefy_a_checkpoint_of_a_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = DynaMoE({**MODELS["llama"]}, router_units=8)
    checkpoint = tmp_path / "run.ckpt"
    torch.save({"state_dict": method.state_dict(), "hyper_parameters": dict(method.hparams)}, checkpoint)
    assert main(["moefy", str(checkpoint), str(tmp_path / "out"), "--theta", "0.5"]) == 0
    loaded = export.load(tmp_path / "out")
    for name, value in method.lm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert json.loads((tmp_path / "out" / export.SETTINGS).read_text())["theta"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["./nowhere", "OUT", "--tokenizer", "bytes"], "no model at"),
        (["CKPT", "OUT", "--theta", "2"], "--theta 2.0 is not accepted"),
        (["CKPT", "OUT"], "has no routers"),
        (["DENSE", "OUT", "--experts", "99", "--tokenizer", "bytes"], "experts: 99 is not accepted for 24 hidden"),
    ],
)
def test_moefy_names_mistakes(
    options: list[str], message: str, tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    build_lm(MODELS["llama"]).save_pretrained(tmp_path / "dense")
    torch.save({"state_dict": {}, "hyper_parameters": {}}, tmp_path / "run.ckpt")
    places = {"OUT": tmp_path / "out", "CKPT": tmp_path / "run.ckpt", "DENSE": tmp_path / "dense"}
    argv = ["moefy", *(str(places.get(word, word)) for word in options), "--corpus", str(texts)]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_moefy_says_before_it_asks_the_hub(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network that question takes a minute: who misspelt a run should know what is waited for."""

    def ask(*_: object, **__: object) -> None:
        assert "no file, run or model at runs/nowhere" in capsys.readouterr().out
        raise OSError("offline")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", ask)
    argv = ["moefy", "runs/nowhere", str(tmp_path / "out"), "--corpus", str(texts), "--tokenizer", "bytes"]
    assert main(argv) == 2
    assert "the model 'runs/nowhere' cannot be loaded: offline" in capsys.readouterr().err
