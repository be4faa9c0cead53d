"""Heat conduction on a rectangle with insulated borders, solved exactly in cosines (vHeat, arXiv 2405.16555).

The equation is u_t = k (u_xx + u_yy). With N cells a side its modes are the cosines of the orthonormal DCT-II, and mode n
decays at the rate k (pi n / N)^2. The mean of a channel does not change, and nothing flows across a border.

The transforms are matmuls with constant matrices, so a map costs 2 H W C (H + W) multiply-adds in each direction. The matrices,
the rates and the decay factors are float32 for maps of any type; a bfloat16 map is rounded after each product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def dct_matrix(n):
    """Return the orthonormal DCT-II matrix, numpy float32 [n, n]: row k holds cosine k at the n cells.

    >>> print(dct_matrix(2).round(4))
    [[ 0.7071  0.7071]
     [ 0.7071 -0.7071]]
    """
    frequency, cell = np.arange(n)[:, None], np.arange(n)
    matrix = np.sqrt(2.0 / n) * np.cos(np.pi * frequency * (cell + 0.5) / n)
    matrix[0] = np.sqrt(1.0 / n)
    return matrix.astype(np.float32)


@functools.cache
def rates(height, width):
    """Return the decay rate of each mode at k = 1, numpy float32 [H, W]: (pi n / H)^2 + (pi m / W)^2."""
    rows, columns = (np.square(np.pi * np.arange(size) / size) for size in (height, width))
    return (rows[:, None] + columns).astype(np.float32)


def decay(k):
    """Return the factor that is left of each mode, exp(-rate * k), float32 [..., H, W, C].

    k: diffusivity times time of each mode, non-negative, [..., H, W, C]; the last axis may be 1 for all channels.
    """
    return jnp.exp(-rates(*k.shape[-3:-1])[:, :, None] * k.astype(jnp.float32))


def heat_conduction(u, factors):
    """Return maps after heat conduction: each mode is multiplied by its factor.

    Args:
      u: maps [..., H, W, C].
      factors: float32 [..., H, W, C], see `decay`. It broadcasts against u.

    Returns:
      [..., H, W, C] of u's type.

    >>> import jax
    >>> u = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    >>> hot, cold = heat_conduction(u, decay(jnp.zeros((3, 4, 5)))), heat_conduction(u, decay(jnp.full((3, 4, 5), 1e3)))
    >>> bool(jnp.allclose(hot, u, atol=1e-6)), bool(jnp.allclose(cold, u.mean((1, 2), keepdims=True), atol=1e-6))
    (True, True)
    """
    rows, columns = (dct_matrix(size) for size in u.shape[-3:-1])
    modes = _along_columns(_along_rows(u, rows), columns, factors)
    return _along_rows(_along_columns(modes, columns.T), rows.T)


def _along_rows(u, matrix):
    """Multiply the axis of rows of u [..., H, W, C] by a matrix [H, H]."""
    *_, height, width, channels = u.shape
    return _product(matrix, u.reshape(-1, height, width * channels)).astype(u.dtype).reshape(u.shape)


def _along_columns(u, matrix, factors=None):
    """Multiply the axis of columns of u [..., H, W, C] by a matrix [W, W], and the result by `factors` if given."""
    y = _product(matrix, u.reshape(-1, *u.shape[-2:])).reshape(u.shape)
    return (y if factors is None else y * factors).astype(u.dtype)


def _product(matrix, u):
    """Return matrix [n, n] times u [N, n, c], float32 [N, n, c].

    XLA:CPU transposes u for a product with one matrix, and takes ten times as long as with a copy for each of N. On
    accelerators the copies would be written to memory.
    """

    def copies(u):
        return jax.lax.batch_matmul(jnp.broadcast_to(matrix, (len(u), *matrix.shape)), u)

    def one(u):
        return jnp.einsum("mn,bnc->bmc", matrix, u)

    return jax.lax.platform_dependent(u.astype(jnp.float32), cpu=copies, default=one)
