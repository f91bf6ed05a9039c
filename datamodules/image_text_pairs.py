"""Batches of images with captions that are read from rows: of one size, or of the shape that each image has.

The latter is the native-resolution stage of AIMv2 (arXiv 2411.14402): each batch has an area of its own, in
patches, and as many images as make the number of patches in a batch the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.caption_rows import Rows
from datamodules.image_captions import ImageTextBatch
from datamodules.image_text_tokens import CaptionTokenizer, padded
from datamodules.loading import Batches, epoch_permutation, keyed_generator


def transforms(
    size: int, scale: Sequence[float], flip: float, mean: Sequence[float], std: Sequence[float]
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Pipelines for a PIL image in training (random crop and flip) and in evaluation (7/8 of the middle); bicubic."""
    from torchvision.transforms import InterpolationMode, v2

    cubic = InterpolationMode.BICUBIC
    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    crop = v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=cubic, antialias=True)
    train = v2.Compose([crop, v2.RandomHorizontalFlip(flip), *last])
    resize = v2.Resize(round(size / 0.875), interpolation=cubic, antialias=True)
    return train, v2.Compose([resize, v2.CenterCrop(size), *last])


class Pairs(Batches):
    """Images with captions, read from rows; shuffled for training.

    Args:
        rows: Images and captions.
        places: The rows that are served.
        tokenizer: Cuts captions into tokens.
        pad_id: Token that fills captions.
        transform: Makes a tensor of an image; may draw from the global generator.
        size: Images in a batch.
        seed: Seed of order, transforms and choice of captions.
        train: Whether to shuffle, to leave out the last images that fill no batch, and to choose among captions.
    """

    def __init__(
        self,
        rows: Rows,
        places: range,
        tokenizer: CaptionTokenizer,
        pad_id: int,
        transform: Callable[[Any], Tensor],
        size: int,
        seed: int,
        train: bool,
    ) -> None:
        self.source, self.places, self.train = rows, places, train
        self.tokenizer, self.pad_id, self.transform = tokenizer, pad_id, transform
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        full, rest = divmod(len(self.places), self.size)
        return full + (not self.train and rest > 0)

    def chosen(self, epoch: int, index: int) -> list[int]:
        """Numbers in `places` of the images of a global batch."""
        numbers = range(len(self.places))[index * self.size : (index + 1) * self.size]
        if not self.train:
            return list(numbers)
        return epoch_permutation(len(self.places), self.seed, epoch)[numbers.start : numbers.stop].tolist()

    def view(self, image: Any, epoch: int, index: int) -> Any:
        """What `collate` takes of an image of a batch; may draw from the global generator."""
        return self.transform(image)

    def collate(self, views: list[Any]) -> dict[str, Tensor]:
        """The images of a batch, from what `view` made of each."""
        return {"image": torch.stack(views)}

    def batch(self, epoch: int, index: int) -> ImageTextBatch:
        chosen = self.chosen(epoch, index)
        mine = self.rows(len(chosen))
        views, captions = [], []
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            for place, number in enumerate(chosen[mine], start=mine.start):
                row = self.places[number]
                image, choices = self.source[row]
                torch.manual_seed(keyed_generator(self.seed, "pair", epoch, index, place).initial_seed())
                choice = int(torch.randint(len(choices), ())) if self.train else 0
                views.append(self.view(image, epoch, index))
                captions.append(self.tokenizer.encode(choices[choice], self.source.where(row)))
        text, target = padded(captions, self.pad_id), torch.full((len(views),), -1)
        return cast("ImageTextBatch", {**self.collate(views), "text": text, "target": target})


@dataclass(frozen=True)
class Native:
    """How images of their own shapes are served.

    Args:
        patch_size: Side of a patch in pixels.
        patches: Patches in a training batch, of all images together.
        area: Least and greatest exponent of two of the patches of an image.
        eval_area: Patches of an image in evaluation.
        flip: Probability of a horizontal flip in training.
        mean: Subtracted from each channel, of pixels from 0 to 1.
        std: Each channel is divided by it.
    """

    patch_size: int
    patches: int
    area: tuple[float, float]
    eval_area: int
    flip: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def exponent(share: Tensor, area: tuple[float, float]) -> Tensor:
    """Quantiles `share` of the exponent: a standard normal, cut to [-1, 1], mapped linearly to `area`; float64."""
    tail = (1 - math.erf(math.sqrt(0.5))) / 2
    normal = math.sqrt(2) * torch.erfinv(2 * (tail + (1 - 2 * tail) * share.double()) - 1)
    return area[0] + (normal.clamp(-1, 1) + 1) / 2 * (area[1] - area[0])


@lru_cache(maxsize=2)
def draw_areas(count: int, area: tuple[float, float], seed: int, epoch: int) -> Tensor:
    """Patches of an image in each of the `count` batches of an epoch, int64 `[count]`; it is kept: do not write."""
    share = torch.rand(count, dtype=torch.float64, generator=keyed_generator(seed, "area", epoch))
    return exponent(share, area).exp2().long()


def fit_grid(height: int, width: int, area: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most `area` patches in the shape of an image, to whole patches."""
    scale = math.sqrt(area / (height * width))
    rows = min(max(int(height * scale + 1e-9), 1), area)
    return rows, max(min(int(width * scale + 1e-9), area // rows), 1)


class NativePairs(Pairs):
    """Images with captions, each in its own shape, as a sequence of patches with zeros after the last one.

    A training batch has an area drawn for it; images are resized to fit, up or down, and their number is such that
    all batches have about as many patches. Evaluation has one area and `size` images in a batch.

    Args:
        native: How images are served.
        options: Those of `Pairs`.

    Departures:
        The paper keeps aspect ratios; here they are kept to whole patches, so that no patch is padded within.
    """

    def __init__(self, native: Native, **options: Any) -> None:
        super().__init__(transform=self.pixels, **options)
        self.native = native
        middle = (torch.arange(1000) + 0.5) / 1000
        mean = float(self.count(exponent(middle, native.area).exp2().long()).double().mean())
        self.length = max(1, int(len(self.places) / mean)) if self.train else super().__len__()

    def pixels(self, image: Any) -> Tensor:
        """A PIL image as normalised float32 `[3, H, W]`."""
        from torchvision.transforms.v2 import functional as tv

        return tv.normalize(tv.pil_to_tensor(image).float() / 255, list(self.native.mean), list(self.native.std))

    def count(self, areas: Tensor) -> Tensor:
        """Images in batches of these areas."""
        return (self.native.patches // areas).clamp(min=1)

    def __len__(self) -> int:
        return self.length

    def chosen(self, epoch: int, index: int) -> list[int]:
        """Numbers in `places` of the images of a global batch; the order of an epoch begins anew where it ends."""
        if not self.train:
            return super().chosen(epoch, index)
        counts = self.count(draw_areas(self.length, self.native.area, self.seed, epoch))
        numbers = torch.arange(int(counts[index])) + int(counts[:index].sum())
        return epoch_permutation(len(self.places), self.seed, epoch)[numbers % len(self.places)].tolist()

    def view(self, image: Any, epoch: int, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Patches `[rows columns, P]` of an image, values ordered row, column, channel, and its rows and columns."""
        p, area = self.native.patch_size, self.native.eval_area
        if self.train:
            area = int(draw_areas(self.length, self.native.area, self.seed, epoch)[index])
        rows, columns = fit_grid(image.height, image.width, area)
        pixels = self.transform(image.resize((columns * p, rows * p), resample=3))  # bicubic, with antialiasing
        if self.train and float(torch.rand(())) < self.native.flip:
            pixels = pixels.flip(2)
        squares = pixels.unflatten(2, (columns, p)).unflatten(1, (rows, p))
        return squares.permute(1, 3, 2, 4, 0).reshape(rows * columns, -1), (rows, columns)

    def collate(self, views: list[Any]) -> dict[str, Tensor]:
        """Sequences, padded with zeros to the longest, and their grids."""
        patches, grids = zip(*views, strict=True)
        return {"image": torch.nn.utils.rnn.pad_sequence(list(patches), batch_first=True), "grid": torch.tensor(grids)}
