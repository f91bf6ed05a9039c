"""Every shipped config names data and a network that fit together, the large ones included."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.config import load_layers

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "configs" / "visual_scratchpad").glob("*.yaml")
    if path.stem != "claims"
)


def named(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", CONFIGS)
def test_data_and_network_fit_together(name: str) -> None:
    config = load_layers([f"visual_scratchpad/{name}"], []).merged
    data_options = config["data"]["init_args"] | {"train_size": 4, "val_size": 2, "test_size": 2, "batch_size": 2}
    data = named(config["data"]["class_path"])(**data_options | {"num_workers": 0})
    method = named(config["model"]["class_path"])
    facts = {key: getattr(data, attribute) for key, attribute in method.card.links.items()}
    options: dict[str, Any] = config["model"]["init_args"] | facts
    if "pretrained" in inspect.signature(method).parameters:
        options["pretrained"] = False  # would be downloaded
    if options.get("backbone", "vit") != "vit":
        options["backbone"] = options["backbone"].replace("base", "tiny")
    model = method(**options)
    data.ood_difficulty = None  # takes its time to draw, and was checked on the way in
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    assert int(batch["num_frames"].max()) <= model.t_max
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        losses = model.losses(batch)
    assert all(torch.isfinite(value) for value in losses.values())
    assert ("frame" in losses) == (options.get("mode", "inductive") not in ("none", "recurrent"))
    true_frames_alone = options["mode"] == "none" or options.get("p_tf") == 1
    assert true_frames_alone or config["trainer"]["max_steps"] > options["self_feed_after"]
