"""Bicubic resampling of tables as PyTorch's `interpolate`, for parameters that are indexed by place or frequency.

It differs from `jax.image.resize` in its kernel (a = -0.75), in the lack of antialiasing, and at borders, where the outermost
entry is repeated.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_A = -0.75


@functools.cache
def weights(old, new):
    """Return the weight of each of `old` entries in each of `new` ones, numpy float32 [new, old]."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int) - 1
    table = np.zeros((new, old))
    for k in range(4):
        index = np.clip(first + k, 0, old - 1)
        np.add.at(table, (np.arange(new), index), _cubic(np.abs(place - (first + k))))
    return table.astype(np.float32)


def _cubic(d):
    """Return the cubic convolution kernel at distances d, 0 <= d <= 2."""
    near = ((_A + 2) * d - (_A + 3)) * d * d + 1
    far = ((_A * d - 5 * _A) * d + 8 * _A) * d - 4 * _A
    return np.where(d <= 1, near, far)


def resize(table, size):
    """Return a table [h, w, C] resampled to `size` = (H, W), float32 [H, W, C]. At its own size it is unchanged."""
    if table.shape[:2] == tuple(size):
        return table
    rows, columns = (weights(old, new) for old, new in zip(table.shape, size))
    return jnp.einsum("ij,kl,jlc->ikc", rows, columns, table, precision=jax.lax.Precision.HIGHEST)
