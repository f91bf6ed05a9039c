"""The callback that times a fit and a raw loop in alternating blocks."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from callbacks.boundaries import watch
from callbacks.run_summary import batch_rows, peak_resident_bytes
from zoo.bench.raw import RawLoop

#: Keys of a batch that hold token ids `[B, T]`.
TOKEN_KEYS = ("input_ids", "tokens")


def batch_tokens(batch: Any) -> int:
    """Return the number of tokens in a batch of token ids, padding included; 0 for other batches."""
    if not isinstance(batch, dict):
        return 0
    return next((batch[key].numel() for key in TOKEN_KEYS if isinstance(batch.get(key), torch.Tensor)), 0)


class Clock:
    """Marks in time on the device: CUDA events there, the processor's clock elsewhere.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Return a mark; it waits for nothing."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, marks: list[Any]) -> list[float]:
        """Return the time between each mark and the next one."""
        self.wait()
        pairs = itertools.pairwise(marks)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


class Bench(Callback):
    """Interrupts a fit after every few steps for as many steps of a raw loop, and stops it when there are enough.

    Fit and raw blocks alternate, so that a machine that becomes slower is as slow for both; there is a fit block before
    and after each raw one. The first step of a block is left out: it fills the caches again. Memory is read before the
    copy for the raw loop is made.

    Args:
        steps: Steps of the fit that are measured at least, and of the raw loop.
        blocks: Raw blocks.
        warmup: Steps before anything is measured, of both.
        raw: Whether to compare with a raw loop.

    Attributes:
        fit_blocks: Seconds of the steps of each fit block.
        raw_blocks: The same of the raw blocks.
        fit_cpu, raw_cpu: Processor time of each block in seconds, of this process; a busy machine does not change it.
        fit_wait, raw_wait: Seconds between the end of a step and the start of the next one's work.
        rows: Samples in each measured batch of the fit.
        tokens: Tokens in each of them.
        raw_rows: Samples in each measured batch of the raw loop.
        peak_bytes: Peak memory of the fit alone.
        flops: Floating-point operations of one step, forward and backward; None if they could not be counted.
        done: Whether all blocks were measured.
    """

    def __init__(self, steps: int = 120, blocks: int = 6, warmup: int = 10, raw: bool = True) -> None:
        super().__init__()
        for name, value in (("steps", steps), ("blocks", blocks), ("warmup", warmup)):
            if value < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {value}")
        self.blocks, self.warmup, self.compare = blocks, warmup, raw
        self.per_block = 1 + -(-steps // blocks)
        self.fit_blocks: list[list[float]] = []
        self.raw_blocks: list[list[float]] = []
        self.fit_cpu: list[float] = []
        self.raw_cpu: list[float] = []
        self.fit_wait: list[float] = []
        self.raw_wait: list[float] = []
        self.rows: list[int] = []
        self.tokens: list[int] = []
        self.raw_rows: list[int] = []
        self.peak_bytes, self.flops, self.done = 0, None, False  # type: int, int | None, bool
        self._loop: RawLoop | None = None
        self._batches = 0
        self._marks: list[Any] = []
        self._ended = self._cpu = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        watch(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock = Clock(trainer.strategy.root_device)
        if self.clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.clock.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if len(self._marks) > 1:  # the first step of a block does not count
            self.fit_wait.append(time.perf_counter() - self._ended)
            self.rows.append(batch_rows(batch))
            self.tokens.append(batch_tokens(batch))

    def on_step_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches += 1
        if self.done or self._batches < self.warmup:
            return
        if self._batches == self.warmup:
            self._prepare(trainer)
        else:
            self._marks.append(self.clock.mark())
            if len(self._marks) == 2:
                self._cpu = time.process_time()
            if len(self._marks) <= self.per_block:
                self._ended = time.perf_counter()
                return
            self.fit_cpu.append(time.process_time() - self._cpu)
            self.fit_blocks.append(self.clock.seconds(self._marks)[1:])
            self.done = len(self.fit_blocks) > self.blocks
            trainer.should_stop = self.done
            if not self.done and self._loop is not None:
                self.raw_blocks.append(self._raw_block(self._loop))
        self.clock.wait()
        self._marks = [self.clock.mark()]
        self._ended = time.perf_counter()

    def _prepare(self, trainer: Trainer) -> None:
        """Read the memory of the fit, then build the raw loop, warm it up and count one of its steps."""
        on_gpu = self.clock.device.type == "cuda"
        self.peak_bytes = torch.cuda.max_memory_allocated(self.clock.device) if on_gpu else peak_resident_bytes()
        if not self.compare:
            return
        self._loop = RawLoop(trainer)
        for _ in range(self.warmup):
            self._loop.step()
        self._loop.fetch()
        counter = FlopCounterMode(display=False)
        with counter:
            self._loop.work()
        self.flops = counter.get_total_flops() or None

    def _raw_block(self, loop: RawLoop) -> list[float]:
        self.clock.wait()
        marks, cpu = [self.clock.mark()], 0.0
        for step in range(self.per_block):
            began = time.perf_counter()
            loop.fetch()
            if step:
                self.raw_wait.append(time.perf_counter() - began)
                self.raw_rows.append(batch_rows(loop.batch))
            loop.work()
            marks.append(self.clock.mark())
            if not step:
                cpu = time.process_time()
        self.raw_cpu.append(time.process_time() - cpu)
        return self.clock.seconds(marks)[1:]
