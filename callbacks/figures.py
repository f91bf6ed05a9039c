"""Figures of a method: files in the run directory, images in W&B."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.boundaries import shown_step


class Figures(Callback):
    """Draws `pl_module.figures()`, a dict of names and matplotlib figures, after validations and tests.

    Rank zero saves each as `figures/<name>.png` (the last one wins) and logs it to W&B as `figures/<name>`. A figure
    that fails is reported once and never stops the training. A module without the method is left alone.

    Args:
        every_n_validations: Draw after each n-th validation; tests always draw.
        dpi: Dots per inch of the files.
        dirpath: Directory; `<trainer.default_root_dir>/figures` if None.

    Raises:
        ValueError: If `every_n_validations` or `dpi` is below 1.
    """

    def __init__(self, every_n_validations: int = 1, dpi: int = 120, dirpath: str | None = None) -> None:
        super().__init__()
        for name, value in (("every_n_validations", every_n_validations), ("dpi", dpi)):
            if value < 1:
                raise ValueError(f"figures: {name} must be at least 1, got {value}")
        self.every_n_validations, self.dpi, self.dirpath = every_n_validations, dpi, dirpath
        self._validations = 0
        self._reported: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._draw(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        draw = getattr(pl_module, "figures", None)
        if not trainer.is_global_zero or not callable(draw):
            return
        from matplotlib import pyplot

        known = set(pyplot.get_fignums())
        try:
            for name, figure in draw().items():
                try:
                    self._keep(trainer, name, figure)
                except Exception as error:  # whatever a plot or a disk raises, the training is worth more
                    self._report(name, error)
                pyplot.close(figure)
        except Exception as error:
            self._report("figures()", error)
        finally:
            for number in set(pyplot.get_fignums()) - known:  # those that a failing method left behind
                pyplot.close(number)

    def _keep(self, trainer: Trainer, name: str, figure: Any) -> None:
        folder = Path(self.dirpath) if self.dirpath else Path(trainer.default_root_dir) / "figures"
        path = folder / f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', name).lstrip('.') or 'figure'}.png"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=self.dpi, bbox_inches="tight")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"figures/{name}", [str(path)], step=shown_step(trainer))

    def _report(self, name: str, error: Exception) -> None:
        if name not in self._reported:
            self._reported.add(name)
            warnings.warn(
                f"the figure {name!r} could not be made ({type(error).__name__}: {error}); the training goes on",
                RuntimeWarning,
                stacklevel=2,
            )
