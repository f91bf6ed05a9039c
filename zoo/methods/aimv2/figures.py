"""Pictures of what was learned.

    python -m zoo.methods.aimv2.figures [runs/reproduce/aimv2/cpu] [results]

keeps those of the first seed of `zoo reproduce aimv2` beside its results.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from zoo.methods.aimv2.losses import unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _picture(image: Tensor) -> Any:
    """An image `[c, H, W]` of any range as an array for `imshow`."""
    image = image.float().cpu()
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy().squeeze()


def _show(axes: Any, image: Tensor, title: str = "", size: int = 8) -> None:
    axes.imshow(_picture(image), cmap="gray", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=size)


def patch_figure(shown: Sequence[tuple[Tensor, Tensor, int]], images: Sequence[Tensor], patch_size: int) -> Figure:
    """Draw normalised patches above the predictions of the next ones.

    Args:
        shown: For each image its patches `[I, P]`, the predicted ones, and the number of those that are given.
        images: The images `[c, H, W]`, above the patches.
        patch_size: Side of a patch.
    """
    from matplotlib.figure import Figure

    names = ("image", "true patches", "predicted")
    figure = Figure(figsize=(1.3 * len(shown), 4.6), layout="constrained")
    axes = figure.subplots(len(names), len(shown), squeeze=False)
    for column, ((target, predicted, _), image) in enumerate(zip(shown, images, strict=True)):
        patches = [unpatchify(x[None].clamp(-2.5, 2.5), patch_size, *image.shape[1:])[0] for x in (target, predicted)]
        for row, (picture, name) in enumerate(zip([image, *patches], names, strict=True)):
            _show(axes[row][column], picture, name if column == 0 else "")
    given = ", ".join(str(prefix) for prefix in sorted({prefix for _, _, prefix in shown}))
    figure.suptitle(f"Each patch from the true ones before it, normalised; the first {given} are given", fontsize=9)
    return figure


def caption_figure(images: Sequence[Tensor], true: Sequence[str], said: Sequence[str]) -> Figure:
    """Draw images `[c, H, W]` with their captions and the most likely ones."""
    from textwrap import fill

    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * len(images), 2.9), layout="constrained")
    axes = figure.subplots(1, len(images), squeeze=False)[0]
    for axis, image, label, caption in zip(axes, images, true, said, strict=True):
        _show(axis, image, fill(label, 22), 7)
        axis.set_xlabel("said: " + fill(caption, 22), fontsize=7)
    figure.suptitle("Captions of the data above, captions of the decoder below", fontsize=9)
    return figure


def attention_figure(images: Tensor, weights: Tensor, grid: tuple[int, int]) -> Figure:
    """Draw images `[n, c, H, W]` above the attention `[n, I]` of the probe's query over the patches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.3 * len(images), 3.0), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (image, weight) in enumerate(zip(images, weights.float().cpu(), strict=True)):
        _show(axes[0][column], image)
        axes[1][column].imshow(weight.view(grid).numpy(), cmap="magma", vmin=0)
        axes[1][column].axis("off")
    figure.suptitle("Where the attentive probe looks", fontsize=9)
    return figure


def probe_figure(curves: Mapping[str, Sequence[float]], steps: Sequence[int]) -> Figure:
    """Draw the validation accuracy of each probe against the steps of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(steps, values, marker="o", label=name)
    axes.set(xlabel="step", ylabel="validation accuracy", title="Probes on the frozen encoder")
    axes.legend()
    return figure


#: Pictures that are kept: the run that made each.
KEPT = {"next_patches": "aimv2", "captions": "aimv2", "probes": "probe_aimv2", "attention": "probe_aimv2"}


def keep(runs: Path, out: Path, seed: int = 0) -> list[Path]:
    """Copy the pictures of a campaign to `out`, as `aimv2.<name>.png`, and return where they are.

    Raises:
        FileNotFoundError: If a run or its picture is not there.
    """
    sources = {name: runs / run / str(seed) / "figures" / f"{name}.png" for name, run in KEPT.items()}
    for source in sources.values():
        if not source.is_file():
            raise FileNotFoundError(f"no picture {source}; `zoo reproduce aimv2` makes it")
    return [Path(shutil.copy(source, out / f"aimv2.{name}.png")) for name, source in sources.items()]


def main(words: list[str] | None = None) -> None:
    """Read the command line and keep the pictures."""
    parser = argparse.ArgumentParser(description="Keep the pictures of `zoo reproduce aimv2` beside its results.")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs/reproduce/aimv2/cpu"))
    parser.add_argument("out", type=Path, nargs="?", default=Path("results"))
    args = parser.parse_args(words)
    for path in keep(args.runs, args.out):
        print(path)


if __name__ == "__main__":
    main()
