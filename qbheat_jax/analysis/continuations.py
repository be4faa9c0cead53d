"""Continuations of the visible block over the whole grid, in numpy: by its mean, its border, its mirror image, by cosines.

They fit no matrix. All are linear, so the continuation of departures from a mean map is the departure of the continuation.
"""

import numpy as np

from qbheat_jax.ops import quarters
from qbheat_jax.ops.heat_conduction import dct_matrix

NAMES = ("cosine", "mirror", "border", "mean")
# Times of heat conduction to choose from, in squared half images: 0 mirrors the block, the last leaves its mean.
TIMES = (0.0, *np.geomspace(1e-3, 3.0, 12), 1e6)


def mean(visible, quarter):
    """Return the mean of the block at every cell: [N, h/2, w/2, K] -> [N, h, w, K]. `quarter`: index of the placement."""
    height, width = (2 * cells for cells in visible.shape[1:3])
    return np.broadcast_to(visible.mean((1, 2), keepdims=True), (len(visible), height, width, visible.shape[-1]))


def border(visible, quarter):
    """Return the nearest cell of the block at every cell, as `mean` does."""
    rows, columns = (
        np.clip(np.arange(2 * n) - quarters.start(2 * n, place), 0, n - 1)
        for n, place in zip(visible.shape[1:3], quarters.split(quarter))
    )
    return visible[:, rows][:, :, columns]


def mirror(visible, quarter):
    """Return the mirror image in the block at every cell, as `mean` does."""
    (rows, _), (columns, _) = _reflections(visible.shape[1:3], quarter)
    return visible[:, rows][:, :, columns]


def cosine(visible, target):
    """Continue by cosines after heat conduction, as `ops.cosine` does, with the best time of each distance and channel.

    Args:
      visible: {placement: {"train", "test": [N, h/2, w/2, K]}}.
      target: {"train": [N, h, w, K]}, whose squared error over all placements decides.

    Returns:
      {placement: grids of the test images [N, h, w, K]}.
    """
    distance = {q: _distance(parts["train"].shape[1:3], q) for q, parts in visible.items()}
    errors = {d: np.zeros((len(TIMES), target["train"].shape[-1])) for d in np.unique(np.stack([*distance.values()]))}
    for k, time in enumerate(TIMES):
        for q, parts in visible.items():
            difference = mirror(_conduct(parts["train"], time), q) - target["train"]
            error = np.einsum("nijk,nijk->ijk", difference, difference)
            for d, total in errors.items():
                total[k] += error[distance[q] == d].sum(0)
    best = {d: total.argmin(0) if d else np.zeros(total.shape[1], int) for d, total in errors.items()}
    grids = {}
    for q, parts in visible.items():
        chosen = np.stack([[best[d] for d in row] for row in distance[q]])  # [h, w, K]
        grids[q] = mirror(parts["test"], q)
        for k in np.unique(chosen):
            grids[q] = np.where(chosen == k, mirror(_conduct(parts["test"], TIMES[k]), q), grids[q])
    return grids


def _reflections(shape, quarter):
    return [quarters.reflections(2 * n, place) for n, place in zip(shape, quarters.split(quarter))]


def _distance(shape, quarter):
    """Return the larger distance along both axes from the block of `shape`, float [h, w] in half images."""
    down, across = (np.abs(steps) / n for n, (_, steps) in zip(shape, _reflections(shape, quarter)))
    return np.maximum(down[:, None], across[None, :])


def _conduct(visible, time):
    """Return the block after heat conduction for a time behind insulated borders."""
    rows, columns = (
        ((waves.T * np.exp(-np.square(np.pi * np.arange(len(waves))) * time)) @ waves).astype(visible.dtype)
        for waves in map(dct_matrix, visible.shape[1:3])
    )
    return np.einsum("iy,nyxc,jx->nijc", rows, visible, columns, optimize=True)
