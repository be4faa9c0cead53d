"""Exponential moving averages: teachers and key encoders."""

import jax


def ema_update(slow, fast, momentum):
    """Return momentum * slow + (1 - momentum) * fast of two trees of float32."""
    return jax.tree.map(lambda s, f: momentum * s + (1 - momentum) * f, slow, fast)
