"""Image-text sets from files: webdataset shards, data sets of `datasets`, and folders of images with a caption file.

Captions are cut into tokens by the tokenizer of a `transformers` model. Rows are read when a batch asks for them, and a
batch is a function of (seed, epoch, index), as everywhere in the zoo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.caption_rows import Rows, open_rows
from datamodules.image_captions import ImageTextBatch
from datamodules.image_folder import read_image
from datamodules.loading import Batches, ResumableLoader, ZooDataModule, epoch_permutation, keyed_generator

#: Of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CaptionTokenizer:
    """Captions as tokens of a `transformers` model, each with its end.

    Args:
        name: Name or folder of a model with a tokenizer.
        context_length: Most tokens of a caption.
        truncate: Cut longer captions (their end stays the last token); else they are refused.

    Raises:
        ValueError: If there is no such tokenizer, or if it has no token that ends a text.
    """

    def __init__(self, name: str, context_length: int, truncate: bool) -> None:
        from transformers import AutoTokenizer

        self.context_length, self.truncate = context_length, truncate
        try:
            self.inner = AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        end = self.inner.eos_token_id if self.inner.eos_token_id is not None else self.inner.sep_token_id
        if end is None:
            raise ValueError(f"tokenizer: {name!r} has no token that ends a caption")
        self.eos_id: int = end
        #: Many tokenizers of image-text models (CLIP, SigLIP) fill with the end token.
        self.pad_id: int = end if self.inner.pad_token_id is None else self.inner.pad_token_id
        self.vocab_size: int = len(self.inner)

    def encode(self, caption: str, where: str) -> list[int]:
        """Tokens of a caption, with those that the tokenizer adds.

        Raises:
            ValueError: If the caption is empty, or too long and not to be cut; `where` names it.
        """
        if not caption.strip():
            raise ValueError(f"{where}: the caption is missing")
        ids: list[int] = self.inner(caption, verbose=False)["input_ids"]
        ids = ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]
        if len(ids) > self.context_length:
            if not self.truncate:
                raise ValueError(
                    f"{where}: the caption has {len(ids)} tokens; accepted: context_length: {self.context_length} or "
                    "fewer (truncate: true cuts longer ones)"
                )
            ids = [*ids[: self.context_length - 1], self.eos_id]
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The words up to the end of the caption."""
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return str(self.inner.decode(tokens[:end], skip_special_tokens=True)).strip()


def padded(captions: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Captions as `[B, T]`, `T` the length of the longest, padded on the right."""
    rows = [torch.tensor(caption, dtype=torch.int64) for caption in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)


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


class _Pairs(Batches):
    """Images with captions, read from rows; augmented and shuffled for training."""

    def __init__(self, data: ImageTextSet, rows: Rows, places: range, train: bool) -> None:
        self.source, self.places, self.train = rows, places, train
        self.tokenizer, self.pad_id = data.tokens, data.pad_id
        self.size, self.seed = data.batch_size if train else data.eval_batch_size, data.data_seed
        self.transform = data.transforms[0 if train else 1]

    def __len__(self) -> int:
        full, rest = divmod(len(self.places), self.size)
        return full + (not self.train and rest > 0)

    def batch(self, epoch: int, index: int) -> ImageTextBatch:
        n = len(self.places)
        places = range(n)[index * self.size : (index + 1) * self.size]
        chosen = list(places)
        if self.train:
            chosen = epoch_permutation(n, self.seed, epoch)[places.start : places.stop].tolist()
        mine = self.rows(len(chosen))
        images, captions = [], []
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            for place, number in enumerate(chosen[mine], start=mine.start):
                row = self.places[number]
                image, choices = self.source[row]
                torch.manual_seed(keyed_generator(self.seed, "pair", epoch, index, place).initial_seed())
                choice = int(torch.randint(len(choices), ())) if self.train else 0
                images.append(self.transform(image))
                captions.append(self.tokenizer.encode(choices[choice], self.source.where(row)))
        return {
            "image": torch.stack(images),
            "text": padded(captions, self.pad_id),
            "target": torch.full((len(images),), -1),
        }


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
        self._pad_id = pad_id
        self.parts: dict[str, tuple[Rows, range]] = {}
        self.labelled: tuple[list[str], Tensor] = ([], torch.empty(0, dtype=torch.int64))

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

    def train_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch`, augmented."""
        return self.loader(_Pairs(self, *self.parts["train"], train=True))

    def val_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of some labelled images, if there is a `class_root`, else of validation pairs."""
        if self.class_root is not None:
            return self.loader(_Classes(self, self.val_images), same_every_epoch=True)
        return self.loader(_Pairs(self, *self.parts["val"], train=False), same_every_epoch=True)

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageTextBatch` of the labelled images, if there is a `class_root`, else of the validation pairs."""
        if self.class_root is None:
            return self.val_dataloader()
        return self.loader(_Classes(self), same_every_epoch=True)

    predict_dataloader = test_dataloader
