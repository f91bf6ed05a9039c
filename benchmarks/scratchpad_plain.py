"""The generators of `datamodules/scratchpad` once more, one problem at a time, by loops and PIL, to be timed against.

Each function returns a function that makes one problem and all frames of its solution as palette indices, without
anti-aliasing, at the size and by the rules of the task.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from datamodules.scratchpad.circ_maze import CircMaze, ring_sectors
from datamodules.scratchpad.rect_maze import RectMaze
from datamodules.scratchpad.tasks import BLACK, BLUE, PALETTE, RED, WHITE

#: Cells joined to each cell.
Tree: TypeAlias = dict[int, set[int]]


def square_cells(task: RectMaze) -> Callable[[Tree, dict[int, int]], None]:
    """Return a function that draws one frame of a rectangular maze with PIL."""
    size, cell, cells = task.size, task.cell_size, task.grid.cells

    def draw(tree: Tree, colours: dict[int, int]) -> None:
        image = Image.new("P", (size * cell, size * cell), BLACK)
        pen = ImageDraw.Draw(image)
        for at in range(cells):
            row, column = divmod(at, size)
            x, y, colour = column * cell, row * cell, colours.get(at, WHITE)
            pen.rectangle([x + 1, y + 1, x + cell - 2, y + cell - 2], fill=colour)
            for other in tree[at]:
                side = {
                    -size: [x + 1, y, x + cell - 2, y],
                    size: [x + 1, y + cell - 1, x + cell - 2, y + cell - 1],
                    -1: [x, y + 1, x, y + cell - 2],
                    1: [x + cell - 1, y + 1, x + cell - 1, y + cell - 2],
                }
                pen.rectangle(side[other - at], fill=colour)
        np.asarray(image)

    return draw


def ring_cells(task: CircMaze) -> Callable[[Tree, dict[int, int]], None]:
    """Return a function that draws one frame of a circular maze with PIL."""
    centre = (task.image_size - 1) / 2
    width = (task.image_size / 2 - 0.5) / (task.size + 1)
    first = [sum(map(ring_sectors, range(1, ring))) for ring in range(1, task.size + 1)]
    sides = task.grid.neighbours.tolist()

    def draw(tree: Tree, colours: dict[int, int]) -> None:
        image = Image.new("P", (task.image_size, task.image_size), WHITE)
        pen = ImageDraw.Draw(image)
        for ring in range(task.size, 0, -1):
            inner, outer, sectors = ring * width, (ring + 1) * width, ring_sectors(ring)
            box = [centre - outer, centre - outer, centre + outer, centre + outer]
            for sector in range(sectors):
                colour = colours.get(first[ring - 1] + sector, WHITE)
                pen.pieslice(box, 360 * sector / sectors, 360 * (sector + 1) / sectors, fill=colour)
            if ring == task.size:
                pen.ellipse(box, outline=BLACK, width=2)
            inside = [centre - inner, centre - inner, centre + inner, centre + inner]
            for sector in range(sectors):
                at = first[ring - 1] + sector
                if sides[at][0] not in tree[at]:
                    angle = 2 * math.pi * (sector + 1) / sectors
                    x, y = math.cos(angle), math.sin(angle)
                    ends = [centre + inner * x, centre + inner * y, centre + outer * x, centre + outer * y]
                    pen.line(ends, fill=BLACK, width=2)
                if sides[at][2] not in tree[at]:
                    pen.arc(inside, 360 * sector / sectors, 360 * (sector + 1) / sectors, fill=BLACK, width=2)
        pen.ellipse([centre - width, centre - width, centre + width, centre + width], fill=BLACK)
        np.asarray(image)

    return draw


def plain_maze(task: RectMaze | CircMaze, low: int, high: int) -> Callable[[], int]:
    """Return a function that makes one maze and all its frames by loops and PIL, by the rules of `Maze`."""
    rng = random.Random(0)
    cells = task.grid.cells
    draw = square_cells(task) if isinstance(task, RectMaze) else ring_cells(task)
    sides, views = task.grid.neighbours.tolist(), task.grid.views.tolist()
    straight, nearer = task.grid.straight.tolist(), task.grid.nearer.tolist()

    def distances(tree: Tree, start: int) -> dict[int, int]:
        found, queue = {start: 0}, deque([start])
        while queue:
            at = queue.popleft()
            for other in tree[at] - found.keys():
                found[other] = found[at] + 1
                queue.append(other)
        return found

    def spanning_tree() -> tuple[Tree, list[tuple[int, int]]]:
        """Kruskal's algorithm."""
        root, tree, edges = list(range(cells)), {at: set() for at in range(cells)}, []

        def find(at: int) -> int:
            while root[at] != at:
                root[at] = root[root[at]]
                at = root[at]
            return at

        weight = {(at, other): rng.random() for at in range(cells) for other in sides[at] if at < other < cells}
        for a, b in sorted(weight, key=weight.__getitem__):
            if find(a) != find(b):
                root[find(a)] = find(b)
                tree[a].add(b)
                tree[b].add(a)
                edges.append((a, b))
        return tree, edges

    def join(tree: Tree, a: int, b: int) -> None:
        tree[a].add(b)
        tree[b].add(a)

    def cut(tree: Tree, a: int, b: int) -> None:
        tree[a].discard(b)
        tree[b].discard(a)

    def matched_ends(before: dict[int, int], after: dict[int, int], tree: Tree, start: int) -> tuple[list, list]:
        """Ends on the start's side and on the lost one that agree in everything local."""
        groups: dict[tuple, tuple[list[int], list[int]]] = {}
        for at in range(cells):
            if low <= before[at] <= high:
                code = sum(1 << side for side, other in enumerate(sides[at]) if other in tree[at])
                leaving = sum(
                    nearer[at][start][side] for side, other in enumerate(sides[start]) if other in tree[start]
                )
                arriving = sum(nearer[start][at][side] for side, other in enumerate(sides[at]) if other in tree[at])
                key = (before[at], views[at][code], straight[start][at], leaving, arriving)
                groups.setdefault(key, ([], []))[at not in after].append(at)
        both = {key: pair for key, pair in groups.items() if pair[0] and pair[1]}
        if not both:
            return [], []
        depth = rng.choice(sorted({key[0] for key in both}))
        return both[rng.choice([key for key in both if key[0] == depth for side in both[key] for _ in side])]

    def problem() -> tuple[Tree, dict[int, int], int, bool]:
        wanted = rng.random() < 0.5
        while True:
            tree, edges = spanning_tree()
            balanced = []
            for a, b in edges:
                cut(tree, a, b)
                if cells // 4 <= len(distances(tree, a)) <= cells - cells // 4:
                    balanced.append((a, b))
                join(tree, a, b)
            if not balanced:
                continue
            a, b = rng.choice(balanced)
            for start in rng.sample(range(cells), cells):
                before = distances(tree, start)
                cut(tree, a, b)
                after = distances(tree, start)
                near, lost = matched_ends(before, after, tree, start)
                if near:
                    return tree, after, rng.choice(near if wanted else lost), wanted
                join(tree, a, b)

    def make() -> int:
        tree, after, end, wanted = problem()
        for step in range((after[end] if wanted else max(after.values())) + 1):
            draw(tree, {end: RED} | {at: BLUE for at, distance in after.items() if distance <= step})
        return 1

    return make


def plain_cycle(nodes: int, image_size: int) -> Callable[[], int]:
    """Return a function that makes one problem of cycles and all its frames, by loops and PIL."""
    rng = random.Random(0)
    palette = [int(255 * part) for colour in PALETTE for part in colour]

    def make() -> int:
        wanted = rng.random() < 0.5
        order = list(range(nodes))
        rng.shuffle(order)
        loops = [order] if wanted else [order[: nodes // 2], order[nodes // 2 :]]
        turn, centre = rng.random(), (image_size - 1) / 2
        at = []
        for node in range(nodes):
            angle = 2 * math.pi * (turn + node / nodes)
            at.append((centre + 0.42 * image_size * math.cos(angle), centre + 0.42 * image_size * math.sin(angle)))
        joined: dict[int, list[int]] = {node: [] for node in order}
        edges = [(loop[i - 1], loop[i]) for loop in loops for i in range(len(loop))]
        for a, b in edges:
            joined[a].append(b)
            joined[b].append(a)
        blue, frames = {0: 0}, deque([0])
        while frames:
            node = frames.popleft()
            for other in joined[node]:
                if other not in blue:
                    blue[other] = blue[node] + 1
                    frames.append(other)
        radius = max(1.5, 0.025 * image_size)
        for step in range(max(blue.values()) + 1):
            image = Image.new("P", (image_size, image_size), WHITE)
            image.putpalette(palette)
            pen = ImageDraw.Draw(image)
            done = [(a, b) for a, b in edges if min(blue.get(a, nodes), blue.get(b, nodes)) < step]
            for colour, lines in ((BLACK, edges), (BLUE, done)):
                for a, b in lines:
                    pen.line([at[a], at[b]], fill=colour, width=2)
            for node, (x, y) in enumerate(at):
                colour = BLUE if blue.get(node, nodes) <= step else BLACK
                pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
            np.asarray(image)
        return 1

    return make


def plain_string(nodes: int, image_size: int) -> Callable[[], int]:
    """Return a function that makes one problem of strings and all its frames, by loops and PIL."""
    rng = random.Random(0)
    samples, unit, radius = 24, 0.2 * image_size, max(2.0, 0.03 * image_size)
    palette = [int(255 * part) for colour in PALETTE for part in colour]

    def piece(p0: float, p1: float, p2: float, p3: float, t: float) -> float:
        return (1 - t) ** 3 * p0 + 3 * t * (1 - t) ** 2 * p1 + 3 * t**2 * (1 - t) * p2 + t**3 * p3

    def make() -> int:
        wanted = rng.random() < 0.5
        anchors: list[tuple[float, float]] = []
        while len(anchors) < nodes:
            x, y = (image_size - 1) * (0.12 + 0.76 * rng.random()), (image_size - 1) * (0.12 + 0.76 * rng.random())
            if all(math.hypot(x - a, y - b) >= 0.1 * (image_size - 1) for a, b in anchors):
                anchors.append((x, y))
        start = min(range(nodes), key=lambda node: anchors[node][1])
        others = [node for node in range(nodes) if node != start]
        rng.shuffle(others)
        order = [start, *others]
        black, blue = [], []  # lines; lines and their distance from the start
        for number, loop in enumerate([order] if wanted else [order[: nodes // 2], order[nodes // 2 :]]):
            length, lines = 0.0, []
            tangent = {}
            for i, node in enumerate(loop):
                (ax, ay), (bx, by) = anchors[loop[i - 1]], anchors[loop[(i + 1) % len(loop)]]
                tangent[node] = ((bx - ax) / 6, (by - ay) / 6)
            for i, node in enumerate(loop):
                after = loop[(i + 1) % len(loop)]
                (ax, ay), (bx, by), (ux, uy), (vx, vy) = anchors[node], anchors[after], tangent[node], tangent[after]
                at = (ax, ay)
                for step in range(1, samples + 1):
                    t = step / samples
                    to = (piece(ax, ax + ux, bx - vx, bx, t), piece(ay, ay + uy, by - vy, by, t))
                    lines.append((at, to, length))
                    length += math.hypot(to[0] - at[0], to[1] - at[1])
                    at = to
            black += [(a, b) for a, b, _ in lines]
            if number == 0:
                blue = [(a, b, min(along, length - along)) for a, b, along in lines]
        x, y = anchors[start]
        for step in range(math.ceil(max(far for _, _, far in blue) / unit) + 1):
            image = Image.new("P", (image_size, image_size), WHITE)
            image.putpalette(palette)
            pen = ImageDraw.Draw(image)
            for a, b in black:
                pen.line([a, b], fill=BLACK, width=2)
            for a, b, far in blue:
                if far <= step * unit:
                    pen.line([a, b], fill=BLUE, width=2)
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=BLUE)
            np.asarray(image)
        return 1

    return make
