"""One cell of a grid: a few training steps in fresh processes, timed between two synchronisations."""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401 - the slow import, once in the server that forks
from torch import Tensor, nn

from zoo.methods.slm_bottlenecks.costs import GIB, Shape
from zoo.methods.slm_bottlenecks.networks import CausalLM, build_adamw

LR, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1
#: Parts of the messages of PyTorch where a kernel, collective or type does not exist for a device.
UNSUPPORTED = ("no viable backend", "no available kernel", "not supported", "not implemented", "does not support")
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Cell:
    """One configuration of a training run.

    Attributes:
        size: Name of the model's shape.
        attention: `eager`, `sdpa`, `flash` or `efficient`.
        batch: Sequences on each device.
        n_gpu: Devices.
        comm: `single`, `ddp`, `fsdp_full` or `fsdp_grad_op`.
        seq_len: Tokens of a sequence.
        precision: `bf16-true`, `bf16-mixed` or `32-true`.
        compile: Whether the model is compiled.
        fused: Whether AdamW is one kernel.
        loss_chunks: Chunks of the cross-entropy.
        checkpointing: Whether activations are computed again.
    """

    size: str
    attention: str = "sdpa"
    batch: int = 4
    n_gpu: int = 1
    comm: str = "single"
    seq_len: int = 1024
    precision: str = "bf16-true"
    compile: bool = False
    fused: bool = True
    loss_chunks: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class Effort:
    """How long a cell is measured.

    Attributes:
        device: `cpu` or `cuda`.
        steps: Steps between the two synchronisations.
        warmup: Steps before.
        threads: Threads of a process on a CPU; 0 leaves the default.
        clock: `wall`; or `cpu`: processor time of the process, which on a CPU that others use too is what the steps
            would take alone. It means something with one thread and one process only.
        seed: Seed of weights and tokens.
        timeout: Seconds until a cell is given up.
    """

    device: str = "cpu"
    steps: int = 10
    warmup: int = 3
    threads: int = 0
    clock: str = "wall"
    seed: int = 0
    timeout: float = 900.0


def classify(error: BaseException) -> str:
    """Status of a cell that raised: `oom`, `unsupported`, or `failed` for everything else."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        return "oom"
    if isinstance(error, NotImplementedError) or any(words in text for words in UNSUPPORTED):
        return "unsupported"
    return "failed"


def distribute(net: CausalLM, comm: str, device: torch.device) -> nn.Module:
    """Replicate or shard a model over the processes of the group."""
    if comm == "single":
        return net
    if comm == "ddp":
        return nn.parallel.DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in net.lm.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=comm == "fsdp_full")
    fully_shard(net, mesh=mesh, reshard_after_forward=comm == "fsdp_full")
    return net


class Stopwatch:
    """Marks the ends of steps without waiting for the device.

    Args:
        device: Where the steps are made.
        clock: What tells the time on a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock, self.marks = device, clock, list[Any]()
        self.began = self.ended = 0.0

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self) -> None:
        """Note the end of a step; the first mark is the beginning of the first one."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.clock())

    def start(self) -> None:
        """Synchronise and begin."""
        self.synchronize()
        self.began = self.clock()
        self.mark()

    def stop(self) -> None:
        """Synchronise and end."""
        self.synchronize()
        self.ended = self.clock()

    @property
    def seconds(self) -> float:
        """From start to stop."""
        return self.ended - self.began

    @property
    def steps(self) -> list[float]:
        """Seconds of each step."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [a.elapsed_time(b) / 1000 for a, b in pairs]
        return [b - a for a, b in pairs]


def measure(cell: Cell, shape: Shape, effort: Effort, rank: int = 0) -> dict[str, Any]:
    """Train in this process, which is one of `cell.n_gpu`, and return times, memory and losses of this rank.

    Batches are cut from one global batch, so that all schemes of communication see the same data.
    """
    if effort.device == "cpu" and effort.threads:
        torch.set_num_threads(effort.threads)
    device = torch.device("cuda", rank) if effort.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(effort.seed)
    net = CausalLM(shape, cell.attention, cell.loss_chunks, cell.checkpointing)
    net = net.to(device, torch.bfloat16 if cell.precision == "bf16-true" else torch.float32)
    tokens = torch.randint(shape.vocab_size, (cell.n_gpu * cell.batch, cell.seq_len + 1))
    own = tokens[rank * cell.batch : (rank + 1) * cell.batch].to(device)
    model = distribute(net, cell.comm, device)
    if cell.compile:
        model.compile()
    optimizer = build_adamw(net, LR, BETAS, WEIGHT_DECAY, cell.fused)
    watch = Stopwatch(device, time.process_time if effort.clock == "cpu" else time.perf_counter)
    losses: list[Tensor] = []

    def step() -> None:
        with autocast(device, cell.precision):
            loss = model(own[:, :-1], own[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    for _ in range(effort.warmup):
        step()
    watch.start()
    for _ in range(effort.steps):
        step()
        watch.mark()
    watch.stop()
    return {
        "seconds": watch.seconds,
        "step_seconds": watch.steps,
        "losses": [float(loss) for loss in losses],
        **device_memory(device),
    }


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision where it is asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def device_memory(device: torch.device) -> dict[str, float | None]:
    """Peak memory in GiB since the last reset, and how often the allocator had to try again; None on a CPU."""
    if device.type != "cuda":
        return {"mem_active_gib": None, "mem_reserved_gib": None, "alloc_retries": None}
    stats = torch.cuda.memory_stats(device)
    return {
        "mem_active_gib": stats["active_bytes.all.peak"] / GIB,
        "mem_reserved_gib": stats["reserved_bytes.all.peak"] / GIB,
        "alloc_retries": stats["num_alloc_retries"],
    }


def _rank(cell: Cell, shape: Shape, effort: Effort, rank: int, port: int, answer: Connection) -> None:
    """Entry of a process."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    try:
        if cell.comm != "single":
            backend = "nccl" if effort.device == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=cell.n_gpu)
        answer.send({"status": "ok", **measure(cell, shape, effort, rank)})
    except Exception as error:
        status = classify(error)
        answer.send({"status": status, "note": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"})
        answer.close()
        os._exit(0)  # other ranks may wait in a collective for ever: do not wait for them in turn
    if dist.is_initialized():
        dist.destroy_process_group()


def run_cell(cell: Cell, shape: Shape, effort: Effort) -> dict[str, Any]:
    """Measure a cell in processes of its own and return the status, the slowest rank's time, the largest memory.

    Status `killed` is a process that ended without a word, as one does that the system kills.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(cell.n_gpu):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(cell, shape, effort, rank, port, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers, deadline = [], time.monotonic() + effort.timeout
    try:
        for pipe in pipes:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                return {"status": "failed", "note": f"no answer in {effort.timeout:g} s"}
            try:
                answers.append(pipe.recv())
            except EOFError:
                return {"status": "killed", "note": "the process ended without an answer"}
            if answers[-1]["status"] != "ok":
                return answers[-1]
    finally:
        for process in processes:
            process.join(10 if len(answers) == cell.n_gpu else 0)
            process.kill()
            process.join()
    return join_ranks(answers)


def join_ranks(answers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the ranks of a cell: slowest time, largest memory, mean loss."""
    slowest = max(answers, key=lambda answer: answer["seconds"])
    out = dict(slowest)
    for key in ("mem_active_gib", "mem_reserved_gib", "alloc_retries"):
        out[key] = None if answers[0][key] is None else max(answer[key] for answer in answers)
    columns = zip(*(answer["losses"] for answer in answers), strict=True)
    out["losses"] = [statistics.fmean(column) for column in columns]
    return out
