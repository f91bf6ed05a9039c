"""Pictures of what the clusters became."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cluster_figure(usage: Tensor) -> Figure:
    """Draw how the images of each class spread over the prototypes.

    Args:
        usage: Counts `[K, C]`: images of class `c` whose nearest prototype is `k`.
    """
    from matplotlib.figure import Figure

    share = (usage / usage.sum(dim=0, keepdim=True).clamp_min(1)).cpu()
    prototypes, classes = share.shape
    if prototypes > classes:  # free prototypes have no order: sort them by the class that uses them most
        share = share[share.argmax(dim=1).argsort(stable=True)]
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="class", ylabel="prototype", title="Share of each class assigned to a prototype")
    figure.colorbar(image)
    return figure


def pseudo_label_figure(quarters: Tensor) -> Figure:
    """Draw the accuracy of the pseudo-labels in each quarter of training, `[4]`; NaN where training has not been."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, 5), quarters.nan_to_num().cpu().numpy())
    axes.set(xlabel="quarter of training", ylabel="accuracy", ylim=(0, 1), xticks=range(1, 5))
    axes.set_title("Pseudo-labels against hidden classes")
    return figure
