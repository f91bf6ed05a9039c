"""A config for hardware that is not here is refused before anything begins."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator, MPSAccelerator

from zoo.cli import check_accelerator
from zoo.config import Layers
from zoo.errors import UsageError
from zoo.main import main

TOY = str(Path(__file__).parent / "support" / "toy.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_without_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for cls in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(cls, "is_available", staticmethod(lambda: False))


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_missing_accelerator_is_named_and_nothing_is_started(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Path("mine.yaml").write_text(f"trainer: {{accelerator: {name}}}\n")
    assert main(["fit", "--config", TOY, "--config", "mine.yaml"]) == 2
    assert capsys.readouterr().err == (
        f"error: mine.yaml: trainer.accelerator: {name} is not available here; accepted: cpu "
        "(add --trainer.accelerator cpu)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_config_of_other_hardware_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", TOY, "--trainer.accelerator", "gpu", "--print_config"]) == 0
    assert "accelerator: gpu" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", [{}, {"accelerator": "auto"}, {"accelerator": "cpu"}, {"accelerator": "other"}])
def test_what_is_not_known_to_be_missing_goes_on(trainer: dict[str, str]) -> None:
    check_accelerator(Layers({"trainer": trainer}))


def test_gpu_means_cuda_or_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = Layers({"trainer": {"accelerator": "gpu"}})
    with pytest.raises(UsageError):
        check_accelerator(layers)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    check_accelerator(layers)
    monkeypatch.setattr(CPUAccelerator, "is_available", staticmethod(lambda: False))
    with pytest.raises(UsageError, match=r"accepted: mps \(add"):
        check_accelerator(Layers({"trainer": {"accelerator": "cuda"}}))
