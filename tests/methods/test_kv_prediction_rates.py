"""Learning rates of auxiliary and linear maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from datamodules.prompts import Hop
from tests.methods.test_kv_prediction_module import make


@pytest.mark.parametrize(("given", "expected"), [(0.02, 0.02), (1e-4, 1e-4), (None, 1e-3)])
def test_the_maps_may_learn_at_a_rate_of_their_own(tmp_path: Path, given: float | None, expected: float) -> None:
    model = make(lr=1e-3, predictor_lr=given, weight_decay=0.0, export=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False,
                      default_root_dir=tmp_path, **quiet)  # fmt: skip
    trainer.fit(model, datamodule=Hop(batch_size=8, steps_per_epoch=1))
    # the first step of Adam is as long as the rate, whatever the gradient
    for name, value in model.state_dict().items():
        length = float((value - before[name]).abs().max())
        rate = {"base": 0.0, "auxiliary": 1e-3, "predictor": expected}[name.partition(".")[0]]
        assert length == pytest.approx(rate, rel=1e-2), name
