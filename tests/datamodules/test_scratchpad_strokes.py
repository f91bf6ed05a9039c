"""What cycles and strings look like: pixels near segments and points, places of nodes, curves through anchors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from datamodules.scratchpad.loops import INK, Cycles
from datamodules.scratchpad.strings import Strings
from datamodules.scratchpad.strokes import segment_pixels, stamp
from datamodules.scratchpad.tasks import BLACK, BLUE, CHUNK, NEVER, WHITE, problem_pool


@pytest.mark.parametrize("radius", [0.75, 2.4])
def test_segments_consist_of_the_pixels_near_them(radius: float) -> None:
    rng = np.random.default_rng(0)
    start, end = rng.uniform(-0.3, 19.3, (2, 40, 2))
    end[:5] = start[:5]
    end[5:10, 0], end[10:15, 1] = start[5:10, 0], start[10:15, 1]
    y, x = np.indices((20, 20))
    for pixels, a, b in zip(segment_pixels(start, end, 20, radius), start, end, strict=True):
        along = np.linspace(0, 1, 4001)[:, None, None]
        gap = np.hypot(a[0] + along * (b - a)[0] - x, a[1] + along * (b - a)[1] - y).min(axis=0)
        found = np.zeros(400, dtype=bool)
        found[pixels] = True
        assert found[gap.ravel() < radius - 1e-3].all()
        assert not found[gap.ravel() > radius + 1e-3].any()


def test_discs_keep_the_least_time() -> None:
    rng = np.random.default_rng(0)
    points, when, picture = rng.uniform(2, 13, (30, 2)), rng.integers(1, 9, 30).astype(np.uint8), np.arange(30) % 3
    first = np.full((3, 16, 16), NEVER, dtype=np.uint8)
    stamp(first, picture, points.T, when, 1.5)
    y, x = np.indices((16, 16))
    for row in range(3):
        expected = np.full((16, 16), NEVER)
        for point, time in zip(points[picture == row], when[picture == row], strict=True):
            near = np.hypot(point[0] - x, point[1] - y) < 1.5
            expected[near] = np.minimum(expected[near], time)
        np.testing.assert_array_equal(first[row], expected)


@pytest.mark.parametrize("task", [Cycles(64), Cycles(64, 14)])
def test_every_line_and_dot_of_cycles_is_drawn_in_its_step(task: Cycles) -> None:
    problems = problem_pool(task, 4, "train", 24, 6, 10)
    canvas, arrival = task.pixels(problems)
    positions, edges, (node, line) = task.positions(problems), task.edge_list(problems), task.hops(problems)
    for row in range(24):
        first = np.full(64 * 64, NEVER, dtype=np.uint8)
        for place, (a, b) in enumerate(edges[row]):
            if a >= 0:
                for end, when, radius in ((b, line, 0.75), (a, node, 1.6)):
                    pixels = segment_pixels(positions[row, [a]], positions[row, [end]], 64, radius)[0]
                    first[pixels] = np.minimum(first[pixels], when[row, place])
        colour = np.select([first == NEVER, first == 0], [WHITE, BLUE], BLACK)
        np.testing.assert_array_equal(canvas[row].ravel(), colour)
        np.testing.assert_array_equal(arrival[row].ravel(), np.where(first == INK, NEVER, first))


def test_nodes_sit_at_random_ones_of_the_fixed_places() -> None:
    problems = problem_pool(Cycles(64, 9), 0, "train", CHUNK, 6, 8)
    for row in range(CHUNK):
        taken = problems["tick"][row, : problems["difficulty"][row]]
        assert len(set(taken)) == len(taken)
    counts = np.bincount(problems["tick"][:, 0], minlength=9)
    assert stats.chisquare(counts).pvalue > 0.01


def test_strings_pass_through_their_anchors_smoothly() -> None:
    task = Strings(96)
    problems = problem_pool(task, 0, "train", 60, 8, 8)
    curve, _, distance = task.curve(problems)
    points = np.moveaxis(curve, 0, -1)
    at = problems["anchors"][np.arange(60)[:, None], problems["loop"]] * 95
    np.testing.assert_allclose(points[:, :, 0], at, atol=1e-4)
    following = task.next_place(problems)
    rows = np.arange(60)[:, None]
    arriving = points[:, :, -1] - points[:, :, -2]
    leaving = points[rows, following][:, :, 1] - points[rows, following][:, :, 0]
    np.testing.assert_allclose(points[:, :, -1] + arriving, points[rows, following][:, :, 0], atol=0.1)
    np.testing.assert_allclose(arriving, leaving, atol=0.15)
    assert (points > 0).all()
    assert (points < 95).all()
    assert (distance[:, 0, 0] == 0).all()
    assert (np.isfinite(distance).all(axis=(1, 2)) == (problems["label"] == 1)).all()


def test_anchors_keep_apart_and_the_top_one_is_the_start() -> None:
    problems = problem_pool(Strings(64), 0, "train", 200, 12, 12)
    anchors = problems["anchors"]
    gap = np.linalg.norm(anchors[:, :, None] - anchors[:, None], axis=-1) + np.eye(12)
    assert gap.min() >= 0.1 - 1e-6
    assert (anchors[:, :, 1].argmin(axis=1) == 0).all()
