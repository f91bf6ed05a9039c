"""Cycles that are traced pixel by pixel: times by arc length, the red front, and that nothing else changed."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from datamodules.scratchpad.loops import Cycles
from datamodules.scratchpad.strings import Strings
from datamodules.scratchpad.tasks import BLACK, BLUE, CHUNK, RED, WHITE, num_frames, problem_pool, rows_of
from datamodules.scratchpad.traced import TracedCycles, TracedStrings, VisualScratchpadTraced, traced_frame

TASK = TracedCycles(64, advance=7)


def test_pixels_are_coloured_by_their_distance_along_the_cycle() -> None:
    problems = problem_pool(TASK, 3, "train", 40, 6, 12)
    sketch = TASK.sketch(problems)
    for row in range(40):
        at = TASK.positions(rows_of(problems, slice(row, row + 1)))[0]
        first = int(TASK.first_component(problems)[row])
        corners = at[problems["loop"][row, :first]]
        sides = [np.linspace(corners[i], corners[(i + 1) % first], 2000, endpoint=False) for i in range(first)]
        points = np.concatenate(sides)
        before = np.cumsum(np.hypot(*(np.roll(points, -1, axis=0) - points).T))
        total = before[-1]
        away = np.minimum(before, total - before)
        columns, rows = points.round().astype(int).T
        arrival = sketch.arrival[row, rows, columns]
        last = np.ceil((total / 2 - 3) / TASK.advance)
        assert (arrival <= np.ceil((away + 1) / TASK.advance)).all(), "a crossing may be coloured before, never later"
        late = np.minimum(np.ceil((away - 1) / TASK.advance), last)
        assert (arrival >= late).mean() > 0.6, "what lies on no crossing waits for its turn"
        assert arrival.max() <= last


def test_the_questions_are_those_of_cycles() -> None:
    plain = Cycles(64)
    ours, theirs = (problem_pool(task, 1, "train", 60, 8, 12) for task in (TASK, plain))
    for key in ("loop", "tick", "label", "difficulty"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    drawn, expected = TASK.sketch(ours), plain.sketch(theirs)
    np.testing.assert_array_equal(drawn.canvas == WHITE, expected.canvas == WHITE)
    np.testing.assert_array_equal(drawn.canvas == RED, expected.canvas == BLUE)
    final = [traced_frame(drawn, 254) == BLUE, plain.sketch(theirs).arrival < 255]
    np.testing.assert_array_equal(final[0], final[1], "the same loop is coloured in the end")


def test_the_front_is_red_for_one_frame_moves_in_every_step_and_is_gone_at_the_end() -> None:
    problems = problem_pool(TracedCycles(48), 2, "train", 200, 12, 12)
    sketch, last = TracedCycles(48).sketch(problems), num_frames(problems)
    frames = np.stack([traced_frame(sketch, t) for t in range(int(last.max()) + 2)])
    np.testing.assert_array_equal(frames[0], sketch.canvas)
    red, blue = frames == RED, frames == BLUE
    assert (blue[1:] == (blue | red)[:-1]).all(), "red turns blue, and nothing else does"
    shown = red.any(axis=(2, 3))
    every = np.arange(len(frames))[:, None]
    np.testing.assert_array_equal(shown, every < last, "so the last frame, and it alone, has no red")
    np.testing.assert_array_equal((frames[-1] == BLACK).any(axis=(1, 2)), problems["label"] == 0)


def test_the_front_lies_next_to_what_was_coloured_before() -> None:
    problems = problem_pool(TracedCycles(48), 5, "train", 40, 12, 12)
    sketch = TracedCycles(48).sketch(problems)
    square = np.ones((3, 3))
    for row, last in enumerate(num_frames(problems)):
        for t in range(1, int(last)):
            new, old = sketch.arrival[row] == t, sketch.arrival[row] < t
            pieces, count = ndimage.label(new | old, square)
            touched = np.unique(pieces[old])
            assert set(np.unique(pieces[new])) <= set(touched), f"row {row}, step {t} of {last}: {count} pieces"


def test_strings_are_those_of_the_plain_task_with_a_front() -> None:
    task, plain = TracedStrings(48, 6), Strings(48, 8)  # 8 steps across 48 pixels are 6 pixels each
    problems, same = (problem_pool(kind, 1, "train", 60, 8, 12) for kind in (task, plain))
    sketch, expected = task.sketch(problems), plain.sketch(same)
    np.testing.assert_array_equal(sketch.arrival, expected.arrival)
    np.testing.assert_array_equal(problems["steps"], same["steps"] + 1)
    np.testing.assert_array_equal(sketch.canvas == RED, expected.canvas == BLUE)
    last = num_frames(problems)
    assert (traced_frame(sketch, last - 1) == RED).any(axis=(1, 2)).all()
    assert not (traced_frame(sketch, last) == RED).any()
    np.testing.assert_array_equal((traced_frame(sketch, last) == BLACK).any(axis=(1, 2)), problems["label"] == 0)


@pytest.mark.parametrize(("task", "sizes"), [(TASK, (6, 12)), (TracedStrings(48, 5), (8, 12))])
def test_no_solution_is_longer_than_the_bound(task: TracedCycles | TracedStrings, sizes: tuple[int, ...]) -> None:
    for nodes in sizes:
        assert problem_pool(task, 2, "train", CHUNK, nodes, nodes)["steps"].max() <= task.longest(nodes)


def test_batches_know_their_task_and_bounds() -> None:
    data = VisualScratchpadTraced(ood_difficulty=[14, 14], train_size=32, val_size=8, test_size=8)
    assert data.longest_solution == data.task.longest(14)
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    canvas, arrival = batch["canvas"].numpy(), batch["arrival"].numpy()
    np.testing.assert_array_equal(canvas == RED, arrival == 0)
    assert (batch["num_frames"] == 1 + np.where(arrival == 255, 0, arrival).max(axis=(1, 2))).all()
    assert set(batch["difficulty"].tolist()) == {12}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TracedCycles(48, 2), "advance=2 pixels"),
        (lambda: TracedCycles(48, 49), "advance=49 pixels"),
        (lambda: TracedStrings(48, 2), "advance=2 pixels"),
        (lambda: VisualScratchpadTraced(task="rect_maze"), "task='rect_maze': expected one of cycles, strings"),
        (lambda: TracedCycles(160, 3).check(12, 24), "expected fewer than 254"),
        (lambda: VisualScratchpadTraced(advance=1), "advance=1 pixels"),
        (lambda: VisualScratchpadTraced(ood_difficulty=[12, 14]), "overlaps"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
