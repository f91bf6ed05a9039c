"""Checks of checkpoints and of going on from them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping
from typing import Any

import torch

from callbacks.atomic_checkpoint_io import check_plain
from zoo.errors import UsageError
from zoo.testing.compare import differences, row_differences, told
from zoo.testing.kit import NotApplicable, Verdict, Violation, check
from zoo.testing.probes import KillAt
from zoo.testing.subject import CHILD_SECONDS, Run, Subject, in_process, probe, read_rows

EXACT = (
    "A run that is killed and continued by `--resume` gives the same weights, optimiser state, buffers, logged metrics "
    "and steps as one that was not, bit for bit on a CPU"
)


@check("checkpoint", "the checkpoint loads with `weights_only=True`")
def checkpoint(subject: Subject) -> Verdict:
    """It holds tensors, numbers, strings, lists and dicts; the state dict fits a new model of the same options."""
    path = subject.base.checkpoint
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        check_plain({key: value for key, value in content.items() if key != "loops"})
    except Exception as error:
        raise Violation(str(error).splitlines()[0]) from error
    return f"{path.stat().st_size / 1e6:.2f} MB"


def middle(subject: Subject, at_end: bool) -> int:
    """Return a number of optimiser steps near the middle of the run, in mid-epoch or at the end of an epoch."""
    positions = subject.recorder.positions
    fit = [step for step, _, last in positions[:-1] if last == at_end and step < positions[-1][0]]
    if not fit:
        raise NotApplicable(f"the smoke config has no step {'that ends' if at_end else 'in the midst of'} an epoch")
    return min(fit, key=lambda step: abs(step - positions[-1][0] / 2))


def killed(subject: Subject, tag: str, step: int, overrides: Mapping[str, Any]) -> Any:
    """Arguments of a run that writes a checkpoint at `step` and is killed one step later, and its folder."""
    folder = subject.new_folder(tag)
    call = subject.words(
        {**overrides, "checkpoint.every_n_steps": step},
        [probe(KillAt, step=step + 1, marker=str(subject.folder / f"{folder.name}-killed"))],
    )
    return call, folder


def same(whole: Run, resumed: Run) -> None:
    """Raise a `Violation` unless metrics and final state are bit-identical."""
    left, right = whole.final(), resumed.final()
    for content in (left, right):
        content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "probes" not in k}
    found = differences(left, right, "checkpoint") + row_differences(whole.rows, resumed.rows)
    if found:
        raise Violation(told(found))


def resumed_in_process(subject: Subject, tag: str, step: int, overrides: Mapping[str, Any]) -> Run:
    """Train in a child process, kill it, and go on here."""
    call, folder = killed(subject, tag, step, overrides)
    child = subject.child(call, {"run_dir": folder})
    code = child.wait(CHILD_SECONDS)
    if code != -signal.SIGKILL:
        raise Violation(f"the run to be killed ended with {code}: {child.output()[-300:]}")
    try:
        return in_process("fit", resume=folder)
    except UsageError as error:
        raise Violation(f"--resume: {error}") from error


@check("resume", EXACT + ": in mid-epoch")
def resume(subject: Subject) -> Verdict:
    """Killed by SIGKILL one step after a checkpoint in mid-epoch."""
    step = middle(subject, at_end=False)
    same(subject.base, resumed_in_process(subject, "resume", step, {}))
    return f"checkpoint at step {step}, killed in step {step + 1}"


@check("resume_epoch", "at the end of an epoch", full=True)
def resume_epoch(subject: Subject) -> Verdict:
    """The same, with the checkpoint at the end of an epoch."""
    step = middle(subject, at_end=True)
    same(subject.base, resumed_in_process(subject, "resume-epoch", step, {}))
    return f"checkpoint at step {step}"


@check("resume_workers", "with loader workers", full=True)
def resume_workers(subject: Subject) -> Verdict:
    """The same in mid-epoch with two loader processes; the whole run has none."""
    if not hasattr(subject.base.result.trainer.datamodule, "num_workers"):  # type: ignore[union-attr]
        raise NotApplicable("the datamodule has no option num_workers")
    same(subject.base, resumed_in_process(subject, "resume-workers", middle(subject, False), {"data.num_workers": 2}))
    return None


@check("resume_ranks", "in two processes", full=True)
def resume_ranks(subject: Subject) -> Verdict:
    """The same in mid-epoch with two gloo processes, all of them killed."""
    step = middle(subject, at_end=False)
    whole = subject.new_folder("whole-ranks")
    codes, output = subject.two_ranks(subject.words({}), {"run_dir": whole})
    if codes != [0, 0]:
        raise Violation(f"two processes ended with {codes}: {output[-300:]}")
    call, folder = killed(subject, "resume-ranks", step, {})
    codes, output = subject.two_ranks(call, {"run_dir": folder})
    if -signal.SIGKILL not in codes:
        raise Violation(f"the processes to be killed ended with {codes}: {output[-300:]}")
    codes, output = subject.two_ranks({"config": [], "overrides": {}}, {"resume": folder})
    if codes != [0, 0]:
        raise Violation(f"two resumed processes ended with {codes}: {output[-300:]}")
    same(Run(whole, read_rows(whole)), Run(folder, read_rows(folder)))
    shutil.rmtree(whole)
    return f"checkpoint at step {step}"
