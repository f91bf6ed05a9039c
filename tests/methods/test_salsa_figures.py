"""Figures and answers of what `zoo reproduce salsa` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.reviews import Reviews
from tests.methods.salsa_toy import LLAMA
from zoo.methods.salsa.figures import answers_page, frontier_points, main, plane_of_runs, seeds_alpha_figure
from zoo.methods.salsa.generation import InProcess, Sampling
from zoo.nn.lm import build_lm

ALPHAS = ("-0.25", "+0.00", "+0.50", "+1.00")
SURFACE = {
    str(seed): {**{f"test/reward_alpha_{a}": float(a) + seed for a in ALPHAS}, "test/reward_centroid": 2.0}
    for seed in (0, 1)
}
TRAINED = {"0": {"test/kl_sft": 1.0, "test/reward": 2.0}, "1": {"test/kl_sft": 3.0, "test/reward": 2.5}}
ARMS = ("ppo_b1", "salsa_b1", "ppo_b04", "salsa_b04", "ppo_b01", "salsa_b01")
RESULTS: dict[str, Any] = {"runs": {"surface": SURFACE, **dict.fromkeys(ARMS, TRAINED)}}


def test_points_of_the_frontier_are_means_over_seeds() -> None:
    assert frontier_points(RESULTS, {"PPO": {0.4: "ppo_b04"}}) == {"PPO": [(0.4, 2.0, 2.25)]}


def test_reward_over_alpha_has_a_line_for_each_seed_and_their_mean() -> None:
    *seeds, mean, three = seeds_alpha_figure(RESULTS).axes[0].lines
    assert [list(line.get_ydata()) for line in seeds] == [[float(a) + seed for a in ALPHAS] for seed in (0, 1)]
    assert list(mean.get_xdata()) == [-0.25, 0.0, 0.5, 1.0]
    assert list(mean.get_ydata()) == pytest.approx([0.25, 0.5, 1.0, 1.5])
    assert set(three.get_ydata()) == {2.0}


def runs_with_members(folder: Path) -> list[Any]:
    models = []
    for number in (1, 2, 3):
        torch.manual_seed(number)
        models.append(build_lm(LLAMA, Reviews.vocab_size))
        state = {f"lm.{name}": value for name, value in models[-1].state_dict().items()}
        place = folder / f"sft{number}" / "0" / "checkpoints"
        place.mkdir(parents=True)
        hyper = {"lm": LLAMA, "vocab_size": Reviews.vocab_size}
        torch.save({"hyper_parameters": hyper, "state_dict": state, "base": ""}, place / "step=1.ckpt")
    return models


def test_the_corners_of_the_plane_are_the_members(tmp_path: Path) -> None:
    models = runs_with_members(tmp_path)
    plane = plane_of_runs(tmp_path, prompts=30)
    batch: Any = Reviews(test_rows=30).held_out_batches("test").batch(0, 0)
    corners = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    for corner, model in zip(corners, models, strict=True):
        engine = InProcess(Sampling(11, 1.0, Reviews.eos_id, Reviews.pad_id))
        engine.sync(model)
        drawn = engine(batch["prompt_ids"], batch["prompt_mask"], batch["row"], 0)
        expected = Reviews().reward(batch["prompt_ids"], drawn.tokens, drawn.mask).mean()
        assert plane["reward"][plane["points"].index(corner)] == pytest.approx(float(expected), abs=1e-5)
    assert len(set(plane["reward"])) > 3


def test_answers_stand_side_by_side(tmp_path: Path) -> None:
    for run, answer in (("ppo_b04", "a <x>"), ("salsa_b04", "b")):
        (tmp_path / run / "0").mkdir(parents=True)
        rows = [{"prompt": f"p{n}", "answer": answer, "score": 1.25} for n in range(20)]
        (tmp_path / run / "0" / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = answers_page(tmp_path, {"PPO": "ppo_b04", "SALSA": "salsa_b04"}, rows=3).splitlines()
    assert page[-5] == "| prompt | PPO | reward | SALSA | reward |"
    assert page[-3:] == [f"| p{n} | a &lt;x> | 1.2 | b | 1.2 |" for n in range(3)]


def test_without_runs_the_figures_of_the_results_are_drawn(tmp_path: Path) -> None:
    results = tmp_path / "salsa.cpu.json"
    results.write_text(json.dumps(RESULTS))
    main([str(results), str(tmp_path), "--runs", str(tmp_path / "none")])
    assert {path.name for path in tmp_path.glob("*.png")} == {"salsa.frontier.png", "salsa.alpha.png"}
