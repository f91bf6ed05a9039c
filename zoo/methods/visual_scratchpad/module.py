"""Visual scratchpads as a LightningModule: one network, several ways of supervising and using the sketch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from zoo.card import Card
from zoo.methods.visual_scratchpad.evaluation import Evaluation
from zoo.methods.visual_scratchpad.frames import frame_indices, next_input, to_image
from zoo.methods.visual_scratchpad.losses import change_weights, frame_loss, inductive_loss, masked_bce, masked_mean
from zoo.methods.visual_scratchpad.networks import ConvLabeller, Prediction, ScratchpadViT, build_vit
from zoo.methods.visual_scratchpad.rollout import RollOut, roll_out
from zoo.nn.distributed import world_size
from zoo.nn.optim import decay_groups
from zoo.nn.schedules import warmup_cosine_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Ways of training and using the network.
MODES = ("none", "single", "single_two_pass", "multi", "inductive", "recurrent")
#: Modes that draw frames one after the other and decide when to stop.
STEPWISE = ("multi", "inductive")
#: What validation logs; testing logs all that is measured.
_SHORT = ("acc", "iou", "final_iou", "nonhalting")
_PALETTE = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


class VisualScratchpad(LightningModule):
    """Answer a yes/no question about an image, with or without drawing the way to the answer.

    Args:
        mode: `none`: the answer from the question. `single`: answer and last frame in one pass. `single_two_pass`: the
            last frame, then the answer from it. `multi`: frame by frame, each pass reading all frames so far.
            `inductive`: frame by frame, each pass reading the newest frame alone. `recurrent`: no frames, but the
            blocks are applied `iterations` times with the same weights.
        image_size: Height and width of the images in pixels.
        patch_size: Side of a patch in pixels; fits the cells of square mazes.
        patch_overlap: Pixels around a patch that its embedding sees too (backbone `vit` only).
        backbone: `vit` of the sizes below, `cnn` (mode `none` only), or a vision transformer of timm by name.
        width: Width of the tokens; channels of the first stage of the `cnn`.
        depth: Number of blocks; of stages of the `cnn`.
        heads: Attention heads.
        pretrained: Whether timm loads the published weights of the backbone.
        frame_weight: Weight λ of the frame loss.
        change_weight: Weight `w_ch` of the pixels in patches that change, against 1 elsewhere.
        p_tf: Probability of training on the true frame and not on one the network drew.
        self_feed_after: Steps of pure teacher forcing at the start.
        self_steps: Frames that the network draws in a row when it trains on its own; in `multi` always one.
        snap: Whether drawn frames are rounded to the palette before they are read again, in training and afterwards.
        t_max: Most frames of a roll-out; 0 for three times the longest solution.
        iterations: How often `recurrent` applies its blocks.
        mask_ratio: Probability with which a patch of the question is greyed out, in training and test: the probe of
            globality. Mode `none` only.
        lr: Peak learning rate.
        betas: Momenta of AdamW.
        weight_decay: Weight decay of matrices and kernels.
        warmup_steps: Steps of linear warm-up; a cosine to zero follows.
        palette: Colours that frames consist of, RGB fractions; None for white, black, blue and red.
        cell_size: Pixels between cells of a square grid, 0 if there are none; from the data.
        longest_solution: Bound of the number of frames of a solution, 0 if unknown; from the data.

    Raises:
        ValueError: If a value is out of range or two do not go together.

    Departures:
        The paper's text and code were not at hand: modes and heads follow the abstract and the public reviews; losses'
        weights, sizes, self-feeding schedule and halting are ours.
    """

    card = Card(
        title="Visual Scratchpads: Enabling Global Reasoning in Vision",
        summary="Connectivity in mazes, cycles and strings, solved by drawing the solution frame by frame",
        arxiv="2410.08165",
        year=2024,
        batch="datamodules.scratchpad.datamodule.ScratchpadBatch",
        kind="vision, reasoning",
        links={
            "image_size": "image_size",
            "cell_size": "cell_size",
            "longest_solution": "longest_solution",
            "palette": "palette",
        },
        skip_checks={
            "accumulation": "the losses are means over the rows that have a next frame or an answer; halves have "
            "unequal numbers of them",
        },
        compiles=False,
    )

    def __init__(
        self,
        mode: str = "inductive",
        image_size: int = 24,
        patch_size: int = 4,
        patch_overlap: int = 4,
        backbone: str = "vit",
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        pretrained: bool = False,
        frame_weight: float = 10.0,
        change_weight: float = 10.0,
        p_tf: float = 0.5,
        self_feed_after: int = 200,
        self_steps: int = 1,
        snap: bool = True,
        t_max: int = 0,
        iterations: int = 8,
        mask_ratio: float = 0.0,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        palette: list[list[float]] | None = None,
        cell_size: int = 0,
        longest_solution: int = 0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if image_size % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide image_size={image_size}")
        if cell_size and cell_size % patch_size and patch_size % cell_size:
            raise ValueError(
                f"patch_size={patch_size} does not fit cells of {cell_size} pixels: expected a divisor or a multiple "
                f"of {cell_size}"
            )
        for key, value in (("p_tf", p_tf), ("mask_ratio", mask_ratio)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key}={value}: expected a probability from 0 to 1")
        for key, number in (("self_steps", self_steps), ("iterations", iterations), ("depth", depth)):
            if number < 1:
                raise ValueError(f"{key}={number}: expected at least 1")
        if (mask_ratio or backbone == "cnn") and mode != "none":
            given = f"backbone={backbone!r}" if backbone == "cnn" else f"mask_ratio={mask_ratio}"
            raise ValueError(f"{given} goes with mode 'none' only, got mode={mode!r}")
        if t_max and t_max < longest_solution:
            raise ValueError(
                f"t_max={t_max} is too small for data whose solutions may take {longest_solution} frames: expected "
                f"at least {longest_solution}, better {3 * longest_solution} (0 chooses that)"
            )
        if mode in STEPWISE and not t_max and not longest_solution:
            raise ValueError(
                "t_max=0 means three times the longest solution, but longest_solution is not known: give t_max"
            )
        self.save_hyperparameters()
        self.mode, self.patch_size, self.t_max = mode, patch_size, t_max or 3 * longest_solution
        self.net: Any
        if backbone == "cnn":
            self.net = ConvLabeller(width, depth)
        else:
            vit = build_vit(backbone, image_size, patch_size, patch_overlap, width, depth, heads, pretrained)
            self.net = ScratchpadViT(
                vit,
                patch_size,
                draws=mode not in ("none", "recurrent"),
                halts=mode in STEPWISE,
                history=self.t_max + 1 if mode == "multi" else 1,
                iterations=iterations if mode == "recurrent" else 1,
            )
        self.register_buffer("colours", torch.tensor(palette or _PALETTE), persistent=False)
        self.register_buffer("samples_seen", torch.zeros((), dtype=torch.int64))
        self.colours: Tensor
        self.samples_seen: Tensor
        self.evaluation = Evaluation(self.t_max)

    def forward(self, image: Tensor) -> Prediction:
        """Read one frame `[B, 3, H, W]`."""
        return self.net(image)

    def frame(self, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Show frame `t` `[B]` of the true solution, `[B, 3, H, W]`."""
        return to_image(frame_indices(batch["canvas"], batch["arrival"], t), self.colours)

    def clean(self, frame: Tensor) -> Tensor:
        """Turn a drawn frame into the next input; no gradient passes."""
        return next_input(frame, self.colours, self.hparams["snap"])

    def _weights(self, batch: Mapping[str, Tensor], t: Tensor, target: Tensor) -> Tensor:
        now, then = (frame_indices(batch["canvas"], batch["arrival"], index) for index in (t, target))
        return change_weights(now, then, self.patch_size, self.hparams["change_weight"])

    def _masked(self, question: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Grey out each patch with probability `mask_ratio`."""
        if not self.hparams["mask_ratio"]:
            return question
        p = self.patch_size
        grid = (len(question), 1, question.shape[-2] // p, question.shape[-1] // p)
        if generator is None:
            hidden = torch.rand(grid, device=question.device) < self.hparams["mask_ratio"]
        else:
            hidden = (torch.rand(grid, generator=generator) < self.hparams["mask_ratio"]).to(question.device)
        return question.masked_fill(hidden.repeat_interleave(p, -2).repeat_interleave(p, -1), 0.5)

    def own_frames(self, batch: Mapping[str, Tensor], t: Tensor) -> Tensor:
        """Draw frame `t` `[B]` from the true frame `self_steps` earlier (or the question), without gradient."""
        start = (t - self.hparams["self_steps"]).clamp(min=0)
        image = self.frame(batch, start)
        with torch.no_grad():
            for step in range(self.hparams["self_steps"]):
                image = torch.where((t - start > step)[:, None, None, None], self.clean(self.net(image).frame), image)
        return image

    def inductive_inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The frames to train on: true ones, and for rows whose coin says so, ones that the network drew."""
        t = batch["t"]
        image = self.frame(batch, t)
        if self.global_step < self.hparams["self_feed_after"] or self.hparams["p_tf"] == 1:
            return image
        own = torch.nonzero((batch["coin"] >= self.hparams["p_tf"]) & (t > 0))[:, 0]
        if len(own):
            drawn = self.own_frames({key: batch[key][own] for key in ("canvas", "arrival")}, t[own])
            image[own] = drawn.to(image.dtype)
        return image

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the loss, before weighting."""
        zero, last, answer = torch.zeros_like(batch["t"]), batch["num_frames"], batch["label"]
        if self.mode == "inductive":
            t, following = batch["t"], torch.minimum(batch["t"] + 1, last)
            said = self.net(self.inductive_inputs(batch))
            weights = self._weights(batch, t, following)
            target = self.frame(batch, following)
            return inductive_loss(said.frame, said.halt, said.label, target, weights, t >= last, answer)
        if self.mode == "multi":
            return self._history_losses(batch)
        said = self.net(self._masked(self.frame(batch, zero)))
        if self.mode in ("none", "recurrent"):
            return {"label": F.binary_cross_entropy_with_logits(said.label, answer.float())}
        label = said.label if self.mode == "single" else self.net(self.clean(said.frame)).label
        drawing = frame_loss(said.frame, self.frame(batch, last), self._weights(batch, zero, last))
        return {"frame": drawing, "label": F.binary_cross_entropy_with_logits(label, answer.float())}

    def _history_losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All steps of the solution at once; attention keeps each frame from seeing later ones."""
        last, rows = batch["num_frames"], len(batch["t"])
        count = int(last.max()) + 1
        steps = torch.arange(count, device=last.device).expand(rows, count)
        images = torch.stack([self.frame(batch, steps[:, t]) for t in range(count)], dim=1)
        inputs = images
        if self.global_step >= self.hparams["self_feed_after"] and self.hparams["p_tf"] < 1:
            with torch.no_grad():
                drawn = self.clean(self.net.read_history(images).frame[:, :-1])
            own = (batch["coin"] >= self.hparams["p_tf"])[:, None, None, None, None]
            inputs = torch.cat([images[:, :1], torch.where(own, drawn.to(images.dtype), images[:, 1:])], dim=1)
        said = self.net.read_history(inputs)
        valid, terminal = steps <= last[:, None], steps == last[:, None]
        target = torch.cat([images[:, 1:], images[:, -1:]], dim=1)
        weights = torch.stack([self._weights(batch, steps[:, t], steps[:, t] + 1) for t in range(count)], dim=1)
        error = (weights * (said.frame - target).square()).flatten(2).mean(dim=2)
        return {
            "frame": masked_mean(error, valid),
            "halt": masked_bce(said.halt, terminal, valid),
            "label": masked_bce(said.label, batch["label"][:, None].expand_as(said.label), terminal),
        }

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Weigh the parts: `λ frame + halt + label`."""
        parts = self.losses(batch)
        weight = {"frame": self.hparams["frame_weight"]}
        loss = torch.stack([weight.get(name, 1.0) * value for name, value in parts.items()]).sum()
        self.samples_seen += len(batch["t"]) * world_size()
        logged = {"train/loss": loss, **{f"train/{name}_loss": value for name, value in parts.items()}}
        logged["train/samples"] = self.samples_seen.float()
        self.log_dict({name: value.detach() for name, value in logged.items()}, on_step=True, on_epoch=False)
        return loss

    def answer(self, batch: Mapping[str, Tensor], seed: int = 0, keep: bool = False) -> RollOut:
        """Answer on the network's own: from the question alone, without any true frame."""
        question = self.frame(batch, torch.zeros_like(batch["t"]))
        if self.mode in STEPWISE:
            history = self.mode == "multi"
            read = self._newest if history else self.net
            return roll_out(read, self.clean, question, self.t_max, history, keep)
        said = self.net(self._masked(question, torch.Generator().manual_seed(seed)))
        drawn = question if said.frame is None else self.clean(said.frame)
        label = self.net(drawn).label if self.mode == "single_two_pass" else said.label
        passes = torch.full_like(batch["t"], int(said.frame is not None))
        frames = torch.stack([question, drawn], dim=1) if keep else None
        return RollOut(label.float(), passes, torch.ones_like(passes, dtype=torch.bool), drawn, frames)

    def _newest(self, frames: Tensor) -> Prediction:
        return self.net.read_history(frames).at(-1)

    def on_validation_epoch_start(self) -> None:
        """Forget the pictures and answers of the evaluation before."""
        self.evaluation.clear()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log accuracy and the quality of frames."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log accuracy and the quality of frames."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def _evaluate(self, stage: str, batch: Mapping[str, Tensor], batch_idx: int, loader: int) -> None:
        name = ("id", "ood")[loader] if loader < 2 else str(loader)
        keep = batch_idx == 0 and self.mode not in ("none", "recurrent") and not self.trainer.sanity_checking
        values = self.evaluation.measure(self, batch, name, batch_idx, keep)
        for key, (value, weight) in values.items():
            if weight and (stage == "test" or key in _SHORT):
                self.log(
                    f"{stage}/{key}_{name}",
                    value,
                    on_step=False,
                    on_epoch=True,
                    # Lightning averages the weights of the ranks as whole numbers: 13.5 would become 13
                    batch_size=weight * world_size(),
                    sync_dist=True,
                    add_dataloader_idx=False,
                )

    def on_validation_epoch_end(self) -> None:
        """Add a point to the curve of accuracy against samples seen."""
        if not self.trainer.sanity_checking:
            self.evaluation.add_point(int(self.samples_seen))

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Answer; returns `answer` (bool), `steps`, `halted` and `frames`, the sketch."""
        said = self.answer(batch, batch_idx, keep=True)
        assert said.frames is not None  # kept on request
        return {"answer": said.label > 0, "steps": said.steps, "halted": said.halted, "frames": said.frames}

    def figures(self) -> dict[str, Figure]:
        """Roll-out strips, accuracy against difficulty, accuracy against samples seen; what there is data for."""
        return self.evaluation.figures()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the learning curve."""
        checkpoint["visual_scratchpad_curve"] = self.evaluation.curve

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the learning curve."""
        self.evaluation.curve = checkpoint.get("visual_scratchpad_curve", [])

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, linear warm-up, cosine to zero."""
        groups = decay_groups(self.parameters(), self.hparams["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=tuple(self.hparams["betas"]))
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = warmup_cosine_lr(optimizer, steps, self.hparams["warmup_steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
