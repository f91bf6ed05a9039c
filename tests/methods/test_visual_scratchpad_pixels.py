"""The network with a convolutional stem, and training on sketches with a red front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything

from datamodules.scratchpad.datamodule import VisualScratchpadTasks
from datamodules.scratchpad.tasks import RED, Sketch
from datamodules.scratchpad.traced import VisualScratchpadTraced, traced_frame
from zoo.methods.visual_scratchpad.module import VisualScratchpad
from zoo.methods.visual_scratchpad.networks import Prediction
from zoo.methods.visual_scratchpad.pixels import MODES, PixelScratchpad, PixelScratchpadViT, PixelStem


def make_data(**changes: Any) -> VisualScratchpadTraced:
    arguments: dict[str, Any] = {"image_size": 32, "advance": 12, "train_difficulty": [6, 6]}
    arguments |= {"ood_difficulty": [8, 8], "train_size": 32, "val_size": 4, "test_size": 8, "batch_size": 8}
    return VisualScratchpadTraced(**(arguments | changes))


def make_model(**changes: Any) -> PixelScratchpad:
    arguments: dict[str, Any] = {"image_size": 32, "stem_width": 4, "stem_depth": 1, "width": 16, "depth": 1}
    arguments |= {"heads": 2, "longest_solution": 11, "t_max": 12, "warmup_steps": 2, "self_feed_after": 2}
    return PixelScratchpad(**(arguments | changes))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_and_tests(mode: str) -> None:
    seed_everything(0, verbose=False)
    data, model = make_data(), make_model(mode=mode)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=4,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer.fit(model, data)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in model.named_parameters() if value.requires_grad}
    inside, outside = trainer.test(model, data, verbose=False)
    assert 0 <= inside["test/acc_id"] <= 1
    assert ("test/iou_ood" in outside) == (mode == "inductive")
    assert model.hparams["mode"] == mode
    assert model.hparams["snap"] is True, "the options of the parent are known too"


def test_frames_show_what_the_generator_draws() -> None:
    data, model = make_data(), make_model()
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    sketch = Sketch(batch["canvas"].numpy(), batch["arrival"].numpy())
    for t in (0, 1, 3, 200):
        ours = model.indices(batch, torch.full((8,), t))
        assert torch.equal(ours, torch.from_numpy(traced_frame(sketch, t)))
    images = model.frame(batch, torch.ones(8, dtype=torch.int64))
    red = (images == torch.tensor([1.0, 0, 0])[:, None, None]).all(dim=1)
    assert torch.equal(red, batch["arrival"] == 1)


def test_a_sketch_without_front_is_that_of_the_plain_method() -> None:
    """In mazes the goal is red, and the front of a flood needs no colour of its own."""
    data = VisualScratchpadTasks(
        task="circ_maze", size=2, image_size=32, train_difficulty=[3, 6], train_size=32, val_size=4, test_size=4,
        batch_size=8,
    )  # fmt: skip
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    plain = VisualScratchpad(image_size=32, patch_size=8, longest_solution=20)
    for t in (0, 2, 5):
        steps = torch.full((8,), t)
        with_front = make_model(front=True).indices(batch, steps)
        assert torch.equal(make_model(front=False).frame(batch, steps), plain.frame(batch, steps))
        assert torch.equal(
            with_front == RED, (batch["arrival"] == t) | ((batch["canvas"] == RED) & (batch["arrival"] > t))
        )


def test_several_own_steps_start_from_an_earlier_true_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = make_data(), make_model(self_steps=2)
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    passes: list[torch.Tensor] = []
    monkeypatch.setattr(
        model.net, "forward", lambda image: (passes.append(image), Prediction(image, None, image[:, 0]))[1]
    )
    t = torch.full((8,), 3)
    drawn = model.own_frames(batch, t)
    assert len(passes) == 2
    assert torch.equal(drawn, model.frame(batch, t - 2)), "a network that copies never leaves the frame it began with"


def test_what_turns_from_red_to_blue_is_weighted_too() -> None:
    data, model = make_data(), make_model()
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    t = torch.ones(8, dtype=torch.int64)
    due = ((batch["arrival"] == 1) | (batch["arrival"] == 2)).float()[:, None]
    assert torch.equal(model._weights(batch, t, t + 1)[:, :, ::8, ::8], 1 + 9 * F.max_pool2d(due, 8))


def test_single_steps_are_measured_on_frames_with_a_front() -> None:
    data, model = make_data(), make_model()
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    truth = {}

    class Oracle(torch.nn.Module):
        """Knows the frame after each of the batch's, and the answer from the last one alone."""

        def forward(self, image: torch.Tensor) -> Any:
            last = torch.equal(image, model.frame(batch, batch["num_frames"]))
            answer = (2.0 * batch["label"] - 1) * (1 if last else -1)
            return type(truth["said"])(model.frame(batch, batch["t"] + 1), answer, answer)

    truth["said"] = model.net(model.frame(batch, batch["t"]))
    model.net = Oracle()
    values = model.evaluation._teacher_forced(model, batch)
    assert float(values["iou"][0]) == 1
    assert values["iou"][1] == int((batch["t"] < batch["num_frames"]).sum())
    assert float(values["acc_true_frames"][0]) == 1


def test_the_network_copies_before_it_has_learned_anything() -> None:
    torch.manual_seed(0)
    net = PixelScratchpadViT(16, 8, 6, 2, 16, 1, 2, draws=True, halts=True)
    images = torch.rand(3, 3, 16, 16)
    said = net(images)
    assert torch.equal(said.frame, images)
    assert said.halt.shape == said.label.shape == (3,)


def test_the_head_draws_what_a_pixel_and_its_patch_say() -> None:
    torch.manual_seed(0)
    net = PixelScratchpadViT(16, 8, 6, 2, 16, 1, 2, draws=True, halts=True)
    head: Any = net.frame_head
    torch.nn.init.normal_(head.change.weight)
    image, features, patches = torch.rand(1, 3, 16, 16), torch.rand(1, 6, 16, 16), torch.rand(1, 4, 16)
    drawn = head(image, features, patches)
    for row, column, patch in ((0, 0, 0), (3, 12, 1), (8, 7, 2), (15, 15, 3)):
        hidden = features[0, :, row, column] + head.tokens(patches[0, patch])
        change = head.change.weight[:, :, 0, 0] @ F.gelu(hidden)
        torch.testing.assert_close(drawn[0, :, row, column], image[0, :, row, column] + change)


def test_the_stem_sees_as_far_as_its_dilations() -> None:
    stem = PixelStem(4, 3)
    stem.norms = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])  # these look at the whole picture
    image = torch.zeros(1, 3, 33, 33, requires_grad=True)
    (reach,) = torch.autograd.grad(stem(image)[0, :, 16, 16].sum(), image)
    seen = reach[0].abs().sum(dim=0) > 0
    assert seen.any(dim=0).nonzero().flatten().tolist() == list(range(16 - 8, 16 + 9)), "1 + 1 + 2 + 4 pixels"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "multi"}, "mode='multi': expected one of none, single"),
        ({"stem_depth": 0}, "stem_depth=0"),
        ({"patch_size": 7}, "does not divide"),
        ({"t_max": 5}, "t_max=5 is too small"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**changes)
