"""A class-incremental stream as plain arithmetic: which classes a task has, which images are labelled, what is kept.

Nothing here has state. The replay buffer after task `t` follows from the labelled images, the buffer's size and `t`
alone, so that a resumed run has the very buffer of the run it continues.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.loading import keyed_generator


def class_positions(num_classes: int, num_tasks: int, class_order: list[int] | None = None) -> Tensor:
    """Return for each class of the data its position in the stream, int64 `[num_classes]`.

    Classes are renumbered by position, so that task `t` has the classes `t * C/T .. (t + 1) * C/T - 1`.

    Args:
        num_classes: Classes of the data set.
        num_tasks: Tasks that they are divided into, equally.
        class_order: The classes in the order of their arrival; None is the natural order.

    Raises:
        ValueError: If the tasks do not divide the classes, or the order is not a permutation of them.
    """
    if num_tasks < 1 or num_classes % num_tasks:
        divisors = [d for d in range(1, num_classes + 1) if num_classes % d == 0]
        raise ValueError(f"num_tasks: {num_tasks} tasks do not divide {num_classes} classes; accepted: {divisors}")
    order = list(range(num_classes)) if class_order is None else class_order
    if sorted(order) != list(range(num_classes)):
        raise ValueError(f"class_order: {order} is not an order of the classes 0 .. {num_classes - 1}, each once")
    return torch.from_numpy(np.argsort(order))


def labels_per_class(counts: list[int], number: int | None, fraction: float | None) -> list[int]:
    """Return how many images of each class are labelled.

    Args:
        counts: Images of each class.
        number: The same number for every class, or None.
        fraction: A fraction of each class, rounded to the nearest number, or None.

    Raises:
        ValueError: If not exactly one is given, a class lacks images, or a class would get no label.
    """
    if (number is None) == (fraction is None):
        raise ValueError("give exactly one of labels_per_class and label_fraction, the other one null")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"label_fraction: {fraction} is not in (0, 1]")
    wanted = [number if number is not None else int(count * (fraction or 0) + 0.5) for count in counts]
    for label, (want, count) in enumerate(zip(wanted, counts, strict=True)):
        if want < 1:
            given = f"labels_per_class: {number}" if number is not None else f"label_fraction: {fraction}"
            hint = "at least 1" if number is not None else f"at least {0.5 / count:.3g}" if count else "more images"
            raise ValueError(f"{given} gives no label to class {label}, which has {count} images; accepted: {hint}")
        if want > count:
            raise ValueError(f"labels_per_class: {want} labels asked, class {label} has {count} images")
    return wanted


@dataclass(frozen=True)
class Stream:
    """The labelled images of a stream and the buffer that replays them.

    Args:
        labelled: For each class, by position in the stream, the training indices of its labelled images, in the order
            in which the buffer prefers them.
        classes_per_task: Classes that arrive with a task.
        buffer_size: Labelled images of earlier tasks that are kept at most; 0 keeps none.
    """

    labelled: list[Tensor]
    classes_per_task: int
    buffer_size: int

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.labelled) // self.classes_per_task

    def quotas(self, task: int) -> list[int]:
        """Return how many images of each class seen so far are kept after `task`.

        All where they fit; otherwise equally many, the remainder to the oldest classes. A class keeps a prefix of its
        list that never grows with `task`, so the buffer after `task` is part of the labelled pool of `task`.
        """
        seen = (task + 1) * self.classes_per_task
        have = [len(indices) for indices in self.labelled[:seen]]
        if sum(have) <= self.buffer_size:
            return have
        share, rest = divmod(self.buffer_size, seen)
        return [min(n, share + (label < rest)) for label, n in enumerate(have)]

    def buffer(self, task: int) -> list[Tensor]:
        """Return the indices kept after `task`, one tensor for each seen class; none before the first (`-1`)."""
        if task < 0:
            return []
        return [indices[:quota] for indices, quota in zip(self.labelled, self.quotas(task), strict=False)]

    def pool(self, task: int) -> dict[int, Tensor]:
        """Return the labelled images that `task` may use, by class: the buffer and the labels of its own classes."""
        first = task * self.classes_per_task
        pool = {label: kept for label, kept in enumerate(self.buffer(task - 1)) if len(kept)}
        return pool | {label: self.labelled[label] for label in range(first, first + self.classes_per_task)}

    def check_supports(self, per_class: int, replacement: bool) -> None:
        """Check that every class that is in the buffer or has just arrived can give its supports.

        Args:
            per_class: Supports of a class in a batch.
            replacement: Whether images may be repeated where a class has fewer.

        Raises:
            ValueError: If the buffer or the labels cannot give `per_class` different images without `replacement`.
        """
        old = (self.num_tasks - 1) * self.classes_per_task
        if old and 0 < self.buffer_size < old:
            raise ValueError(
                f"buffer_size: {self.buffer_size} images cannot hold one of each of the {old} classes that are old in "
                f"the last task; accepted: 0 (no replay) or at least {old}"
            )
        if replacement:
            return
        fewest = min(len(indices) for indices in self.labelled)
        if per_class > fewest:
            raise ValueError(
                f"supports_per_class: {per_class} is more than the {fewest} labels of a class; accepted: at most "
                f"{fewest}, or repeat_supports: true"
            )
        if old and self.buffer_size and per_class > min(self.quotas(self.num_tasks - 2)):
            raise ValueError(
                f"supports_per_class: {per_class} is more than a buffer of {self.buffer_size} images allows for {old} "
                f"old classes; accepted: buffer_size of at least {per_class * old}, or repeat_supports: true"
            )


def draw_supports(pool: dict[int, Tensor], per_class: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """Draw the same number of labelled images of each class, without repetition where a class has enough.

    Args:
        pool: Indices by class.
        per_class: Images of each class.
        key: Key of the random stream, see `keyed_generator`.

    Returns:
        Indices and classes, int64 `[per_class * len(pool)]`; the classes in turn, `c_1 .. c_K`, `per_class` times.
    """
    generator = keyed_generator(*key)
    columns = []
    for indices in pool.values():
        rounds = -(-per_class // len(indices))
        order = torch.cat([torch.randperm(len(indices), generator=generator) for _ in range(rounds)])
        columns.append(indices[order[:per_class]])
    return torch.stack(columns, dim=1).flatten(), torch.tensor(list(pool)).repeat(per_class)
