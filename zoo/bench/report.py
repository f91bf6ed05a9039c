"""From the times of a bench to its JSON file, its table, and the page over all of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo import runs
from zoo.claims.results import hardware_name, table
from zoo.output import table_console
from zoo.runs import read_json, write_atomically

PAGE = "README.md"

#: Peak dense floating-point operations a second by part of the GPU's name: with bf16 inputs, with float32 inputs.
#: From NVIDIA's data sheets, without sparsity; float32 without TF32.
PEAK_FLOPS = {
    "H200": (989e12, 67e12), "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12), "L40S": (362e12, 91.6e12), "L4": (121e12, 30.3e12), "4090": (165e12, 82.6e12),
}  # fmt: skip


def peak_flops(gpu: str, precision: str) -> float | None:
    """Return the peak of a GPU for a Trainer's precision, None for an unknown one."""
    for name, (half, single) in PEAK_FLOPS.items():
        if name in gpu:
            return half if "16" in precision else single
    return None


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value with at least `share` of all values at or below it."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def speed(blocks: Sequence[Sequence[float]], wait: Sequence[float], rows: int, tokens: int) -> dict[str, Any]:
    """Return throughput and step times.

    Args:
        blocks: Seconds of the steps of each block.
        wait: Seconds spent on getting a batch, for each step.
        rows: Samples in all steps together.
        tokens: Tokens in all steps together.
    """
    times = [seconds for block in blocks for seconds in block]
    total = sum(times)
    out: dict[str, Any] = {
        "samples_per_second": rows / total,
        "step_ms": {"median": 1000 * statistics.median(times), "p90": 1000 * percentile(times, 0.9)},
        "data_wait_share": min(1.0, sum(wait) / total),
    }
    return out | ({"tokens_per_second": tokens / total} if tokens else {})


def paired_ratios(fit: Sequence[Sequence[float]], raw: Sequence[Sequence[float]]) -> list[float]:
    """Return the throughput of the fit over that of the raw loop, for each raw block with the fit blocks beside it."""
    means = [statistics.fmean(block) for block in fit]
    pairs = zip(raw, means, means[1:], strict=False)
    return [statistics.fmean(block) / ((before + after) / 2) for block, before, after in pairs]


def trainer_ms(fit: Sequence[Sequence[float]], raw: Sequence[Sequence[float]]) -> float:
    """Return the milliseconds that a step of the fit takes longer, median over the raw blocks."""
    means = [statistics.fmean(block) for block in fit]
    pairs = zip(raw, means, means[1:], strict=False)
    return 1000 * statistics.median((before + after) / 2 - statistics.fmean(block) for block, before, after in pairs)


def summarise(bench: Any, precision: str, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a finished `zoo.bench.measure.Bench`."""
    out: dict[str, Any] = {
        "steps": sum(map(len, bench.fit_blocks)),
        "blocks": len(bench.fit_blocks),
        "rows_per_step": statistics.fmean(bench.rows),
        "fit": speed(bench.fit_blocks, bench.fit_wait, sum(bench.rows), sum(bench.tokens)),
        "raw": None,
        "ratio": None,
        "processor_time_ratio": None,
        "trainer_ms_per_step": None,
        "peak_memory_bytes": bench.peak_bytes,
        "flops_per_step": bench.flops,
        "mfu": None,
    }
    if bench.raw_blocks:
        ratios = paired_ratios(bench.fit_blocks, bench.raw_blocks)
        out["raw"] = speed(bench.raw_blocks, bench.raw_wait, sum(bench.raw_rows), 0)
        out["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "blocks": ratios}
        if bench.clock.device.type == "cpu":
            per_step = [[[s / len(b)] for s, b in zip(cpu, blocks, strict=True)] for cpu, blocks in (
                (bench.fit_cpu, bench.fit_blocks), (bench.raw_cpu, bench.raw_blocks))]  # fmt: skip
            out["processor_time_ratio"] = statistics.median(paired_ratios(*per_step))
        out["trainer_ms_per_step"] = trainer_ms(bench.fit_blocks, bench.raw_blocks)
    gpus = hardware.get("gpus") or []
    peak = peak_flops(gpus[0], precision) if gpus and bench.clock.device.type == "cuda" else None
    if bench.flops and peak:
        out["mfu"] = bench.flops * 1000 / out["fit"]["step_ms"]["median"] / peak
    return out


def write_bench(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file of the folder and the page over all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_atomically(path.parent / PAGE, page(path.parent))


def comparison(
    benchmark: str, statement: str, value: float, unit: str, relation: str, limit: float, details: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the file content of a comparison by a script in `benchmarks/`.

    Args:
        benchmark: Name of script and file.
        statement: What the number is, without the number.
        value: The number.
        unit: Its unit, `""` for a ratio.
        relation: `>=` or `<=`, how it should compare with `limit`.
        limit: The target, fixed before the measurement.
        details: Everything else that was measured.
    """
    return {
        "benchmark": benchmark,
        "statement": statement,
        "value": value,
        "unit": unit,
        "target": f"{relation} {limit:g} {unit}".strip(),
        "holds": value >= limit if relation == ">=" else value <= limit,
        **details,
        "hardware": runs.hardware(),
        "versions": runs.versions(),
        "commit": runs.commit(),
    }


def page(directory: Path) -> str:
    """Return the page over all JSON files of a folder."""
    files = [read_json(path) for path in sorted(directory.glob("*.json"))]
    lines = ["# Speed", "", "Made by `zoo bench` and the scripts in `benchmarks/`; not to be edited.", ""]
    comparisons = [f for f in files if "statement" in f]
    if comparisons:
        rows = [
            [
                f"`{f['benchmark']}`", f["statement"], f"{f['value']:.3g} {f['unit']}".strip(), f["target"],
                "yes" if f["holds"] else "**no**", hardware_name(f["hardware"]),
            ]
            for f in comparisons
        ]  # fmt: skip
        lines += [
            "## Comparisons",
            "",
            table(["benchmark", "what", "measured", "target", "holds", "hardware"], rows),
            "",
        ]
    methods = [f for f in files if "fit" in f]
    if methods:
        lines += ["## Training", "", "Fit over raw: throughput of `zoo fit` over that of a plain PyTorch loop, in"]
        lines += ["alternating blocks of one process; median, least and largest block.", ""]
        lines += [table(HEADER, [training_row(f) for f in methods]), ""]
    for f in (f for f in files if "parts" in f):
        parts = list(f["parts"][0]["shares"])
        rows = [
            [row["config"], f"{row['step_ms']:.3g}", *(f"{row['shares'][part]:.0%}" for part in parts)]
            for row in f["parts"]
        ]
        note = f" {f['note']}." if f.get("note") else ""
        lines += ["## Where a step goes", "", f"`{f['benchmark']}` on {hardware_name(f['hardware'])}.{note}", ""]
        lines += [table(["config", "step ms", *parts], rows), ""]
    return "\n".join(lines)


HEADER = (
    "config", "samples/s", "step ms, median (p90)", "waits for data", "fit over raw", "Trainer ms", "peak memory",
    "MFU", "hardware",
)  # fmt: skip


def training_row(f: Mapping[str, Any]) -> list[str]:
    """Return the row of a method's bench."""
    fit, ratio = f["fit"], f["ratio"]
    tokens = f" ({fit['tokens_per_second']:.4g} tokens/s)" if "tokens_per_second" in fit else ""
    return [
        f["config"], f"{fit['samples_per_second']:.4g}{tokens}",
        f"{fit['step_ms']['median']:.3g} ({fit['step_ms']['p90']:.3g})", f"{fit['data_wait_share']:.1%}",
        f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})" if ratio else "–",
        f"{f['trainer_ms_per_step']:.2f}" if ratio else "–", f"{f['peak_memory_bytes'] / 2**20:.0f} MiB",
        f"{f['mfu']:.1%}" if f["mfu"] else "–", hardware_name(f["hardware"]),
    ]  # fmt: skip


def show(content: Mapping[str, Any]) -> None:
    """Print the numbers of a method's bench."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False)
    out.add_column("")
    out.add_column("fit", justify="right")
    out.add_column("raw loop", justify="right")
    fit, raw = content["fit"], content["raw"]

    def row(name: str, form: str, *keys: str) -> None:
        cells = []
        for side in (fit, raw):
            value: Any = side
            for key in keys:
                value = value.get(key) if value else None
            cells.append("–" if value is None else form.format(value))
        out.add_row(name, *cells)

    row("samples/s", "{:.4g}", "samples_per_second")
    if "tokens_per_second" in fit:
        row("tokens/s", "{:.4g}", "tokens_per_second")
    row("step, median (ms)", "{:.2f}", "step_ms", "median")
    row("step, 90 % (ms)", "{:.2f}", "step_ms", "p90")
    row("waits for data", "{:.1%}", "data_wait_share")
    console = table_console()
    console.print(f"{content['config']}, {content['rows_per_step']:g} samples a step", highlight=False)
    console.print(out)
    ratio = content["ratio"]
    lines = []
    if ratio:
        lines.append(f"fit over raw: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f} over blocks)")
        if content["processor_time_ratio"]:
            lines.append(f"in processor time: {content['processor_time_ratio']:.3f}")
        lines.append(f"Trainer: {content['trainer_ms_per_step']:.2f} ms a step")
    lines.append(f"peak memory: {content['peak_memory_bytes'] / 2**20:.0f} MiB")
    if content["flops_per_step"]:
        rate = content["flops_per_step"] * 1000 / fit["step_ms"]["median"]
        used = f", {content['mfu']:.1%} of the peak" if content["mfu"] else ""
        lines.append(f"arithmetic: {rate / 1e9:.4g} GFLOP/s{used}")
    console.print("\n".join(lines), highlight=False)
