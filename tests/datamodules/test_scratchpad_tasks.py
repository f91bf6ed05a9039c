"""The four generators: labels from pixels, balance, determinism, frames, and the structure that the tasks promise."""

from __future__ import annotations

import multiprocessing
import zlib
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree, shortest_path

from datamodules.scratchpad.circ_maze import CircMaze, circ_grid, ring_sectors
from datamodules.scratchpad.grids import spanning_trees, tree_distances
from datamodules.scratchpad.loops import Cycles, Loops
from datamodules.scratchpad.mazes import Maze
from datamodules.scratchpad.rect_maze import RectMaze, rect_grid
from datamodules.scratchpad.strings import Strings
from datamodules.scratchpad.tasks import (
    BLACK,
    BLUE,
    CHUNK,
    NEVER,
    RED,
    WHITE,
    Sketch,
    Task,
    frame_indices,
    num_frames,
    problem_chunk,
    problem_pool,
    rows_of,
)

CASES = {
    "rect_maze": (RectMaze(24, 6), 5, 10),
    "circ_maze": (CircMaze(48, 3), 4, 9),
    "cycles": (Cycles(64), 6, 12),
    "cycles at fixed places": (Cycles(48, 12), 6, 10),
    "strings": (Strings(48), 8, 10),
    "strings by short steps": (Strings(48, 10), 8, 10),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Task, int, int]:
    return CASES[request.param]


def union_find_components(pairs: list[tuple[int, int]], nodes: list[int]) -> list[int]:
    """Component sizes, in ascending order."""
    parent = {node: node for node in nodes}

    def root(node: int) -> int:
        while parent[node] != node:
            node = parent[node]
        return node

    for a, b in pairs:
        parent[root(a)] = root(b)
    return sorted(Counter(map(root, nodes)).values())


@pytest.mark.parametrize("name", ["rect_maze", "circ_maze"])
def test_the_label_of_a_maze_follows_from_its_pixels(name: str) -> None:
    task, low, high = CASES[name]
    problems = problem_pool(task, 1, "train", 1000, low, high)
    canvas = task.sketch(problems).canvas
    for picture, label in zip(canvas, problems["label"], strict=True):
        regions, _ = ndimage.label(picture != BLACK)
        start, end = np.unique(regions[picture == BLUE]), np.unique(regions[picture == RED])
        assert len(start) == len(end) == 1
        assert (start[0] == end[0]) == label


@pytest.mark.parametrize("name", ["cycles", "cycles at fixed places", "strings"])
def test_the_label_of_a_loop_task_follows_from_its_edges(name: str) -> None:
    task, low, high = CASES[name]
    assert isinstance(task, Loops)
    problems = problem_pool(task, 1, "train", 1000, low, high)
    for edges, label, nodes in zip(task.edge_list(problems), problems["label"], problems["difficulty"], strict=True):
        pairs = [(int(a), int(b)) for a, b in edges if a >= 0]
        assert np.bincount(np.ravel(pairs)).tolist() == [2] * nodes, "every node has two neighbours"
        assert union_find_components(pairs, list(range(nodes))) == ([nodes] if label else [nodes // 2] * 2)


def test_strings_can_be_told_apart_by_their_pixels_when_they_do_not_meet() -> None:
    task, low, high = CASES["strings"]
    problems = problem_pool(task, 1, "train", 300, low, high)
    canvas = task.sketch(problems).canvas
    pieces = np.array([ndimage.label(picture != WHITE, np.ones((3, 3)))[1] for picture in canvas])
    assert (pieces[problems["label"] == 1] == 1).all()
    assert (pieces <= 2).all()
    assert (pieces == 2).any()


def test_exactly_half_of_the_answers_are_yes(case: tuple[Task, int, int]) -> None:
    task, low, high = case
    assert problem_pool(task, 0, "val_id", 300, low, high)["label"].sum() == 150
    assert problem_pool(task, 0, "train", 1500, low, high)["label"].sum() == 750


def test_a_problem_depends_on_its_key_alone(case: tuple[Task, int, int]) -> None:
    task, low, high = case
    pool = problem_pool(task, 3, "train", CHUNK + 50, low, high)
    part = problem_pool(task, 3, "train", 30, low, high, start=CHUNK + 10)
    for key, values in part.items():
        np.testing.assert_array_equal(values, pool[key][CHUNK + 10 : CHUNK + 40])
    for seed, split in ((4, "train"), (3, "val_id")):
        other = problem_pool(task, seed, split, 20, low, high)
        assert any((other[key] != pool[key][:20]).any() for key in other if key not in ("label", "difficulty"))


def test_other_processes_draw_the_same_problems() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        drawn = pool.map(_pixels_sum, CASES)
    assert drawn == [_pixels_sum(name) for name in CASES]


def _pixels_sum(name: str) -> int:
    task, low, high = CASES[name]
    sketch = task.sketch(problem_pool(task, 5, "test_id", 40, low, high))
    return zlib.crc32(sketch.canvas.tobytes() + sketch.arrival.tobytes())


def test_frames_start_at_the_question_and_grow_to_a_fixed_point(case: tuple[Task, int, int]) -> None:
    task, low, high = case
    problems = problem_pool(task, 2, "train", 200, low, high)
    for stride in (1, 2):
        sketch, last = task.sketch(problems, stride), num_frames(problems, stride)
        np.testing.assert_array_equal(frame_indices(sketch, 0), sketch.canvas)
        frames = np.stack([frame_indices(sketch, t) for t in range(int(last.max()) + 2)])
        blue = frames == BLUE
        assert (blue[1:] >= blue[:-1]).all()
        changes = (frames[1:] != frames[:-1]).any(axis=(2, 3))
        steps = np.arange(len(changes))[:, None]
        assert changes[steps < last].all(), "something is drawn in every step but the last"
        assert not changes[steps >= last].any(), "the last frame is a fixed point"
        every = stride * np.arange(len(frames))
        single = task.sketch(problems)
        fine = np.stack([frame_indices(single, int(t)) for t in every])
        before_end = np.arange(len(frames))[:, None] < last
        np.testing.assert_array_equal(frames[before_end], fine[before_end])


def test_the_last_frame_tells_the_answer(case: tuple[Task, int, int]) -> None:
    task, low, high = case
    problems = problem_pool(task, 2, "train", 200, low, high)
    final = frame_indices(task.sketch(problems), NEVER - 1)
    left = RED if isinstance(task, Maze) else BLACK
    np.testing.assert_array_equal((final == left).any(axis=(1, 2)), problems["label"] == 0)


def test_no_solution_is_longer_than_the_bound(case: tuple[Task, int, int]) -> None:
    task, low, high = case
    assert problem_pool(task, 2, "train", CHUNK, low, high)["steps"].max() <= task.longest(high)


# ---------------------------------------------------------------- Markov property, read from the pixels of one frame


def rect_step_from_pixels(picture: np.ndarray, cell: int) -> np.ndarray:
    """One step of flood fill, knowing nothing but the picture and the size of its cells."""
    n = len(picture) // cell
    blocks = picture.reshape(n, cell, n, cell).swapaxes(1, 2)
    colour = blocks[:, :, 1, 1]
    if not (colour == RED).any():
        return picture
    blue = colour == BLUE
    openings = {(-1, 0): blocks[:, :, 0, 1], (1, 0): blocks[:, :, -1, 1], (0, -1): blocks[:, :, 1, 0]}
    openings[0, 1] = blocks[:, :, 1, -1]
    grown = blue.copy()
    for (down, right), wall in openings.items():
        for i, j in zip(*np.nonzero(blue & (wall != BLACK)), strict=True):
            grown[i + down, j + right] = True
    return np.where(np.kron(grown, np.ones((cell, cell), bool)) & (picture != BLACK), BLUE, picture)


def test_the_next_frame_of_a_maze_follows_from_the_pixels_of_this_one() -> None:
    task, low, high = CASES["rect_maze"]
    problems = problem_pool(task, 7, "train", 30, low, high)
    sketch = task.sketch(problems)
    for row, last in enumerate(num_frames(problems)):
        one = Sketch(sketch.canvas[row : row + 1], sketch.arrival[row : row + 1])
        for t in range(last + 1):
            expected = frame_indices(one, t + 1)[0]
            np.testing.assert_array_equal(rect_step_from_pixels(frame_indices(one, t)[0], task.cell_size), expected)


def test_the_next_frame_of_cycles_follows_from_the_pixels_of_this_one() -> None:
    task = Cycles(96)
    problems = problem_pool(task, 7, "train", 40, 8, 8)
    sketch = task.sketch(problems)
    spots = task.positions(problems).round().astype(int)
    lines = np.linspace(0, 1, 200)[:, None]
    for row, last in enumerate(num_frames(problems)):
        ends = [(a, b) for a in range(8) for b in range(a)]
        exact = task.positions(rows_of(problems, slice(row, row + 1)))[0]
        middle = {}
        for a, b in ends:
            points = (exact[a] * lines + exact[b] * (1 - lines)).round().astype(int)
            if (sketch.canvas[row, points[:, 1], points[:, 0]] != WHITE).mean() > 0.95:
                middle[a, b] = points
        assert len(middle) == 8, "lines can be read off the picture"
        for t in range(last):
            now, then = (
                frame_indices(Sketch(sketch.canvas[row : row + 1], sketch.arrival[row : row + 1]), s)[0]
                for s in (t, t + 1)
            )
            blue = {node for node in range(8) if now[spots[row, node, 1], spots[row, node, 0]] == BLUE}
            grown = blue | {end for edge in middle if set(edge) & blue for end in edge}
            seen = {node for node in range(8) if then[spots[row, node, 1], spots[row, node, 0]] == BLUE}
            assert seen == grown
            for edge, points in middle.items():
                all_blue = (then[points[:, 1], points[:, 0]] == BLUE).mean() > 0.95
                assert all_blue == bool(set(edge) & blue)


# ---------------------------------------------------------------- mazes


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 7), st.integers(0, 10**6), st.booleans())
def test_trees_span_the_grid_and_distances_count_edges(size: int, seed: int, circular: bool) -> None:
    grid = circ_grid(size - 1) if circular else rect_grid(size)
    parent, order = spanning_trees(grid, 3, np.random.default_rng(seed))
    distance = tree_distances(parent, order)
    for row in range(3):
        assert sorted(order[:, row]) == list(range(grid.cells))
        assert order[0, row] == 0
        graph = np.zeros((grid.cells, grid.cells))
        for cell in range(1, grid.cells):
            above = parent[row, cell]
            assert above in grid.neighbours[cell]
            graph[cell, above] = 1
        np.testing.assert_array_equal(distance[row], shortest_path(graph, directed=False))


def test_the_tree_is_a_minimum_spanning_tree() -> None:
    grid, rng = rect_grid(5), np.random.default_rng(0)
    weights = np.random.default_rng(0).random((2, 41), dtype=np.float32)  # what the generator draws first
    parent, _ = spanning_trees(grid, 2, rng)
    for row in range(2):
        a = np.broadcast_to(np.arange(25)[:, None], (25, 4))[grid.neighbours < 25]
        b, edge = grid.neighbours[grid.neighbours < 25], grid.edges[grid.neighbours < 25]
        tree = minimum_spanning_tree(coo_array((weights[row, edge], (a, b)), shape=(25, 25)).tocsr()).tocoo()
        expected = {frozenset(pair) for pair in zip(tree.row.tolist(), tree.col.tolist(), strict=True)}
        ours = {frozenset((cell, int(parent[row, cell]))) for cell in range(25) if parent[row, cell] < 25}
        assert ours == expected


def test_neighbours_are_mutual_and_rings_double_where_they_get_too_wide() -> None:
    assert [ring_sectors(ring) for ring in (1, 2, 3, 4, 7, 8)] == [8, 16, 16, 32, 32, 64]
    for grid in (rect_grid(4), circ_grid(5)):
        for cell in range(grid.cells):
            for other in grid.neighbours[cell][grid.neighbours[cell] < grid.cells]:
                assert cell in grid.neighbours[other]


@pytest.mark.parametrize("name", ["rect_maze", "circ_maze"])
def test_mazes_are_trees_without_one_edge_and_sides_are_balanced(name: str) -> None:
    task, low, high = CASES[name]
    assert isinstance(task, Maze)
    problems = problem_pool(task, 0, "train", 300, low, high)
    grid = task.grid
    bits = problems["openings"][:, :, None] >> np.arange(grid.sides) & 1
    assert (bits.sum(axis=(1, 2)) == 2 * (grid.cells - 2)).all()
    for row in range(len(bits)):
        pairs = [(c, int(grid.neighbours[c, s])) for c in range(grid.cells) for s in np.flatnonzero(bits[row, c])]
        assert all((b, a) in pairs for a, b in pairs), "a wall is missing on both of its sides"
        sizes = union_find_components(pairs, list(range(grid.cells)))
        assert len(sizes) == 2
        assert min(sizes) >= grid.cells // 4


def test_the_distance_map_is_that_of_breadth_first_search() -> None:
    task, low, high = CASES["rect_maze"]
    assert isinstance(task, Maze)
    problems = problem_pool(task, 0, "train", 50, low, high)
    for row in range(50):
        distance = np.full(37, NEVER)
        distance[problems["start"][row]] = 0
        frontier = [int(problems["start"][row])]
        while frontier:
            cell = frontier.pop(0)
            for side in range(4):
                other = task.grid.neighbours[cell, side]
                if problems["openings"][row, cell] >> side & 1 and distance[other] == NEVER:
                    distance[other] = distance[cell] + 1
                    frontier.append(int(other))
        np.testing.assert_array_equal(problems["distance"][row], distance[:36])
        if problems["label"][row]:
            assert distance[problems["end"][row]] == problems["difficulty"][row] == problems["steps"][row]
        else:
            assert distance[problems["end"][row]] == NEVER
            assert problems["steps"][row] == distance[distance < NEVER].max()


# ---------------------------------------------------------------- loops


def test_few_edges_have_the_same_law_in_both_classes() -> None:
    task = Cycles(96)
    problems = problem_pool(task, 11, "train", 6 * CHUNK, 12, 12)
    edges = task.edge_list(problems)
    rng = np.random.default_rng(0)
    for k in (2, 3, 5):
        counts: list[dict[tuple[int, ...], int]] = [{}, {}]
        for row, label in enumerate(problems["label"]):
            chosen = [(int(a), int(b)) for a, b in edges[row, rng.choice(12, k, replace=False)]]
            touched = sorted({node for pair in chosen for node in pair})
            key = tuple(union_find_components(chosen, touched))
            counts[label][key] = counts[label].get(key, 0) + 1
        kinds = sorted(set(counts[0]) | set(counts[1]))
        table = np.array([[counts[label].get(kind, 0) for kind in kinds] for label in (0, 1)])
        table = table[:, table.sum(axis=0) >= 10]
        assert stats.chi2_contingency(table).pvalue > 0.01, f"{k} edges tell the classes apart"


def test_single_edges_and_pairs_of_edges_are_equally_frequent_in_both_classes() -> None:
    touching = []
    for components in ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]]):
        pairs = [{c[i], c[(i + 1) % len(c)]} for c in components for i in range(len(c))]
        touching.append(sum(bool(a & b) for a, b in combinations(pairs, 2)))
    assert touching[0] == touching[1], "the expected number of edge pairs that share a node"
    task = Cycles(64)
    problems = problem_pool(task, 0, "train", 4 * CHUNK, 6, 6)
    edges = np.sort(task.edge_list(problems), axis=-1)
    code = edges[..., 0] * 6 + edges[..., 1]
    by_class = [np.bincount(code[problems["label"] == label].ravel(), minlength=36) for label in (0, 1)]
    table = np.stack(by_class)[:, by_class[0] + by_class[1] > 0]
    assert table.shape[1] == 15
    assert stats.chi2_contingency(table).pvalue > 0.01


# ---------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RectMaze(25, 6), "multiple of 6"),
        (lambda: RectMaze(18, 6), "at least 24"),
        (lambda: RectMaze(24, 2), "at least 3 cells"),
        (lambda: CircMaze(32, 4), "at least 5"),
        (lambda: Cycles(64).check(7, 8), "must be even"),
        (lambda: Cycles(64).check(4, 8), "6 <= low"),
        (lambda: Cycles(32).check(6, 24), "too small to tell the lines"),
        (lambda: Cycles(32, 10).check(6, 12), "at most size=10 nodes"),
        (lambda: Cycles(32, 16).check(6, 8), "lines of 16 nodes"),
        (lambda: Cycles(32, 4), "at least 6"),
        (lambda: Strings(64).check(6, 8), "8 <= low"),
        (lambda: RectMaze(24, 6).check(5, 40), "<= 26"),
        (lambda: problem_pool(RectMaze(24, 6), 0, "train", 0, 5, 10), "at least 1"),
        (lambda: problem_chunk(RectMaze(16, 4), 0, "train", 0, 11, 11), "mazes have such paths"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
