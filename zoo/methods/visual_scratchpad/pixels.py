"""Visual scratchpads with a convolutional stem: for rules that are local in pixels rather than in patches.

A vision transformer of patches has to learn for every place in a patch anew what a line looks like, where it ends, and
which way it goes on; convolutions learn it once. The blocks above read the stem's features, say when to stop, and
answer, which is global over a finished sketch and local over none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.card import Card
from zoo.methods.visual_scratchpad.evaluation import Evaluation
from zoo.methods.visual_scratchpad.frames import change_iou, frame_indices, nearest, to_image
from zoo.methods.visual_scratchpad.losses import change_weights
from zoo.methods.visual_scratchpad.module import VisualScratchpad
from zoo.methods.visual_scratchpad.networks import OverlapPatchEmbed, Prediction, build_vit

#: Modes of `VisualScratchpad` that read one frame, once.
MODES = ("none", "single", "single_two_pass", "inductive")
#: Palette index of the newest part of a sketch.
RED = 3


class PixelStem(nn.Module):
    """Residual 3x3 convolutions at full resolution, dilated by 1, 2 and 4 in turn: features of each pixel.

    After the early convolutions of Xiao et al. 2021 (arXiv 2106.14881), which are there for stable training.

    Args:
        width: Channels.
        depth: Number of convolutions after the first.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 3, padding=1)
        dilations = [2 ** (number % 3) for number in range(depth)]
        self.norms = nn.ModuleList([nn.GroupNorm(1, width) for _ in dilations])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in dilations])

    def forward(self, image: Tensor) -> Tensor:
        """Map `[B, 3, H, W]` to `[B, C, H, W]`."""
        hidden = self.embed(image)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            hidden = hidden + conv(F.gelu(norm(hidden)))
        return hidden


class PixelHead(nn.Module):
    """Draws the change of a frame from the features of its pixels and the tokens of its patches; none at first.

    Args:
        channels: Features of a pixel.
        width: Width of a token.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Linear(width, channels)
        self.change = nn.Conv2d(channels, 3, 1)
        for parameter in self.change.parameters():
            nn.init.zeros_(parameter)

    def forward(self, image: Tensor, features: Tensor, patches: Tensor) -> Tensor:
        """Draw frames `[B, 3, H, W]`.

        Args:
            image: Frames that were read, `[B, 3, H, W]`.
            features: Of their pixels, `[B, C, H, W]`.
            patches: Tokens in row-major order, `[B, N, D]`.
        """
        side = round(patches.shape[1] ** 0.5)
        coarse = self.tokens(patches).transpose(1, 2).unflatten(2, (side, side))
        return image + self.change(F.gelu(features + F.interpolate(coarse, size=image.shape[-2:])))


class PixelScratchpadViT(nn.Module):
    """Stem, vision transformer on its features, and the heads of `ScratchpadViT`, the frame head being a `PixelHead`.

    Args:
        image_size: Height and width of the images in pixels.
        patch_size: Side of a patch in pixels.
        stem_width: Channels of the stem.
        stem_depth: Convolutions of the stem.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        draws: Whether there is a frame head.
        halts: Whether there is a halt head.
    """

    def __init__(
        self, image_size: int, patch_size: int, stem_width: int, stem_depth: int,
        width: int, depth: int, heads: int, draws: bool, halts: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = PixelStem(stem_width, stem_depth)
        self.vit: Any = build_vit("vit", image_size, patch_size, 0, width, depth, heads, False)
        self.vit.patch_embed = OverlapPatchEmbed(image_size, patch_size, stem_width, width)
        self.frame_head = PixelHead(stem_width, width) if draws else None
        self.halt_head = nn.Linear(width, 1) if halts else None
        self.label_head = nn.Linear(width, 1)
        self.to(memory_format=torch.channels_last)  # kernels: what suits few channels on a CPU

    def forward(self, image: Tensor) -> Prediction:
        """Read one frame `[B, 3, H, W]`; nothing says which frame of the sketch it is."""
        features = self.stem(image.contiguous(memory_format=torch.channels_last))
        hidden = self.vit.forward_features(features)
        first = hidden[:, 0]
        drawn = None
        if self.frame_head is not None:
            drawn = self.frame_head(image, features, hidden[:, self.vit.num_prefix_tokens :])
        halt = None if self.halt_head is None else self.halt_head(first)[:, 0]
        return Prediction(drawn, halt, self.label_head(first)[:, 0])


class TracedEvaluation(Evaluation):
    """The evaluation, with true frames that show their newest part in red."""

    @staticmethod
    def _teacher_forced(model: Any, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        t, last, rows = batch["t"], batch["num_frames"], len(batch["t"])
        frame, label = model.net(model.frame(batch, t)).frame, model.net(model.frame(batch, last)).label
        hit, either = change_iou(model.indices(batch, t), nearest(frame, model.colours), model.indices(batch, t + 1))
        changes = t < last
        iou = (hit / either.clamp(min=1))[changes].mean() if changes.any() else hit.float().mean()
        right = ((label > 0) == (batch["label"] == 1)).float().mean()
        return {"iou": (iou, int(changes.sum())), "acc_true_frames": (right, rows)}


class PixelScratchpad(VisualScratchpad):
    """`VisualScratchpad` on sketches that are traced pixel by pixel, their newest part in red.

    The same network in every mode, so that the modes differ in supervision and in nothing else.

    Args:
        mode: `none`, `single`, `single_two_pass` or `inductive`, as in `VisualScratchpad`.
        image_size: Height and width of the images in pixels.
        patch_size: Side of a patch in pixels.
        stem_width: Channels of the convolutions at full resolution.
        stem_depth: Number of these convolutions; they see 15 pixels each way with 6 of them.
        width: Width of the tokens.
        depth: Number of blocks.
        heads: Attention heads.
        frame_weight: Weight λ of the frame loss.
        change_weight: Weight `w_ch` of the pixels in patches that change, against 1 elsewhere.
        p_tf: Probability of training on the true frame and not on one the network drew.
        self_feed_after: Steps of pure teacher forcing at the start.
        self_steps: Frames that the network draws in a row when it trains on its own.
        front: Whether the newest part of a sketch is red; for lines, not for mazes, whose goal is red.
        t_max: Most frames of a roll-out; 0 for three times the longest solution.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices and kernels.
        warmup_steps: Steps of linear warm-up; a cosine to zero follows.
        palette: Colours that frames consist of, RGB fractions; None for white, black, blue and red.
        longest_solution: Bound of the number of frames of a solution, 0 if unknown; from the data.

    Raises:
        ValueError: If a value is out of range or two do not go together.

    Departures:
        The stem, the drawn change and the red front are designs of this repository; the paper draws with one linear
        layer on each patch token.
    """

    card = Card(
        title="Visual Scratchpads: Enabling Global Reasoning in Vision",
        summary="Visual scratchpads with a convolutional stem, for rules that are local in pixels",
        arxiv="2410.08165",
        year=2024,
        batch="datamodules.scratchpad.datamodule.ScratchpadBatch",
        kind="vision, reasoning",
        links={"image_size": "image_size", "longest_solution": "longest_solution", "palette": "palette"},
        skip_checks={
            "accumulation": "the losses are means over the rows that have a next frame or an answer; halves have "
            "unequal numbers of them",
        },
        compiles=False,
    )

    def __init__(
        self,
        mode: str = "inductive",
        image_size: int = 48,
        patch_size: int = 8,
        stem_width: int = 24,
        stem_depth: int = 6,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        frame_weight: float = 10.0,
        change_weight: float = 10.0,
        p_tf: float = 0.5,
        self_feed_after: int = 400,
        self_steps: int = 1,
        front: bool = True,
        t_max: int = 0,
        lr: float = 4e-3,
        weight_decay: float = 0.05,
        warmup_steps: int = 50,
        palette: list[list[float]] | None = None,
        longest_solution: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        for key, number in (("stem_width", stem_width), ("stem_depth", stem_depth)):
            if number < 1:
                raise ValueError(f"{key}={number}: expected at least 1")
        super().__init__(
            mode=mode, image_size=image_size, patch_size=patch_size, patch_overlap=0, width=width, depth=depth,
            heads=heads, frame_weight=frame_weight, change_weight=change_weight, p_tf=p_tf,
            self_feed_after=self_feed_after, self_steps=self_steps, t_max=t_max, lr=lr, weight_decay=weight_decay,
            warmup_steps=warmup_steps, palette=palette, longest_solution=longest_solution,
        )  # fmt: skip
        draws, halts = mode != "none", mode == "inductive"
        self.net = PixelScratchpadViT(image_size, patch_size, stem_width, stem_depth, width, depth, heads, draws, halts)
        self.evaluation = TracedEvaluation(self.t_max)
        self.save_hyperparameters()

    def indices(self, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Palette indices of frame `t` `[B]` of the true solution, red where it is new (`front`), `[B, H, W]`."""
        drawn = frame_indices(batch["canvas"], batch["arrival"], t)
        if not self.hparams["front"]:
            return drawn
        return torch.where(batch["arrival"] == t[:, None, None], RED, drawn)

    def frame(self, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Show frame `t` `[B]` of the true solution, `[B, 3, H, W]`."""
        return to_image(self.indices(batch, t), self.colours)

    def _weights(self, batch: Mapping[str, Tensor], t: Tensor, target: Tensor) -> Tensor:
        now, then = self.indices(batch, t), self.indices(batch, target)
        return change_weights(now, then, self.patch_size, self.hparams["change_weight"])
