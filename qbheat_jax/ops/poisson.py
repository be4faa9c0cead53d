"""The heat equation on pixels themselves: known pixels are held, and heat flows through the others until nothing changes.

Beside `heat.py`, which continues features, this one has nothing to learn. It closes the seam between what a decoder predicts
and what was visible, and alone it is the guess that a reconstruction has to beat.
"""

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg


def solve(images, known):
    """The steady state u_xx + u_yy = 0 of the pixels that are not known -> float [B, H, W, C].

    images float [B, H, W, C], known bool [B, H, W]. No heat flows across the border of an image. Known pixels are kept; of an
    image without any the rest stays 0.
    """
    return blend(jnp.zeros_like(images), images, known)


def blend(predicted, images, known):
    """Predicted pixels raised or lowered so that they meet the known ones -> float [B, H, W, C].

    predicted, images float [B, H, W, C], known bool [B, H, W]: where `images` holds and is kept. What is added to the
    prediction is the steady state of the heat equation whose temperature at the seam is the difference there between a
    known pixel and what was predicted beside it (Poisson image editing, Perez et al. 2003): steps within the prediction
    stay as they are, the one at the seam goes.
    """
    known = known[..., None]
    return jnp.where(known, images, predicted + jax.vmap(_added)(jnp.where(known, images, predicted), known))


def _added(pixels, known):
    """[H, W, C], known ones among them (bool [H, W, 1]) -> what is added to the others, 0 where known."""
    known = known.astype(pixels.dtype)
    # By how much the known neighbours of each pixel that is not known differ from it.
    gap = (1.0 - known) * (_around(known * pixels) - _around(known) * pixels)
    return cg(lambda x: _flow(x, known), gap, tol=1e-3, maxiter=50, M=lambda x: _cycle(x, known))[0]


def _flow(x, known):
    """What flows from each pixel to its neighbours, known ones being held at 0: [H, W, C] -> [H, W, C]."""
    return (1.0 - known) * (_around(jnp.ones_like(known)) * x - _around((1.0 - known) * x)) + known * x


def _cycle(sources, known):
    """Roughly the x of which `_flow` is `sources`: a V-cycle of multigrid, which makes conjugate gradients take few steps."""
    damped = 0.7 / jnp.maximum(_around(jnp.ones_like(known)), 1.0)
    x = damped * sources
    height, width, channels = sources.shape
    if height % 2 == 0 and width % 2 == 0:
        blocks = (height // 2, 2, width // 2, 2, channels)
        coarse = (sources - _flow(x, known)).reshape(blocks).sum((1, 3))
        inside = known.reshape(*blocks[:4], 1).min((1, 3))
        coarse = _cycle((1.0 - inside) * coarse, inside)
        x = x + (1.0 - known) * jnp.repeat(jnp.repeat(coarse, 2, 0), 2, 1)
    return x + damped * (sources - _flow(x, known))


def _around(x):
    """The sum of the four neighbours of each pixel, those outside counting 0: [H, W, C] -> [H, W, C]."""
    x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
    return x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]
