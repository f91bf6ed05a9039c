"""The module: it trains, writes models for transformers, keeps its curve, and its studies run from the configs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from datamodules.synthetic_tokens import SyntheticTokens
from zoo.claims.reader import claims_files, load_plan
from zoo.config import load_layers, shipped_configs
from zoo.methods.slm_bottlenecks import module as module_file
from zoo.methods.slm_bottlenecks.costs import flops_per_token
from zoo.methods.slm_bottlenecks.grid import Grid, fill_row
from zoo.methods.slm_bottlenecks.module import SLMBottlenecks
from zoo.methods.slm_bottlenecks.studies import STUDIES

CONFIGS = sorted(name for name in shipped_configs() if name.startswith("slm_bottlenecks/"))
SMALL: dict[str, Any] = {"vocab_size": 64, "width": 32, "depth": 1, "head_dim": 16}
GRID: dict[str, Any] = {
    "axes": {"size": "s", "attention": ["eager", "sdpa"], "seq_len": 16, "precision": "32-true"},
    "sizes": {"s": SMALL},
}


def make(**changes: Any) -> SLMBottlenecks:
    torch.manual_seed(0)
    return SLMBottlenecks(**{**SMALL, **changes})


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **{**quiet, **options})


def data(**changes: Any) -> SyntheticTokens:
    return SyntheticTokens(**{"vocab_size": 64, "seq_len": 16, "batch_size": 4, "num_batches": 4, **changes})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_can_be_built(name: str) -> None:
    init = dict(load_layers([name], []).merged["model"]["init_args"])
    assert set(init) <= set(inspect.signature(SLMBottlenecks).parameters)
    with torch.device("meta"):  # a model of a billion parameters needs no memory to be looked at
        model = SLMBottlenecks(**init)
    if init.get("study", "replay") != "replay":
        assert model.grid is not None
        assert model.grid.cells


def test_every_metric_of_the_claims_is_measured() -> None:
    plan = load_plan(claims_files()["slm_bottlenecks"][0], "cpu")
    logged: dict[str, set[str]] = {}
    for name, run in plan.runs.items():
        init = load_layers(run.configs, []).merged["model"]["init_args"]
        study = init.get("study")
        grid = SLMBottlenecks(**init).grid if study else None
        numbers = {"loss", "law_floor", "law_scale", "law_exponent"}
        if study:
            numbers = set(STUDIES[study](fake_rows(grid), grid or Grid((), {})))
        logged[name] = {f"test/{number}" for number in numbers} | {"test/loss"}
    for claim in plan.claims:
        for side in (claim.left, claim.right):
            if side.run:
                assert side.metric in logged[side.run], (claim.id, side)


def fake_rows(grid: Grid | None) -> list[dict[str, Any]]:
    """Rows whose steps take as long as their tokens need."""
    rows = []
    for cell in grid.cells if grid else ():
        seconds = (0.01 + 1e-5 * cell.batch * cell.seq_len) * (1.5 if cell.attention == "eager" else 1.0)
        assert grid is not None
        filled = Grid(grid.cells, grid.shapes, gpu="cpu", prices={"cpu": 1.0})
        rows.append(fill_row(cell, filled, 0, {"status": "ok", "seconds": seconds, "step_seconds": [seconds]}))
    return rows


def test_studies_by_hand() -> None:
    grid = SLMBottlenecks(**SMALL, study="attention", grid=GRID).grid
    numbers = STUDIES["attention"](fake_rows(grid), grid or Grid((), {}))
    assert numbers["sdpa_speedup_s"] == pytest.approx(1.5)
    assert numbers["eager_largest_batch_s"] == 4
    saturation = {"axes": {"size": "s", "batch": [1, 4], "seq_len": 100, "precision": "32-true"}, "sizes": {"s": SMALL}}
    grid = SLMBottlenecks(**SMALL, study="batch", grid=saturation).grid
    numbers = STUDIES["batch"](fake_rows(grid), grid or Grid((), {}))
    # 400 tokens in 14 ms against 100 in 11 ms
    assert numbers["saturation_s"] == pytest.approx(4 * 11 / 14)
    assert numbers["memory_growth_s"] == pytest.approx(4.0)
    levers = {"axes": {"size": "s", "attention": ["eager", "sdpa"], "fused": [False, True]}, "sizes": {"s": SMALL}}
    grid = SLMBottlenecks(**SMALL, study="levers", grid=levers).grid
    assert STUDIES["levers"](fake_rows(grid), grid or Grid((), {}))["tuned_speedup_s"] == pytest.approx(1.5)


def test_schemes_that_do_not_run_are_not_compared() -> None:
    content = {"axes": {"size": "s", "n_gpu": 2, "comm": ["ddp", "fsdp_full", "fsdp_grad_op"]}, "sizes": {"s": SMALL}}
    grid = SLMBottlenecks(**SMALL, study="comm", grid=content).grid
    rows = fake_rows(grid)
    rows[1] |= {"status": "unsupported", "tok_s_best": 0.0}
    assert set(STUDIES["comm"](rows, grid or Grid((), {}))) == {"ddp_over_fsdp_grad_op_s"}


def test_a_study_in_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def measured(grid: Grid, path: Path) -> list[dict[str, Any]]:
        seen.append(path)
        return fake_rows(grid)

    monkeypatch.setattr(module_file, "run_grid", measured)
    model = make(study="attention", grid=GRID)
    (metrics,) = trainer(tmp_path).test(model, data(), verbose=False)
    assert seen == [tmp_path / "cells.csv"]  # a test that is resumed goes on with them
    assert metrics["test/sdpa_speedup_s"] == pytest.approx(1.5)
    assert set(model.figures()) == {"attention"}


def test_replay_in_a_test(tmp_path: Path) -> None:
    model = make(study="replay")
    (metrics,) = trainer(tmp_path).test(model, data(), verbose=False)
    assert metrics["test/flash_speedup_100m"] == pytest.approx(3.25, abs=0.01)
    assert metrics["test/exceptions_found_share"] == 1.0
    assert set(model.figures()) == {"attention", "hardware", "communication", "batch"}


def test_it_learns_a_sequence_and_keeps_a_curve(tmp_path: Path) -> None:
    class Counting(SyntheticTokens):
        """Tokens that follow from the one before."""

        def setup(self, stage: str) -> None:
            for part, count in self.num_batches.items():
                start = torch.arange(count * self.batch_size)[:, None]
                self.blocks[part] = ((start + torch.arange(self.seq_len + 1)) % self.vocab_size).int()

    model = make(lr=1e-2, save_pretrained="model")
    run = trainer(tmp_path, max_epochs=8, num_sanity_val_steps=0)
    run.fit(model, Counting(vocab_size=64, seq_len=16, batch_size=8, num_batches=12))
    assert [tokens for tokens, _ in model.curve] == [8 * 12 * 16 * epoch for epoch in range(1, 9)]
    losses = [loss for _, loss in model.curve]
    assert losses[-1] < 0.3 < 0.8 < losses[0] < 4.2  # guessing is 4.16
    assert model.flops_per_batch == 8 * 16 * flops_per_token(model.shape, 16)
    law = model.law()
    assert law is not None
    assert "loss" in model.figures()

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(ids), rtol=1e-4, atol=1e-5)

    checkpoint: dict[str, Any] = {}
    model.on_save_checkpoint(checkpoint)
    other = make()
    other.on_load_checkpoint(checkpoint)
    assert other.curve == model.curve
    assert make().law() is None


def test_loss_is_weighted_by_tokens(tmp_path: Path) -> None:
    """Two batches of different sizes: the mean over their tokens, not over the batches."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(64, (6, 17), generator=generator, dtype=torch.int32)
    batches: Any = [
        {"input_ids": blocks[a:b, :-1].long(), "labels": blocks[a:b, 1:].long()} for a, b in ((0, 4), (4, 6))
    ]
    model = make()
    (metrics,) = trainer(tmp_path).test(model, DataLoader(batches, batch_size=None), verbose=False)
    expected = model.net(blocks[:, :-1].long(), blocks[:, 1:].long())
    assert metrics["test/loss"] == pytest.approx(float(expected.detach()), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "7b"}, "size: '7b' is not accepted; accepted: 100m, 1b, 2b, 500m"),
        ({"study": "atention", "grid": GRID}, "study: 'atention' is not accepted; did you mean 'attention'"),
        ({"study": "attention"}, "grid: missing with study 'attention'"),
        ({"grid": GRID}, "grid: given with study ''"),
        ({"study": "replay", "grid": GRID}, "grid: given with study 'replay'"),
        ({"loss_chunks": -1}, "loss_chunks: -1 is not accepted; accepted: 0 or more"),
        ({"width": 40}, "width: 40 is no multiple of head_dim 16"),
        ({"attention": "flsh"}, "attention: 'flsh' is not accepted; did you mean 'flash'"),
        ({"study": "batch", "grid": {"axes": {"size": "x"}}}, "grid: axes.size: 'x' is not accepted"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(**changes)
    assert message in str(caught.value)


def test_the_papers_sizes_take_the_vocabulary_of_the_data() -> None:
    with torch.device("meta"):
        model = SLMBottlenecks(vocab_size=100, size="100m")
    assert model.shape.width == 832
    assert model.net.lm.lm_head.out_features == 100
