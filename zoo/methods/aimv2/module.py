"""AIMv2 as a LightningModule, with the objectives it is compared with as values of `objective`.

Longer than other files: a third of it are the options of four objectives and three stages, and what they mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from zoo.card import Card
from zoo.methods.aimv2.decoder import build_decoder
from zoo.methods.aimv2.encoder import build_trunk
from zoo.methods.aimv2.losses import (
    PixelNorm,
    contrastive_loss,
    normalise_patches,
    patchify,
    pixel_errors,
    pooled_mean,
    prefix_mask,
    real_patches,
    token_errors,
    unpatchify,
)
from zoo.methods.aimv2.optimiser import adam_lh
from zoo.methods.aimv2.towers import Towers, build_towers
from zoo.methods.aimv2.weights import export_trunk, load_network, load_trunk
from zoo.nn.distributed import all_gather_rows, rank, world_size
from zoo.nn.schedules import total_steps, warmup_cosine_lr

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from matplotlib.figure import Figure

#: Objectives with a decoder, and those that compare an embedding of the image with one of its caption.
GENERATIVE, CONTRASTIVE = ("aimv2", "image_only", "captioner"), ("clip", "lit")
CHOICES = {
    "objective": (*GENERATIVE, *CONTRASTIVE),
    "mask": ("prefix", "causal", "full"),
    "order": ("image_text", "text_image"),
    "image_head": ("linear", "aimv1_mlp"),
    "pixel_norm": ("official", "paper"),
    "init_parts": ("trunk", "network"),
}


class AIMv2(LightningModule):
    """Multimodal autoregressive pre-training of a vision encoder (arXiv 2411.14402).

    The encoder reads an image with prefix attention; a causal decoder predicts the next patch, then the caption.

    Args:
        vocab_size: Tokens of the vocabulary.
        pad_id: Token that fills captions.
        eos_id: Token that ends captions.
        context_length: Longest caption in tokens.
        class_prompts: A caption of each class, in tokens; contrastive objectives classify the images of evaluation with
            them.
        in_channels: Channels of the images.
        image_size: Height and width of the images in pixels.
        trunk: The encoder: `size` (base, large, huge, 1B, 3B) or `width`, `depth`, `heads`; `patch_size` (14),
            `pos_embed` (absolute, sincos), `multiple_of` (256), `hidden`.
        decoder: The decoder: `width`, `depth`, `heads`; with `image_head` aimv1_mlp, `mlp_width` and `mlp_depth` too.
        text_tower: Text encoder of the contrastive objectives: `width`, `depth`, `heads`, `embed_dim`.
        objective: What is trained. `aimv2`: patches and caption. `image_only`: patches alone. `captioner`: the caption
            alone. `clip`: a contrastive loss. `lit`: the same with a frozen encoder and an attention-pool head.
        alpha: Weight of the pixel loss beside the text loss.
        mask: Attention of the encoder in training: `prefix` (a length drawn for each image), `causal`, or `full`, which
            can be trained by captions alone. Evaluation has no mask.
        order: What the decoder reads first.
        image_head: `linear` on the decoder, or `aimv1_mlp`: AIMv1's head on the encoder.
        pixel_norm: The pixel loss is a mean over the predicted patches (`official`) or over all (`paper`).
        lr: Peak learning rate.
        final_lr: Learning rate at the end of the cosine.
        warmup_steps: Steps of linear warm-up.
        weight_decay: Fraction of a weight that a step at the peak learning rate takes away.
        betas: Decay rates of Adam.
        init_from: Weights to start from: a checkpoint of this method, or a folder, file or hub name of a transformers
            `Aimv2VisionModel` or `Aimv2Model`. Positions are resized to the grid of this encoder.
        init_parts: `trunk` or, from a checkpoint of this method, the whole `network`.

    Departures:
        * Losses are means over the global batch; the released code divides by the counts of each rank.
        * Evaluation measures the losses with prefix lengths that depend on the batch alone.
    """

    card = Card(
        title="Multimodal autoregressive pre-training of large vision encoders",
        summary="A vision encoder learns by predicting the image's next patches and then its caption",
        arxiv="2411.14402",
        year=2025,
        batch="datamodules.image_captions.ImageTextBatch",
        kind="vision and text, pre-training",
        links={
            "vocab_size": "vocab_size",
            "pad_id": "pad_id",
            "eos_id": "eos_id",
            "context_length": "context_length",
            "class_prompts": "class_prompts",
            "in_channels": "in_channels",
            "image_size": "image_size",
        },
        # means over predicted patches and tokens: halves of a batch count as many only where nothing is drawn
        check_options={"accumulation": {"model.objective": "image_only", "model.mask": "causal"}},
    )

    def __init__(
        self,
        vocab_size: int,
        pad_id: int,
        eos_id: int,
        context_length: int = 77,
        class_prompts: list[list[int]] | None = None,
        in_channels: int = 3,
        image_size: int = 224,
        trunk: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        text_tower: dict[str, Any] | None = None,
        objective: str = "aimv2",
        alpha: float = 0.4,
        mask: str = "prefix",
        order: str = "image_text",
        image_head: str = "linear",
        pixel_norm: PixelNorm = "official",
        lr: float = 1e-3,
        final_lr: float = 1e-5,
        warmup_steps: int = 12500,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        init_from: str | None = None,
        init_parts: str = "trunk",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, accepted in CHOICES.items():
            if self.hparams[name] not in accepted:
                raise ValueError(f"{name}: {self.hparams[name]!r} is not accepted; accepted: {', '.join(accepted)}")
        if mask == "full" and objective in ("aimv2", "image_only"):
            raise ValueError(f"mask: 'full' shows objective {objective!r} the patches it predicts; accepted: captioner")
        if alpha < 0:
            raise ValueError(f"alpha: {alpha} is not accepted; accepted: 0 or more")
        self.trunk = build_trunk(trunk or {"size": "large"}, image_size, in_channels)
        self.pixels, self.texts = objective in ("aimv2", "image_only"), objective in ("aimv2", "captioner")
        self.decoder, self.pixel_mlp = build_decoder(
            decoder or {},
            self.trunk.width,
            self.trunk.patch_size**2 * in_channels if self.pixels else 0,
            vocab_size if self.texts else 0,
            image_head,
            context_length=context_length,
            order=order,
            pad_id=pad_id,
        )
        self.towers: Towers | None = None
        if objective in CONTRASTIVE:
            pool, size = "attention" if objective == "lit" else "mean", (self.trunk.width, self.trunk.heads)
            self.towers = build_towers(text_tower or {}, *size, vocab_size, context_length, eos_id, pool)
        if objective == "lit":
            self.trunk.requires_grad_(False)
        self.means: Any = nn.ModuleDict({name: MeanMetric() for name in self.measured()})
        classes = len(class_prompts or [])
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=-1) if classes else None
        prompts = [torch.tensor(prompt) for prompt in class_prompts or []]
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad_id) if prompts else None
        self.register_buffer("prompts", padded, persistent=False)
        self.prompts: Tensor | None
        self.shown: dict[str, Tensor] = {}

    # -- training ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Encode under the mask, decode patches and caption, and add their losses: `L_text + alpha L_pixel`."""
        if self.towers is not None:
            parts = {"contrastive": self.contrastive(batch)}
        else:
            count = len(batch["image"])
            errors = self.errors(batch, self.draw_prefix(batch, count * world_size(), count * rank()))
            norms = {"pixel": self.hparams["pixel_norm"], "text": "official"}
            parts = {name: pooled_mean(*found, norms[name]) for name, found in errors.items() if name in norms}
        loss = torch.stack([self.weight(name) * value for name, value in parts.items()]).sum()
        logged = {f"train/loss_{name}": value.detach() for name, value in parts.items()}
        self.log_dict({"train/loss": loss.detach(), **logged}, on_step=True, on_epoch=False)
        return loss

    def weight(self, part: str) -> float:
        """Weight of a part of the loss."""
        return self.hparams["alpha"] if part == "pixel" and self.texts else 1.0

    def draw_prefix(
        self, batch: dict[str, Tensor], total: int, start: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw `M` for the images of a batch that stand at `start` in a global batch of `total` ones; int64 `[B]`.

        `prefix`: uniform over 1 .. I - 1 of the `I` patches of an image. `causal` is a prefix of one patch, `full` one
        of all.
        """
        images, mask = batch["image"], self.hparams["mask"]
        patches = self.count_patches(images)
        if mask != "prefix":
            return torch.full((len(images),), 1 if mask == "causal" else patches, device=images.device)
        rows = slice(start, start + len(images))
        if "grid" in batch:
            share = torch.rand(total, generator=generator)[rows].to(images.device)
            return 1 + (share * (batch["grid"].prod(dim=1) - 1)).long()
        return torch.randint(1, patches, (total,), generator=generator)[rows].to(images.device)

    def count_patches(self, images: Tensor) -> int:
        """Length of the sequences of images `[B, c, H, W]` or of patches `[B, I, P]`."""
        if images.ndim == 3:
            return images.shape[1]
        return (images.shape[2] // self.trunk.patch_size) * (images.shape[3] // self.trunk.patch_size)

    def encode(self, images: Tensor, prefix_len: Tensor, grid: Tensor | None = None) -> Tensor:
        """Features `[B, I, D]` under the mask of training; no patch sees the zeros after the last one."""
        full = self.hparams["mask"] == "full"
        return self.trunk(images, None if full else prefix_mask(prefix_len, self.count_patches(images)), grid)

    def errors(self, batch: dict[str, Tensor], prefix_len: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Errors of patches and tokens and which of them count, and of a prediction of zeros beside them.

        Raises:
            ValueError: If images are sequences of patches and `pixel_norm` counts all of them.
        """
        images, grid = batch["image"], batch.get("grid")
        real = None if grid is None else real_patches(grid, images.shape[1])
        if real is not None and self.hparams["pixel_norm"] == "paper":
            raise ValueError("pixel_norm: 'paper' is made for images of one size; accepted: official")
        features = self.encode(images, prefix_len, grid)
        text = self.checked(batch["text"]) if self.texts else None
        pixels, logits = (None, None) if self.decoder is None else self.decoder(features, text, real)
        if self.pixel_mlp is not None:
            pixels = self.pixel_mlp(features)
        found = {}
        if pixels is not None:
            target = normalise_patches(images if images.ndim == 3 else patchify(images, self.trunk.patch_size))
            found["pixel"] = pixel_errors(pixels, target, prefix_len, real)
            if not self.training:
                found["predict_zero"] = pixel_errors(torch.zeros_like(target), target, prefix_len, real)
        if logits is not None:
            found["text"] = token_errors(logits, batch["text"], self.hparams["pad_id"])
        return found

    def checked(self, text: Tensor) -> Tensor:
        """The captions, if they are not too long.

        Raises:
            ValueError: If they are.
        """
        if text.shape[1] > self.hparams["context_length"]:
            raise ValueError(
                f"captions of {text.shape[1]} tokens are longer than context_length: {self.hparams['context_length']}"
            )
        return text

    def contrastive(self, batch: dict[str, Tensor]) -> Tensor:
        """Contrastive loss over the images and captions of all ranks.

        Raises:
            ValueError: If the images are sequences of patches.
        """
        assert self.towers is not None
        if "grid" in batch:
            raise ValueError(f"objective: {self.hparams['objective']!r} is made for images of one size")
        image, caption = self.embed_images(batch["image"]), self.towers.embed_text(self.checked(batch["text"]))
        return contrastive_loss(all_gather_rows(image), all_gather_rows(caption), self.towers.scale)

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings `[B, d]` of unit length; contrastive objectives alone."""
        assert self.towers is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.hparams["objective"] != "lit"):
            tokens = self.trunk(images)
        return self.towers.embed_images(tokens)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def measured(self) -> list[str]:
        """Names of the losses that evaluation measures."""
        if self.towers is not None:
            return ["contrastive"]
        return [*(["pixel", "predict_zero"] if self.pixels else []), *(["text"] if self.texts else [])]

    def _evaluate(self, batch: dict[str, Tensor], stage: str, batch_idx: int) -> None:
        images, count = batch["image"], len(batch["image"])
        if batch_idx == 0:  # for the figures
            self.shown = {key: batch[key][:6] for key in ("image", "text", "grid") if key in batch}
        if self.towers is not None:
            self.means["contrastive"].update(self.contrastive(batch), count)
            if self.accuracy is not None:
                self.accuracy.update(self.classify(images), batch["target"])
                self.log(f"{stage}/acc_zero_shot", self.accuracy, on_epoch=True, batch_size=count)
        else:
            sizes = all_gather_rows(torch.tensor([count], device=self.device)).tolist()
            generator = torch.Generator().manual_seed(batch_idx)
            prefix_len = self.draw_prefix(batch, sum(sizes), sum(sizes[: rank()]), generator)
            for name, (errors, counted) in self.errors(batch, prefix_len).items():
                self.means[name].update(errors, counted.to(errors.dtype))
        self.log_dict({f"{stage}/loss_{k}": m for k, m in self.means.items()}, on_epoch=True, batch_size=count)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the losses, and zero-shot accuracy for contrastive objectives."""
        self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the losses, and zero-shot accuracy for contrastive objectives."""
        self._evaluate(batch, "test", batch_idx)

    def classify(self, images: Tensor) -> Tensor:
        """Cosines `[B, C]` between images and the captions of the classes."""
        assert self.towers is not None
        assert self.prompts is not None
        return self.embed_images(images) @ self.towers.embed_text(self.prompts).T

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, I, D]` of images `[B, c, H, W]`, without a mask."""
        return self.trunk(images)

    def features(self, images: Tensor) -> Tensor:
        """Mean of the tokens, `[B, D]`."""
        return self.trunk(images).mean(dim=1)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Features `[B, I, D]`, and a caption `[B, N]` if captions are learned."""
        images, grid = batch["image"], batch.get("grid")
        out = {"features": self.trunk(images, grid=grid)}
        return {**out, "caption": self.caption(images, grid)} if self.texts else out

    @torch.no_grad()
    def caption(self, images: Tensor, grid: Tensor | None = None) -> Tensor:
        """Most likely captions, token by token, int64 `[B, N]`; padding after the end."""
        assert self.decoder is not None
        features = self.trunk(images, grid=grid)
        real = None if grid is None else real_patches(grid, images.shape[1])
        return self.decoder.caption(features, self.hparams["eos_id"], self.hparams["context_length"], real)

    def export(self, folder: str) -> None:
        """Write the encoder as a folder that `Aimv2VisionModel.from_pretrained` reads, for `zoo export`."""
        export_trunk(self.trunk, folder)

    def figures(self) -> dict[str, Figure]:
        """Next patches that are predicted, and captions, for a few images of the last evaluation."""
        from zoo.methods.aimv2.figures import caption_figure, patch_figure

        if not self.shown:
            return {}
        drawn = {}
        images, grid, text = self.shown["image"], self.shown.get("grid"), self.shown["text"]
        pictures = list(images) if grid is None else self.pictures(images, grid)
        if self.pixels:
            shown = [self.predicted_patches(*pair) for pair in zip(pictures, text, strict=True)]
            drawn["next_patches"] = patch_figure(shown, pictures, self.trunk.patch_size)
        if self.texts:
            decode = getattr(getattr(self.trainer, "datamodule", None), "decode", str)
            words = [[decode(row) for row in rows.tolist()] for rows in (text, self.caption(images, grid))]
            drawn["captions"] = caption_figure(pictures, *words)
        return drawn

    def pictures(self, patches: Tensor, grid: Tensor) -> list[Tensor]:
        """Images `[c, H, W]` of sequences of patches."""
        p = self.trunk.patch_size
        sizes = [(rows, columns) for rows, columns in grid.tolist()]
        rows = zip(patches, sizes, strict=True)
        return [unpatchify(x[None, : h * w], p, h * p, w * p)[0] for x, (h, w) in rows]

    @torch.no_grad()
    def predicted_patches(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, int]:
        """Normalised patches of an image `[c, H, W]` and their predictions `[I, P]`, and the length of the prefix.

        The prefix is a third of the image. A prediction of it is not made: its patches are the true ones.
        """
        images = image[None]
        prefix = max(1, self.count_patches(images) // 3)
        target = normalise_patches(patchify(images, self.trunk.patch_size))
        features = self.encode(images, torch.tensor([prefix], device=image.device))
        if self.pixel_mlp is not None:
            pixels = self.pixel_mlp(features)
        else:
            assert self.decoder is not None
            pixels, _ = self.decoder(features, text[None] if self.hparams["order"] == "text_image" else None)
        assert pixels is not None
        return target[0], torch.cat([target[0, :prefix], pixels[0, prefix - 1 : -1].float()]), prefix

    # -- first weights and optimiser --------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load `init_from` before training; a resumed run has its weights in the checkpoint."""
        if stage == "fit" and self.hparams["init_from"] and not self.trainer.ckpt_path:
            if self.hparams["init_parts"] == "trunk":
                load_trunk(self.trunk, self.hparams["init_from"])
            else:
                load_network(self, self.hparams["init_from"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamLH with warm-up and cosine."""
        hp = self.hparams
        optimizer = adam_lh(self.named_parameters(), hp["lr"], hp["weight_decay"], hp["betas"])
        steps = total_steps(self.trainer)
        scheduler = warmup_cosine_lr(optimizer, steps, hp["warmup_steps"], hp["final_lr"] / hp["lr"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
