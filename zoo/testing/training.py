"""Checks of what happens when the smoke config is trained."""

from __future__ import annotations

import math
import re

import torch

from zoo.testing.compare import gradient_differences, row_differences, told
from zoo.testing.kit import NotApplicable, Verdict, Violation, check
from zoo.testing.probes import Compile, FixedBatch, Halves, NoDropout, Recorder
from zoo.testing.subject import SHORT, Subject, probe

#: Folders that a metric may be in; `monitor` and `lr` are those of shared callbacks.
STAGES = ("train", "val", "test")
SHARED = ("monitor", "probe", "lr-", "epoch", "step", "trainer")
FRACTIONS = re.compile(r"/(acc|accuracy|iou)(_|$)")


@check(
    "smoke",
    "`configs/<name>/smoke.yaml` fits, validates and tests in seconds on two CPU cores and needs no network; it "
    "writes a checkpoint every few steps",
)
def smoke(subject: Subject) -> Verdict:
    """It runs as it is shipped, writes a checkpoint every few steps, and can be evaluated."""
    steps = subject.base.result.trainer.global_step  # type: ignore[union-attr]
    every = (subject.config.get("checkpoint") or {}).get("every_n_steps", 0)
    if not 1 <= every <= max(steps // 2, 1):
        raise Violation(f"{steps} steps with checkpoint.every_n_steps {every or 'not set'}: expected 1 to {steps // 2}")
    return f"{steps} steps; {', '.join(['fit', *subject.evaluations])}"


@check("finite", "`training_step` returns the loss")
def finite(subject: Subject) -> Verdict:
    """It does so in every step, and it is a number."""
    for index, loss in enumerate(subject.recorder.losses):
        if not math.isfinite(loss):
            raise Violation(f"the loss of batch {index} is {loss}")
    return f"{subject.recorder.losses[0]:.4g} to {subject.recorder.losses[-1]:.4g}"


@check("falls", "The loss of the smoke config is finite and falls when it is trained on one batch again and again.")
def falls(subject: Subject) -> Verdict:
    """The mean of the last three losses is below that of the first three."""
    overrides = {"trainer.limit_val_batches": 1, "trainer.enable_model_summary": False}
    losses = subject.fit("fixed", overrides, [probe(FixedBatch), probe(Recorder)]).callback(Recorder).losses
    n = min(3, len(losses) // 2)
    if n == 0:
        raise NotApplicable("the smoke config has fewer than two steps")
    first, last = sum(losses[:n]) / n, sum(losses[-n:]) / n
    if not last < first:
        raise Violation(f"the loss on one batch goes from {first:.6g} to {last:.6g} in {len(losses)} steps")
    return f"{first:.4g} to {last:.4g} in {len(losses)} steps"


@check("gradients", "Every trainable parameter gets a gradient in some step; frozen ones never do.")
def gradients(subject: Subject) -> Verdict:
    """Trainable is what an optimiser holds and what wants a gradient when the training starts."""
    seen = subject.recorder
    idle, moved = sorted(seen.trainable - seen.touched), sorted(seen.frozen & seen.touched)
    if idle:
        raise Violation(f"no gradient in {len(seen.losses)} steps: {told(idle)}")
    if moved:
        raise Violation(f"a gradient although no optimiser holds it or it was frozen: {told(moved)}")
    return f"{len(seen.trainable)} trainable, {len(seen.frozen)} frozen"


@check("metrics", "names `train/...`, `val/...`, `test/...`")
def metrics(subject: Subject) -> Verdict:
    """All logged names are of that form, each stage logs something, and accuracies are fractions."""
    subject.evaluations  # noqa: B018 - the test metrics
    rows = [*subject.base.rows, *subject.evaluations["validate"].rows, *subject.evaluations["test"].rows]
    names = dict.fromkeys(key for row in rows for key, value in row.items() if value != "")
    for name in names:
        if not name.startswith((*(f"{stage}/" for stage in STAGES), *SHARED)):
            raise Violation(f"{name!r} is none of train/..., val/..., test/...")
    for stage in STAGES:
        if not any(name.startswith(f"{stage}/") for name in names):
            raise Violation(f"nothing is logged as {stage}/...")
    for row in rows:
        for name, value in row.items():
            if value and FRACTIONS.search(name) and not -1e-6 <= float(value) <= 1 + 1e-6:
                raise Violation(f"{name} is {value}: expected a fraction in [0, 1]")
    return f"{sum(name.startswith(STAGES) for name in names)} names"


@check("bf16", "`bf16-mixed` runs")
def bf16(subject: Subject) -> Verdict:
    """A few steps in bfloat16 mixed precision give finite losses."""
    run = subject.fit("bf16", {**SHORT, "trainer.precision": "bf16-mixed"}, [probe(Recorder)])
    losses = run.callback(Recorder).losses
    if not all(map(math.isfinite, losses)):
        raise Violation(f"losses in bf16-mixed: {losses}")
    return None


@check("accumulation", "Half batches with twice the accumulation give the gradients of whole ones.")
def accumulation(subject: Subject) -> Verdict:
    """The gradient of the first batch is the mean of those of its halves; dropout is off."""
    result = subject.base.result
    if not result.model.automatic_optimization:  # type: ignore[union-attr]
        raise NotApplicable("the method steps its optimisers itself")
    run = subject.fit("halves", {**SHORT, "trainer.max_steps": 1}, [probe(NoDropout), probe(Halves)])
    halves = run.callback(Halves)
    found = gradient_differences(halves.halves, halves.whole, 1e-3)
    if found:
        raise Violation(told(found))
    return None


@check("workers", "the same data for any number of workers", full=True)
def workers(subject: Subject) -> Verdict:
    """The first losses with 0 and with 2 loader processes are the same numbers."""
    result = subject.base.result
    if not hasattr(result.trainer.datamodule, "num_workers"):  # type: ignore[union-attr]
        raise NotApplicable("the datamodule has no option num_workers")
    runs = [subject.fit(f"workers-{n}", {**SHORT, "data.num_workers": n}) for n in (0, 2)]
    found = row_differences(runs[0].rows, runs[1].rows)
    if found:
        raise Violation(told(found))
    return None


@check("compile", "`torch.compile` runs where the card says `compiles=True`", full=True)
def compiles(subject: Subject) -> Verdict:
    """The compiled training step gives the losses of the plain one, to 1e-3."""
    if not subject.card.compiles:
        raise NotApplicable("the card does not say compiles=True")
    plain = subject.fit("plain", SHORT, [probe(Recorder)]).callback(Recorder).losses
    losses = subject.fit("compiled", SHORT, [probe(Compile), probe(Recorder)]).callback(Recorder).losses
    torch.compiler.reset()
    off = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, plain, strict=True))
    if off > 1e-3:
        raise Violation(f"compiled losses {losses}, plain {plain}")
    return f"within {off:.1g}"
