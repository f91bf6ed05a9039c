"""The paper's findings, checked on the points that it has published."""

from __future__ import annotations

from zoo.methods.slm_bottlenecks.costs import SIZES, geometric_mean
from zoo.methods.slm_bottlenecks.published import BATCHES, GPUS, NODES, published_rows
from zoo.methods.slm_bottlenecks.reduce import reduce_best

H100, A100_40, A100_80 = "H100-80GB", "A100-40GB", "A100-80GB"


def points(figure: int, *axes: str) -> dict[tuple[object, ...], float]:
    """Return the best tokens a dollar of a figure for each combination of axes."""
    rows = [row for row in published_rows() if row["figure"] == figure]
    return {key: row["tokens_per_dollar"] for key, row in reduce_best(rows, axes).items()}


def flash_speedups() -> dict[str, float]:
    """Flash over eager for each size: geometric mean over the batches of Figure 1 at which both run."""
    best = points(1, "size", "attention", "global_batch")
    return {
        size: geometric_mean(
            [best[size, "flash", b] / best[size, "eager", b] for b in BATCHES if best[size, "eager", b]]
        )
        for size in SIZES
    }


def win_share(figure: int, size: str, axis: str, rival: str, name: str) -> float:
    """Share of the values of `axis` at which `name` is the best of `rival`, for one size."""
    best = points(figure, "size", axis, rival)
    values = sorted({key[1] for key in best if key[0] == size}, key=str)
    names = {key[2] for key in best}
    wins = [max(names, key=lambda other: best[size, value, other]) == name for value in values]
    return sum(wins) / len(wins)


def agreement() -> float:
    """Largest relative difference between points of a figure and the best of the points of another that they hide.

    Figure 1 at global batches from 128 on (which one GPU cannot hold) from Figure 4; Figure 2's A100-80GB from Figure
    3; Figure 1's best of the two smallest sizes from Figure 2; and two GPUs at 2B, Figure 2, from Figure 4 at batch 8.
    """
    one, two = points(1, "size", "attention", "global_batch"), points(2, "size", "gpu", "n_gpu")
    three, four = points(3, "size", "nodes"), points(4, "size", "global_batch")
    pairs = [(one[size, "flash", b], four[size, b]) for size in SIZES for b in BATCHES if b >= 128]
    for size in SIZES:
        shown = {1: max(two[size, A100_80, n] for n in (2, 4, 8)), 2: two[size, A100_80, 16]}
        shown |= {4: two[size, A100_80, 32], 8: two[size, A100_80, 64]}
        pairs += [(shown[n], three[size, n]) for n in NODES]
    tops = points(1, "size", "attention"), points(2, "size")
    pairs += [(tops[0][size, "flash"], tops[1][size,]) for size in ("100m", "500m")]
    pairs.append((points(2, "size", "n_gpu")["2b", 2], four["2b", 8]))
    return max(abs(a / b - 1) for a, b in pairs)


def exceptions() -> dict[str, bool]:
    """What does not follow the paper's sentences but stands in its figures, by a few words."""
    two = points(2, "size", "gpu", "n_gpu")
    three, four = points(3, "size", "comm", "nodes"), points(4, "size", "comm", "global_batch")
    return {
        "full sharding wins for 1B on one node": three["1b", "fsdp_full", 1] > three["1b", "ddp", 1],
        "gradient sharding wins for 500M at batch 32": four["500m", "fsdp_grad_op", 32] > four["500m", "ddp", 32],
        "gradient sharding loses to full sharding for 100M on one node": (
            three["100m", "fsdp_grad_op", 1] < three["100m", "fsdp_full", 1]
        ),
        "full and gradient sharding tie for 2B on several nodes": all(
            abs(three["2b", "fsdp_grad_op", n] / three["2b", "fsdp_full", n] - 1) < 0.01 for n in (2, 4, 8)
        ),
        "DDP holds a batch of 512 at 2B and fails at 1024": (
            four["2b", "ddp", 512] > 0 and four["2b", "ddp", 1024] == 0
        ),
        "one H100 beats one A100-40GB at 100M": two["100m", H100, 1] > two["100m", A100_40, 1],
        "one H100 beats one A100-80GB at 1B": two["1b", H100, 1] > two["1b", A100_80, 1],
        "64 A100-80GB jump up at 100M": two["100m", A100_80, 64] > 1.2 * two["100m", A100_80, 32],
        "64 H100 jump down at 100M": two["100m", H100, 64] < 0.5 * two["100m", H100, 32],
    }


def findings() -> dict[str, float]:
    """Numbers of the four findings: attention, hardware, communication, saturation; and of their exceptions."""
    speedups = flash_speedups()
    one = points(1, "size", "attention", "global_batch")
    out = {f"flash_speedup_{size}": value for size, value in speedups.items()}
    out |= {f"h100_best_share_{size}": win_share(2, size, "n_gpu", "gpu", H100) for size in SIZES}
    two = points(2, "size", "gpu", "n_gpu")
    several = [
        two[size, H100, n] < min(two[size, gpu, n] for gpu in (A100_40, A100_80)) for size in SIZES for n in GPUS
    ]
    out["h100_worst_share"] = sum(several) / len(several)
    out |= {f"ddp_best_share_{size}": win_share(3, size, "nodes", "comm", "ddp") for size in SIZES}
    curves = {size: {b: one[size, "flash", b] for b in BATCHES} for size in SIZES}
    # what the largest batch, which uses the memory best, reaches of the best one
    out |= {f"largest_batch_share_{size}": curve[max(BATCHES)] / max(curve.values()) for size, curve in curves.items()}
    found = exceptions()
    out["exceptions_found_share"] = sum(found.values()) / len(found)
    out["figures_disagree_by"] = agreement()
    return out
