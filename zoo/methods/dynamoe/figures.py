"""Pictures of where the width goes and what it buys; as a command, those of the results of `zoo reproduce dynamoe`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

_STYLES: dict[str, dict[str, Any]] = {
    "router": {"color": "black", "marker": "o", "linewidth": 2},
    "oracle": {"color": "tab:green", "marker": "x", "linestyle": "--"},
    "layer_adaptive": {"color": "tab:orange", "marker": "s"},
    "token_table": {"color": "tab:purple", "marker": "d"},
    "static_width": {"color": "tab:gray", "marker": "^"},
    "shuffled": {"color": "tab:red", "marker": "."},
    "shuffled_in_class": {"color": "tab:pink", "marker": "."},
    "random_iid": {"color": "tab:brown", "marker": "*", "linestyle": "none"},
    "router_only": {"color": "tab:blue", "marker": "v"},
    "flextron_like": {"color": "tab:cyan", "marker": "P", "markersize": 8, "linestyle": "none"},
    "dense": {"color": "black", "marker": "D", "markerfacecolor": "none", "linestyle": "none"},
    "dense_ft": {"color": "tab:olive", "marker": "D", "linestyle": "none"},
}
#: Ways of choosing widths that the results give as a difference to the router at each threshold.
_CONTROLS = ("oracle", "layer_adaptive", "token_table", "shuffled", "shuffled_in_class")


def curve_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]], counts: Callable[[float], Mapping[str, float]]
) -> Figure:
    """Nats per token against active parameters (embeddings among them), with activity above.

    Args:
        curves: Activity and loss of each way of choosing widths.
        counts: Parameter counts at an activity.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    empty, full = (counts(a)["parameters_active"] / 1e6 for a in (0.0, 1.0))
    for name, points in curves.items():
        ordered = sorted(points)
        x = [empty + (full - empty) * a for a, _ in ordered]
        style: dict[str, Any] = {"markersize": 4, **_STYLES.get(name, {})}
        axes.plot(x, [y for _, y in ordered], label=name.replace("_", " "), **style)
    if "router" in curves:
        # controls may be far above: the region of the router's curve is what matters
        best, worst = min(y for _, y in curves["router"]), max(y for _, y in curves["router"])
        axes.set_ylim(best - 0.1 * (worst - best) - 1e-3, worst + 1.2 * (worst - best) + 1e-3)

    def to_activity(parameters: Any) -> Any:
        return (parameters - empty) / (full - empty)

    def to_parameters(active: Any) -> Any:
        return empty + (full - empty) * active

    axes.secondary_xaxis("top", functions=(to_activity, to_parameters)).set_xlabel("activity of the MLPs")
    axes.set(xlabel="active parameters (million)", ylabel="nats per token")
    axes.legend(fontsize=8)
    return figure


def usage_figure(usage: Tensor) -> Figure:
    """Share of the tokens with each expert, by layer; `usage` is `[L, E]`."""
    figure = Figure(figsize=(max(4.0, 0.4 * len(usage) + 2), 3.2), layout="constrained")
    axes = figure.subplots()
    below = [0.0] * len(usage)
    experts = usage.shape[1]
    for e in range(experts):
        shares = usage[:, e].tolist()
        colour = str(0.9 - 0.8 * e / max(experts - 1, 1))
        axes.bar(range(len(usage)), shares, bottom=below, color=colour, label=f"expert {e}", edgecolor="white")
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axes.set(xlabel="layer", ylabel="share of tokens", xticks=range(len(usage)), ylim=(0, 1))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tokens_figure(texts: Sequence[str], active: Tensor, columns: int = 100) -> Figure:
    """Tokens of a text on a background that is the darker the wider their MLPs are.

    Args:
        texts: Text of each token, `T`.
        active: Activity of each token, `[T]`.
        columns: Characters in a line.
    """
    from matplotlib import colormaps

    rows: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for text, value in zip(texts, active.tolist(), strict=True):
        shown = text.replace("\n", "⏎").replace("$", r"\$") or "·"
        if column + len(shown) > columns:
            rows.append([])
            column = 0
        rows[-1].append((column, shown, value))
        column += len(shown) + 1
    # 100 columns of the monospace font at 11 points fill a figure of 11 inches
    figure = Figure(figsize=(0.11 * columns, 0.3 * len(rows) + 0.4))
    axes = figure.add_axes((0.01, 0, 0.98, 1 - 0.35 / (0.3 * len(rows) + 0.4)))
    axes.set(xlim=(0, columns), ylim=(len(rows), 0))
    axes.axis("off")
    colours = colormaps["YlOrRd"]
    for line, row in enumerate(rows):
        for start, shown, value in row:
            box = {"facecolor": colours(0.75 * value), "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
            axes.text(start, line + 0.5, shown, family="monospace", fontsize=11, va="center", bbox=box)
    axes.set_title("darker: wider experts", fontsize=9)
    return figure


def curves_of(results: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Activity and loss of all arms, as means over seeds.

    Args:
        results: Content of `results/dynamoe.cpu.json`.
    """

    def mean(run: str, metric: str) -> float:
        return fmean(metrics[f"test/{metric}"] for metrics in results["runs"][run].values())

    def knobs(run: str, start: str) -> list[str]:
        names = [name.removeprefix("test/") for name in next(iter(results["runs"][run].values()))]
        return sorted(name.removeprefix(start) for name in names if re.fullmatch(rf"{start}\d\d\d", name))

    def router(run: str) -> list[tuple[float, float]]:
        return [(mean(run, f"activity_{knob}"), mean(run, f"nll_{knob}")) for knob in knobs(run, "nll_")]

    found = {"router": router("dynamoe")}
    for control in _CONTROLS:
        points = [
            (
                mean("dynamoe", f"activity_{knob}"),
                mean("dynamoe", f"nll_{knob}") + mean("dynamoe", f"{control}_gain_{knob}"),
            )
            for knob in knobs("dynamoe", f"{control}_gain_")
        ]
        found[control] = points
    statics = sum(
        bool(re.fullmatch(r"test/nll_static_\d", name)) for name in next(iter(results["runs"]["dynamoe"].values()))
    )
    widths = [(e + 1) / (statics + 1) for e in range(statics)]
    found["static_width"] = [(width, mean("dynamoe", f"nll_static_{e}")) for e, width in enumerate(widths)]
    found["router_only"] = router("router_only")
    found["flextron_like"] = [(mean("flextron", "activity_router"), mean("flextron", "nll_router"))]
    found |= {"dense": [(1.0, mean("base", "nll_full"))], "dense_ft": [(1.0, mean("dense_ft", "nll_full"))]}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Draw all arms over active parameters, and what the router of one run does with the test sequences."""
    import argparse
    import json

    import torch

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/dynamoe.cpu.json"))
    parser.add_argument("--run", type=Path, default=Path("runs/reproduce/dynamoe/cpu/dynamoe/0"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args(argv)
    from zoo.commands.moefy import data_of, find_checkpoint, read

    checkpoint = find_checkpoint(str(args.run))
    if checkpoint is None:
        parser.error(f"no run in {args.run}; accepted: a run of zoo reproduce dynamoe")
    method, config = read(checkpoint)
    method.eval()
    drawn = {"curve": curve_figure(curves_of(json.loads(args.results.read_text("utf-8"))), method.parameter_counts)}
    data = data_of(config)
    data.prepare_data()
    data.setup("test")
    with torch.no_grad():
        batches = list(data.predict_dataloader())
        widths = torch.cat([method.predict_step(batch, i) for i, batch in enumerate(batches)], dim=1)
    shares = [(widths == e).float().mean((1, 2)) for e in range(method.sizes.shape[1])]
    drawn["use"] = usage_figure(torch.stack(shares, dim=1))
    active = method.sizes.gather(1, widths[:, 0]).mean(0)
    drawn["tokens"] = tokens_figure(data.token_texts(batches[0]["input_ids"][0].tolist()), active)
    for name, figure in drawn.items():
        figure.savefig(args.out / f"dynamoe.{name}.png", dpi=120)


if __name__ == "__main__":
    main()
