"""Geometry of quarter-block masking: nine placements of the visible block, and the source of each masked cell.

The visible block covers half of each axis, at one of three places. The paper keeps one contiguous quarter of the image
visible (arXiv 2211.13228); the half steps of the middle placement are this project's interpretation.

| axis placement | visible cells | predicts                                            | signed step, in half images |
|----------------|---------------|-----------------------------------------------------|-----------------------------|
| start          | [0, n/2)      | i -> i + n/2                                        | +1                          |
| middle         | [n/4, 3n/4)   | i -> i - n/4 for i < n/2; i -> i + n/4 for i >= n/2 | -1/2 and +1/2               |
| end            | [n/2, n)      | i -> i - n/2                                        | -1                          |

An image's placement is a pair, encoded as one index `3 * row + column` with start, middle, end = 0, 1, 2. The
two-dimensional map is separable, so all functions here work per axis. They use numpy only.
"""

import numpy as np

from qbheat_jax.errors import UserError

AXIS_PLACEMENTS = ("start", "middle", "end")
NAMES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))

# Values of `quarter.placements`, and the placements from which training images then draw uniformly.
PLACEMENT_SETS = {
    "corners": (0, 2, 6, 8),
    "center": (4,),
    "corners_center": (0, 2, 4, 6, 8),
    "all9": tuple(range(9)),
}


def split(placement):
    """Split a placement index into (row, column), each 0 (start), 1 (middle) or 2 (end)."""
    return placement // 3, placement % 3


def check_axis(cells, placement, axis="an axis"):
    """Check that an axis of `cells` cells can hold the visible block of an axis placement.

    Raises:
      UserError: `cells` is odd, or no multiple of 4 for the middle placement.
    """
    if cells < 2 or cells % 2:
        raise UserError(f"{axis} has {cells} cells: the visible half needs an even number of cells, at least 2")
    if placement == 1 and cells % 4:
        raise UserError(
            f"{axis} has {cells} cells: the middle placement leaves a quarter of them on either side. Use a multiple of 4 "
            "cells, or quarter.placements='corners'"
        )


def check_grid(height, width, placements):
    """Check that a grid of height x width cells can hold all these placements.

    Args:
      height, width: int, cells.
      placements: iterable of placement indices 0..8.

    Raises:
      UserError: an axis does not divide; the message names the axis and its size.
    """
    for placement in placements:
        row, column = split(int(placement))
        check_axis(height, row, "the grid's height")
        check_axis(width, column, "the grid's width")


def start(cells, placement):
    """Return the first visible cell of an axis (or pixel, where `cells` counts pixels) under an axis placement."""
    return (0, cells // 4, cells // 2)[placement]


def visible_slices(height, width, placement):
    """Return (row slice, column slice) of the visible block of a height x width image or grid."""
    check_grid(height, width, [placement])
    return tuple(
        slice(begin, begin + size // 2)
        for size, begin in ((size, start(size, place)) for size, place in zip((height, width), split(placement)))
    )


def starts(size, axis):
    """Return int32 [9], the first visible pixel of an axis of `size` pixels by placement index; axis 0 is rows."""
    return np.array([start(size, split(q)[axis]) for q in range(9)], np.int32)


def masked(height, width):
    """Return bool [9, height, width], True for the masked cells, by placement index."""
    rows, columns = _visible(height), _visible(width)
    return np.stack([~np.outer(rows[split(q)[0]], columns[split(q)[1]]) for q in range(9)])


def _visible(cells):
    return np.stack(
        [(np.arange(cells) >= start(cells, p)) & (np.arange(cells) < start(cells, p) + cells // 2) for p in range(3)]
    )


def sources(cells, placement):
    """Return the source of each cell of an axis, and the signed step from it.

    A visible cell is its own source, with step 0. Each masked cell has exactly one visible source, and each visible cell
    is the source of exactly one masked cell.

    Args:
      cells: int, length of the axis.
      placement: axis placement 0, 1 or 2.

    Returns:
      (int32 [cells] index into the visible half, float32 [cells] signed step in half images).

    >>> sources(4, 0)[1]
    array([0., 0., 1., 1.], dtype=float32)
    >>> sources(4, 1)
    (array([0, 0, 1, 1], dtype=int32), array([-0.5,  0. ,  0. ,  0.5], dtype=float32))
    """
    check_axis(cells, placement)
    half, quarter = cells // 2, cells // 4
    i = np.arange(cells)
    if placement == 0:
        source, step = i % half, np.where(i < half, 0.0, 1.0)
    elif placement == 2:
        source, step = i % half, np.where(i < half, -1.0, 0.0)
    else:
        source = np.where(i < quarter, i, np.where(i < 3 * quarter, i - quarter, i - half))
        step = np.where(i < quarter, -0.5, np.where(i < 3 * quarter, 0.0, 0.5))
    return source.astype(np.int32), step.astype(np.float32)


def reflections(cells, placement):
    """Return the visible cell whose mirror image each cell of an axis is, and the signed distance from the visible half.

    Continuing a cosine series of the visible half mirrors it at its ends; a visible cell is itself.

    Args:
      cells: int, length of the axis.
      placement: axis placement 0, 1 or 2.

    Returns:
      (int32 [cells] index into the visible half, int32 [cells] distance to its nearest cell, negative before it).

    >>> reflections(8, 1)
    (array([1, 0, 0, 1, 2, 3, 3, 2], dtype=int32), array([-2, -1,  0,  0,  0,  0,  1,  2], dtype=int32))
    """
    check_axis(cells, placement)
    offset = np.arange(cells) - start(cells, placement)
    index = np.minimum(offset % cells, cells - 1 - offset % cells)  # twice the visible half is one period
    return index.astype(np.int32), (offset - offset.clip(0, cells // 2 - 1)).astype(np.int32)


def steps(placements, axis):
    """Return the sorted nonzero signed steps that these placement indices need along an axis."""
    needed = {0: (1.0,), 1: (-0.5, 0.5), 2: (-1.0,)}
    return tuple(sorted({d for q in placements for d in needed[split(int(q))[axis]]}))


def selection(cells, placements, axis):
    """Return the 0/1 table that places the visible cells on the axis, copied or propagated.

    Args:
      cells: int, length of the axis.
      placements: iterable of placement indices. The entries of others stay zero, so only these need to fit the axis.
      axis: 0 for rows, 1 for columns.

    Returns:
      float32 [9, 2, cells, cells // 2]. Entry [q, 0, i, j] is 1 where placement q shows visible cell j at cell i. Entry
      [q, 1, i, j] is 1 where it fills cell i from visible cell j over a nonzero step.
    """
    table = np.zeros((9, 2, cells, cells // 2), np.float32)
    for q in placements:
        source, step = sources(cells, split(int(q))[axis])
        table[q, (step != 0).astype(int), np.arange(cells), source] = 1.0
    return table


def signed_steps(cells, placements, axis):
    """Return the signed step over which each part of the visible cells is propagated.

    Args:
      cells: int, length of the axis.
      placements: iterable of placement indices; the rows of others stay zero.
      axis: 0 for rows, 1 for columns.

    Returns:
      float32 [9, parts]. There is one part, or two (the halves of the visible cells) if some placement is in the middle.
    """
    rows = {q: split(int(q))[axis] for q in placements}
    parts = 2 if 1 in rows.values() else 1
    table = np.zeros((9, parts), np.float32)
    for q, place in rows.items():
        source, step = sources(cells, place)
        carried = np.zeros(cells // 2, np.float32)
        carried[source[step != 0]] = step[step != 0]
        table[q] = carried[:: cells // 2 // parts]
    return table
