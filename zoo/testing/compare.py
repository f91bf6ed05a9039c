"""What differs between two runs, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: Endings of metrics that measure the machine and not the method.
MEASURED = re.compile(r"(^|_)(seconds|ms|us|bytes|mib|per_second)$")
SHOWN = 3
#: Share of the largest gradient below which others consist of rounding errors, e.g. of a bias before a batch norm.
NOISE = 1e-3


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Name everything in which two nested values are not bit-identical; NaN equals NaN."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        keys = sorted(map(str, set(left) ^ set(right)))
        out = [f"{where or 'top'}: {', '.join(keys[:SHOWN])} only in one of them"] if keys else []
        return out + [d for k in left if k in right for d in differences(left[k], right[k], f"{where}/{k}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        out = [f"{where}: {len(left)} and {len(right)} long"] if len(left) != len(right) else []
        return out + [d for i, (a, b) in enumerate(zip(left, right)) for d in differences(a, b, f"{where}[{i}]")]  # noqa: B905
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.shape != right.shape or left.dtype != right.dtype:
            return [f"{where}: {left.dtype}{list(left.shape)} and {right.dtype}{list(right.shape)}"]
        unlike = (left != right) & ~((left != left) & (right != right))
        if not bool(unlike.any()):
            return []
        most = (left.double() - right.double()).abs().nan_to_num(float("inf")).max()
        return [f"{where}: {int(unlike.sum())} of {left.numel()} numbers differ, by up to {float(most):.3g}"]
    return [] if left == right or (left != left and right != right) else [f"{where}: {left!r} and {right!r}"]


def unmeasured(value: Any) -> Any:
    """Return nested mappings without the entries that measure the machine."""
    if not isinstance(value, Mapping):
        return value
    return {k: unmeasured(v) for k, v in value.items() if not (isinstance(k, str) and MEASURED.search(k))}


def row_differences(left: Sequence[Mapping[str, str]], right: Sequence[Mapping[str, str]]) -> list[str]:
    """Compare the rows of two `metrics.csv`; measured times and sizes may differ."""
    kept = [[{k: v for k, v in unmeasured(row).items() if v} for row in rows] for rows in (left, right)]
    return differences(kept[0], kept[1], "metrics.csv")


def gradient_differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """Name the tensors that differ by more than `tolerance` of the largest number in them.

    Where all numbers of a tensor are small, `NOISE` of the largest gradient takes the place of its own largest number.
    """
    largest = max((float(g.abs().max()) for g in right.values() if g.numel()), default=0.0)
    out = []
    for name in sorted(set(left) | set(right)):
        a, b = left.get(name), right.get(name)
        if a is None or b is None:
            size = float((b if a is None else a).abs().max())  # type: ignore[union-attr]
            off, scale = size, largest
        else:
            off, scale = float((a - b).abs().max()), max(float(b.abs().max()), NOISE * largest)
        if off > tolerance * scale:
            out.append(f"{name}: off by {off:.3g} where the largest is {scale:.3g}")
    return out


def told(found: Sequence[str]) -> str:
    """Return the first differences, one a line, and the number of the others."""
    more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return "\n".join([*found[:SHOWN], *more])


def as_floats(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state that hold floating-point numbers."""
    return {k: v for k, v in values.items() if isinstance(v, Tensor) and torch.is_floating_point(v)}
