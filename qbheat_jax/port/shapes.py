"""The shapes of a model's variables, traced and never initialised."""

import functools

import jax
import jax.numpy as jnp

from qbheat_jax import config as config_lib
from qbheat_jax import objectives, trees


def of(config):
    """{path of a leaf, `params/encoder/...`: its shape} of the model that a config describes. Cached."""
    return _of(config_lib.to_json(config))


@functools.lru_cache(maxsize=64)
def _of(text):
    objective = objectives.build(config_lib.from_json(text))
    side = objective.encoder.stride  # one cell is enough: no shape depends on the image's

    def init():
        return objective.init(jax.random.key(0), {"image": jnp.zeros((1, side, side, 3), jnp.uint8)})

    return {name: tuple(leaf.shape) for name, leaf in trees.names(jax.eval_shape(init))}
