"""Checks with two processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.testing.compare import NOISE, as_floats, differences, gradient_differences, told
from zoo.testing.kit import Verdict, Violation, check
from zoo.testing.probes import NoDropout, Recorder
from zoo.testing.subject import SHORT, Subject, probe

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3
#: Of the largest number in a tensor; optimisers such as Adam turn rounding noise of tiny gradients into full steps.
STATE_TOLERANCE = 1e-3
METRIC_TOLERANCE = 1e-4
#: On top of `hardware/ddp_cpu`; blocks of a smoke config are small.
SHARDED = {
    "trainer.strategy": {"class_path": "zoo.nn.fsdp2.FullyShardedStrategy", "init_args": {"min_parameters": 100}},
}


@check(
    "ranks",
    "Two processes at the same global batch give the loss, gradients and updates of one, within float tolerance.",
)
def ranks(subject: Subject) -> Verdict:
    """Three steps with gloo; dropout is off, batch norm is over the global batch."""
    return two_as_one(subject, {})


@check("sharded", "Two processes with sharded parameters (FSDP2) do what one does, within float tolerance.", full=True)
def sharded(subject: Subject) -> Verdict:
    """The same with every block sharded; gradients and states are assembled from both parts."""
    return two_as_one(subject, SHARDED)


def two_as_one(subject: Subject, overrides: dict[str, Any]) -> Verdict:
    """Train a few steps in one process, and in two under `overrides`.

    Raises:
        Violation: If losses, gradients or states differ.
    """
    folder = subject.new_folder("ranks-seen")
    folder.mkdir()
    one = subject.fit("one", SHORT, [probe(NoDropout), probe(Recorder)]).callback(Recorder)
    call = subject.words({**SHORT, **overrides}, [probe(NoDropout), probe(Recorder, folder=str(folder))])
    codes, output = subject.two_ranks(call, {"run_dir": subject.new_folder("two")})
    if codes != [0, 0]:
        raise Violation(f"two processes ended with {codes}: {output.strip()[-600:]}")
    two: list[dict[str, Any]] = [torch.load(folder / f"rank-{n}.pt", weights_only=True) for n in (0, 1)]
    found = differences(two[0]["first_update"], two[1]["first_update"], "ranks")
    if found:
        raise Violation(f"the processes do not have the same state after one step\n{told(found)}")
    losses = [(a + b) / 2 for a, b in zip(two[0]["losses"], two[1]["losses"], strict=True)]
    off = [abs(a - b) / max(abs(b), 1e-6) for a, b in zip(losses, one.losses, strict=True)]
    if off[0] > LOSS_TOLERANCE:
        raise Violation(f"first loss {losses[0]:.7g} with two processes, {one.losses[0]:.7g} with one")
    found = gradient_differences(two[0]["gradients"], one.gradients, GRADIENT_TOLERANCE)
    if found:
        raise Violation(f"gradients differ\n{told(found)}")
    found = state_differences(two[0]["first_update"], one.first_update, one.gradients)
    if found:
        raise Violation(f"state after one step differs\n{told(found)}")
    if max(off) > 10 * LOSS_TOLERANCE:
        raise Violation(f"losses {losses} with two processes, {one.losses} with one")
    return f"losses within {max(off):.0e}"


def state_differences(left: dict[str, Tensor], right: dict[str, Tensor], gradients: dict[str, Tensor]) -> list[str]:
    """Name the tensors of two states that differ; entries with a gradient near zero are left out, see above."""
    found = []
    largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    whole = {k: v for k, v in right.items() if k not in as_floats(right)}
    found += differences({k: left[k] for k in whole}, whole, "state")
    for name, value in as_floats(right).items():
        a, b = left[name], value
        if name in gradients:
            grad = gradients[name].abs()
            clear = grad > max(1e-3 * float(grad.max()), NOISE * 1e-2 * largest)
            a, b = a[clear], b[clear]
        scale = float(value.abs().max()) if value.numel() else 0.0
        if a.numel() and float((a - b).abs().max()) > STATE_TOLERANCE * max(scale, 1e-3):
            found.append(f"{name}: off by {float((a - b).abs().max()):.3g} where the largest is {scale:.3g}")
    return found


@check("ranks_evaluation", "Evaluation by two processes gives the metrics of one.", full=True)
def ranks_evaluation(subject: Subject) -> Verdict:
    """The same checkpoint, validated by one and by two processes."""
    # not the metrics of the run, which has others from its training
    seen = subject.evaluations["validate"].result.trainer.callback_metrics  # type: ignore[union-attr]
    folder = subject.new_folder("two-validate")
    call = subject.words({"ckpt_path": str(subject.base.checkpoint)})
    codes, output = subject.two_ranks(call, {"run_dir": folder}, command="validate")
    if codes != [0, 0]:
        raise Violation(f"two processes ended with {codes}: {output.strip()[-600:]}")
    from zoo.runs import read_json

    one = {name: float(value) for name, value in seen.items()}
    found = metric_differences(read_json(folder / "summary.json")["metrics"], one)
    if found:
        raise Violation(told(found))
    return f"{sum(name.startswith('val/') for name in one)} metrics"


def metric_differences(two: Mapping[str, float], one: Mapping[str, float]) -> list[str]:
    """Name the metrics `val/...` that two processes do not give as one does; there has to be one."""
    names = [{name for name in metrics if name.startswith("val/")} for metrics in (two, one)]
    if not any(names):
        return ["nothing is logged as val/..."]
    out = [f"{name} is logged by two processes alone" for name in sorted(names[0] - names[1])]
    out += [f"{name} is not logged by two processes" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        # in this form no comparison with NaN is passed
        if not abs(two[name] - one[name]) <= METRIC_TOLERANCE * max(1.0, abs(one[name])):
            out.append(f"{name} is {two[name]:.6g} with two processes, {one[name]:.6g} with one")
    return out
