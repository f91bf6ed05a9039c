"""Labelled folders of images under timm's transforms, for probes and other training on labels alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.image_folder import ImageFolders, _EvalBatches
from datamodules.loading import ResumableLoader

#: Of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Seeded:
    """A transform whose random numbers of Python and numpy follow from torch's, and leave theirs as they were."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        """Transform an image."""
        kept, kept_numpy = random.getstate(), np.random.get_state()
        seed = int(torch.randint(2**31, ()))
        random.seed(seed)
        np.random.seed(seed)
        try:
            return self.transform(image)
        finally:
            random.setstate(kept)
            np.random.set_state(kept_numpy)


class _View:
    """Stands for `Augment` where a pipeline for single images is asked for."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def torchvision(self) -> Callable[[Any], Tensor]:
        """The pipeline."""
        return self.transform


class LabelledFolders(ImageFolders):
    """Images in `root/train/<class>/*` and `root/val/<class>/*`, all of them labelled, under timm's transforms.

    Batches are `SemiSupervisedBatch` without views, and `ImageBatch`. `val` is the test set.

    Args:
        root: Folder with `train` and `val`.
        labels_per_class: Images of each class to train on; null for all.
        val_per_class: Training images of each class that are kept for validation.
        image_size: Height and width of the images in pixels.
        batch_size: Images in a (global) batch.
        scale: Smallest and largest area of the random crop, as a part of the image.
        flip: Probability of a horizontal flip.
        color_jitter: Strength of timm's colour jitter; an `auto_augment` takes its place, as timm has it.
        auto_augment: Policy of timm, e.g. `rand-m9-mstd0.5-inc1`; null for none.
        crop_pct: The part of the middle that evaluation sees.
        mean: Subtracted from each channel, of pixels from 0 to 1; null for ImageNet's.
        std: Each channel is divided by it; null for ImageNet's.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; decoding needs several.
        data_seed: Seed of split, order and augmentation.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        labels_per_class: int | None = None,
        val_per_class: int = 10,
        image_size: int = 224,
        batch_size: int = 1024,
        scale: list[float] | None = None,
        flip: float = 0.5,
        color_jitter: float = 0.3,
        auto_augment: str | None = None,
        crop_pct: float = 0.875,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        eval_batch_size: int = 256,
        num_workers: int = 8,
        data_seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            labels_per_class=labels_per_class,
            val_per_class=val_per_class,
            image_size=image_size,
            batch_size=batch_size,
            labelled_batch_size=batch_size,
            views=[],
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            data_seed=data_seed,
        )
        from timm.data import create_transform

        common: dict[str, Any] = {"input_size": image_size, "interpolation": "bicubic"}
        common |= {"mean": tuple(mean or MEAN), "std": tuple(std or STD)}
        train = create_transform(
            **common,
            is_training=True,
            scale=tuple(scale or (0.08, 1.0)),  # type: ignore[arg-type]
            hflip=flip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
        )
        self.labelled_augment: Any = _View(Seeded(train))
        self.test_transform: Any = create_transform(**common, is_training=False, crop_pct=crop_pct)

    def _evaluation(self, paths: list[str], target: Tensor) -> ResumableLoader:
        batches = _EvalBatches(paths, target, self.image_size, self.eval_batch_size)
        batches.transform = self.test_transform
        return self.loader(batches, same_every_epoch=True)
