"""Made-up captions: attributes, templates, noise knobs, and the batches of them."""

from __future__ import annotations

import pytest
import torch

from datamodules.captions import (
    ANYTHING,
    NOUNS,
    TEMPLATES,
    WORDS,
    Vocabulary,
    attributes,
    draw_captions,
    quantile_index,
)
from datamodules.image_captions import DigitsCaptions, trim

FINE, COARSE = NOUNS["fashion_mnist"]


def make_images(n: int = 60) -> torch.Tensor:
    """Bright rectangles of different sizes and places on black."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(n, 1, 12, 12, dtype=torch.uint8)
    for i in range(n):
        height, width, value = torch.randint(2, 11, (3,), generator=generator).tolist()
        images[i, :, :height, :width] = 60 + 15 * value
    return images


def make_data(**changes):
    arguments = {"train_images": 200, "val_images": 50, "batch_size": 32, "eval_batch_size": 40}
    return DigitsCaptions(**(arguments | changes))


def test_attributes_are_measured_on_the_pixels():
    images = make_images()
    found = attributes(images)
    x = images[:, 0].float() / 255
    inside = x > 0.15
    area, brightness = inside.sum((1, 2)), (x * inside).sum((1, 2)) / inside.sum((1, 2))
    for name, value in (("size", area), ("brightness", brightness)):
        for low in (0, 1):  # whatever is in a higher third has at least the value of all in a lower one
            assert value[found[name] == low].max() <= value[found[name] == low + 1].min()
    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)
    ratio = rows / columns
    assert ratio[found["aspect"] == 0].min() >= ratio[found["aspect"] == 1].max()  # narrow ones are higher
    assert set(found) == set(WORDS)
    assert all(len(WORDS[name]) > int(value.max()) for name, value in found.items())


def test_quantiles_are_of_equal_size():
    index = quantile_index(torch.randperm(90).float(), 3)
    assert index.bincount().tolist() == [30, 30, 30]


def test_a_caption_is_a_template_with_words_of_the_image():
    images, target, vocabulary = make_images(), torch.arange(60) % 10, Vocabulary(FINE)
    text = draw_captions(images, target, FINE, vocabulary, p_class=1.0, p_wrong=0.0, seed=3)
    found = attributes(images)
    assert len(vocabulary) == 39
    for i in range(60):
        words = {name: WORDS[name][int(value[i])] for name, value in found.items()}
        possible = [t.format(**words, **{"class": FINE[int(target[i])]}) for t in TEMPLATES]
        assert vocabulary.decode(text[i].tolist()) in possible
        assert (text[i] == vocabulary.eos_id).sum() == 1
        assert (text[i] == vocabulary.unk_id).sum() == 0
    assert text.shape[1] <= 16
    assert torch.equal(text, draw_captions(images, target, FINE, vocabulary, 1.0, 0.0, seed=3))
    assert not torch.equal(text, draw_captions(images, target, FINE, vocabulary, 1.0, 0.0, seed=4))


@pytest.mark.parametrize(("p_class", "p_wrong"), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.3)])
def test_noise_knobs(p_class, p_wrong):
    n = 4000
    images, target = make_images(8).repeat(n // 8, 1, 1, 1), torch.arange(n) % 10
    vocabulary = Vocabulary(FINE)
    text = draw_captions(images, target, FINE, vocabulary, p_class, p_wrong, seed=0)
    nouns = torch.tensor([vocabulary.index[noun] for noun in FINE])
    told = torch.isin(text, nouns).any(1)
    right = (text == nouns[target][:, None]).any(1)
    assert (text == vocabulary.index[ANYTHING]).any(1).float().mean() == pytest.approx(1 - p_class, abs=0.03)
    assert told.float().mean() == pytest.approx(p_class, abs=0.03)
    if p_class:
        assert right[told].float().mean() == pytest.approx(1 - 0.9 * p_wrong, abs=0.03)


def test_coarse_nouns_are_shared():
    vocabulary = Vocabulary(COARSE)
    text = draw_captions(make_images(), torch.arange(60) % 10, COARSE, vocabulary, 1.0, 0.0, seed=0)
    top = vocabulary.index["top"]
    assert ((text == top).any(1) == torch.isin(torch.arange(60) % 10, torch.tensor([0, 2, 4, 6]))).all()


def test_words_that_are_not_known_and_what_follows_the_end():
    vocabulary = Vocabulary(FINE)
    tokens = vocabulary.encode("a dark zebra")
    assert tokens[2:] == [vocabulary.unk_id, vocabulary.eos_id]
    assert vocabulary.decode([*tokens[:2], vocabulary.eos_id, 7, 0]) == "a dark"


def test_batches_are_trimmed_normalised_and_never_repeat_a_training_image_in_validation():
    data = make_data()
    data.setup("fit")
    data.setup("test")
    batch = data.train_dataloader().dataset.batch(0, 0)
    assert batch["image"].shape == (32, 1, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert batch["text"].shape[1] == int((batch["text"] != data.pad_id).sum(1).max())
    assert ((batch["text"] == data.eos_id).sum(1) == 1).all()
    val = data.val_dataloader()
    assert [len(b["target"]) for b in val] == [40, 10]
    assert len(data.parts["train"][0]) == 200
    assert torch.equal(trim(torch.tensor([[5, 1, 0, 0], [5, 6, 1, 0]]), 0), torch.tensor([[5, 1, 0], [5, 6, 1]]))
    assert data.vocab_size > int(batch["text"].max())
    prompts = [data.decode(prompt) for prompt in data.class_prompts]
    assert prompts[3] == "photo of a three"


def test_ranks_see_slices_of_one_batch():
    data = make_data()
    data.setup("fit")
    whole = data.train_dataloader().dataset.batch(1, 2)
    parts = []
    for rank in range(2):
        batches = data.train_dataloader().dataset
        batches.rank, batches.world_size = rank, 2
        parts.append(batches.batch(1, 2))
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value), key


def test_captions_of_a_seed_stay_and_the_order_changes_with_the_epoch():
    first, again, other = make_data(), make_data(), make_data(data_seed=1)
    for data in (first, again, other):
        data.setup("fit")
    assert torch.equal(first.parts["train"][1], again.parts["train"][1])
    assert not torch.equal(first.parts["train"][1], other.parts["train"][1])
    batches = first.train_dataloader().dataset
    assert not torch.equal(batches.batch(0, 0)["target"], batches.batch(1, 0)["target"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p_class": 1.5}, "p_class: 1.5 is no probability"),
        ({"batch_size": 0}, "batch_size: 0 is not accepted; accepted: 1 or more"),
        ({"train_images": 8}, "train_images: 8 is not accepted; accepted: 32 or more"),
        ({"view": {"scal": [0, 1]}}, "view.scal is not accepted; did you mean 'scale'"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_data(**changes)


def test_more_images_than_there_are():
    data = make_data(train_images=5000)
    with pytest.raises(ValueError, match="train_images: 5000 and val_images: 50 are not accepted; accepted: together"):
        data.setup("fit")
