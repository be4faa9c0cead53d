"""Geometry of quarter-block masking: nine placements of the visible block, what each masked cell is predicted from.

The visible block covers half of each axis, at one of three places (method: one contiguous quarter of the
image is visible, arXiv 2211.13228; the half steps of the middle placement are this project's reading of it):

| axis placement | visible cells | predicts                                            | signed step, in half images |
|----------------|---------------|-----------------------------------------------------|-----------------------------|
| start          | [0, n/2)      | i -> i + n/2                                        | +1                          |
| middle         | [n/4, 3n/4)   | i -> i - n/4 for i < n/2; i -> i + n/4 for i >= n/2 | -1/2 and +1/2               |
| end            | [n/2, n)      | i -> i - n/2                                        | -1                          |

A placement of the image is a pair, written as one index `quarter = 3 * row + column` with start, middle, end
= 0, 1, 2. The two-dimensional map is separable, so everything here is per axis. numpy only, no jax.
"""

import numpy as np

from qbheat_jax.errors import UserError

AXIS_PLACEMENTS = ("start", "middle", "end")
NAMES = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))

# What `quarter.placements` may say, and the placements that a training image then draws from, uniformly.
PLACEMENT_SETS = {
    "corners": (0, 2, 6, 8),
    "center": (4,),
    "corners_center": (0, 2, 4, 6, 8),
    "all9": tuple(range(9)),
}


def split(quarter):
    """Placement index -> (row placement, column placement), each 0 (start), 1 (middle) or 2 (end)."""
    return quarter // 3, quarter % 3


def check_axis(cells, placement, axis="an axis"):
    """Raises UserError where an axis of `cells` cells cannot hold the visible block of this placement."""
    if cells < 2 or cells % 2:
        raise UserError(f"{axis} has {cells} cells, but half of it must be visible: an even number is needed")
    if placement == 1 and cells % 4:
        raise UserError(
            f"{axis} has {cells} cells, which a middle placement cannot split (it leaves {cells}/4 cells on either "
            "side): use a multiple of 4 cells, or quarter.placements='corners'"
        )


def check_grid(height, width, placements):
    """Raises UserError, with the reason, where a grid of height x width cells cannot be split so.

    `placements` is an iterable of placement indices 0..8.
    """
    for quarter in placements:
        row, column = split(int(quarter))
        check_axis(height, row, "the grid's height")
        check_axis(width, column, "the grid's width")


def start(cells, placement):
    """First visible cell (or pixel, where `cells` counts pixels) of an axis under this placement."""
    return (0, cells // 4, cells // 2)[placement]


def visible_slices(height, width, quarter):
    """(row slice, column slice) of the visible block of a height x width image or grid."""
    check_grid(height, width, [quarter])
    return tuple(
        slice(begin, begin + size // 2)
        for size, begin in ((size, start(size, place)) for size, place in zip((height, width), split(quarter)))
    )


def starts(size, quarters_axis):
    """int32[9]: first visible pixel of an axis of `size` pixels for each placement index; axis 0 rows, 1 columns."""
    return np.array([start(size, split(q)[quarters_axis]) for q in range(9)], np.int32)


def masked(height, width):
    """bool[9, height, width]: the cells that are not visible, for each placement index."""
    rows, columns = _visible(height), _visible(width)
    return np.stack([~np.outer(rows[split(q)[0]], columns[split(q)[1]]) for q in range(9)])


def _visible(cells):
    return np.stack(
        [(np.arange(cells) >= start(cells, p)) & (np.arange(cells) < start(cells, p) + cells // 2) for p in range(3)]
    )


def sources(cells, placement):
    """What each cell of an axis is made from: (int32[cells] index into the visible half, float32[cells] signed step).

    A visible cell comes from itself, step 0. Every masked cell comes from exactly one visible cell, and every
    visible cell gives exactly one masked cell.

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


def steps(placements, quarters_axis):
    """The signed steps other than 0 that these placement indices need along an axis, sorted."""
    needed = {0: (1.0,), 1: (-0.5, 0.5), 2: (-1.0,)}
    return tuple(sorted({d for q in placements for d in needed[split(int(q))[quarters_axis]]}))


def selection(cells, placements, quarters_axis):
    """float32[9, 2, cells, cells // 2] of zeros and ones: where each cell's value is taken from.

    Entry [q, 0, i, j] is 1 where placement q has visible cell j at i, and [q, 1, i, j] where it fills cell i from visible
    cell j carried over a step. Placements not in `placements` are left zero, so that a grid which some unused placement
    could not split is still accepted.
    """
    table = np.zeros((9, 2, cells, cells // 2), np.float32)
    for q in placements:
        source, step = sources(cells, split(int(q))[quarters_axis])
        table[q, (step != 0).astype(int), np.arange(cells), source] = 1.0
    return table


def signed_steps(cells, placements, quarters_axis):
    """float32[9, parts]: the signed step over which the visible cells of each part of the axis are carried.

    One part, or two, the first and the second half of the visible cells, where a placement is in the middle. Zero for
    placements not in `placements`.
    """
    rows = {q: split(int(q))[quarters_axis] for q in placements}
    parts = 2 if 1 in rows.values() else 1
    table = np.zeros((9, parts), np.float32)
    for q, place in rows.items():
        source, step = sources(cells, place)
        carried = np.zeros(cells // 2, np.float32)
        carried[source[step != 0]] = step[step != 0]
        table[q] = carried[:: cells // 2 // parts]
    return table
