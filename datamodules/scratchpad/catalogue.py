"""The tasks by name for the commands that export, picture and probe them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.datamodule import make_task
from datamodules.scratchpad.tasks import Sketch, Task, frame_indices
from datamodules.scratchpad.traced import TRACED, Traced, TracedCycles, TracedStrings, traced_frame

#: Difficulty and sizes of each task unless told otherwise.
DEFAULTS: dict[str, dict[str, Any]] = {
    "rect_maze": {"size": 6, "image_size": 24, "difficulty": [5, 10]},
    "circ_maze": {"size": 3, "image_size": 42, "difficulty": [4, 9]},
    "cycles": {"size": None, "image_size": 48, "difficulty": [12, 12]},
    "strings": {"size": None, "image_size": 48, "difficulty": [8, 8]},
    TracedCycles.name: {"size": None, "image_size": 48, "difficulty": [12, 12]},
    TracedStrings.name: {"size": None, "image_size": 48, "difficulty": [8, 8]},
}
#: Names that `task_of` takes.
NAMES = tuple(DEFAULTS)
#: What `--size` means.
SIZE_HELP = "cells along a side, rings, fixed places (cycles), steps (strings), pixels of a step (traced)"


def task_of(name: str, image_size: int, size: int | None = None) -> Task:
    """Build a generator by name, as `make_task` does; traced ones too, `size` being the pixels of a step (6).

    Raises:
        ValueError: If the name is unknown or the sizes do not fit.
    """
    for kind in TRACED.values():
        if name == kind.name:
            return kind(image_size) if size is None else kind(image_size, size)
    return make_task(name, image_size, size)


def size_of(task: Task) -> int | None:
    """Return the size that `task_of` would take to build this task again."""
    for key in ("size", "advance", "places", "steps_across"):
        if hasattr(task, key):
            return getattr(task, key)
    return None


def frames_of(task: Task, sketch: Sketch, t: int | NDArray[np.integer]) -> NDArray[np.uint8]:
    """Palette indices `[n, H, W]` of frame `t` as the networks of the task see it; one number, or one per row `[n]`."""
    return traced_frame(sketch, t) if isinstance(task, Traced) else frame_indices(sketch, t)
