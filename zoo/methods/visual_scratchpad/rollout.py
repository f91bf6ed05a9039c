"""Inference: the network reads what it drew until it says that it has finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.methods.visual_scratchpad.networks import Prediction


class RollOut(NamedTuple):
    """End of the roll-outs of a batch.

    Args:
        label: Logit of the answer at the end, `[B]`.
        steps: Frames drawn before the end, int64 `[B]`.
        halted: Whether the network said that it had finished, bool `[B]`.
        last: The frame that the answer was read from, `[B, 3, H, W]`.
        frames: The frames read, `[B, steps + 1, 3, H, W]`, each sample's last one repeated; None unless asked for.
    """

    label: Tensor
    steps: Tensor
    halted: Tensor
    last: Tensor
    frames: Tensor | None


@torch.no_grad()
def roll_out(
    predict: Callable[[Tensor], Prediction],
    clean: Callable[[Tensor], Tensor],
    question: Tensor,
    t_max: int,
    history: bool = False,
    keep: bool = False,
) -> RollOut:
    """Draw frames until the halt logit is positive, at most `t_max`; samples that finished are not touched again.

    Args:
        predict: Reads frames, `[B, 3, H, W]` or, with `history`, `[B, F, 3, H, W]`, and says what follows the last.
        clean: Makes the next input from a drawn frame (clamp, palette).
        question: First frame `[B, 3, H, W]`.
        t_max: Most frames to draw.
        history: Whether all frames so far are read, or only the last one.
        keep: Whether to return all frames.
    """
    batch, device = len(question), question.device
    label = torch.zeros(batch, device=device)
    steps = torch.zeros(batch, dtype=torch.int64, device=device)
    halted = torch.zeros(batch, dtype=torch.bool, device=device)
    last = question.clone()
    record = [question]
    active = torch.arange(batch, device=device)
    seen = question[:, None]
    for step in range(t_max + 1):
        said = predict(seen if history else seen[:, -1])
        if said.frame is None or said.halt is None:
            raise ValueError("a roll-out needs a network that draws and halts")
        label[active] = said.label.float()
        stop = said.halt > 0
        halted[active] = stop
        go = ~stop
        if step == t_max or not go.any():
            break
        active = active[go]
        drawn = clean(said.frame[go])
        steps[active] += 1
        last[active] = drawn.to(last.dtype)
        seen = torch.cat([seen[go], drawn[:, None]], dim=1) if history else drawn[:, None]
        if keep:
            record.append(last.clone())
    return RollOut(label, steps, halted, last, torch.stack(record, dim=1) if keep else None)
