"""First-order autoregression of features over a grid: z(x + 1, y) = z(x, y) + A norm(z(x, y)), and B likewise for y.

With a layer norm this is FINOLA, first-order norm + linear autoregression (arXiv 2305.16319). Each cell is computed from its
immediate neighbour by matrices that all cells of all images share. There are four, named as in `ops.heat`: "x+" and "x-" to
the right and left, "y+" and "y-" down and up. A cell off the axes has two paths from where the recurrence starts, along x
first or along y first. `both_orders` averages them.
"""

import jax
import jax.numpy as jnp

_PRECISION = jax.lax.Precision.HIGHEST


def layer_norm(z):
    """Return z [..., C], normalised over the channels without gain or bias."""
    mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    return (z - mean) * jax.lax.rsqrt(variance + 1e-6)


def line(z, matrix, count, norm, dtype=jnp.float32):
    """Return the `count` cells that follow each of z on a line, nearest first.

    Args:
      z: float32 [..., C].
      matrix: float32 [C, C], the change over one cell.
      count: int, above 0.
      norm: Function of float32 [..., C] that is applied before every product.
      dtype: Type of the products, float32 (at full precision) or bfloat16; sums are float32.

    Returns:
      float32 [count, ..., C].
    """
    precision = _PRECISION if dtype == jnp.float32 else None
    change = matrix.T.astype(dtype)

    def step(z, _):
        product = jnp.matmul(norm(z).astype(dtype), change, precision=precision, preferred_element_type=jnp.float32)
        z = z + product
        return z, z

    return jax.lax.scan(step, z, length=count)[1]


def grow(params, z, axis, before, after, norm, dtype=jnp.float32):
    """Return z with `before` cells added ahead of its first cell along an axis and `after` cells behind its last.

    Args:
      params: {"x+", "x-", "y+", "y-": float32 [C, C]}, changes over one cell.
      z: float32 [B, h, w, C].
      axis: "x" or "y".
      before, after: ints.
      norm, dtype: as for `line`.

    Returns:
      float32 [B, h, before + w + after, C] along x; the rows grow along y.
    """
    along = {"y": 1, "x": 2}[axis]
    parts = [z]
    if before:
        first = jax.lax.index_in_dim(z, 0, along, keepdims=False)
        cells = line(first, params[f"{axis}-"], before, norm, dtype)
        parts.insert(0, jnp.moveaxis(jnp.flip(cells, 0), 0, along))
    if after:
        last = jax.lax.index_in_dim(z, z.shape[along] - 1, along, keepdims=False)
        parts.append(jnp.moveaxis(line(last, params[f"{axis}+"], after, norm, dtype), 0, along))
    return jnp.concatenate(parts, along)


def both_orders(along_x, along_y, z):
    """Return the mean of along_y(along_x(z)) and along_x(along_y(z)), which gives both axes the same part."""
    return 0.5 * (along_y(along_x(z)) + along_x(along_y(z)))


def from_centre(params, vectors, height, width, norm=layer_norm, dtype=jnp.float32):
    """Return the map that grows from one vector at its centre into the four quadrants.

    The vector lies at row height // 2 and column width // 2.

    Args:
      params: as for `grow`.
      vectors: float32 [B, C].
      height, width: ints, cells of the map.
      norm, dtype: as for `line`.

    Returns:
      float32 [B, height, width, C].
    """

    def along(axis, cells):
        return lambda z: grow(params, z, axis, cells // 2, cells - 1 - cells // 2, norm, dtype)

    return both_orders(along("x", width), along("y", height), vectors[:, None, None])
