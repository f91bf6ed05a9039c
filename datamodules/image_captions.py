"""Images with captions in the batch that AIMv2 learns from: small data sets in memory whose captions are made up."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from datamodules import sources
from datamodules.augment import Augment, normalise
from datamodules.captions import NOUNS, PROMPT, Vocabulary, draw_captions
from datamodules.in_memory import SourceDataModule
from datamodules.loading import Batches, ResumableLoader, epoch_permutation, keyed_generator


class ImageTextBatch(TypedDict):
    """`B` images and a caption of each."""

    image: Tensor
    """Images `[B, c, H, W]`, float32, normalised; with `grid`, patches `[B, I, P]` in raster order, then zeros."""
    text: Tensor
    """Tokens, int64 `[B, T]`, padded on the right; the last one of a caption is the end of text."""
    target: Tensor
    """Classes, int64 `[B]`, for evaluation alone; -1 where there is none."""
    grid: NotRequired[Tensor]
    """Rows and columns of patches of each image, int64 `[B, 2]`, where images have different ones."""


def trim(text: Tensor, pad_id: int) -> Tensor:
    """Cut the columns `[B, T]` that hold nothing but padding."""
    return text[:, : int((text != pad_id).any(dim=0).sum())]


class _Pairs(Batches):
    """Images and captions in memory; augmented and shuffled for training."""

    def __init__(self, data: TemplateCaptions, part: tuple[Tensor, Tensor, Tensor], train: bool) -> None:
        self.images, self.text, self.target = part
        self.view = data.augment if train else None
        self.size, self.seed = data.batch_size if train else data.eval_batch_size, data.data_seed
        self.mean, self.std, self.pad_id = data.source.mean, data.source.std, data.pad_id

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.size)
        return full + (self.view is None and rest > 0)

    def batch(self, epoch: int, index: int) -> ImageTextBatch:
        places = slice(index * self.size, (index + 1) * self.size)
        n = len(self.images)
        order = torch.arange(n) if self.view is None else epoch_permutation(n, self.seed, epoch)
        chosen = order[places]
        rows = self.rows(len(chosen))
        images = self.images[chosen[rows]]
        if self.view is None:
            images = normalise(images.float() / 255, self.mean, self.std)
        else:
            drawn = self.view.draw(len(chosen), keyed_generator(self.seed, "view", epoch, index))
            images = self.view.apply(images, {key: value[rows] for key, value in drawn.items()})
        return {
            "image": images,
            "text": trim(self.text[chosen], self.pad_id)[rows],
            "target": self.target[chosen[rows]],
        }


class TemplateCaptions(SourceDataModule):
    """Images in memory with one made-up caption each; a subclass names the data set in `source`.

    A caption tells attributes that are measured from the pixels and, sometimes, the class, see `datamodules.captions`.
    Training images are the first `train_images`, validation images the `val_images` after them.

    Args:
        root: Folder to look in; null for `$ZOO_DATA`, `data`, `~/data` and where a system package puts it.
        download: Whether to fetch it, if it is nowhere.
        train_images: Images to train on; null for all but the validation images.
        val_images: Images to validate on.
        p_class: Probability that a caption names the class.
        p_wrong: Probability that the class is drawn anew from all of them before it is named.
        coarse: Name coarse classes that several classes share.
        view: Augmentation of a training image, a mapping with the keys of `datamodules.augment.Augment`.
        batch_size: Images in a (global) batch.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; 0 is best for images in memory.
        data_seed: Seed of captions, order and augmentation.
    """

    source: sources.ImageSource

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        train_images: int | None = None,
        val_images: int = 1000,
        p_class: float = 0.5,
        p_wrong: float = 0.1,
        coarse: bool = False,
        view: dict[str, Any] | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(root, download, num_workers, data_seed)
        least = {
            "train_images": (batch_size if train_images is None else train_images, batch_size),
            "val_images": (val_images, 1),
            "batch_size": (batch_size, 1),
            "eval_batch_size": (eval_batch_size, 1),
        }
        for key, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {bound} or more")
        for key, probability in (("p_class", p_class), ("p_wrong", p_wrong)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{key}: {probability} is no probability")
        self.train_images, self.val_images = train_images, val_images
        self.p_class, self.p_wrong, self.coarse = p_class, p_wrong, coarse
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        common = {"size": self.source.image_size, "mean": self.source.mean, "std": self.source.std}
        self.augment = Augment.from_options({"scale": [0.75, 1.0], **(view or {})}, "view", **common)
        self.nouns = NOUNS[self.source.name][coarse]
        self.vocabulary = Vocabulary(self.nouns)
        self.parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.vocabulary)

    @property
    def pad_id(self) -> int:
        """Token that fills a caption."""
        return self.vocabulary.pad_id

    @property
    def eos_id(self) -> int:
        """Token that ends a caption."""
        return self.vocabulary.eos_id

    @property
    def context_length(self) -> int:
        """Most tokens of a caption."""
        return 16

    @property
    def class_prompts(self) -> list[list[int]]:
        """Tokens of a caption that names each class and nothing else."""
        return [self.vocabulary.encode(PROMPT.replace("{class}", noun)) for noun in self.nouns]

    def decode(self, tokens: list[int]) -> str:
        """The words of a caption."""
        return self.vocabulary.decode(tokens)

    def setup(self, stage: str) -> None:
        """Read the images of the stage and write their captions."""
        if stage in ("fit", "validate") and "train" not in self.parts:
            images, target = self.source.load(self.root, train=True)
            count = len(images) - self.val_images if self.train_images is None else self.train_images
            if count < self.batch_size or count + self.val_images > len(images):
                raise ValueError(
                    f"train_images: {count} and val_images: {self.val_images} are not accepted; accepted: together at "
                    f"most {len(images)}, and at least one batch of {self.batch_size} to train on"
                )
            self.parts["train"] = self.described(images[:count], target[:count])
            last = count + self.val_images
            self.parts["val"] = self.described(images[count:last], target[count:last])
        if stage in ("test", "predict") and "test" not in self.parts:
            self.parts["test"] = self.described(*self.source.load(self.root, train=False))

    def described(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, captions and classes of a part."""
        text = draw_captions(images, target, self.nouns, self.vocabulary, self.p_class, self.p_wrong, self.data_seed)
        return images, text, target

    def train_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch`, augmented."""
        return self.loader(_Pairs(self, self.parts["train"], train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of the validation images."""
        return self.loader(_Pairs(self, self.parts["val"], train=False), same_every_epoch=True)

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of the test images."""
        return self.loader(_Pairs(self, self.parts["test"], train=False), same_every_epoch=True)

    predict_dataloader = test_dataloader


class FashionMNISTCaptions(TemplateCaptions):
    """Fashion-MNIST with made-up captions: greyscale images of 28 pixels, ten kinds of clothing."""

    source = sources.source("fashion_mnist")


class DigitsCaptions(TemplateCaptions):
    """scikit-learn's digits with made-up captions: greyscale images of 8 pixels; nothing to fetch."""

    source = sources.source("digits")
