"""Class-incremental streams of images, a few of them labelled: the tasks follow one another in one fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Union

import torch
from torch import Tensor

from datamodules import sources
from datamodules.augment import Augment, normalise
from datamodules.images import ImageBatch, draw_split, make_views
from datamodules.in_memory import SourceDataModule
from datamodules.loading import Batches, ResumableLoader, cycled_order, keyed_generator
from datamodules.streams import Stream, class_positions, draw_supports, labels_per_class

if TYPE_CHECKING:
    from datamodules.image_files import FolderSource, ImageFiles

#: Images that an index tensor picks from, as uint8 `[n, c, H, W]`.
Images: TypeAlias = Union[Tensor, "ImageFiles"]


class ClassIncrementalBatch(TypedDict):
    """What a class-incremental method trains on; images are float32 and normalised, classes numbered by arrival."""

    task: int
    """Number of the task, from 0; its classes are `task * C/T .. (task + 1) * C/T - 1`."""
    step: int
    """Number of the batch within the task, from 0."""
    steps: int
    """Batches of the task."""
    views: list[Tensor]
    """Views of the unlabelled images of the task, `[B, c, h, w]` each, the two global ones first; may be empty."""
    supports: list[Tensor]
    """Views of the labelled images, `[S, c, H, W]` each: equally many of each class in the buffer and in the task."""
    support_y: Tensor
    """Their classes, int64 `[S]`."""
    support_index: Tensor
    """Their places in the training set, int64 `[S]`."""
    exemplars: Tensor
    """In the first batch of a task the whole buffer, not augmented, on every rank `[E, c, H, W]`; empty otherwise."""
    exemplar_index: Tensor
    """Their places in the training set, int64 `[E]`."""


class _TrainBatches(Batches):
    """Batches of the task that an epoch belongs to."""

    def __init__(self, data: ClassIncrementalImages) -> None:
        self.images, self.stream, self.unlabelled = data.images, data.stream, data.unlabelled
        self.views, self.support_view, self.support_views = data.view_list, data.support_augment, data.support_views
        self.size, self.supports_per_class = data.batch_size, data.supports_per_class
        self.length, self.epochs_per_task, self.seed = data.steps_per_epoch, data.epochs_per_task, data.data_seed

    def __len__(self) -> int:
        return self.length

    def batch(self, epoch: int, index: int) -> ClassIncrementalBatch:
        task, epoch_of_task = divmod(epoch, self.epochs_per_task)
        step = epoch_of_task * len(self) + index
        key = (self.seed, "stream", epoch, index)
        chosen, y = draw_supports(self.stream.pool(task), self.supports_per_class, *key, "supports")
        rows = self.rows(len(chosen))
        kept = self.stream.buffer(task - 1) if step == 0 else []
        exemplars = torch.cat(kept) if kept else chosen[:0]
        out: ClassIncrementalBatch = {
            "task": task,
            "step": step,
            "steps": self.epochs_per_task * len(self),
            "views": [],
            "supports": [
                self.augmented(self.support_view, chosen, rows, *key, f"support{i}") for i in range(self.support_views)
            ],
            "support_y": y[rows],
            "support_index": chosen[rows],
            "exemplars": plain(self.images[exemplars], self.support_view.mean, self.support_view.std),
            "exemplar_index": exemplars,
        }
        if self.views:
            unlabelled = self.unlabelled[task]
            chosen = unlabelled[cycled_order(len(unlabelled), step * self.size, self.size, self.seed)]
            rows = self.rows(self.size)
            out["views"] = [self.augmented(view, chosen, rows, *key, f"view{i}") for i, view in enumerate(self.views)]
        return out

    def augmented(self, view: Augment, chosen: Tensor, rows: slice, *key: int | str) -> Tensor:
        """Draw for the global batch, build this process's rows of it."""
        drawn = view.draw(len(chosen), keyed_generator(*key))
        return view.apply(self.images[chosen[rows]], {name: value[rows] for name, value in drawn.items()})


class _EvalBatches(Batches):
    """Chosen images as they are, in order."""

    def __init__(self, data: ClassIncrementalImages, images: Images, target: Tensor, chosen: Tensor) -> None:
        self.images, self.target, self.chosen, self.size = images, target, chosen, data.eval_batch_size
        self.mean, self.std = data.source.mean, data.source.std

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.size)

    def batch(self, epoch: int, index: int) -> ImageBatch:
        chosen = self.chosen[index * self.size : (index + 1) * self.size]
        mine = chosen[self.rows(len(chosen))]
        return {"image": plain(self.images[mine], self.mean, self.std), "target": self.target[mine]}


def plain(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise images `[n, c, H, W]` (uint8) without augmentation; float32."""
    return normalise(images.float() / 255, mean, std)


class ClassIncrementalImages(SourceDataModule):
    """A stream of tasks with new classes each; batches are `ClassIncrementalBatch` and `ImageBatch`.

    Task `t` owns the epochs `t * epochs_per_task .. (t + 1) * epochs_per_task - 1` of one fit. It shows all training
    images of its classes without labels, the labelled ones among them, and a few labelled images of these classes and
    of earlier ones that the replay buffer holds. Classes are numbered in the order of their arrival. A fit that stopped
    after a task goes on from its checkpoint when `trainer.max_epochs` is raised.

    Validation serves the test images first, for the accuracy matrix, and then the validation split, to choose by.

    Args:
        source: Data set in memory: `fashion_mnist`, `cifar10`, `cifar100` or `digits`; or `image_folder` for the files
            in `root/train/<class>/*` and `root/val/<class>/*`.
        root: Folder to look in; null for `$ZOO_DATA`, `data`, `~/data` and where a system package puts it.
        download: Whether to fetch it, if it is nowhere.
        image_size: Height and width at which `image_folder` reads; null is 256. The other sources have their own.
        num_tasks: Tasks, which divide the classes equally.
        class_order: The classes in the order of their arrival; null for the natural order.
        epochs_per_task: Epochs of a task.
        steps_per_epoch: Batches of an epoch; null for one pass over the unlabelled images of the smallest task.
        labels_per_class: Labelled images of each class; null where `label_fraction` is given.
        label_fraction: Labelled part of each class.
        unlabelled_per_task: Unlabelled images of a task, drawn once; null for all (the official CIFAR-10 runs: 5000).
        val_per_class: Training images of each class that are kept for validation and never trained on.
        buffer_size: Labelled images of earlier tasks that are kept at most, equally many of each class; 0 for none.
        supports_per_class: Labelled images of each class in a batch.
        support_views: Views of each of them.
        repeat_supports: Whether a class with fewer labels than that may repeat them.
        batch_size: Unlabelled images in a (global) batch.
        views: Views of an unlabelled image: mappings with the keys of `datamodules.augment.Augment` and `count`; the
            first two are the global ones. Null for two of the image's own size; an empty list leaves them out.
        support_view: Augmentation of the labelled images, a mapping of the same keys; null for that of the first view.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; 0 is best for images in memory.
        data_seed: Seed of label draw, order and augmentation.

    Departures:
        The unlabelled images of a task are an endless shuffled stream, so that none is dropped at the end of an epoch.
        The official code draws supports without replacement and keeps the first ones in file order; here the
        order of a class is drawn once.
    """

    images: Images
    target: Tensor
    test: tuple[Images, Tensor]
    stream: Stream

    def __init__(
        self,
        source: str = "fashion_mnist",
        root: str | None = None,
        download: bool = False,
        image_size: int | None = None,
        num_tasks: int = 5,
        class_order: list[int] | None = None,
        epochs_per_task: int = 1,
        steps_per_epoch: int | None = None,
        labels_per_class: int | None = None,
        label_fraction: float | None = None,
        unlabelled_per_task: int | None = None,
        val_per_class: int = 100,
        buffer_size: int = 500,
        supports_per_class: int = 5,
        support_views: int = 2,
        repeat_supports: bool = True,
        batch_size: int = 256,
        views: list[dict[str, Any]] | None = None,
        support_view: dict[str, Any] | None = None,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(root, download, num_workers, data_seed)
        for key, value, least in (
            ("image_size", image_size, 1),
            ("epochs_per_task", epochs_per_task, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("unlabelled_per_task", unlabelled_per_task, 1),
            ("val_per_class", val_per_class, 0),
            ("buffer_size", buffer_size, 0),
            ("supports_per_class", supports_per_class, 1),
            ("support_views", support_views, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        if labels_per_class is None and label_fraction is None:
            labels_per_class = 10
        self.source = self._source(source, root, image_size)
        self.num_tasks, self.class_order = num_tasks, class_order
        self.positions = class_positions(self.num_classes, num_tasks, class_order)
        self.epochs_per_task, self._steps_per_epoch = epochs_per_task, steps_per_epoch
        self.labels_per_class, self.label_fraction = labels_per_class, label_fraction
        self.unlabelled_per_task, self.val_per_class = unlabelled_per_task, val_per_class
        self.buffer_size, self.repeat_supports = buffer_size, repeat_supports
        self.supports_per_class, self.support_views = supports_per_class, support_views
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        common = {"size": self.source.image_size, "mean": self.source.mean, "std": self.source.std}
        self.view_list = make_views([{"count": 2}] if views is None else views, "views", **common)
        if len(self.view_list) == 1:
            raise ValueError(
                "views: 1 view is not accepted; accepted: two global ones and any number of others, or none"
            )
        first = {key: value for key, value in (views[0] if views else {}).items() if key != "count"}
        self.support_augment = Augment.from_options(
            first if support_view is None else support_view, "support_view", **common
        )
        self.validation: Tensor | None = None
        self.unlabelled: list[Tensor] = []

    @staticmethod
    def _source(name: str, root: str | None, image_size: int | None) -> sources.ImageSource | FolderSource:
        if name == "image_folder":
            from datamodules.image_files import FolderSource

            return FolderSource(root, image_size or 256)
        if name not in sources.SOURCES:
            raise ValueError(f"source: no data set {name!r}; accepted: {', '.join(sources.SOURCES)}, image_folder")
        if image_size is not None:
            raise ValueError(f"image_size: {image_size} is not accepted; accepted: null, images of {name} have a size")
        return sources.source(name)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the same for all tasks."""
        return self._steps_per_epoch or min(map(len, self.unlabelled)) // self.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run has to agree in: it says which images each task has."""
        return {
            "source": self.source.name,
            "num_tasks": self.num_tasks,
            "class_order": self.class_order,
            "epochs_per_task": self.epochs_per_task,
            "labels_per_class": self.labels_per_class,
            "label_fraction": self.label_fraction,
            "unlabelled_per_task": self.unlabelled_per_task,
            "val_per_class": self.val_per_class,
            "buffer_size": self.buffer_size,
            "data_seed": self.data_seed,
        }

    def setup(self, stage: str) -> None:
        """Read the images; for training, divide them into tasks and draw the labelled ones."""
        if stage in ("fit", "validate") and self.validation is None:
            self.images, target = self.source.load(self.root, train=True)
            self._divide(self.positions[target])
        if not hasattr(self, "test"):
            images, target = self.source.load(self.root, train=False)
            self.test = images, self.positions[target]
        if stage == "fit":
            self._check_length()

    def _divide(self, target: Tensor) -> None:
        self.target = target
        split = draw_split(target, self.val_per_class, None, self.data_seed)
        self.validation, train = split["validation"], split["train"]
        by_class = [train[target[train] == label] for label in range(self.num_classes)]
        counts = labels_per_class([len(indices) for indices in by_class], self.labels_per_class, self.label_fraction)
        labelled = []
        for label, (indices, count) in enumerate(zip(by_class, counts, strict=True)):
            generator = keyed_generator(self.data_seed, "labelled", label)
            labelled.append(indices[torch.randperm(len(indices), generator=generator)[:count]])
        size = self.num_classes // self.num_tasks
        self.stream = Stream(labelled, size, self.buffer_size)
        self.stream.check_supports(self.supports_per_class, self.repeat_supports)
        self.unlabelled = []
        for task in range(self.num_tasks):
            images = torch.cat(by_class[task * size : (task + 1) * size])
            order = torch.randperm(len(images), generator=keyed_generator(self.data_seed, "unlabelled", task))
            self.unlabelled.append(images[order[: self.unlabelled_per_task]])
        if not self.steps_per_epoch:
            fewest = min(map(len, self.unlabelled))
            raise ValueError(f"batch_size: {self.batch_size} is more than the {fewest} unlabelled images of a task")

    def _check_length(self) -> None:
        """Refuse a fit that goes on after the last task."""
        if self.trainer is None:
            return
        most = self.num_tasks * self.epochs_per_task
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if steps != -1:
            epochs = min(-(-steps // self.steps_per_epoch), most + 1 if epochs in (None, -1) else int(epochs))
        if epochs is None or not 0 <= epochs <= most:
            raise ValueError(
                f"trainer.max_epochs: {epochs} is not accepted; accepted: at most {most} ({self.num_tasks} tasks of "
                f"{self.epochs_per_task} epochs), fewer end after an earlier task"
            )

    def state_dict(self) -> dict[str, Any]:
        """What the stream consists of; the buffer follows from it."""
        return self.identity

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this stream.

        Raises:
            ValueError: If it does not; names the first option that differs.
        """
        for key, value in self.identity.items():
            if state_dict.get(key) != value:
                raise ValueError(
                    f"{key}: {value} is not accepted: the checkpoint comes from a stream with {key}: "
                    f"{state_dict.get(key)}; the tasks before and after a resume must be those of one stream"
                )

    def train_dataloader(self) -> ResumableLoader:
        """Serve `ClassIncrementalBatch`."""
        return self.loader(_TrainBatches(self))

    def val_dataloader(self) -> list[ResumableLoader]:
        """Serve `ImageBatch` of the test images and, unless `val_per_class` is 0, of the validation split."""
        chosen = self.validation if self.validation is not None else torch.empty(0, dtype=torch.long)
        held_out = [self._evaluation(self.images, self.target, chosen)] if len(chosen) else []
        return [self.test_dataloader(), *held_out]

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageBatch` of the test images of all classes."""
        return self._evaluation(*self.test, torch.arange(len(self.test[1])))

    predict_dataloader = test_dataloader

    def _evaluation(self, images: Images, target: Tensor, chosen: Tensor) -> ResumableLoader:
        return self.loader(_EvalBatches(self, images, target, chosen), same_every_epoch=True)
