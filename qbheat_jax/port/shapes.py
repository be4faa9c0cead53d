"""Shapes of a model's variables, traced without initialising them."""

import functools

import jax
import jax.numpy as jnp

from qbheat_jax import config as config_lib
from qbheat_jax import methods, pytree
from qbheat_jax.train import config_tables
from qbheat_jax.train.config_tables import CLASSIFIER


def of(config):
    """Return {path of a leaf, `params/encoder/...`: its shape} of the model of a classifier's config."""
    fields = config_lib.flatten(config.to_dict())
    encoder, outputs = _encoder(config_lib.to_json(config_lib.resolve({**fields, "head.classes": 0}, CLASSIFIER)))
    if not config.head.classes:
        return encoder
    head = methods.build(config).head
    made = jax.eval_shape(lambda features, out: head.init(jax.random.key(0), features, out, False), *outputs)
    return {**encoder, **_paths(made, "head")}


@functools.lru_cache(maxsize=64)
def _encoder(text):
    """Return (paths and shapes, shapes of the encoder's outputs) of a config as JSON."""
    encoder = methods.build(config_tables.from_json(text)).encoder
    example = encoder.example_shape(encoder.least_size)  # no variable's shape depends on the input's

    def init():
        return encoder.init_with_output(jax.random.key(0), jnp.zeros((1, *example)))

    outputs, made = jax.eval_shape(init)
    return _paths(made, "encoder"), outputs


def _paths(variables, part):
    paths = ((name.split("/", 1), leaf) for name, leaf in pytree.names(variables))
    return {f"{collection}/{part}/{rest}": tuple(leaf.shape) for (collection, rest), leaf in paths}
