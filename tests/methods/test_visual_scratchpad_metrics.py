"""What is measured on held-out problems, from networks whose faults are known; expected values from the problems alone.

The networks are made of the `Oracle`, which solves mazes of 4 x 4 cells: as it is, copying its input, painting a pixel
that is nowhere due, stopping early or never, and knowing the answer from some frames only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.test_visual_scratchpad_module import make_data, make_model, make_trainer
from tests.methods.test_visual_scratchpad_parts import PALETTE, Oracle
from zoo.methods.visual_scratchpad.networks import Prediction

Read = Callable[[Tensor], Prediction]
Batch = dict[str, Tensor]


class Reader(torch.nn.Module):
    """Stands in for the network: says of each frame what `read` says, whatever came before it."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read

    def forward(self, image: Tensor) -> Prediction:
        return self.read(image)

    def read_history(self, frames: Tensor) -> Prediction:
        said = self.read(frames.flatten(0, 1))
        return Prediction(*(None if part is None else part.unflatten(0, frames.shape[:2]) for part in said))


def solve(image: Tensor) -> Prediction:
    different, place = image.unique(dim=0, return_inverse=True)  # a history has many equal frames
    return Prediction(*(part[place] for part in Oracle()(different) if part is not None))


def solve_at_once(image: Tensor) -> Prediction:
    """Draws the last frame, whatever the frame; the answer is right."""
    different, place = image.unique(dim=0, return_inverse=True)
    said = solve(different)
    while said.halt is not None and said.frame is not None and (said.halt < 0).any():
        said = solve(said.frame)
    return Prediction(*(part[place] for part in said if part is not None))


def copy_and_say_yes(image: Tensor) -> Prediction:
    return Prediction(image, -torch.ones(len(image)), torch.ones(len(image)))


def paint_the_corner(image: Tensor) -> Prediction:
    """Solves, but paints the upper left pixel, which is wall; does not see it in what it reads."""
    seen = image.clone()
    seen[:, :, 0, 0] = PALETTE[1]
    said = solve(seen)
    assert said.frame is not None
    said.frame[:, :, 0, 0] = PALETTE[2]
    return said


def stop_early(image: Tensor) -> Prediction:
    """Says that it has finished one frame too soon."""
    said = solve(image)
    assert said.frame is not None
    return said._replace(halt=solve(said.frame).halt)


def never_stop(image: Tensor) -> Prediction:
    said = solve(image)
    return said._replace(halt=-torch.ones(len(image)))


def know_when_finished(image: Tensor) -> Prediction:
    """Copies; the answer is right on finished frames and wrong on all others."""
    said, truth = solve(image), solve_at_once(image).label
    assert said.halt is not None
    return copy_and_say_yes(image)._replace(label=torch.where(said.halt > 0, truth, -truth))


def know_when_unfinished(image: Tensor) -> Prediction:
    said = know_when_finished(image)
    return said._replace(label=-said.label)


@pytest.fixture(scope="module", params=["id", "ood"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """All yes and half of the no problems of a test set."""
    data = make_data(test_size=20, eval_batch_size=20)
    data.setup("test")
    whole: Any = data.batches(f"test_{request.param}").batch(0, 0)
    rows = torch.cat([(whole["label"] == 1).nonzero()[:, 0], (whole["label"] == 0).nonzero()[:5, 0]])
    batch = {key: value[rows] for key, value in whole.items()}
    assert len(rows) == 15
    assert (batch["num_frames"] >= 3).all()
    assert 0 < int((batch["t"] == batch["num_frames"]).sum()) < 15
    return batch


def measure(read: Read, batch: Batch, **changes: Any) -> dict[str, tuple[float, int]]:
    """Values and the numbers of rows they are means of."""
    model = make_model(**changes)
    model.net = Reader(read)
    found = model.evaluation.measure(model, batch, "id", 0, keep=False)
    return {key: (float(value), rows) for key, (value, rows) in found.items()}


def blue(batch: Batch, t: Tensor) -> Tensor:
    """Number of pixels that are blue in frame `t`, `[B]`."""
    return ((batch["arrival"].long() <= t[:, None, None]) | (batch["canvas"] == 2)).flatten(1).sum(dim=1)


STEPWISE = pytest.mark.parametrize("mode", ["inductive", "multi"])


# ---------------------------------------------------------------- networks without a fault, and with the worst


@STEPWISE
def test_an_oracle_is_right_everywhere(batch: Batch, mode: str) -> None:
    t, last = batch["t"], batch["num_frames"]
    full = ("acc", "final_iou", "final_exact", "stops_on_time", "steps_ratio", "acc_true_frames")
    expected = dict.fromkeys(full, (1.0, 15))
    expected |= {"nonhalting": (0.0, 15), "iou": (1.0, int((t < last).sum()))}
    expected |= {"acc_yes": (1.0, 10), "acc_no": (1.0, 5)}
    assert measure(solve, batch, mode=mode) == expected


@pytest.mark.parametrize("mode", ["single", "single_two_pass"])
def test_a_network_that_draws_the_last_frame_at_once_is_right(batch: Batch, mode: str) -> None:
    expected = {"acc": (1.0, 15), "acc_yes": (1.0, 10), "acc_no": (1.0, 5)}
    assert measure(solve_at_once, batch, mode=mode) == expected | {"final_iou": (1.0, 15), "final_exact": (1.0, 15)}


@pytest.mark.parametrize("mode", ["inductive", "multi", "single"])
def test_a_network_that_copies_draws_nothing_and_is_right_as_often_as_its_answer(batch: Batch, mode: str) -> None:
    last = batch["num_frames"]
    found = measure(copy_and_say_yes, batch, mode=mode)
    assert found["acc"] == pytest.approx((10 / 15, 15))
    assert (found["acc_yes"], found["acc_no"]) == ((1.0, 10), (0.0, 5))
    start = blue(batch, torch.zeros_like(last)) / blue(batch, last)
    assert found["final_iou"][0] == pytest.approx(float(start.mean()))
    assert start.max() < 0.5
    assert found["final_exact"][0] == 0
    if mode != "single":
        assert found["iou"][0] == 0
        assert (found["nonhalting"][0], found["stops_on_time"][0]) == (1, 0)
        assert found["steps_ratio"][0] == pytest.approx(float((13 / (last + 1)).mean()))
        assert found["acc_true_frames"][0] == pytest.approx(10 / 15)


def test_without_a_scratchpad_only_answers_are_measured(batch: Batch) -> None:
    found = measure(lambda image: Prediction(None, None, -torch.ones(len(image))), batch, mode="none")
    assert {key: value for key, (value, _) in found.items()} == pytest.approx({"acc": 1 / 3, "acc_yes": 0, "acc_no": 1})


# ---------------------------------------------------------------- one fault each


@STEPWISE
def test_a_pixel_too_many_counts_in_every_frame(batch: Batch, mode: str) -> None:
    """One pixel is in the union and not in the intersection; where nothing is to be drawn no step is measured."""
    t, last = batch["t"], batch["num_frames"]
    found = measure(paint_the_corner, batch, mode=mode)
    due = (blue(batch, t + 1) - blue(batch, t))[t < last]
    assert found["iou"] == pytest.approx((float((due / (due + 1)).mean()), len(due)))
    whole = blue(batch, last)
    assert found["final_iou"][0] == pytest.approx(float((whole / (whole + 1)).mean()))
    assert found["final_exact"][0] == 0
    assert (found["acc"][0], found["stops_on_time"][0], found["acc_true_frames"][0]) == (1, 1, 1)


@STEPWISE
def test_stopping_a_frame_early_is_not_on_time(batch: Batch, mode: str) -> None:
    """In the last frame but one the goal is still red: it looks like a no."""
    last = batch["num_frames"]
    found = measure(stop_early, batch, mode=mode)
    assert (found["stops_on_time"][0], found["nonhalting"][0]) == (0, 0)
    assert (found["acc_yes"][0], found["acc_no"][0], found["acc_true_frames"][0]) == (0, 1, 1)
    assert found["steps_ratio"][0] == pytest.approx(float((last / (last + 1)).mean()))
    drawn = blue(batch, last - 1) / blue(batch, last)
    assert found["final_iou"][0] == pytest.approx(float(drawn.mean()))
    assert found["iou"][0] == 1


@STEPWISE
def test_never_stopping_is_not_on_time_even_if_the_last_frame_is_the_right_one(batch: Batch, mode: str) -> None:
    last = batch["num_frames"]
    longest = int(last.max())
    found = measure(never_stop, batch, mode=mode, t_max=longest, longest_solution=0)
    assert (found["stops_on_time"][0], found["nonhalting"][0]) == (0, 1)
    assert found["steps_ratio"][0] == pytest.approx(float(((longest + 1) / (last + 1)).mean()))
    assert (found["acc"][0], found["final_exact"][0]) == (1, 1)


def test_some_stop_and_some_do_not(batch: Batch) -> None:
    """Only those with the answer no stop."""

    def stop_without_red(image: Tensor) -> Prediction:
        said = solve(image)
        assert said.halt is not None
        return said._replace(halt=torch.where(said.label > 0, -1.0, said.halt))

    found = measure(stop_without_red, batch)
    assert found["nonhalting"][0] == pytest.approx(10 / 15)
    assert found["stops_on_time"][0] == pytest.approx(5 / 15)


@STEPWISE
def test_the_answer_from_true_frames_is_read_off_the_last(batch: Batch, mode: str) -> None:
    short = {"mode": mode, "t_max": int(batch["num_frames"].max()), "longest_solution": 0}
    finished, unfinished = (measure(read, batch, **short) for read in (know_when_finished, know_when_unfinished))
    assert (finished["acc"][0], finished["acc_true_frames"][0]) == (0, 1)
    assert (unfinished["acc"][0], unfinished["acc_true_frames"][0]) == (1, 0)


def test_with_a_history_each_step_is_read_where_it_belongs(batch: Batch) -> None:
    """Frames after the last one, which fill up shorter solutions, are not asked for the answer."""
    t, last = batch["t"], batch["num_frames"]

    class Table(Reader):
        def read_history(self, frames: Tensor) -> Prediction:
            said = super().read_history(frames)
            place = torch.arange(frames.shape[1])
            truth = 2.0 * batch["label"][:, None] - 1
            assert said.frame is not None
            frame = torch.where((place == t[:, None])[..., None, None, None], said.frame, frames)
            return Prediction(frame, said.halt, torch.where(place == last[:, None], truth, -truth))

    model = make_model(mode="multi")
    model.net = Table(solve)
    found = model.evaluation._teacher_forced(model, batch)
    assert {key: float(value) for key, (value, _) in found.items()} == {"iou": 1, "acc_true_frames": 1}


# ---------------------------------------------------------------- over batches and loaders


def everything(data: Any, split: str) -> Batch:
    batches = data.batches(split)
    parts = [batches.batch(0, index) for index in range(len(batches))]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_a_run_logs_means_over_problems_and_keeps_both_loaders() -> None:
    """Batches of 6, 6 and 4 problems; what is logged are means over all of a loader, not over its batches."""
    data, model = make_data(eval_batch_size=6), make_model()
    model.net = Reader(lambda image: paint_the_corner(image)._replace(label=torch.ones(len(image))))
    logged = make_trainer().test(model, data, verbose=False)
    sets = {name: everything(data, f"test_{name}") for name in ("id", "ood")}
    for (name, batch), values in zip(sets.items(), logged, strict=True):
        t, last = batch["t"], batch["num_frames"]
        due = (blue(batch, t + 1) - blue(batch, t))[t < last]
        expected = {"acc": 0.5, "acc_yes": 1, "acc_no": 0, "acc_true_frames": 0.5, "nonhalting": 0, "stops_on_time": 1}
        expected |= {"iou": float((due / (due + 1)).mean()), "steps_ratio": 1, "final_exact": 0}
        whole = blue(batch, last)
        expected["final_iou"] = float((whole / (whole + 1)).mean())
        assert values == pytest.approx({f"test/{key}_{name}": value for key, value in expected.items()})
    levels = {}
    for batch in sets.values():
        for difficulty in sorted(set(batch["difficulty"].tolist())):
            yes = batch["label"][batch["difficulty"] == difficulty].float()
            levels[difficulty] = (pytest.approx(float(yes.mean())), len(yes))
    assert min(levels) < 6 <= max(levels)
    assert model.evaluation.by_difficulty() == levels


def test_each_loader_has_its_own_point_on_the_curve() -> None:
    data, model = make_data(test_size=20, eval_batch_size=20), make_model(mode="none")
    data.setup("test")
    assert model.evaluation.by_difficulty() == {}
    for name, read in (("id", solve_at_once), ("ood", lambda image: Prediction(None, None, -torch.ones(len(image))))):
        model.net = Reader(read)
        part: Any = everything(data, f"test_{name}")
        model.evaluation.measure(model, part, name, 0, keep=False)
    model.evaluation.add_point(320)
    assert model.evaluation.curve == [{"samples": 320.0, "id": 1.0, "ood": 0.5}]
    found = model.evaluation.by_difficulty()
    assert {level: accuracy for level, (accuracy, _) in found.items() if level < 6} == dict.fromkeys((3, 4, 5), 1.0)
    assert sum(count for _, count in found.values()) == 40
    right = sum(accuracy * count for accuracy, count in found.values())
    assert right == pytest.approx(20 + 10)
    model.evaluation.clear()
    assert model.evaluation.by_difficulty() == {}
