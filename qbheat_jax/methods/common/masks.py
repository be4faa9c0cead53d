"""Random masks over a grid of cells, drawn on the device, with the same exact share of every image."""

import jax
import jax.numpy as jnp


def ranks(rng, batch, cells):
    """For each of `batch` images the numbers 0..cells-1 in a random order of its own -> int32 [batch, cells].

    The first n of every order, `ranks < n`, are n cells drawn without replacement: exactly that share of every image.
    rng: None draws the same every time, for evaluation.
    """
    rng = jax.random.key(0) if rng is None else rng
    return jnp.argsort(jax.random.uniform(rng, (batch, cells)), -1).astype(jnp.int32)


def mean_over(values, cells):
    """The mean of values [B, h, w] over the cells bool [B, h, w] that count; 0 where none does."""
    weight = cells.astype(jnp.float32)
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def variance(target, wanted, cells):
    """`target.error` of predicting for every cell the mean of the cells that count: the trivial predictor's loss.

    target: targets.Target; wanted [B, h, w, ...] what it asks for; cells bool [B, h, w].
    """
    weight = cells.astype(jnp.float32)[..., None]
    mean = (wanted * weight).sum((0, 1, 2)) / jnp.maximum(weight.sum(), 1.0)
    return mean_over(target.error(mean, wanted), cells)
