"""Image-text sets from files: webdataset shards, data sets of `datasets`, and folders of images with a caption file.

Captions are cut into tokens by the tokenizer of a `transformers` model. Rows are read when a batch asks for them, and a
batch is a function of (seed, epoch, index), as everywhere in the zoo.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.caption_rows import Rows, open_rows
from datamodules.image_captions import ImageTextBatch
from datamodules.image_folder import read_image
from datamodules.image_text_pairs import Native, NativePairs, Pairs, transforms
from datamodules.image_text_tokens import CaptionTokenizer, padded
from datamodules.loading import Batches, ResumableLoader, ZooDataModule

#: Of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Classes(Batches):
    """Labelled images in folders of their classes, each with the caption that names its class."""

    def __init__(self, data: ImageTextSet, count: int | None = None) -> None:
        paths, target = data.labelled
        count = len(paths) if count is None else min(count, len(paths))
        chosen = torch.arange(count) * len(paths) // count  # evenly spread: files are sorted by class
        self.paths, self.target = [paths[i] for i in chosen.tolist()], target[chosen]
        self.prompts = padded(data.class_prompts or [], data.pad_id)
        self.size, self.transform = data.eval_batch_size, data.transforms[1]

    def __len__(self) -> int:
        return -(-len(self.paths) // self.size)

    def batch(self, epoch: int, index: int) -> ImageTextBatch:
        places = range(len(self.paths))[index * self.size : (index + 1) * self.size]
        mine = list(places)[self.rows(len(places))]
        target = self.target[mine]
        images = torch.stack([self.transform(read_image(self.paths[i])) for i in mine])
        return {"image": images, "text": self.prompts[target], "target": target}


class ImageTextSet(ZooDataModule):
    """Images with captions from files; batches are `ImageTextBatch`.

    Args:
        source: `hf:NAME`, a data set of the hub; a pattern of webdataset shards (`shards/*.tar`) or of .parquet, .json,
            .jsonl files that `datasets` reads; or a folder of images with a caption file.
        val_source: The same for validation; null keeps the last `val_images` rows of `source` for it.
        val_images: Rows kept for validation.
        captions: Name of the caption file of a folder: .csv, .tsv or .jsonl with `file_name` and `text`, or .json in
            the form of COCO. An image may have several captions; one is drawn each time.
        image_column: Column of the image; null for the first of image, jpg, jpeg, png, webp.
        caption_column: Column of the caption; null for the first of text, caption, txt. `json.caption` means the key
            `caption` of column `json`.
        hub_split: Split of a data set of the hub.
        tokenizer: Name or folder of a transformers model whose tokenizer is taken.
        pad_id: Token that fills captions; null for the tokenizer's. Where that is the end token too, as with CLIP and
            SigLIP, the end of a caption is not learned, as in the released code.
        context_length: Most tokens of a caption.
        truncate: Cut longer captions; else they are refused.
        class_root: Folder of labelled images, `class_root/<class>/*`, to test on and, `val_images` of them, to
            validate on instead of pairs: contrastive objectives classify them by captions of the classes.
        class_names: Text file with one name of a class in each line, in the order of the sorted folders; null for the
            names of the folders.
        prompt: Caption of a class, `{}` stands for its name.
        image_size: Height and width of the images in pixels.
        scale: Smallest and largest area of the random crop, as a part of the image.
        flip: Probability of a horizontal flip.
        native_patch: Side of a patch, for the native-resolution stage: images keep their shape and become sequences of
            patches. A training batch has as many patches as `batch_size` images of `image_size`, for an area of an
            image that is drawn for the batch; evaluation has the area of `image_size`. Null for images of one size.
        native_area: Least and greatest area, as exponents of two of the number of patches; null for 7 to 12.
        mean: Subtracted from each channel, of pixels from 0 to 1; null for ImageNet's.
        std: Each channel is divided by it; null for ImageNet's.
        batch_size: Images in a (global) batch.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; decoding needs several.
        data_seed: Seed of order, crops and choice of captions.
    """

    in_channels = 3

    def __init__(
        self,
        source: str,
        tokenizer: str,
        val_source: str | None = None,
        val_images: int = 1000,
        captions: str = "captions.csv",
        image_column: str | None = None,
        caption_column: str | None = None,
        hub_split: str = "train",
        pad_id: int | None = None,
        context_length: int = 77,
        truncate: bool = True,
        class_root: str | None = None,
        class_names: str | None = None,
        prompt: str = "a photo of a {}.",
        image_size: int = 224,
        scale: list[float] | None = None,
        flip: float = 0.5,
        native_patch: int | None = None,
        native_area: list[float] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        num_workers: int = 8,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        least = {"val_images": val_images, "context_length": context_length, "image_size": image_size}
        for key, value in {**least, "batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            bound = 2 if key == "context_length" else 1
            if value < bound:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {bound} or more")
        area = [0.4, 1.0] if scale is None else scale
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"scale: {scale} is not accepted; accepted: [low, high] with 0 < low <= high <= 1")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: {flip} is no probability")
        if "{}" not in prompt:
            raise ValueError(f"prompt: {prompt!r} is not accepted; accepted: words with {{}} for the class")
        self.source, self.val_source, self.val_images = source, val_source, val_images
        self.reading: dict[str, Any] = {
            "captions": captions,
            "image": image_column,
            "caption": caption_column,
            "split": hub_split,
        }
        self.tokenizer, self.context_length, self.truncate = tokenizer, context_length, truncate
        self.class_root = None if class_root is None else Path(class_root).expanduser()
        self.class_names, self.prompt = class_names, prompt
        self.image_size, self.batch_size, self.eval_batch_size = image_size, batch_size, eval_batch_size
        self.transforms = transforms(image_size, area, flip, mean or MEAN, std or STD)
        self.native: Native | None = None
        if native_patch is not None:
            low, high = self._native_range(native_patch, native_area or [7, 12])
            patches = (image_size // native_patch) ** 2
            statistics = tuple(mean or MEAN), tuple(std or STD)
            self.native = Native(native_patch, batch_size * patches, (low, high), patches, flip, *statistics)
        self._pad_id = pad_id
        self.parts: dict[str, tuple[Rows, range]] = {}
        self.labelled: tuple[list[str], Tensor] = ([], torch.empty(0, dtype=torch.int64))

    def _native_range(self, patch: int, area: list[float]) -> tuple[float, float]:
        if not 1 <= patch <= self.image_size:
            raise ValueError(f"native_patch: {patch} is not accepted; accepted: 1 to image_size: {self.image_size}")
        if self.class_root is not None:
            raise ValueError("class_root: it is classified by images of one size; accepted: null beside native_patch")
        budget = self.batch_size * (self.image_size // patch) ** 2
        if len(area) != 2 or not 0 < area[0] <= area[1] or 2 ** area[1] > budget:
            raise ValueError(
                f"native_area: {area} is not accepted; accepted: [low, high] with 0 < low <= high, and 2^high at most "
                f"the {budget} patches of a batch"
            )
        return area[0], area[1]

    @cached_property
    def tokens(self) -> CaptionTokenizer:
        """The tokenizer."""
        return CaptionTokenizer(self.tokenizer, self.context_length, self.truncate)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.tokens.vocab_size

    @property
    def pad_id(self) -> int:
        """Token that fills a caption.

        Raises:
            ValueError: If `pad_id` is no token.
        """
        if self._pad_id is None:
            return self.tokens.pad_id
        if not 0 <= self._pad_id < self.vocab_size:
            raise ValueError(f"pad_id: {self._pad_id} is not accepted; accepted: 0 to {self.vocab_size - 1}")
        return self._pad_id

    @property
    def eos_id(self) -> int:
        """Token that ends a caption."""
        return self.tokens.eos_id

    @property
    def class_prompts(self) -> list[list[int]] | None:
        """Tokens of a caption of each class in `class_root`; None without one."""
        if self.class_root is None:
            return None
        return [self.tokens.encode(self.prompt.format(name), f"class {name!r}") for name in self.names]

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes.

        Raises:
            FileNotFoundError: If there are no class folders.
            ValueError: If there are not as many names as folders.
        """
        folders = self.folders
        if self.class_names is None:
            return [folder.replace("_", " ") for folder in folders]
        lines = Path(self.class_names).expanduser().read_text("utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != len(folders):
            raise ValueError(
                f"class_names: {self.class_names} has {len(names)} names; accepted: one for each of the {len(folders)} "
                f"folders in {self.class_root}"
            )
        return names

    @property
    def folders(self) -> list[str]:
        """Names of the folders in `class_root`, sorted."""
        root = self.class_root
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root and root.is_dir() else []
        if not found:
            raise FileNotFoundError(f"class_root: no class folders in {root}; accepted: a folder with <class>/*.jpg")
        return found

    def decode(self, tokens: list[int]) -> str:
        """The words of a caption."""
        return self.tokens.decode(tokens)

    def prepare_data(self) -> None:
        """Look for the files; fetch a data set of the hub."""
        for source in filter(None, (self.source, self.val_source)):
            open_rows(source, **self.reading)

    def setup(self, stage: str) -> None:
        """Open the sets."""
        if "train" not in self.parts:
            rows = open_rows(self.source, **self.reading)
            count = len(rows)
            if self.val_source is None:
                count -= self.val_images
                self.parts["val"] = rows, range(count, len(rows))
            else:
                val = open_rows(self.val_source, **self.reading)
                self.parts["val"] = val, range(len(val))
            if count < self.batch_size:
                kept = "" if self.val_source else f" and val_images: {self.val_images}"
                raise ValueError(
                    f"batch_size: {self.batch_size}{kept} are more than the {len(rows)} pairs of {self.source}"
                )
            self.parts["train"] = rows, range(count)
        if self.class_root is not None and not self.labelled[0]:
            from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

            index = {name: i for i, name in enumerate(self.folders)}
            listed = make_dataset(str(self.class_root), index, extensions=IMG_EXTENSIONS)
            self.labelled = [path for path, _ in listed], torch.tensor([label for _, label in listed])

    def _pairs(self, part: str) -> Pairs:
        train = part == "train"
        rows, places = self.parts[part]
        options: dict[str, Any] = {"rows": rows, "places": places, "tokenizer": self.tokens, "pad_id": self.pad_id}
        options |= {"size": self.batch_size if train else self.eval_batch_size, "seed": self.data_seed, "train": train}
        if self.native is not None:
            return NativePairs(self.native, **options)
        return Pairs(transform=self.transforms[0 if train else 1], **options)

    def train_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch`, augmented."""
        return self.loader(self._pairs("train"))

    def val_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of some labelled images, if there is a `class_root`, else of validation pairs."""
        if self.class_root is not None:
            return self.loader(_Classes(self, self.val_images), same_every_epoch=True)
        return self.loader(self._pairs("val"), same_every_epoch=True)

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of the labelled images, if there is a `class_root`, else of the validation pairs."""
        if self.class_root is None:
            return self.val_dataloader()
        return self.loader(_Classes(self), same_every_epoch=True)

    predict_dataloader = test_dataloader
