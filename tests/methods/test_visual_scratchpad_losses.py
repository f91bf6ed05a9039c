"""Losses of the modes that are not `inductive`, written out once more without the functions of the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_visual_scratchpad_module import make_data, make_model

Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = make_data()
    data.setup("fit")
    batch: Any = data.batches("train").batch(0, 0)
    assert (batch["num_frames"] > 1).all()
    assert len(batch["num_frames"].unique()) > 1
    return batch


def colours(batch: Batch, row: int, t: int) -> tuple[Tensor, Tensor]:
    """Palette indices `[H, W]` and picture `[3, H, W]` of a true frame."""
    indices = torch.where(batch["arrival"][row] <= t, 2, batch["canvas"][row].long())
    palette = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
    return indices, palette[indices].permute(2, 0, 1)


def squared_error(drawn: Tensor, now: Tensor, then: Tensor, picture: Tensor, weight: float) -> Tensor:
    """Mean over pixels and colours, patches of 4 x 4 pixels that change weighing `weight` and the others 1."""
    total = torch.zeros(())
    for y in range(0, 16, 4):
        for x in range(0, 16, 4):
            patch = (slice(y, y + 4), slice(x, x + 4))
            changes = bool((now[patch] != then[patch]).any())
            total = total + (weight if changes else 1) * (drawn[:, *patch] - picture[:, *patch]).square().sum()
    return total / (3 * 16 * 16)


def cross_entropy(logit: Tensor, truth: bool) -> Tensor:
    p = torch.sigmoid(logit)
    return -(p if truth else 1 - p).log()


@pytest.mark.parametrize("mode", ["single", "single_two_pass"])
def test_a_single_frame_is_the_last_one(batch: Batch, mode: str) -> None:
    """`λ mean(w (f - s_T)^2) + BCE(y)`, weights from `s_T` against `s_0`; the answer counts in every row."""
    torch.manual_seed(0)
    model = make_model(mode=mode, change_weight=7.0, frame_weight=3.0)
    frame = label = torch.zeros(())
    for row in range(16):
        last = int(batch["num_frames"][row])
        (question, shown), (final, picture) = colours(batch, row, 0), colours(batch, row, last)
        said = model.net(shown[None])
        frame = frame + squared_error(said.frame[0], question, final, picture, 7.0)
        answered = said if mode == "single" else model.net(model.clean(said.frame))
        label = label + cross_entropy(answered.label[0], bool(batch["label"][row]))
    parts = model.losses(batch)
    torch.testing.assert_close(parts, {"frame": frame / 16, "label": label / 16})
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    torch.testing.assert_close(model.training_step(batch, 0), 3 * frame / 16 + label / 16)


@pytest.mark.parametrize("p_tf", [0.0, 0.5])
@pytest.mark.parametrize("snap", [False, True])
def test_a_history_of_own_frames_is_what_the_network_drew_after_the_true_ones(
    batch: Batch, p_tf: float, snap: bool
) -> None:
    """In rows whose coin says so, input `t > 0` is what was drawn after the true frames up to `t - 1`."""
    torch.manual_seed(0)
    model = make_model(mode="multi", p_tf=p_tf, self_feed_after=0, snap=snap, change_weight=7.0)
    model.net.frame_head.weight.data *= 8  # frames that differ from step to step
    total: dict[str, Tensor] = dict.fromkeys(("frame", "halt", "label"), torch.zeros(()))
    steps = 0
    for row in range(16):
        last = int(batch["num_frames"][row])
        true = [colours(batch, row, t) for t in range(last + 1)]
        pictures = [picture for _, picture in true]
        inputs = list(pictures)
        if batch["coin"][row] >= p_tf:
            for t in range(1, last + 1):
                drawn = model.net.read_history(torch.stack(pictures[:t])[None]).frame[0, -1].detach()
                if snap:
                    palette = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]])
                    distance = (drawn[None] - palette[:, :, None, None]).square().sum(dim=1)
                    inputs[t] = palette[distance.argmin(dim=0)].permute(2, 0, 1)
                else:
                    inputs[t] = drawn.clamp(0, 1)
        said = model.net.read_history(torch.stack(inputs)[None])
        for t in range(last + 1):
            (now, _), (then, picture) = true[t], true[min(t + 1, last)]
            total["frame"] = total["frame"] + squared_error(said.frame[0, t], now, then, picture, 7.0)
            total["halt"] = total["halt"] + cross_entropy(said.halt[0, t], t == last)
        total["label"] = total["label"] + cross_entropy(said.label[0, last], bool(batch["label"][row]))
        steps += last + 1
    expected = {"frame": total["frame"] / steps, "halt": total["halt"] / steps, "label": total["label"] / 16}
    torch.testing.assert_close(model.losses(batch), expected)
    fed = make_model(mode="multi", p_tf=1.0, self_feed_after=0, snap=snap, change_weight=7.0)
    fed.load_state_dict(model.state_dict())
    assert abs(fed.losses(batch)["frame"] - expected["frame"]) > 1e-3, "own frames make a difference here"


def test_the_history_is_true_until_the_warm_up_is_over(batch: Batch) -> None:
    torch.manual_seed(0)
    early, true = make_model(mode="multi", p_tf=0.0, self_feed_after=5), make_model(mode="multi", p_tf=1.0)
    true.load_state_dict(early.state_dict())
    torch.testing.assert_close(early.losses(batch), true.losses(batch))
