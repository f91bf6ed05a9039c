"""`zoo export`: what is written loads in timm and transformers and is equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo import run
from zoo.export import export, load_trained
from zoo.main import main

ONE_STEP = {"trainer.max_steps": 1, "checkpoint.every_n_steps": 1, "trainer.limit_val_batches": 0}


def trained(config: str, folder: Path, **overrides: object) -> Path:
    run("fit", config=config, overrides={**ONE_STEP, **overrides}, run_dir=folder, wandb="disabled")
    return folder


def test_a_timm_backbone_loads_in_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    backbone = {"name": "timm:resnet10t", "channels": [64, 128, 256, 512]}  # in place of the smoke config's
    folder = trained("suave/smoke", tmp_path / "run", **{"model.init_args.backbone": backbone})
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    place = next((tmp_path / "out").glob("*backbone*"))
    assert f"timm.create_model('local-dir:{place}', pretrained=True)" in shown
    back = timm.create_model(f"local-dir:{place}", pretrained=True)
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    content = torch.load(newest, weights_only=True)
    prefix = f"{place.name.replace('-', '.')}."
    own = {k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)}
    assert own.keys() == back.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in own.items())
    rest = load_file(tmp_path / "out" / "other" / "model.safetensors")
    assert not any(name.startswith(prefix) for name in rest)
    assert len(rest) + len(own) == len(content["state_dict"])


def test_a_language_model_loads_in_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    folder = trained("sft/smoke", tmp_path / "run")
    assert main(["export", str(folder)]) == 0
    assert "AutoModelForCausalLM.from_pretrained" in capsys.readouterr().out
    back = transformers.AutoModelForCausalLM.from_pretrained(folder / "export" / "lm")
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    own = torch.load(newest, weights_only=True)["state_dict"]
    assert all(torch.equal(own[f"lm.{name}"], value) for name, value in back.state_dict().items())
    assert main(["export", str(folder)]) == 2, "an earlier export is not overwritten"
    assert "is not empty" in capsys.readouterr().err


def test_a_network_of_our_own_keeps_its_names(tmp_path: Path) -> None:
    folder = trained("suave/smoke", tmp_path / "run")
    assert main(["export", str(folder), "--to", str(tmp_path / "out")]) == 0
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    own = torch.load(newest, weights_only=True)["state_dict"]
    back = load_file(tmp_path / "out" / "module" / "model.safetensors")
    assert own.keys() == back.keys()
    assert all(torch.equal(own[name], back[name]) for name in own)


def test_a_file_that_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "foreign.ckpt")
    assert main(["export", str(tmp_path / "foreign.ckpt"), "--to", str(tmp_path / "out")]) == 2
    assert "does not say which method wrote it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tmp_path / "nowhere")]) == 2


def test_a_write_that_went_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained("suave/smoke", tmp_path / "run")
    newest = max((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    model = load_trained(torch.load(newest, weights_only=True))
    import safetensors.torch

    original = safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda state, *a, **k: original({n: v + 1 for n, v in state.items()}, *a, **k)
    )
    with pytest.raises(RuntimeError, match="does not read back equal"):
        export(model, tmp_path / "out")
