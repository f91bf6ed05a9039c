"""What is measured on held-out problems, always from the network's own roll-out, and the figures made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.methods.visual_scratchpad.frames import blue_iou, change_iou, frame_indices, nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRIPS = 4  # problems shown per strip figure
_COLUMNS = 8  # frames shown per problem


class Evaluation:
    """Collects answers by difficulty, a few sketches and the learning curve.

    Args:
        t_max: Most frames of a roll-out.
    """

    def __init__(self, t_max: int) -> None:
        self.t_max = t_max
        self.curve: list[dict[str, float]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the learning curve."""
        self._right: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._strips: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(
        self, model: Any, batch: Mapping[str, Tensor], name: str, seed: int, keep: bool
    ) -> dict[str, tuple[Tensor, int]]:
        """Evaluate a batch; `{metric: (mean, number of rows it is the mean of)}`.

        Raises:
            ValueError: If the roll-out could not reach the end of a solution.
        """
        last = batch["num_frames"]
        draws, stepwise = model.mode not in ("none", "recurrent"), model.mode in ("multi", "inductive")
        if stepwise and int(last.max()) > self.t_max:
            raise ValueError(
                f"t_max={self.t_max} is too small: a solution of this batch takes {int(last.max())} frames"
            )
        said = model.answer(batch, seed, keep)
        right = ((said.label > 0) == (batch["label"] == 1)).float()
        self._right.setdefault(name, []).append((batch["difficulty"].cpu(), right.cpu()))
        rows = len(right)
        values = {"acc": (right.mean(), rows)}
        for key, wanted in (("acc_yes", 1), ("acc_no", 0)):
            of_class = batch["label"] == wanted
            values[key] = (right[of_class].mean() if of_class.any() else right.mean(), int(of_class.sum()))
        if draws:
            final = frame_indices(batch["canvas"], batch["arrival"], last)
            drawn = nearest(said.last, model.colours)
            both, either = blue_iou(drawn, final)
            values["final_iou"] = ((both / either.clamp(min=1)).mean(), rows)
            values["final_exact"] = ((drawn == final).flatten(1).all(dim=1).float().mean(), rows)
        if stepwise:
            values["nonhalting"] = ((~said.halted).float().mean(), rows)
            values["stops_on_time"] = ((said.halted & (said.steps == last)).float().mean(), rows)
            values["steps_ratio"] = (((said.steps + 1) / (last + 1)).mean(), rows)
            values.update(self._teacher_forced(model, batch))
        if keep and said.frames is not None:
            self._strips[name] = self._choose_frames(model, batch, said.frames, said.steps, stepwise)
        return values

    @staticmethod
    def _teacher_forced(model: Any, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        """Quality of single steps on true frames, and the answer read from the true last frame."""
        t, last, rows = batch["t"], batch["num_frames"], len(batch["t"])
        if model.mode == "multi":
            count = int(last.max()) + 1
            images = torch.stack([model.frame(batch, torch.full_like(t, step)) for step in range(count)], dim=1)
            said = model.net.read_history(images)
            every = torch.arange(rows, device=t.device)
            frame, label = said.frame[every, t], said.label[every, last]
        else:
            frame, label = model.net(model.frame(batch, t)).frame, model.net(model.frame(batch, last)).label
        now, target = (frame_indices(batch["canvas"], batch["arrival"], step) for step in (t, t + 1))
        hit, either = change_iou(now, nearest(frame, model.colours), target)
        changes = t < last  # the last frame is not drawn again, the roll-out has ended
        iou = (hit / either.clamp(min=1))[changes].mean() if changes.any() else hit.float().mean()
        oracle = ((label > 0) == (batch["label"] == 1)).float().mean()
        return {"iou": (iou, int(changes.sum())), "acc_true_frames": (oracle, rows)}

    def _choose_frames(
        self, model: Any, batch: Mapping[str, Tensor], frames: Tensor, steps: Tensor, stepwise: bool
    ) -> tuple[Tensor, Tensor]:
        """Pictures for a strip: evenly spaced steps of a few roll-outs and the truth; `[S, C, 3, H, W]` each."""
        rows = min(_STRIPS, len(steps))
        end = torch.maximum(steps, batch["num_frames"])[:rows] if stepwise else steps[:rows].clamp(min=1)
        columns = _COLUMNS if stepwise else 2
        shown = (torch.linspace(0, 1, columns, device=end.device) * end[:, None]).round().long()
        every = torch.arange(rows, device=end.device)
        drawn = frames[every[:, None], shown.clamp(max=frames.shape[1] - 1)]
        small = {key: batch[key][:rows] for key in ("canvas", "arrival", "num_frames")}
        times = shown if stepwise else shown * small["num_frames"][:, None]
        true = torch.stack([model.frame(small, times[:, column]) for column in range(columns)], dim=1)
        return drawn.float().cpu(), true.float().cpu()

    def add_point(self, samples: int) -> None:
        """Add the accuracies measured since `clear` to the learning curve."""
        accuracies = {
            name: float(torch.cat([right for _, right in parts]).mean()) for name, parts in self._right.items()
        }
        self.curve.append({"samples": float(samples), **accuracies})

    def by_difficulty(self) -> dict[int, tuple[float, int]]:
        """Accuracy and number of problems of each difficulty, over all loaders."""
        parts = [part for group in self._right.values() for part in group]
        if not parts:
            return {}
        difficulty, right = torch.cat([d for d, _ in parts]), torch.cat([r for _, r in parts])
        levels = sorted(set(difficulty.tolist()))
        return {int(d): (float(right[difficulty == d].mean()), int((difficulty == d).sum())) for d in levels}

    def figures(self) -> dict[str, Figure]:
        """Draw what there is data for."""
        from zoo.methods.visual_scratchpad.figures import curve_figure, difficulty_figure, strip_figure

        figures = {f"rollout_{name}": strip_figure(*pictures) for name, pictures in self._strips.items()}
        if accuracies := self.by_difficulty():
            figures["accuracy_by_difficulty"] = difficulty_figure(accuracies)
        if len(self.curve) > 1:
            figures["accuracy_by_samples"] = curve_figure(self.curve)
        return figures
