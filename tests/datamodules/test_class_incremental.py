"""The class-incremental datamodule on images that say which one they are."""

from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules import sources
from datamodules.class_incremental import ClassIncrementalImages
from tests.support.batches import same

CLASSES, PER_CLASS = 6, 20
#: No augmentation: the pixels of a view tell its image.
STILL = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0}


def read(place: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Image `i` has all pixels `i`; its class is `i % 6`."""
    index = torch.arange(CLASSES * PER_CLASS if train else 30)
    images = index.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()
    return images, index % CLASSES


@pytest.fixture(autouse=True)
def _toy_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toy = sources.ImageSource("toy", CLASSES, 1, 4, (0.0,), (1.0,), lambda _: [tmp_path], read, "")
    monkeypatch.setitem(sources.SOURCES, "toy", toy)


def make(**changes: Any) -> ClassIncrementalImages:
    arguments: dict[str, Any] = {"source": "toy", "num_tasks": 3, "labels_per_class": 5, "val_per_class": 4}
    arguments |= {"buffer_size": 9, "supports_per_class": 3, "batch_size": 8, "epochs_per_task": 2}
    arguments |= {"views": [{"count": 2, **STILL}]}
    data = ClassIncrementalImages(**(arguments | changes))
    data.setup("fit")
    return data


def batches(data: ClassIncrementalImages) -> Any:
    return data.train_dataloader().dataset


def who(view: torch.Tensor) -> list[int]:
    """Indices of the images of an unaugmented view."""
    assert (view == view[:, :, :1, :1]).all()
    return (view[:, 0, 0, 0] * 255).round().int().tolist()


def test_facts_are_known_before_setup():
    data = ClassIncrementalImages(source="toy", num_tasks=2)
    assert (data.num_classes, data.num_tasks, data.in_channels, data.image_size) == (6, 2, 1, 4)
    assert (data.labels_per_class, data.label_fraction) == (10, None)


def test_epochs_belong_to_tasks():
    data = make(views=[{"count": 2, **STILL}, {"size": 2, "count": 3}])
    served = batches(data)
    assert len(served) == 4, "32 images of a task in batches of 8"
    for epoch in range(6):
        for index in range(4):
            batch = served.batch(epoch, index)
            assert (batch["task"], batch["step"], batch["steps"]) == (epoch // 2, epoch % 2 * 4 + index, 8)
    batch = served.batch(5, 3)
    assert [tuple(view.shape) for view in batch["views"]] == [(8, 1, 4, 4)] * 2 + [(8, 1, 2, 2)] * 3
    assert [tuple(view.shape) for view in batch["supports"]] == [(18, 1, 4, 4)] * 2
    assert batch["support_y"].shape == batch["support_index"].shape == (18,)
    assert all(view.dtype == torch.float32 for view in batch["views"] + batch["supports"])
    assert batch["support_y"].dtype == batch["support_index"].dtype == torch.int64


@pytest.mark.parametrize("class_order", [None, [3, 0, 5, 1, 4, 2]])
def test_a_task_shows_each_image_of_its_classes_once_an_epoch(class_order):
    data = make(class_order=class_order)
    order = class_order or list(range(CLASSES))
    held_out = set(data.validation.tolist())
    for task in range(3):
        for epoch in (2 * task, 2 * task + 1):
            shown = [batches(data).batch(epoch, index)["views"] for index in range(4)]
            first, second = ([who(views[i]) for views in shown] for i in (0, 1))
            assert first == second, "two views of the same images"
            of_task = {i for i in range(CLASSES * PER_CLASS) if i % CLASSES in order[2 * task : 2 * task + 2]}
            assert sorted(chain(*first)) == sorted(of_task - held_out)


@pytest.mark.parametrize("class_order", [None, [3, 0, 5, 1, 4, 2]])
def test_supports_are_balanced_labelled_and_true(class_order):
    data = make(class_order=class_order)
    order = class_order or list(range(CLASSES))
    kept_size = {0: [], 1: [5, 4], 2: [3, 2, 2, 2]}
    ever: dict[int, set[int]] = {}
    for epoch in range(6):
        task = epoch // 2
        for index in range(4):
            batch = batches(data).batch(epoch, index)
            assert torch.bincount(batch["support_y"]).tolist() == [3] * 2 * (task + 1)
            for view in batch["supports"]:
                assert who(view) == batch["support_index"].tolist()
            for i, y in zip(batch["support_index"].tolist(), batch["support_y"].tolist(), strict=True):
                assert order[y] == i % CLASSES
                ever.setdefault(y, set()).add(i)
                if y < 2 * task:
                    assert i in data.stream.labelled[y][: kept_size[task][y]]
    assert [len(ever[y]) for y in range(CLASSES)] == [5] * CLASSES
    assert not set.union(*ever.values()) & set(data.validation.tolist())


def test_without_a_buffer_only_the_task_is_seen():
    batch = batches(make(buffer_size=0)).batch(4, 0)
    assert set(batch["support_y"].tolist()) == {4, 5}
    assert len(batch["exemplars"]) == 0


def test_the_first_batch_of_a_task_brings_the_buffer_as_it_is():
    data = make(support_view={"scale": [0.1, 0.2], "brightness": 1.0})
    for epoch in range(6):
        for index in range(4):
            batch = batches(data).batch(epoch, index)
            task = epoch // 2
            expected = torch.cat(data.stream.buffer(task - 1)).tolist() if batch["step"] == 0 and task else []
            assert batch["exemplar_index"].tolist() == expected
            assert who(batch["exemplars"]) == expected


def test_a_batch_follows_from_its_key():
    changing = {"views": [{"count": 2, "brightness": 0.5}]}
    first, again = batches(make(**changing)), batches(make(**changing))
    again.batch(0, 0)
    assert same(again.batch(3, 2), first.batch(3, 2))
    assert not same(first.batch(3, 1), first.batch(3, 2))
    assert not same(batches(make(**changing, data_seed=1)).batch(3, 2), first.batch(3, 2))
    views = first.batch(3, 2)["views"]
    assert not torch.equal(views[0], views[1])


def test_arms_without_unlabelled_images_see_the_same_supports():
    with_views, without = batches(make()).batch(3, 2), batches(make(views=[], support_view=STILL)).batch(3, 2)
    assert without["views"] == []
    assert same({**without, "views": with_views["views"]}, with_views)


def test_ranks_hold_slices_of_the_global_batch():
    data = make()
    whole, parts = batches(data).batch(4, 0), []
    for rank in range(2):
        served = batches(data)
        served.rank, served.world_size = rank, 2
        parts.append(served.batch(4, 0))
    for key in ("support_y", "support_index"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    for key in ("views", "supports"):
        for i, view in enumerate(whole[key]):
            assert torch.equal(torch.cat([part[key][i] for part in parts]), view)
    assert all(torch.equal(part["exemplars"], whole["exemplars"]) for part in parts), "every rank stores all logits"


def test_evaluation_serves_test_images_and_then_the_validation_split():
    data = make(class_order=[3, 0, 5, 1, 4, 2], eval_batch_size=7)
    test, validation = data.val_dataloader()
    images = [i for batch in test for i in who(batch["image"])]
    target = [y for batch in test for y in batch["target"].tolist()]
    assert images == list(range(30))
    assert [data.class_order[y] for y in target] == [i % CLASSES for i in images]
    assert sum(len(batch["target"]) for batch in validation) == 4 * CLASSES
    assert len(make(val_per_class=0).val_dataloader()) == 1


def test_a_part_of_the_unlabelled_images_can_be_drawn_once():
    data = make(unlabelled_per_task=16)
    shown = [who(batches(data).batch(epoch, index)["views"][0]) for epoch in (0, 1) for index in range(2)]
    assert len(batches(data)) == 2
    assert sorted(shown[0] + shown[1]) == sorted(shown[2] + shown[3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 4}, "num_tasks: 4 tasks do not divide 6 classes"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, "class_order"),
        ({"labels_per_class": None, "label_fraction": 0.02}, "label_fraction: 0.02 gives no label to class 0"),
        ({"labels_per_class": 17}, "labels_per_class: 17 labels asked, class 0 has 16"),
        ({"supports_per_class": 6, "repeat_supports": False}, "supports_per_class: 6 is more than the 5 labels"),
        (
            {"repeat_supports": False},
            "buffer of 9 images allows for 4 old classes; accepted: buffer_size of at least 12",
        ),
        ({"batch_size": 33}, "batch_size: 33 is more than the 32 unlabelled images of a task"),
        ({"val_per_class": 21}, "val_per_class: 21"),
        ({"views": [STILL]}, "views: 1 view is not accepted"),
        ({"source": "imagenet"}, "source: no data set 'imagenet'; accepted: fashion_mnist"),
        ({"epochs_per_task": 0}, "epochs_per_task: 0 is not accepted; accepted: 1 or more"),
        ({"support_view": {"count": 2}}, "support_view.count is not accepted"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("epochs", "steps", "accepted"),
    [(6, -1, True), (4, -1, True), (7, -1, False), (None, -1, False), (-1, 24, True), (-1, 25, False), (9, 24, True)],
)
def test_a_fit_ends_with_the_stream(epochs, steps, accepted):
    data = make()
    data.trainer = SimpleNamespace(max_epochs=epochs, max_steps=steps)  # type: ignore[assignment]
    if accepted:
        data.setup("fit")
    else:
        with pytest.raises(ValueError, match="accepted: at most 6 \\(3 tasks of 2 epochs\\)"):
            data.setup("fit")


@pytest.mark.parametrize(
    "changes", [{"class_order": [1, 0, 2, 3, 4, 5]}, {"num_tasks": 2}, {"buffer_size": 12}, {"data_seed": 3}], ids=str
)
def test_a_resume_with_another_stream_is_refused(changes):
    (key, value), state = next(iter(changes.items())), make().state_dict()
    make(batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match=f"{key}: ".replace("[", r"\[")) as error:
        make(**changes).load_state_dict(state)
    assert str(value) in str(error.value)


def test_loader_processes_get_the_images_without_trainer_and_source():
    """The source of these tests cannot be pickled."""
    data = make()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        assert same(pickle.loads(pickle.dumps(loader.dataset)).batch(2, 0), loader.dataset.batch(2, 0))


def test_folders_of_image_files_make_a_stream(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    for part, count in (("train", 8), ("val", 2)):
        for label in range(4):
            folder = tmp_path / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (12, 10), (60 * label, 0, 20 * i)).save(folder / f"{i}.png")
    data = make(source="image_folder", root=str(tmp_path), image_size=8, num_tasks=2, val_per_class=2, batch_size=6)
    assert (data.num_classes, data.in_channels, data.image_size) == (4, 3, 8)
    batch = batches(data).batch(2, 0)
    assert batch["views"][0].shape == (6, 3, 8, 8)
    mean, std = torch.tensor(data.source.mean), torch.tensor(data.source.std)
    red = batch["supports"][0][:, 0].mean(dim=(1, 2)) * std[0] + mean[0]
    torch.testing.assert_close(red * 255, 60.0 * batch["support_y"])
    assert batch["exemplars"].shape == (9, 3, 8, 8)
    assert batches(data).batch(0, 0)["exemplars"].shape == (0, 3, 8, 8)
    test, validation = data.val_dataloader()
    assert [len(batch["image"]) for batch in test] == [len(batch["image"]) for batch in validation] == [8]


def test_missing_folders_are_an_error_that_says_where(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no class folders in .*train; set `data.init_args.root`"):
        make(source="image_folder", root=str(tmp_path))
    with pytest.raises(ValueError, match="image_size: 8 is not accepted; accepted: null, images of toy have a size"):
        make(image_size=8)
