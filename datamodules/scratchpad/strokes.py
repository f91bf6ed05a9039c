"""Pixels near straight segments and near points, for many pictures at once; no anti-aliasing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SEGMENTS = 1024  # drawn at once: bounds the memory of the candidates


def segment_pixels(start: NDArray, end: NDArray, size: int, radius: float) -> NDArray[np.int64]:
    """Pixels of a `size * size` picture whose centre is nearer than `radius` to a segment.

    Args:
        start: One end `(x, y)` of each segment in pixels, pixel centres being whole numbers, `[K, 2]`.
        end: The other end; the same as `start` for a disc.
        size: Height and width of the picture.
        radius: Half the width of the stroke, at least 0.75: then no segment inside the picture is without a pixel.

    Returns:
        Pixels `row * size + column`, `[K, L]`; segments with fewer than `L` repeat one of theirs.
    """
    starts = range(0, len(start), _SEGMENTS)
    parts = [_some_pixels(start[i : i + _SEGMENTS], end[i : i + _SEGMENTS], size, radius) for i in starts]
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1])), mode="edge") for part in parts])


def _some_pixels(start: NDArray, end: NDArray, size: int, radius: float) -> NDArray[np.int64]:
    steep = abs(end - start)[:, 1] > abs(end - start)[:, 0]
    a, b = (np.where(steep[:, None], point[:, ::-1], point) for point in (start, end))
    a, b = (np.where((a[:, 0] <= b[:, 0])[:, None], *pair) for pair in ((a, b), (b, a)))
    delta = b - a  # the first coordinate grows, the second by no more than it
    length = np.square(delta).sum(axis=1)
    slope = delta[:, 1] / np.maximum(delta[:, 0], 1e-9)
    reach = radius * np.sqrt(2)
    first = np.ceil(a[:, 0] - radius)
    u = first[:, None] + np.arange(int(delta[:, 0].max() + 2 * radius) + 2)
    middle = a[:, 1, None] + slope[:, None] * (u - a[:, 0, None])
    v = np.ceil(middle - reach)[..., None] + np.arange(int(2 * reach) + 1)
    u = np.broadcast_to(u[..., None], v.shape)
    away_u, away_v = u - a[:, 0, None, None], v - a[:, 1, None, None]
    dot = away_u * delta[:, 0, None, None] + away_v * delta[:, 1, None, None]
    share = np.clip(dot / np.maximum(length, 1e-9)[:, None, None], 0, 1)
    far = np.square(away_u - share * delta[:, 0, None, None]) + np.square(away_v - share * delta[:, 1, None, None])
    inside = (far < radius**2) & (np.minimum(u, v) >= 0) & (np.maximum(u, v) < size)
    flat = np.where(steep[:, None, None], u * size + v, v * size + u).astype(np.int64).reshape(len(a), -1)
    inside = inside.reshape(len(a), -1)
    count = inside.sum(axis=1)
    order = np.argsort(~inside, axis=1, kind="stable")[:, : count.max()]
    flat = np.take_along_axis(flat, order, axis=1)
    return np.where(np.arange(flat.shape[1]) < count[:, None], flat, flat[:, :1])


def stamp(first: NDArray[np.uint8], picture: NDArray, points: NDArray, when: NDArray[np.uint8], radius: float) -> None:
    """Paint discs: a pixel within `radius` of points gets the least of its value and their times.

    Args:
        first: Pictures, contiguous, `[n, H, W]`, lowered in place.
        picture: Picture that each point belongs to, `[K]`.
        points: Centres `(x, y)` in pixels, pixel centres being whole numbers, `[2, K]`; discs lie inside the picture.
        when: Time of each point, `[K]`.
        radius: Radius in pixels.
    """
    _, height, width = first.shape
    x, y = points.astype(np.float32)
    column, row = np.ceil(x - np.float32(radius)), np.ceil(y - np.float32(radius))
    away_x, away_y = column - x, row - y
    flat = picture * (height * width) + row.astype(np.int64) * width + column.astype(np.int64)
    reach = range(int(2 * radius) + 1)
    squares_x, squares_y = ([np.square(away + step) for step in reach] for away in (away_x, away_y))
    for down in reach:
        for right in reach:
            inside = np.flatnonzero(squares_x[right] + squares_y[down] < radius**2)
            np.minimum.at(first.reshape(-1), flat[inside] + (down * width + right), when[inside])
