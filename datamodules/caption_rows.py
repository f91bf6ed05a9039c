"""Rows of an image and its captions: a folder with a caption file, or what `datasets` reads."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from datamodules.image_folder import read_image
from zoo.errors import did_you_mean

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "txt")
#: Builders of `datasets` by the ending of a file.
BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}


class Rows(Protocol):
    """Images with captions."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> tuple[Any, list[str]]:
        """The image (PIL, RGB) and its captions, at least one."""

    def where(self, row: int) -> str:
        """What a message calls the row."""


class FolderRows:
    """A folder of images with a file of captions.

    Args:
        folder: The folder.
        file: Name of the caption file in it. `.csv`, `.tsv` and `.jsonl` have `file_name` and `text` (or `caption`) in
            each row, as `metadata.csv` of `datasets`; `.json` is COCO's `images` and `annotations`.

    Raises:
        FileNotFoundError: If the caption file or an image that it names is missing.
        ValueError: If an image of the folder has no caption, or the file has another form.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.folder, path = folder, folder / file
        if not path.is_file():
            raise FileNotFoundError(f"captions: no file {path}; accepted: .csv, .tsv, .jsonl or .json (COCO)")
        captions: dict[str, list[str]] = {}
        for name, caption in _captions(path):
            captions.setdefault(name, []).extend([caption] if caption.strip() else [])
        from torchvision.datasets.folder import IMG_EXTENSIONS

        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS}
        gone = sorted(captions.keys() - there)
        if gone:
            raise FileNotFoundError(f"{path} names {_some(gone)} that are not in {folder}")
        silent = sorted(name for name in there if not captions.get(name))
        if silent:
            raise ValueError(f"{path}: no caption for {_some(silent)}; write one, or take the image away")
        self.rows = sorted(captions.items())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, list[str]]:
        name, captions = self.rows[row]
        return read_image(str(self.folder / name)), captions

    def where(self, row: int) -> str:
        """The file of the image."""
        return str(self.folder / self.rows[row][0])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} image{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names of files and captions."""
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
            names = {image["id"]: image["file_name"] for image in content["images"]}
            yield from ((names[a["image_id"]], a["caption"]) for a in content["annotations"])
            return
        with path.open(encoding="utf-8", newline="") as lines:
            if path.suffix == ".jsonl":
                rows: Any = (json.loads(line) for line in lines if line.strip())
            elif path.suffix in (".csv", ".tsv"):
                rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            else:
                raise ValueError(f"captions: {path.name} is not accepted; accepted: .csv, .tsv, .jsonl or .json (COCO)")
            for row in rows:
                column = next((c for c in CAPTION_COLUMNS if c in row), None)
                if column is None:
                    raise ValueError(f"{path}: no column for captions; accepted: {', '.join(CAPTION_COLUMNS)}")
                yield row["file_name"], row[column] or ""
    except KeyError as error:
        raise ValueError(f"{path}: no key {error} in it; accepted: `file_name` and `text`, or COCO's form") from error


class DatasetRows:
    """Rows of a `datasets.Dataset`.

    Args:
        rows: The data set.
        source: What messages call it.
        image: Column of the image; None for the first of `IMAGE_COLUMNS`.
        caption: Column of the caption, or `column.key`; None for the first of `CAPTION_COLUMNS`.

    Raises:
        ValueError: If there is no such column.
    """

    def __init__(self, rows: Any, source: str, image: str | None, caption: str | None) -> None:
        from datasets import Image

        self.source = source
        self.image = _column("image_column", image, IMAGE_COLUMNS, rows.column_names, source)
        column, _, self.key = (caption or "").partition(".")
        self.caption = _column("caption_column", column or None, CAPTION_COLUMNS, rows.column_names, source)
        rows = rows.select_columns([self.image, self.caption])
        self.rows = rows if isinstance(rows.features[self.image], Image) else rows.cast_column(self.image, Image())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Any, list[str]]:
        content = self.rows[row]
        image, said = content[self.image], content[self.caption]
        if self.key and said is not None:
            said = json.loads(said) if isinstance(said, str | bytes) else said
            said = said.get(self.key)
        captions = said if isinstance(said, list) else [said]
        captions = [c for c in captions if isinstance(c, str) and c.strip()]
        if not captions or image is None:
            what = "the image" if image is None else "the caption"
            raise ValueError(f"{self.where(row)}: {what} is missing")
        return image.convert("RGB"), captions

    def where(self, row: int) -> str:
        """Number of the row."""
        return f"{self.source}, row {row}"


def _column(key: str, asked: str | None, usual: tuple[str, ...], columns: list[str], source: str) -> str:
    if asked is None:
        found = next((c for c in usual if c in columns), None)
        if found is None:
            raise ValueError(f"{key}: none of {', '.join(usual)} is a column of {source}; it has {', '.join(columns)}")
        return found
    if asked not in columns:
        raise ValueError(f"{key}: {asked!r} is no column of {source}; {did_you_mean(asked, columns)}")
    return asked


def open_rows(source: str, captions: str, image: str | None, caption: str | None, split: str) -> Rows:
    """Open a source of pairs; see `datamodules.image_text.ImageTextSet`.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it has another form than the one asked for.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderRows(path, captions)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"source: {source!r} needs the extra: pip install 'method-zoo[data]'") from error
    if source.startswith("hf:"):
        return DatasetRows(load_dataset(source.removeprefix("hf:"), split=split), source, image, caption)
    files = sorted(glob.glob(str(path), recursive=True))
    builders = {BUILDERS.get(Path(file).suffix) for file in files}
    if not files or len(builders) > 1 or None in builders:
        raise FileNotFoundError(
            f"source: no image-text set at {source!r}; accepted: hf:NAME, a folder with {captions}, or a pattern of "
            f"files of one kind: {', '.join(BUILDERS)}"
        )
    rows = load_dataset(builders.pop(), data_files=files, split="train")
    return DatasetRows(rows, source, image, caption)
