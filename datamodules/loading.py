"""Batches that are a pure function of (seed, epoch, index): exact resume, any number of workers, any number of ranks.

A `Batches` object builds batch `index` of epoch `epoch` from nothing but these two numbers and its seed. The order of
the data and every random augmentation follow from them, so that a killed run continues with the very batch it would
have seen, workers do not change the data, and the ranks of a distributed run see slices of one global batch.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a key of integers and strings, e.g. `keyed_generator(seed, "crop", epoch, 3)`.

    Different keys give independent streams; the same key gives the same stream on every machine and in every process.
    """
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    if any(word < 0 for word in words):
        raise ValueError(f"keys must not be negative, got {key}")
    state = np.random.SeedSequence(words).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@lru_cache(maxsize=2)
def epoch_permutation(n: int, seed: int, epoch: int) -> Tensor:
    """Return the shuffled order `[n]` (int64) of `n` samples in one epoch; it is kept: do not write into it."""
    return torch.randperm(n, generator=keyed_generator(seed, "order", epoch))


def cycled_order(n: int, start: int, count: int, seed: int) -> Tensor:
    """Return `count` indices from position `start` on of an endless stream that shuffles `n` samples anew each pass.

    A set smaller than a batch is repeated, so that it never yields an empty or short batch. Shape `[count]`, int64.
    """
    if n < 1:
        raise ValueError("an empty set cannot be cycled")
    passes = range(start // n, (start + count - 1) // n + 1)
    stream = torch.cat([torch.randperm(n, generator=keyed_generator(seed, "cycle", p)) for p in passes])
    offset = start - passes[0] * n
    return stream[offset : offset + count]


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """Return the contiguous rows of a global batch of `n` rows that belong to `rank`.

    The ranks' slices, concatenated in order, are the global batch.

    Raises:
        ValueError: If there are fewer rows than ranks.
    """
    if n < world_size:
        raise ValueError(f"a global batch of {n} rows cannot be split over {world_size} processes")
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


class Batches(ABC, Dataset[Any]):
    """A numbered set of batches; subclasses say how many there are and build one of them."""

    rank: int = 0
    world_size: int = 1

    @abstractmethod
    def __len__(self) -> int:
        """Number of (global) batches in an epoch."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Any:
        """Build this rank's part of global batch `index` of `epoch`, using `keyed_generator` for all randomness."""

    def rows(self, n: int) -> slice:
        """Rows of a global batch of `n` that this process builds."""
        return rank_slice(n, self.rank, self.world_size)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.batch(*key)


class _Positions(Sampler[tuple[int, int]]):
    """Yields `(epoch, index)` from a position on; Lightning announces the epoch through `set_epoch`."""

    def __init__(self, length: int, same_every_epoch: bool) -> None:
        self.length, self.epoch, self.start = length, 0, 0
        self.same_every_epoch = same_every_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = 0 if self.same_every_epoch else epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in range(self.start, self.length)])


class ResumableLoader:
    """Serves `Batches` in the order of an epoch; its position is part of the checkpoint.

    It holds a `DataLoader` and is none itself: Lightning rebuilds those that it is given, for prediction and for
    distributed runs, and would lose the position.

    Args:
        batches: The batches to serve.
        num_workers: Worker processes; the data do not depend on their number.
        same_every_epoch: Serve the batches of epoch 0 always, as evaluation wants it.
    """

    def __init__(self, batches: Batches, num_workers: int = 0, same_every_epoch: bool = False) -> None:
        self.dataset, self.num_workers = batches, num_workers
        self.sampler = _Positions(len(batches), same_every_epoch)
        self.batch_sampler = None  # Lightning asks for it where there is a sampler
        self._loader: DataLoader[Any] = DataLoader(
            batches,
            batch_size=None,
            sampler=self.sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            # A generator of its own: iterating must not consume numbers from torch's global stream.
            generator=torch.Generator().manual_seed(0),
            pin_memory=torch.cuda.is_available(),
        )
        self._served = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing runs before the first batch is asked for, when the epoch is known and a position loaded.
        positions = self.sampler
        start = 0
        if self._resume is not None and self._resume[0] == positions.epoch and self._resume[1] < len(positions):
            start = self._resume[1]
        self._resume = None
        positions.start, self._served = start, start
        iterator = iter(self._loader)
        positions.start = 0
        for batch in iterator:
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches already handed out in it."""
        return {"epoch": self.sampler.epoch, "served": self._served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that `state` counts, in its epoch; another epoch starts at its first batch."""
        self._resume = (state["epoch"], state["served"])


class ZooDataModule(LightningDataModule):
    """A datamodule that serves `Batches`; it knows the rank and builds resumable loaders.

    Args:
        num_workers: Loader processes. 0 is best for data in memory.
        data_seed: Seed of order, augmentation and of label draws; independent of the model's seed.
    """

    def __init__(self, num_workers: int = 0, data_seed: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers
        self.data_seed = data_seed

    def __getstate__(self) -> dict[str, Any]:
        # batches may hold the datamodule; a worker process that is not forked gets the data and not the trainer
        return {**self.__dict__, "trainer": None}

    def loader(self, batches: Batches, same_every_epoch: bool = False) -> ResumableLoader:
        """Return a loader of this process's part of `batches`; evaluation sets `same_every_epoch`."""
        if self.trainer is not None:
            batches.rank, batches.world_size = self.trainer.global_rank, self.trainer.world_size
        return ResumableLoader(batches, self.num_workers, same_every_epoch)
