"""Image data sets that fit in memory: where they lie, how to get them, and their images as one tensor.

Nothing here runs code from a data file: the pickles of CIFAR are read by an unpickler that knows arrays alone.
"""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
#: Folders that are searched for every data set where no `root` is given; `ZOO_DATA` comes first.
DATA_FOLDERS = (Path("data"), Path("~/data"))

Arrays = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ImageSource:
    """A data set of small images.

    Attributes:
        name: Name of the data set.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width in pixels.
        mean: Mean of each channel of the training images, in [0, 1].
        std: Standard deviation of each channel.
        places: Candidate places, given the folders to search.
        read: Images and classes of the training or test part from a place.
        how_to_get: What to tell somebody who lacks it.
        download: Fetches it into a folder; None where it cannot be fetched.
        system: Where a system package puts it.
    """

    name: str
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    places: Callable[[list[Path]], list[Path]]
    read: Callable[[Path, bool], Arrays]
    how_to_get: str
    download: Callable[[Path], None] | None = None
    system: tuple[Path, ...] = ()

    def candidates(self, root: str | None) -> list[Path]:
        """Places where the data set is looked for, in this order: those in `root`, if it is given, and no others."""
        if root:
            return self.places([Path(root).expanduser()])
        given = os.environ.get("ZOO_DATA")
        folders = [*([Path(given)] if given else []), *DATA_FOLDERS]
        return [*self.places([folder.expanduser() for folder in folders]), *self.system]

    def find(self, root: str | None = None, download: bool = False) -> Path:
        """Return the place of the data set.

        Args:
            root: Folder to look in; None for `$ZOO_DATA`, `data`, `~/data` and where a system package puts it.
            download: Fetch it into `root` (or `data`) if it is nowhere.

        Raises:
            FileNotFoundError: If it is nowhere; says where it was looked for and how to get it.
        """
        for place in self.candidates(root):
            if place.exists():
                return place
        if download and self.download is not None:
            self.download(Path(root or "data").expanduser())
            return self.find(root)
        looked = ", ".join(str(place) for place in self.candidates(root))
        elsewhere = next((place for place in self.candidates(None) if place.exists()), None)
        hint = self.how_to_get if elsewhere is None else f"It lies in {elsewhere}: leave out `data.init_args.root`."
        raise FileNotFoundError(f"data set {self.name} was not found; looked for: {looked}. {hint}")

    def load(self, root: str | None, train: bool) -> Arrays:
        """Return images `[N, c, H, W]` (uint8) and classes `[N]` (int64) of the training or the test part.

        Raises:
            FileNotFoundError: If the data set or a file of it is missing.
            ValueError: If a file is damaged.
        """
        images, target = self.read(self.find(root), train)
        if len(images) != len(target):
            raise ValueError(f"{self.name} in {self.find(root)}: {len(images)} images but {len(target)} labels")
        return images, target


def read_idx(path: Path) -> Tensor:
    """Read an IDX file of bytes (the format of MNIST), compressed or not; uint8 of the shape that it names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated or no such file at all.
    """
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and not compressed.exists():
        raise FileNotFoundError(f"{path} is missing (neither it nor {compressed.name} is there)")
    try:
        content = path.read_bytes() if path.exists() else gzip.decompress(compressed.read_bytes())
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise ValueError(f"{compressed} is damaged ({error}); get the file again") from error
    magic = content[:4]
    if len(content) < 8 or magic[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {magic!r}")
    shape = struct.unpack(f">{magic[3]}I", content[4 : 4 + 4 * magic[3]])
    data = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * magic[3])
    if data.size != int(np.prod(shape)):
        raise ValueError(f"{path} is truncated: {data.size} bytes of {int(np.prod(shape))} for shape {shape}")
    return torch.from_numpy(data.reshape(shape).copy())


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; anything else in the file is refused, not run."""

    ALLOWED = frozenset(
        [("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array is built from."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_fashion_mnist(place: Path, train: bool) -> Arrays:
    part = "train" if train else "t10k"
    images = read_idx(place / f"{part}-images-idx3-ubyte")
    return images[:, None], read_idx(place / f"{part}-labels-idx1-ubyte").long()


def _fashion_mnist_places(folders: list[Path]) -> list[Path]:
    inside = [folder / sub for folder in folders for sub in ("FashionMNIST/raw", "fashion-mnist")]
    # a folder that holds the files themselves
    direct = [folder for folder in folders if any(folder.glob("t10k-images-idx3-ubyte*"))]
    return [*direct, *inside]


def _read_cifar(label_key: str, train_files: tuple[str, ...], test_files: tuple[str, ...]) -> Callable[..., Arrays]:
    def read(place: Path, train: bool) -> Arrays:
        images, target = [], []
        for name in train_files if train else test_files:
            path = place / name
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing")
            try:
                with path.open("rb") as file:
                    content = ArrayUnpickler(file, encoding="latin1").load()
                images.append(np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
                target.append(np.asarray(content[label_key], dtype=np.int64))
            except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
                raise ValueError(f"{path} is damaged or no batch of CIFAR ({error}); get the file again") from error
        return torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(target))

    return read


def _read_digits(place: Path, train: bool) -> Arrays:
    from sklearn.datasets import load_digits

    content = load_digits()
    images = torch.from_numpy(content["images"] * (255 / 16)).round().to(torch.uint8)[:, None]
    target = torch.from_numpy(content["target"]).long()
    # writers follow one another: every fifth image is for the test
    chosen = (torch.arange(len(images)) % 5 != 4) == train
    return images[chosen], target[chosen]


def _digits_places(folders: list[Path]) -> list[Path]:
    from importlib.util import find_spec

    found = find_spec("sklearn")
    return [Path(found.origin).parent / "datasets" if found and found.origin else Path("sklearn/datasets")]


def _torchvision(name: str) -> Callable[[Path], None]:
    def download(root: Path) -> None:
        import torchvision

        for train in (True, False):
            getattr(torchvision.datasets, name)(str(root), train=train, download=True)

    return download


def _below(name: str) -> Callable[[list[Path]], list[Path]]:
    return lambda folders: [folder if folder.name == name else folder / name for folder in folders]


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_GET = "Set `data.init_args.download: true` where there is a network, or `data.init_args.root` to its folder"

SOURCES: dict[str, ImageSource] = {
    source.name: source
    for source in (
        ImageSource(
            "fashion_mnist", 10, 1, 28, (0.2860,), (0.3530,), _fashion_mnist_places, _read_fashion_mnist,
            f"`apt-get install dataset-fashion-mnist` on Debian and Ubuntu. {_GET}.", _torchvision("FashionMNIST"),
            (DEBIAN_FASHION_MNIST,),
        ),
        ImageSource(
            "cifar10", 10, 3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _below("cifar-10-batches-py"),
            _read_cifar("labels", _BATCHES, ("test_batch",)), f"{_GET}.", _torchvision("CIFAR10"),
        ),
        ImageSource(
            "cifar100", 100, 3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), _below("cifar-100-python"),
            _read_cifar("fine_labels", ("train",), ("test",)), f"{_GET}.", _torchvision("CIFAR100"),
        ),
        ImageSource(
            "digits", 10, 1, 8, (0.3053,), (0.3760,), _digits_places, _read_digits,
            "It is part of scikit-learn: `pip install scikit-learn`.",
        ),
    )
}  # fmt: skip


def source(name: str) -> ImageSource:
    """Return the data set of that name.

    Raises:
        ValueError: If there is none; names those that there are.
    """
    if name not in SOURCES:
        raise ValueError(f"source: no data set {name!r}; accepted: {', '.join(SOURCES)}")
    return SOURCES[name]


def found() -> dict[str, str]:
    """Return for each data set the place where it was found, or an empty string."""
    return {
        name: next((str(place) for place in source.candidates(None) if place.exists()), "")
        for name, source in SOURCES.items()
    }
