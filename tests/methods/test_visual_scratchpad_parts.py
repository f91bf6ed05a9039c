"""Losses, frames, networks and roll-out of visual scratchpads, against naive versions and an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.scratchpad import tasks
from datamodules.scratchpad.datamodule import VisualScratchpadTasks
from zoo.methods.visual_scratchpad.frames import (
    blue_iou,
    change_iou,
    frame_indices,
    nearest,
    next_input,
    to_image,
)
from zoo.methods.visual_scratchpad.losses import change_weights, frame_loss, inductive_loss, masked_bce
from zoo.methods.visual_scratchpad.module import VisualScratchpad
from zoo.methods.visual_scratchpad.networks import (
    Prediction,
    ScratchpadViT,
    block_causal_mask,
    build_vit,
    sincos_positions,
    unpatchify,
)
from zoo.methods.visual_scratchpad.rollout import roll_out

PALETTE = torch.tensor(tasks.PALETTE)


def small_net(**changes: Any) -> ScratchpadViT:
    torch.manual_seed(0)
    vit = build_vit("vit", 16, 4, 4, 16, 2, 2, False)
    return ScratchpadViT(vit, 4, **({"draws": True, "halts": True} | changes)).eval()


@pytest.fixture(scope="module")
def data() -> VisualScratchpadTasks:
    module = VisualScratchpadTasks(
        size=4,
        image_size=16,
        train_difficulty=[3, 5],
        ood_difficulty=[6, 8],
        train_size=64,
        test_size=40,
        batch_size=16,
    )
    module.setup("fit")
    module.setup("test")
    return module


# ---------------------------------------------------------------- frames


def test_frames_agree_with_those_of_the_generator(data: VisualScratchpadTasks) -> None:
    batch = data.batches("train").batch(0, 0)
    sketch = tasks.Sketch(batch["canvas"].numpy(), batch["arrival"].numpy())
    for t in (0, 1, 3, 200):
        ours = frame_indices(batch["canvas"], batch["arrival"], torch.full((16,), t))
        np.testing.assert_array_equal(ours.numpy(), tasks.frame_indices(sketch, t))
    images = to_image(batch["canvas"], PALETTE)
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy() * 255, tasks.rgb(batch["canvas"].numpy()))


def test_pixels_snap_to_the_nearest_colour() -> None:
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    distance = (image[:, None] - PALETTE[None, :, :, None, None]).square().sum(dim=2)
    assert torch.equal(nearest(image, PALETTE), distance.argmin(dim=1))
    assert torch.equal(
        nearest(to_image(torch.arange(4).reshape(1, 2, 2), PALETTE), PALETTE)[0], torch.tensor([[0, 1], [2, 3]])
    )


def test_the_next_input_is_clamped_and_detached() -> None:
    frame = torch.tensor([1.3, -0.2, 0.4]).reshape(1, 3, 1, 1).requires_grad_()
    assert next_input(frame, PALETTE, False).flatten().tolist() == pytest.approx([1, 0, 0.4])
    assert next_input(frame, PALETTE, True).flatten().tolist() == [1, 0, 0]
    assert not next_input(frame, PALETTE, True).requires_grad


def test_overlaps_count_pixels() -> None:
    now = torch.tensor([[[0, 0, 0, 1]]])
    target = torch.tensor([[[2, 2, 0, 1]]])
    predicted = torch.tensor([[[2, 3, 2, 1]]])
    assert [int(x) for x in change_iou(now, predicted, target)] == [1, 3]
    assert [int(x) for x in blue_iou(predicted, target)] == [1, 3]


# ---------------------------------------------------------------- losses


def test_changed_patches_are_weighted() -> None:
    now = torch.zeros(1, 8, 8)
    target = now.clone()
    target[0, 1, 6] = 2
    weights = change_weights(now, target, 4, 10.0)
    assert weights.shape == (1, 1, 8, 8)
    assert (weights[0, 0, :4, 4:] == 10).all()
    assert weights.sum() == 48 + 160


def test_the_frame_loss_is_a_mean_that_is_not_renormalised() -> None:
    frame, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    weights = 1 + 9 * (torch.rand(2, 1, 4, 4) > 0.5)
    total = 0.0
    for b in range(2):
        for c in range(3):
            for y in range(4):
                for x in range(4):
                    total += float(weights[b, 0, y, x] * (frame[b, c, y, x] - target[b, c, y, x]) ** 2)
    torch.testing.assert_close(frame_loss(frame, target, weights), torch.tensor(total / 96))


def test_a_perfect_prediction_has_no_loss() -> None:
    target, terminal, answer = (
        torch.rand(4, 3, 4, 4),
        torch.tensor([True, True, False, False]),
        torch.tensor([1, 0, 1, 0]),
    )
    logits = 100.0 * (2 * terminal - 1)
    parts = inductive_loss(target, logits, 100.0 * (2 * answer - 1), target, torch.ones(4, 1, 4, 4), terminal, answer)
    assert set(parts) == {"frame", "halt", "label"}
    assert all(float(part) < 1e-6 for part in parts.values())


def test_the_answer_counts_at_the_end_only() -> None:
    logits = torch.tensor([0.3, -2.0, 1.0], requires_grad=True)
    answer = torch.tensor([1, 1, 0])
    loss = masked_bce(logits, answer, torch.tensor([True, False, True]))
    expected = (-torch.sigmoid(logits[0]).log() - (1 - torch.sigmoid(logits[2])).log()) / 2
    torch.testing.assert_close(loss, expected)
    nothing = masked_bce(logits, answer, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert nothing == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


# ---------------------------------------------------------------- networks


def test_patches_are_put_where_their_tokens_are() -> None:
    patches = torch.zeros(1, 4, 48)
    patches[0, 2, 16 + 4 * 1 + 3] = 1  # lower left patch, green, second row, fourth column
    image = unpatchify(patches, 8, 8, 4)
    assert image.nonzero().tolist() == [[0, 1, 5, 3]]
    net = small_net()
    hidden = torch.randn(1, 16, 16, requires_grad=True)
    assert net.frame_head is not None
    drawn = unpatchify(net.frame_head(hidden), 16, 16, 4)
    drawn[:, :, 4:8, 8:12].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(-1)[0].nonzero().flatten().tolist() == [6]


def test_positions_are_sines_and_cosines() -> None:
    table = sincos_positions(3, 8).reshape(3, 3, 8)
    assert torch.equal(table[1, :, :4], table[1, :1, :4].expand(3, 4))
    torch.testing.assert_close(table[2, 1, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(table[2, 1, 7], torch.tensor(0.01).cos())
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(3, 10)


def test_the_embedding_sees_neighbouring_patches_only() -> None:
    embed = small_net().vit.patch_embed
    image = torch.zeros(1, 3, 16, 16)
    image[0, :, 5, 5] = 1
    moved = (embed(image) - embed(torch.zeros_like(image)))[0].abs().sum(-1).reshape(4, 4) > 0
    assert moved.tolist() == [[True] * 3 + [False]] * 3 + [[False] * 4]


def test_a_frame_may_look_at_earlier_ones_and_at_itself() -> None:
    mask = block_causal_mask(3, 2, torch.device("cpu"))
    assert mask.int().tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0, 0]] * 2 + [[1] * 6] * 2


def test_later_frames_do_not_change_what_is_said_about_earlier_ones() -> None:
    net = small_net(history=4)
    frames = torch.rand(2, 4, 3, 16, 16)
    before = net.read_history(frames)
    frames[:, 3] = torch.rand(2, 3, 16, 16)
    after = net.read_history(frames)
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[:, :3], two[:, :3])
        assert not torch.allclose(one[:, 3], two[:, 3])


def test_history_of_one_frame_is_the_inductive_network() -> None:
    history, single = small_net(history=4), small_net()
    missing = single.load_state_dict({k: v for k, v in history.state_dict().items() if k != "frame_embedding"})
    assert not missing.missing_keys
    assert history.frame_embedding is not None
    history.frame_embedding.data[0] = 0
    image = torch.rand(2, 3, 16, 16)
    for one, two in zip(history.read_history(image[:, None]), single(image), strict=True):
        torch.testing.assert_close(one[:, 0], two)


def test_iterations_share_their_weights_and_change_the_answer() -> None:
    once, thrice = (small_net(draws=False, halts=False, iterations=n) for n in (1, 3))
    assert sum(p.numel() for p in once.parameters()) == sum(p.numel() for p in thrice.parameters())
    image = torch.rand(2, 3, 16, 16)
    tokens = thrice.vit._pos_embed(thrice.vit.patch_embed(image))
    hidden = thrice.vit.blocks(tokens)
    for _ in range(2):
        hidden = thrice.vit.blocks(hidden + tokens)
    torch.testing.assert_close(thrice(image).label, thrice.label_head(thrice.vit.norm(hidden)[:, 0])[:, 0])


def test_timm_backbones_are_taken_by_name() -> None:
    vit = build_vit("vit_tiny_patch16_224", 32, 8, 0, 0, 0, 0, False)
    said = ScratchpadViT(vit, 8, draws=True, halts=True)(torch.rand(1, 3, 32, 32))
    assert said.frame is not None
    assert said.frame.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="vision transformer of timm"):
        build_vit("vit_huge_of_nobody", 32, 8, 0, 0, 0, 0, False)
    with pytest.raises(ValueError, match="vision transformer of timm"):
        build_vit("resnet18", 32, 8, 0, 0, 0, 0, False)


# ---------------------------------------------------------------- roll-out


class Oracle:
    """Solves mazes of 4 x 4 cells from the pixels of one frame; counts how many samples it was shown."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def __call__(self, image: Tensor) -> Prediction:
        self.shown.append(len(image))
        indices = nearest(image, PALETTE)
        drawn, halt, label = [], [], []
        for picture in indices.numpy():
            grown = self.step(picture)
            drawn.append(grown)
            halt.append(1.0 if (grown == picture).all() else -1.0)
            label.append(-1.0 if (picture == 3).any() else 1.0)
        frames = to_image(torch.from_numpy(np.stack(drawn)), PALETTE)
        return Prediction(frames, torch.tensor(halt), torch.tensor(label))

    @staticmethod
    def step(picture: np.ndarray) -> np.ndarray:
        if not (picture == 3).any():
            return picture
        walls, blue = picture == 1, picture == 2
        grown = blue.copy()
        for axis in (0, 1):
            for shift in (1, -1):
                moved = np.roll(blue, shift, axis) & ~walls
                grown |= moved
        cells = grown.reshape(4, 4, 4, 4).any(axis=(1, 3))
        return np.where(np.kron(cells, np.ones((4, 4), bool)) & ~walls, 2, picture)


@pytest.mark.parametrize("split", ["test_id", "test_ood"])
def test_an_oracle_answers_everything_in_exactly_the_needed_steps(data: VisualScratchpadTasks, split: str) -> None:
    batch = data.batches(split).batch(0, 0)
    question = to_image(batch["canvas"], PALETTE)
    oracle = Oracle()
    said = roll_out(oracle, lambda frame: frame, question, 33, keep=True)
    assert said.halted.all()
    assert torch.equal(said.label > 0, batch["label"] == 1)
    assert torch.equal(said.steps, batch["num_frames"])
    assert oracle.shown == sorted(oracle.shown, reverse=True), "who has finished is not computed again"
    assert sum(oracle.shown) == int((said.steps + 1).sum())
    final = to_image(frame_indices(batch["canvas"], batch["arrival"], batch["num_frames"]), PALETTE)
    assert torch.equal(said.last, final)
    assert said.frames is not None
    for t in range(said.frames.shape[1]):
        expected = to_image(frame_indices(batch["canvas"], batch["arrival"], torch.full((40,), t)), PALETTE)
        assert torch.equal(said.frames[:, t], expected), "finished samples are frozen"


def test_a_roll_out_ends_after_t_max_frames() -> None:
    calls = []

    def never(image: Tensor) -> Prediction:
        calls.append(len(image))
        return Prediction(image, torch.full((len(image),), -1.0), torch.full((len(image),), float(len(calls))))

    said = roll_out(never, lambda frame: frame, torch.zeros(3, 3, 4, 4), 5)
    assert calls == [3] * 6
    assert said.steps.tolist() == [5] * 3
    assert not said.halted.any()
    assert said.label.tolist() == [6.0] * 3


def test_a_history_grows_with_each_frame() -> None:
    shapes = []

    def look(frames: Tensor) -> Prediction:
        shapes.append(tuple(frames.shape[:2]))
        stop = torch.tensor([1.0 if len(shapes) == 2 and i == 0 else -1.0 for i in range(len(frames))])
        return Prediction(frames[:, -1] + 1, stop, torch.zeros(len(frames)))

    said = roll_out(look, lambda frame: frame, torch.zeros(2, 3, 4, 4), 3, history=True)
    assert shapes == [(2, 1), (2, 2), (1, 3), (1, 4)]
    assert said.last[:, 0, 0, 0].tolist() == [1, 3]


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "triple"}, "expected one of none, single"),
        ({"patch_size": 5}, "does not divide"),
        ({"patch_size": 6, "cell_size": 4}, "does not fit cells of 4 pixels"),
        ({"t_max": 20, "longest_solution": 26}, "t_max=20 is too small for data"),
        ({"t_max": 0, "longest_solution": 0}, "give t_max"),
        ({"p_tf": 1.5, "t_max": 9}, "from 0 to 1"),
        ({"backbone": "cnn", "t_max": 9}, "mode 'none' only"),
        ({"mask_ratio": 0.2, "t_max": 9}, "mode 'none' only"),
        ({"self_steps": 0, "t_max": 9}, "self_steps=0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualScratchpad(**arguments)
