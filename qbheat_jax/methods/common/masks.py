"""Random masks over a grid of cells, drawn on the device; every image has exactly the same number of masked cells."""

import jax
import jax.numpy as jnp


def ranks(rng, batch, cells):
    """Return a random permutation of 0..cells-1 for each of `batch` images -> int32 [batch, cells].

    `ranks < n` selects n cells of every image, drawn without replacement. rng: None draws the same every time, for evaluation.
    """
    rng = jax.random.key(0) if rng is None else rng
    return jnp.argsort(jax.random.uniform(rng, (batch, cells)), -1).astype(jnp.int32)


def mean_over(values, cells):
    """Return the mean of values [B, h, w] over the cells bool [B, h, w] that count; 0 where none does."""
    weight = cells.astype(jnp.float32)
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def variance(target, wanted, cells):
    """Return the loss of the trivial predictor, which predicts the mean of the counted cells everywhere.

    Args:
      target: targets.Target.
      wanted: Target values [B, h, w, ...].
      cells: bool [B, h, w], the cells that count.
    """
    weight = cells.astype(jnp.float32)[..., None]
    mean = (wanted * weight).sum((0, 1, 2)) / jnp.maximum(weight.sum(), 1.0)
    return mean_over(target.error(mean, wanted), cells)
