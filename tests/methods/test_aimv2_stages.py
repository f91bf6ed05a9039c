"""The stages of AIMv2 one after the other on image files: pre-training, high resolution, LiT with zero-shot, probe."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zoo
import zoo.main
from zoo.config import load_layers
from zoo.errors import UsageError
from zoo.methods.aimv2.encoder import SIZES, build_trunk
from zoo.methods.aimv2.export import export
from zoo.methods.aimv2.module import AIMv2
from zoo.methods.aimv2.probe import AIMv2Probe
from zoo.methods.aimv2.towers import TextTower, Towers

COLOURS = {"red": (230, 30, 30), "blue": (20, 40, 220)}
CONFIGS = Path(__file__).parents[2] / "configs" / "aimv2"
TRUNK = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "multiple_of": 16}
SMALL = {"width": 16, "depth": 1, "heads": 2, "multiple_of": 16}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red and blue images: with captions, and in folders of their classes; and a tokenizer."""
    root = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for part in ("pairs", "train/red", "train/blue", "val/red", "val/blue"):
        (root / part).mkdir(parents=True)
        for i in range(16):
            name = Path(part).name if part != "pairs" else list(COLOURS)[i % 2]
            noise = torch.randint(-20, 20, (12, 12, 3), generator=generator)
            pixels = (torch.tensor(COLOURS[name]) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / part / f"{i}.png")
            if part == "pairs":
                rows.append([f"{i}.png", f"a {name} square"])
    with (root / "pairs" / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *rows])
    words = ["<pad>", "<eos>", "<unk>", "a", "square", *COLOURS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(root / "tokenizer")
    return root


def options(files: Path, **model: Any) -> dict[str, Any]:
    """What lays a published config over tiny files and networks."""
    data = {"source": str(files / "pairs"), "tokenizer": str(files / "tokenizer"), "val_images": 4, "context_length": 6}
    data |= {"batch_size": 6, "eval_batch_size": 8, "num_workers": 0, "image_size": 12, "scale": [0.8, 1.0]}
    model = {"trunk": TRUNK, "lr": 1e-2, "warmup_steps": 2} | model
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_steps": 4, "strategy": "auto"}
    trainer |= {"val_check_interval": 4, "log_every_n_steps": 1}
    parts = {"data.init_args.": data, "model.init_args.": model, "trainer.": trainer}
    return {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}


def checkpoint(result: Any) -> str:
    return str(max((result.run_dir / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime))


def test_every_stage_goes_on_from_the_one_before(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def fit(config: str, changes: dict[str, Any]) -> Any:
        return zoo.run("fit", config=config, overrides=changes, wandb="disabled")

    first = fit("aimv2/pretrain_large", options(files, decoder=SMALL))
    assert first.model.hparams["vocab_size"] == 7
    assert math.isfinite(float(first.metrics["val/loss_text"]))

    assert export(checkpoint(first), tmp_path / "exported") == "Aimv2VisionModel"
    source = {"init_from": checkpoint(first), "decoder": SMALL}
    high = fit("aimv2/highres", options(files, **source) | {"data.init_args.image_size": 20})
    assert high.model.trunk.positions.shape == (25, 16)
    assert high.model.hparams["weight_decay"] == 0

    lit = fit(
        "aimv2/lit",
        options(files, init_from=checkpoint(first), text_tower={**SMALL, "embed_dim": 8})
        | {"data.init_args.class_root": str(files / "val"), "data.init_args.prompt": "a {} square"}
        | {"trainer.max_steps": 40, "trainer.val_check_interval": 40, "trainer.check_val_every_n_epoch": None},
    )
    kept = first.model.trunk.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in lit.model.trunk.state_dict().items())
    tested = zoo.run("test", resume=lit.run_dir, wandb="disabled")
    assert tested.metrics["test/acc_zero_shot"] > 0.9

    probe = fit(
        "aimv2_probe/probe_imagenet",
        {key: value for key, value in options(files).items() if key.startswith("trainer.")}
        | {"trainer.max_steps": 10, "trainer.max_epochs": 50, "trainer.val_check_interval": 1}
        | {"model.init_args.trunk": TRUNK, "model.init_args.init_from": checkpoint(first)}
        | {"model.init_args.layers": 2, "model.init_args.warmup_steps": 1, "data.init_args.num_workers": 0}
        | {"data.init_args.root": str(files), "data.init_args.image_size": 12, "data.init_args.batch_size": 8}
        | {"data.init_args.val_per_class": 4, "model.init_args.lrs": [1e-5, 1e-2], "data.init_args.eval_batch_size": 8},
    )
    assert probe.metrics["val/acc_linear"] > 0.6
    kept = first.model.trunk.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in probe.model.trunk.state_dict().items())


def test_the_native_stage_trains_on_images_of_their_own_shapes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From a first stage with fixed positions; a checkpoint with learned ones is refused."""
    monkeypatch.chdir(tmp_path)
    fixed = {**TRUNK, "pos_embed": "sincos"}

    def fit(config: str, model: dict[str, Any], **data: Any) -> Any:
        changes = options(files, decoder=SMALL, **model) | {f"data.init_args.{k}": v for k, v in data.items()}
        return zoo.run("fit", config=config, overrides=changes, wandb="disabled")

    first = fit("aimv2/pretrain_large", {"trunk": fixed})
    native = {"trunk": fixed, "init_from": checkpoint(first), "init_parts": "network"}
    second = fit("aimv2/native", native, native_patch=4, native_area=[2, 5])
    assert math.isfinite(float(second.metrics["val/loss_pixel"]))
    assert second.model.trunk.positions is None
    learned = AIMv2(7, 0, 1, 6, image_size=12, trunk=TRUNK, decoder=SMALL)
    torch.save({"state_dict": learned.state_dict()}, tmp_path / "learned.ckpt")
    with pytest.raises(UsageError, match="weights do not fit the trunk; 1 unknown: positions"):
        fit("aimv2/native", native | {"init_from": str(tmp_path / "learned.ckpt")}, native_patch=4, native_area=[2, 5])


FACTS = {"vocab_size": 32000, "pad_id": 1, "eos_id": 1, "context_length": 77, "in_channels": 3, "image_size": 224}


@pytest.mark.parametrize("config", sorted(p.stem for p in CONFIGS.glob("*.yaml") if p.stem != "claims"))
@pytest.mark.parametrize("overlay", [None, "hardware/fsdp2"])
def test_every_config_builds_its_model(config: str, overlay: str | None):
    layers = [f"aimv2/{config}", *([overlay] if overlay else [])]
    merged = load_layers(layers, []).merged
    small = {"smoke": 8, "fashion_mnist": 28, "gpu": 28, "highres": 336}
    facts = FACTS | {"image_size": small.get(config, 224), "in_channels": 1 if small.get(config, 99) < 99 else 3}
    with torch.device("meta"):
        model = AIMv2(**(merged["model"]["init_args"] | facts))
    assert count(model) > 0
    if overlay:
        assert merged["trainer"]["strategy"]["class_path"] == "zoo.nn.fsdp2.FullyShardedStrategy"
    if config in ("highres", "lit", "native", "pretrain_large"):
        assert 0.29e9 < count(model.trunk) < 0.32e9
    probe = config if config in ("smoke", "fashion_mnist", "gpu") else "probe_imagenet"
    values = load_layers([f"aimv2_probe/{probe}"], []).merged["model"]["init_args"]
    with torch.device("meta"):
        AIMv2Probe(num_classes=10, image_size=facts["image_size"], **(values | {"in_channels": facts["in_channels"]}))


def test_mistakes_are_short_errors(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    short = options(files, decoder=SMALL)
    wide = AIMv2(7, 0, 1, 6, image_size=12, trunk={**TRUNK, "width": 32}, decoder=SMALL)
    torch.save({"state_dict": wide.state_dict()}, tmp_path / "wide.ckpt")
    for changes, message in (
        ({"data.init_args.captions": "none.csv"}, "captions: no file"),
        ({"data.init_args.truncate": False, "data.init_args.context_length": 3}, "context_length: 3 or fewer"),
        ({"data.init_args.image_size": 13}, "trunk.patch_size: 4 does not divide the image size 13"),
        ({"model.init_args.init_from": str(tmp_path / "wide.ckpt")}, "weights do not fit the trunk"),
    ):
        words = [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (short | changes).items()]
        code = zoo.main.main(["fit", "--config", "aimv2/pretrain_large", "--wandb", "disabled", *words])
        err = capsys.readouterr().err
        assert message in err
        assert code in (1, 2)
        assert "Traceback" not in err, message


# ---------------------------------------------------------------- sizes


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_as_many_parameters_as_those_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        trunk = build_trunk({"size": size}, 224, 3)
        config = transformers.Aimv2VisionConfig(
            hidden_size=trunk.width,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=trunk.heads,
            intermediate_size={"base": 2048, "large": 2816, "huge": 4096, "1B": 5632, "3B": 8192}[size],
            use_head=False,
        )
        theirs = transformers.Aimv2VisionModel(config)
    assert count(trunk) == count(theirs)
    assert trunk.width == 128 * trunk.heads


def test_lit_large_is_the_released_model():
    transformers = pytest.importorskip("transformers")
    values = load_layers(["aimv2/lit"], []).merged["model"]["init_args"]
    tower = {key: value for key, value in values["text_tower"].items() if key != "embed_dim"}
    vision = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8}
    text = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    text |= {"num_attention_heads": 6, "max_position_embeddings": 77}
    config = transformers.Aimv2Config(
        text_config=text, vision_config={**vision, "use_head": True}, projection_dim=values["text_tower"]["embed_dim"]
    )
    with torch.device("meta"):
        trunk = build_trunk(values["trunk"], 224, 3)
        text_tower = TextTower(49408, 77, eos_id=49407, multiple_of=256, **tower)
        towers = Towers(trunk.width, trunk.heads, text_tower, 768, 768, "attention")
        theirs = transformers.Aimv2Model(config)
    assert count(trunk) + count(towers) == count(theirs)


def test_configs_of_the_stages_hold_the_published_values():
    large = load_layers(["aimv2/pretrain_large"], []).merged
    model, data, trainer = large["model"]["init_args"], large["data"]["init_args"], large["trainer"]
    assert (model["lr"], model["final_lr"], model["warmup_steps"], model["weight_decay"]) == (1e-3, 1e-5, 12500, 1e-4)
    assert (model["alpha"], model["betas"], data["context_length"], data["batch_size"]) == (0.4, [0.9, 0.95], 77, 8192)
    assert (trainer["max_steps"], trainer["gradient_clip_val"], data["scale"]) == (1_500_000, 1.0, [0.4, 1.0])
    with torch.device("meta"):
        whole = AIMv2(32000, 1, 1, **{key: value for key, value in model.items() if key != "init_from"})
    decoder = whole.decoder
    assert decoder is not None
    assert decoder.pixel_head is not None
    assert decoder.pixel_head.weight.shape == (588, 1024)
    block = 4 * 1024**2 + 3 * 1024 * 2816 + 2 * 1024
    heads = 588 * 1024 + 2 * 32000 * 1024 + 1024 + 78 * 1024
    assert count(decoder) == 12 * block + heads + 1024 * 1024 + 1024 + 1024
    assert load_layers(["aimv2/highres"], []).merged["model"]["init_args"]["weight_decay"] == 0
    probe = load_layers(["aimv2_probe/probe_imagenet"], []).merged
    values, data = probe["model"]["init_args"], probe["data"]["init_args"]
    assert values["lrs"] == [5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3]
    assert (probe["trainer"]["max_epochs"], probe["trainer"]["gradient_clip_val"], data["batch_size"]) == (
        100,
        3.0,
        1024,
    )
    kept = 1_281_167 - 1000 * data["val_per_class"]
    assert values["warmup_steps"] == 5 * (kept // data["batch_size"])
