"""Operations of a training step: the formula against torch's counter, and the benchmark of the MFU up to the peak."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.aimv2_toy import make_batch, make_model, step
from zoo.methods.aimv2.flops import block_flops, step_flops

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("changes", [{}, {"objective": "image_only"}, {"objective": "captioner"}], ids=str)
def test_the_formula_is_what_torch_counts(changes):
    model, batch = make_model(**changes), make_batch(3)
    # the plain kernel: what a fused one recomputes in the backward pass is no work of the model
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(model, batch)["total"].backward()
    assert counter.get_total_flops() == step_flops(model.trunk, model.decoder, 3, batch["text"].shape[1])


def test_a_block():
    assert block_flops(256, 1024, 2816) == 2 * 256 * (4 * 1024**2 + 3 * 1024 * 2816) + 4 * 256**2 * 1024


@pytest.fixture
def mfu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("aimv2_step", "aimv2_mfu"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("aimv2_mfu")


WORDS = ["--config", "aimv2/gpu", "--batch", "2", "--rounds", "2", "--warmup", "1", "--device", "cpu"]


def test_a_device_without_a_known_peak_gets_no_mfu(mfu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mfu.main([*WORDS, "--out", str(tmp_path / "mfu.json")])
    said = capsys.readouterr().out
    assert "no MFU: the peak of this device (cpu) is not known" in said
    assert "tflop_per_step" in said
    assert not (tmp_path / "mfu.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_a_short_error(mfu: Any):
    with pytest.raises(SystemExit, match="--device: no GPU here"):
        mfu.main([])
