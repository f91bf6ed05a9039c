"""What makes the step of a sketch learnable on one CPU core: the same short training, one thing changed at a time.

Cycles of 12 nodes at 48 pixels; each arm trains on pairs of true frames alone, with the frame loss of the method, the
same optimiser, batches and number of steps. What is read, on validation problems and with as many more nodes as in
`configs/visual_scratchpad/cycles_traced.yaml`: agreement with the truth on the pixels that a step colours newly
(intersection over union), so that turning red into blue, or copying, does not count.

    python benchmarks/scratchpad_frame_rule.py [--steps 300] [--output results/visual_scratchpad_frame_rule]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.scratchpad.datamodule import ScratchpadBatches
from datamodules.scratchpad.loops import Cycles
from datamodules.scratchpad.tasks import BLACK, BLUE, PALETTE, RED, problem_pool
from datamodules.scratchpad.traced import TracedCycles
from zoo.methods.visual_scratchpad.frames import frame_indices, nearest, to_image
from zoo.methods.visual_scratchpad.losses import change_weights, frame_loss
from zoo.methods.visual_scratchpad.networks import ScratchpadViT, build_vit
from zoo.methods.visual_scratchpad.pixels import PixelScratchpadViT
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import warmup_cosine_lr

_SIZE, _NODES, _HARDER = 48, 12, 14
_COLOURS = torch.tensor(PALETTE)


class Arm(NamedTuple):
    """One way of drawing the steps, and one network.

    Args:
        title: What is different.
        task: Generator.
        front: Whether the newest part is shown in red.
        net: Makes the network.
    """

    title: str
    task: Callable[[], Cycles]
    front: bool
    net: Callable[[], nn.Module]


def _pixels() -> nn.Module:
    return PixelScratchpadViT(_SIZE, 8, 24, 6, 64, 2, 4, draws=True, halts=True)


def _patches() -> nn.Module:
    return ScratchpadViT(build_vit("vit", _SIZE, 4, 4, 64, 3, 4, False), 4, draws=True, halts=True)


ARMS = {
    "traced_stem": Arm("6 pixels a step, red front, stem", lambda: TracedCycles(_SIZE, 6), True, _pixels),
    "no_front": Arm("6 pixels a step, all blue, stem", lambda: TracedCycles(_SIZE, 6), False, _pixels),
    "whole_lines": Arm("whole lines, all blue, stem", lambda: Cycles(_SIZE), False, _pixels),
    "no_stem": Arm("6 pixels a step, red front, patches alone", lambda: TracedCycles(_SIZE, 6), True, _patches),
}


def indices(batch: Any, t: Tensor, front: bool) -> Tensor:
    """Palette indices of frame `t` `[B]`, `[B, H, W]`."""
    drawn = frame_indices(batch["canvas"], batch["arrival"], t)
    return torch.where(batch["arrival"] == t[:, None, None], RED if front else BLUE, drawn)


@torch.no_grad()
def new_pixel_iou(net: nn.Module, batch: Any, front: bool) -> float:
    """Agreement on the pixels that are black now and coloured in the next frame, mean over problems."""
    t = torch.minimum(batch["t"], batch["num_frames"] - 1 - int(front))  # the last step of a front colours nothing
    now, then = indices(batch, t, front), indices(batch, t + 1, front)
    drawn = nearest(net(to_image(now, _COLOURS)).frame, _COLOURS)
    ours, theirs = (now == BLACK) & (drawn >= BLUE), (now == BLACK) & (then >= BLUE)
    both, either = (ours & theirs).flatten(1).sum(1), (ours | theirs).flatten(1).sum(1)
    return float((both / either.clamp(min=1)).mean())


def train(arm: Arm, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Train one arm; returns its curve of `[step, iou, iou with more nodes]` and the seconds of training."""
    torch.manual_seed(seed)
    task, net = arm.task(), arm.net()
    pool = problem_pool(task, seed, "train", steps * batch_size, _NODES, _NODES)
    batches = ScratchpadBatches(task, pool, 1, batch_size, seed, shuffle=True)
    held_out = [
        ScratchpadBatches(task, problem_pool(task, seed, split, 200, nodes, nodes), 1, 200, seed).batch(0, 0)
        for split, nodes in (("val_id", _NODES), ("val_ood", _HARDER))
    ]
    optimizer = torch.optim.AdamW(decay_groups(net.parameters(), 0.05), lr=4e-3, betas=(0.9, 0.95))
    schedule = warmup_cosine_lr(optimizer, steps, 50)
    curve, seconds = [], 0.0
    for step in range(steps):
        batch = batches.batch(0, step)
        began = time.perf_counter()
        t = batch["t"]
        now, then = indices(batch, t, arm.front), indices(batch, torch.minimum(t + 1, batch["num_frames"]), arm.front)
        loss = 10 * frame_loss(
            net(to_image(now, _COLOURS)).frame, to_image(then, _COLOURS), change_weights(now, then, 8, 10)
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - began
        if (step + 1) % 50 == 0 or step + 1 == steps:
            curve.append([step + 1, *(new_pixel_iou(net, one, arm.front) for one in held_out)])
    return {"title": arm.title, "curve": curve, "seconds": seconds}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for number, arm in enumerate(report["arms"].values()):
        step, inside, outside = np.asarray(arm["curve"]).T
        axis.plot(step, inside, color=f"C{number}", marker=".", label=f"{arm['title']} ({arm['seconds']:.0f} s)")
        axis.plot(step, outside, color=f"C{number}", linestyle="--")
    axis.set(
        xlabel="steps", ylabel="IoU of newly coloured pixels", ylim=(0, 1), title="dashed: more nodes than in training"
    )
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Train all arms and write `<output>.json` and `<output>.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=Path("results/visual_scratchpad_frame_rule"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {key: getattr(options, key) for key in ("steps", "batch_size", "seed")}
    report: dict[str, Any] = {**settings, "nodes": _NODES, "more_nodes": _HARDER, "image_size": _SIZE, "threads": 1}
    report |= {"torch": torch.__version__, "machine": platform.machine(), "arms": {}}
    for name in options.arms:
        report["arms"][name] = train(ARMS[name], options.steps, options.batch_size, options.seed)
        print(name, report["arms"][name]["curve"][-1], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
