"""Image-text sets from tiny files in their true formats: folders, webdataset shards, parquet."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from datamodules.image_text import ImageTextSet, padded

WORDS = ["a", "red", "green", "blue", "square", "photo", "of", "cat", "dog", "."]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A folder with a word-level tokenizer in the form of transformers."""
    special = ["<pad>", "<eos>", "<unk>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def picture(number: int) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.new("RGB", (30, 20), (20 * number, 10, 200))


def encoded(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def caption(number: int) -> str:
    return ("a red square", "a green cat of blue", "photo of a dog")[number % 3]


def write_folder(root: Path, n: int = 10) -> Path:
    root.mkdir()
    for i in range(n):
        picture(i).save(root / f"{i:02}.png")
    with (root / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        writer.writerows([f"{i:02}.png", caption(i)] for i in range(n))
    return root


def write_shards(root: Path, captions: str = "txt") -> str:
    """Two shards of five pairs, as `webdataset` writes them: files of one key stand together."""
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05}.tar", "w") as tar:
            for i in range(5 * shard, 5 * shard + 5):
                said = caption(i) if captions == "txt" else json.dumps({"caption": caption(i), "url": "x"})
                for suffix, content in (("png", encoded(picture(i))), (captions, said.encode())):
                    info = tarfile.TarInfo(f"{i:06}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(root / "*.tar")


def write_parquet(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(10)]
    pq.write_table(pa.table({"image": images, "caption": [[caption(i), "a dog"] for i in range(10)]}), path)
    return str(path)


def make_data(source: str, tokenizer: str, **changes) -> ImageTextSet:
    arguments = {"image_size": 16, "batch_size": 4, "eval_batch_size": 3, "val_images": 2, "num_workers": 0}
    arguments |= {"flip": 0.0, "context_length": 8}
    return ImageTextSet(source, tokenizer, **(arguments | changes))


def number_of(data: ImageTextSet, image: torch.Tensor) -> int:
    """The number that a picture tells."""
    return round((image[0].mean().item() * 0.229 + 0.485) * 255 / 20)


@pytest.mark.parametrize("form", ["folder", "shards", "shards_json", "parquet"])
def test_every_form_gives_each_image_with_its_caption(form, tmp_path, tokenizer):
    options = {}
    if form == "folder":
        source = str(write_folder(tmp_path / "folder"))
    elif form == "parquet":
        source = write_parquet(tmp_path / "pairs.parquet")
    else:
        source = write_shards(tmp_path / "shards", "json" if form == "shards_json" else "txt")
        options = {"caption_column": "json.caption"} if form == "shards_json" else {}
    data = make_data(source, tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    batches = data.train_dataloader()
    assert len(batches) == 2
    seen = []
    for batch in batches:
        assert batch["image"].shape == (4, 3, 16, 16)
        assert batch["image"].dtype == torch.float32
        assert batch["text"].shape[1] == int((batch["text"] != data.pad_id).sum(1).max())
        assert batch["target"].tolist() == [-1] * 4
        for image, text in zip(batch["image"], batch["text"], strict=True):
            number = number_of(data, image)
            seen.append(number)
            accepted = [caption(number)] + (["a dog"] if form == "parquet" else [])
            assert data.decode(text.tolist()) in accepted
            assert int((text == data.eos_id).sum()) == 1
    assert sorted(seen) == list(range(8))
    val = [number_of(data, image) for batch in data.val_dataloader() for image in batch["image"]]
    assert val == [8, 9]
    assert (data.vocab_size, data.pad_id, data.eos_id) == (3 + len(WORDS), 0, 1)
    assert data.class_prompts is None


def test_a_batch_follows_from_seed_epoch_and_index(tmp_path, tokenizer):
    source = str(write_folder(tmp_path / "folder"))
    data = make_data(source, tokenizer, scale=[0.3, 0.6], flip=0.5)
    data.setup("fit")
    batches = data.train_dataloader().dataset
    state = torch.get_rng_state()
    first, again, later = batches.batch(0, 1), batches.batch(0, 1), batches.batch(1, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["image"], later["image"])
    parts = []
    for rank in range(2):
        batches = data.train_dataloader().dataset
        batches.rank, batches.world_size = rank, 2
        parts.append(batches.batch(0, 1))
    assert torch.equal(torch.cat([part["image"] for part in parts]), first["image"])


def test_several_captions_take_turns_in_training_and_the_first_is_validated(tmp_path, tokenizer):
    data = make_data(write_parquet(tmp_path / "pairs.parquet"), tokenizer, val_images=1)
    data.setup("fit")
    batches = data.train_dataloader().dataset
    said = {data.decode(row.tolist()) for epoch in range(6) for row in batches.batch(epoch, 0)["text"]}
    assert "a dog" in said
    assert len(said) > 1
    assert [data.decode(row.tolist()) for b in data.val_dataloader() for row in b["text"]] == [caption(9)]


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "json"])
def test_other_caption_files(kind, tmp_path, tokenizer):
    root = write_folder(tmp_path / "folder")
    path = root / f"other.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"file_name": f"{i:02}.png", "text": caption(i)}) for i in range(10)))
    elif kind == "tsv":
        path.write_text("file_name\tcaption\n" + "".join(f"{i:02}.png\t{caption(i)}\n" for i in range(10)))
    else:
        images = [{"id": 7 + i, "file_name": f"{i:02}.png"} for i in range(10)]
        notes = [{"image_id": 7 + i, "caption": caption(i)} for i in range(10)]
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    data = make_data(str(root), tokenizer, captions=path.name)
    data.setup("fit")
    rows = data.parts["train"][0]
    assert [rows[i][1] for i in range(10)] == [[caption(i)] for i in range(10)]


def test_missing_captions_and_images_are_named(tmp_path, tokenizer):
    root = write_folder(tmp_path / "folder")
    lines = (root / "captions.csv").read_text().splitlines()
    (root / "captions.csv").write_text("\n".join([*lines[:4], "03.png,  ", *lines[5:-1]]))
    with pytest.raises(ValueError, match=r"captions.csv: no caption for 2 images \(03.png, 09.png\)"):
        make_data(str(root), tokenizer).setup("fit")
    (root / "captions.csv").write_text("\n".join([*lines, "77.png,a cat"]))
    with pytest.raises(FileNotFoundError, match=r"names 1 image \(77.png\) that are not in"):
        make_data(str(root), tokenizer).setup("fit")
    (root / "captions.csv").write_text("file_name,words\n00.png,a cat\n")
    with pytest.raises(ValueError, match="no column for captions; accepted: text, caption, txt"):
        make_data(str(root), tokenizer).setup("fit")
    with pytest.raises(FileNotFoundError, match="captions: no file .*none.csv"):
        make_data(str(root), tokenizer, captions="none.csv").setup("fit")
    source = tmp_path / "pairs.jsonl"
    source.write_text(json.dumps({"image": None, "text": "a cat"}) + "\n")
    with pytest.raises(ValueError, match="caption_column: 'tekst' is no column of .*did you mean 'text'"):
        make_data(str(source), tokenizer, caption_column="tekst").setup("fit")
    with pytest.raises(FileNotFoundError, match="source: no image-text set at 'none/"):
        make_data("none/*.tar", tokenizer).setup("fit")


def test_a_row_without_caption_is_named_when_it_is_read(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(6)]
    pq.write_table(pa.table({"image": images, "text": ["a cat"] * 5 + [None]}), tmp_path / "p.parquet")
    data = make_data(str(tmp_path / "p.parquet"), tokenizer)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"p.parquet, row 5: the caption is missing"):
        list(data.val_dataloader())


def test_long_captions_are_cut_or_refused(tmp_path, tokenizer):
    source = str(write_folder(tmp_path / "folder"))
    data = make_data(source, tokenizer, context_length=4)
    data.setup("fit")
    text = data.train_dataloader().dataset.batch(0, 0)["text"]
    assert text.shape[1] == 4
    assert set(text[:, -1].tolist()) <= {data.eos_id}
    strict = make_data(source, tokenizer, context_length=4, truncate=False)
    strict.setup("fit")
    with pytest.raises(ValueError, match=r"\.png: the caption has 5 tokens; accepted: context_length: 4 or fewer"):
        list(strict.val_dataloader())


def test_classes_are_told_by_prompts(tmp_path, tokenizer):
    source, root = str(write_folder(tmp_path / "folder")), tmp_path / "classes"
    for name, numbers in (("n1", (1, 2)), ("n2", (3, 4, 5))):
        (root / name).mkdir(parents=True)
        for number in numbers:
            picture(number).save(root / name / f"{number}.png")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    options = {"class_root": str(root), "prompt": "a photo of a {}"}
    data = make_data(source, tokenizer, class_names=str(tmp_path / "names.txt"), **options)
    data.setup("test")
    assert [data.decode(prompt) for prompt in data.class_prompts] == ["a photo of a cat", "a photo of a dog"]
    batches = list(data.test_dataloader())
    assert torch.cat([b["target"] for b in batches]).tolist() == [0, 0, 1, 1, 1]
    assert [number_of(data, image) for b in batches for image in b["image"]] == [1, 2, 3, 4, 5]
    assert data.decode(batches[1]["text"][0].tolist()) == "a photo of a dog"
    val = list(data.val_dataloader())  # two of the five, evenly spread
    assert torch.cat([b["target"] for b in val]).tolist() == [0, 1]
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="has 1 names; accepted: one for each of the 2 folders"):
        _ = make_data(source, tokenizer, class_names=str(tmp_path / "names.txt"), **options).class_prompts
    named_by_folder = make_data(source, tokenizer, class_root=str(root)).class_prompts
    assert data.decode(named_by_folder[0]).startswith("a photo of a")
    with pytest.raises(FileNotFoundError, match="class_root: no class folders"):
        _ = make_data(source, tokenizer, class_root=str(tmp_path / "none")).class_prompts


def test_a_tokenizer_that_fills_with_its_end(tmp_path, tokenizer):
    """As those of CLIP and SigLIP: the end stays in the batch, for a text tower reads its feature there."""
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    fast.pad_token = fast.eos_token
    fast.save_pretrained(tmp_path / "other")
    data = make_data(str(write_folder(tmp_path / "folder")), str(tmp_path / "other"))
    data.setup("fit")
    assert data.pad_id == data.eos_id
    text = data.train_dataloader().dataset.batch(0, 0)["text"]
    assert (text == data.eos_id).any(1).all()
    assert data.decode(text[0].tolist()) in [caption(i) for i in range(3)]
    assert make_data("none", str(tmp_path / "other"), pad_id=2).pad_id == 2
    with pytest.raises(ValueError, match="pad_id: 99 is not accepted; accepted: 0 to"):
        _ = make_data("none", str(tmp_path / "other"), pad_id=99).pad_id
    assert padded([[3, 1], [4, 5, 1]], 9).tolist() == [[3, 1, 9], [4, 5, 1]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": [0.0, 1.0]}, "scale: .* is not accepted"),
        ({"prompt": "a cat"}, "prompt: 'a cat' is not accepted"),
        ({"context_length": 1}, "context_length: 1 is not accepted; accepted: 2 or more"),
        ({"flip": 2.0}, "flip: 2.0 is no probability"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_data("none", "none", **changes)


def test_too_few_pairs_and_no_tokenizer(tmp_path, tokenizer):
    source = str(write_folder(tmp_path / "folder", 5))
    with pytest.raises(ValueError, match="batch_size: 4 and val_images: 2 are more than the 5 pairs"):
        make_data(source, tokenizer).setup("fit")
    with pytest.raises(ValueError, match="tokenizer: .* cannot be loaded"):
        _ = make_data(source, str(tmp_path / "nothing")).vocab_size
