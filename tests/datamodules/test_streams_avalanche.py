"""The division of classes into tasks against avalanche-lib, where that is installed."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import TensorDataset

from datamodules.streams import class_positions


@pytest.mark.parametrize("order", [list(range(10)), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]])
def test_tasks_have_the_classes_that_avalanche_gives_them(order: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        avalanche = pytest.importorskip("avalanche.benchmarks", reason="avalanche-lib is not installed")
        data = TensorDataset(torch.zeros(40, 1), torch.arange(10).repeat(4))
        data.targets = torch.arange(10).repeat(4).tolist()  # type: ignore[attr-defined]
        stream = avalanche.nc_benchmark(data, data, 5, task_labels=False, fixed_class_order=order, shuffle=False)
        theirs = [set(experience.classes_in_this_experience) for experience in stream.train_stream]
    position = class_positions(10, 5, order)
    ours = [{c for c in range(10) if int(position[c]) // 2 == task} for task in range(5)]
    assert ours == theirs
