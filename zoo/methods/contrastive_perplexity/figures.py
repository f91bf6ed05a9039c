"""Pictures of what the tuning does to perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

_COLOURS = {"wanted": "tab:blue", "unwanted": "tab:red"}


def perplexity_figure(sentences: Mapping[str, Tensor]) -> Figure:
    """Histogram of the log-perplexity of held-out documents, `[D]` of each kind, in nats per token."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    everything = torch.cat(list(sentences.values()))
    edges = torch.linspace(float(everything.min()), float(everything.max()) + 1e-6, 41).tolist()
    for name, values in sentences.items():
        axes.hist(values.tolist(), bins=edges, alpha=0.6, color=_COLOURS[name], label=f"{name} documents")
    axes.axvline(float(sentences["wanted"].mean()), color="black", linestyle=":", label="mean of the wanted")
    axes.set(xlabel="log-perplexity (nats per token)", ylabel="documents", title="Held-out documents")
    axes.legend(fontsize=8)
    return figure


def course_figure(curve: Sequence[Mapping[str, float]]) -> Figure:
    """Perplexity of wanted and unwanted held-out documents against the optimiser step."""
    figure = Figure(figsize=(5.5, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in curve]
    for name, colour in _COLOURS.items():
        axes.plot(steps, [point[f"ppl_{name}"] for point in curve], marker="o", color=colour, label=name)
    axes.set(xlabel="step", ylabel="perplexity", yscale="log", title="Held-out documents")
    axes.legend(fontsize=8)
    return figure
