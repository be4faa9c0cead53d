"""Feature maps as fields, in numpy: departures from the mean map, differences, pairs of cells, shuffled positions."""

import numpy as np

DIRECTIONS = ("x+", "x-", "y+", "y-")


def departures(maps, basis=None):
    """Return the departures of maps from the mean map of the training images, {role: [N, h, w, K]}.

    Args:
      maps: {"train", "val", "test": [N, h, w, C]}.
      basis: directions to keep, [C, K], or None for all.
    """
    mean = maps["train"].mean(0, dtype=np.float64).astype(maps["train"].dtype)
    return {role: (z - mean) if basis is None else (z - mean) @ basis for role, z in maps.items()}


def shuffled(maps, seed):
    """Return maps [N, h, w, C] with the cells of each in its own random order: the same features without geometry."""
    count, height, width, channels = maps.shape
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(height * width), (count, 1)), axis=1)
    cells = maps.reshape(count, height * width, channels)
    return np.take_along_axis(cells, order[..., None], 1).reshape(maps.shape)


def differences(maps, spacing):
    """Return central differences (z_x, z_y) over `spacing` cells s either way, at the cells with all four neighbours.

    maps [N, h, w, C] -> each [N, (h - 2 s) (w - 2 s), C]. The two differences of a place share no cell, which would correlate
    them for independent cells too.
    """
    s, (count, height, width, channels) = spacing, maps.shape
    rows, columns = slice(s, height - s), slice(s, width - s)
    x = maps[:, rows, 2 * s :] - maps[:, rows, : width - 2 * s]
    y = maps[:, 2 * s :, columns] - maps[:, : height - 2 * s, columns]
    return tuple((d / (2 * s)).reshape(count, -1, channels) for d in (x, y))


def ends(maps, direction, distance):
    """Return (cells, those `distance` cells from them in a direction): [N, h, w, C] -> two of [N, pairs, C].

    >>> here, there = ends(np.arange(3.0).reshape(1, 1, 3, 1), "x-", 1)
    >>> here.ravel().tolist(), there.ravel().tolist()
    ([1.0, 2.0], [0.0, 1.0])
    """
    count, height, width, channels = maps.shape
    if direction[0] == "x":
        first, second = maps[:, :, : width - distance], maps[:, :, distance:]
    else:
        first, second = maps[:, : height - distance], maps[:, distance:]
    pair = (first, second) if direction[1] == "+" else (second, first)
    return tuple(part.reshape(count, -1, channels) for part in pair)


def distances(cells):
    """Return the distances tested along an axis of `cells`: powers of 2 up to half of it, and the half.

    >>> distances(8), distances(14)
    ([1, 2, 4], [1, 2, 4, 7])
    """
    half = cells // 2
    return sorted({1 << i for i in range(half.bit_length()) if 1 << i <= half} | {half})


def principal(maps, count):
    """Return (mean [C], directions [C, count], share of the variance) of the principal components of maps [N, h, w, C].

    The largest entry of each direction is positive.
    """
    mean, covariance = _moments(maps)
    variances, directions = np.linalg.eigh(covariance)
    directions = directions[:, ::-1][:, :count]
    share = float(variances[::-1][:count].sum() / max(variances.sum(), np.finfo(np.float64).tiny))
    largest = directions[np.abs(directions).argmax(0), np.arange(directions.shape[1])]
    return mean.astype(np.float32), (directions * np.where(largest < 0, -1, 1)).astype(np.float32), share


def effective_dimension(maps):
    """Return the effective number of directions of variation: (sum of the variances)^2 / sum of their squares."""
    covariance = _moments(maps)[1]
    squares = (covariance**2).sum()
    return float(np.trace(covariance) ** 2 / squares) if squares else 0.0


def _moments(maps):
    """Return (mean [C], covariance [C, C]) over all cells, float64, in blocks of maps."""
    mean = maps.mean((0, 1, 2), dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for begin in range(0, len(maps), 64):
        z = maps[begin : begin + 64].reshape(-1, len(mean)) - mean.astype(maps.dtype)
        covariance += z.T @ z
    return mean, covariance / (maps.size // len(mean))
