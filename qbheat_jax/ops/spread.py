"""How far the features of a batch are spread: two cheap figures that show a collapse while a run trains."""

import jax
import jax.numpy as jnp


def figures(features, mask):
    """Return {"feature_std", "participation_ratio"}, float32 scalars of pooled features; no gradient flows.

    Features are scaled to length 1. `feature_std` is the mean over the channels of their standard deviation over the batch,
    times sqrt(D): near 1 where they are spread over the sphere, 0 where all are alike. `participation_ratio` is tr(C)^2 /
    tr(C^2) of their covariance C: the number of dimensions that they fill, at most D and the examples less one. It is the
    effective rank of order 2, exp of the Renyi entropy of C's eigenvalues, and needs no decomposition.

    Args:
      features: float [B, D].
      mask: bool [B], the examples that count.

    >>> one = figures(jnp.ones((4, 3)), jnp.ones(4, bool))
    >>> round(float(one["feature_std"]), 3)
    0.0
    """
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))
    weight = mask[:, None] / jnp.maximum(mask.sum(), 1)
    centred = (x - (x * weight).sum(0)) * jnp.sqrt(weight)
    variances = jnp.square(centred).sum(0)
    count, width = centred.shape
    gram = centred @ centred.T if count < width else centred.T @ centred  # the same eigenvalues, but for zeros
    return {
        "feature_std": jnp.sqrt(variances).mean() * width**0.5,
        "participation_ratio": variances.sum() ** 2 / jnp.maximum(jnp.square(gram).sum(), 1e-20),
    }
