"""Solve the heat equation on pixels: hold the known pixels and find the steady state of the others.

Unlike `heat.py`, which extrapolates features, this has no parameters. It removes the seam between predicted and visible
pixels. Applied alone, it is the baseline that a reconstruction has to beat.
"""

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg


def solve(images, known):
    """Return the steady state u_xx + u_yy = 0 of the unknown pixels, with the known ones held fixed.

    No heat flows across the image border. An image without known pixels becomes 0.

    Args:
      images: float [B, H, W, C].
      known: bool [B, H, W].

    Returns:
      float [B, H, W, C].
    """
    return blend(jnp.zeros_like(images), images, known)


def blend(predicted, images, known):
    """Shift predicted pixels smoothly so that they meet the known ones (Poisson image editing, Perez et al. 2003).

    The added term solves the steady heat equation. Its boundary value is the difference, at the seam, between a known pixel and
    the prediction beside it. Gradients within the prediction stay; the step at the seam disappears.

    Args:
      predicted: float [B, H, W, C].
      images: float [B, H, W, C], used where `known`.
      known: bool [B, H, W].

    Returns:
      float [B, H, W, C]; known pixels are those of `images`.
    """
    known = known[..., None]
    return jnp.where(known, images, predicted + jax.vmap(_correction)(jnp.where(known, images, predicted), known))


def _correction(pixels, known):
    """Return the correction [H, W, C] of the unknown pixels, 0 where known; `known` is bool [H, W, 1]."""
    known = known.astype(pixels.dtype)
    # The sum of differences between each unknown pixel and its known neighbours.
    gap = (1.0 - known) * (_neighbour_sum(known * pixels) - _neighbour_sum(known) * pixels)
    return cg(lambda x: _outflow(x, known), gap, tol=1e-3, maxiter=50, M=lambda x: _v_cycle(x, known))[0]


def _outflow(x, known):
    """Return the heat [H, W, C] that leaves each pixel for its neighbours, with known pixels held at 0."""
    return (1.0 - known) * (_neighbour_sum(jnp.ones_like(known)) * x - _neighbour_sum((1.0 - known) * x)) + known * x


def _v_cycle(sources, known):
    """Approximately invert `_outflow` by one multigrid V-cycle, the preconditioner of the conjugate gradients."""
    damped = 0.7 / jnp.maximum(_neighbour_sum(jnp.ones_like(known)), 1.0)
    x = damped * sources
    height, width, channels = sources.shape
    if height % 2 == 0 and width % 2 == 0:
        blocks = (height // 2, 2, width // 2, 2, channels)
        coarse = (sources - _outflow(x, known)).reshape(blocks).sum((1, 3))
        inside = known.reshape(*blocks[:4], 1).min((1, 3))
        coarse = _v_cycle((1.0 - inside) * coarse, inside)
        x = x + (1.0 - known) * jnp.repeat(jnp.repeat(coarse, 2, 0), 2, 1)
    return x + damped * (sources - _outflow(x, known))


def _neighbour_sum(x):
    """Return the sum of each pixel's four neighbours, [H, W, C] -> [H, W, C]; pixels outside count as 0."""
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    return x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]
