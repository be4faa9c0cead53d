"""Frozen encoders for probes and analyses: of a run, untrained, or trivial features without an encoder."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qbheat_jax import methods, pretrained, rng
from qbheat_jax.ops.images import Pixels
from qbheat_jax.pretrained import NO_ENCODER, RANDOM


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that is not trained any more, as a function.

    Attributes:
      features: Function of (variables, images uint8 [B, H, W, 3]) to a map float32 [B, h, w, C].
      variables: The encoder's.
      image_size: Pixels a side of its images.
      source: The spec of its images.
      description: Dict for results: the encoder's name and step.
      encoder: The module, None for trivial features.
      model: The `api.Model` it is of, None where there is none.
    """

    features: Callable
    variables: Any
    image_size: int
    source: str
    description: dict
    encoder: Any = None
    model: Any = None


def open_init(init, config, words=(RANDOM, *NO_ENCODER)):
    """Return the `FrozenEncoder` of --init, a directory or one of the words.

    Args:
      init: As of `pretrained.resolve`.
      config: The probe's or analysis's, which fills in what init leaves open.
      words: Which words are accepted.
    """
    found = pretrained.resolve(init, config, words)
    size, source = found.image_size, found.source
    if init in NO_ENCODER:
        features = {"pixels": pixels, "histogram": histogram}[init]
        return FrozenEncoder(lambda _, images: features(images), {}, size, source, {"encoder": init})
    if found.model is None:
        encoder = methods.build_encoder(config)
        return _encoder(encoder, Pixels(), untrained(encoder, size, config.seed), size, source, config.encoder.name)
    model = found.model.sized(size)
    name, kept = model.config.encoder.name, model.objective.pixels
    return _encoder(model.encoder, kept, model.encoder_variables, size, source, name, model)


def untrained(encoder, image_size, seed):
    """Return the initial variables of an encoder, drawn by the seed."""
    return jax.jit(encoder.init)(rng.fold(rng.root(seed), "random"), jnp.zeros((1, image_size, image_size, 3)))


def _encoder(encoder, pixels, variables, image_size, source, name, model=None):
    def features(variables, images):
        return encoder.apply(variables, pixels.normalise(images))[0].astype(jnp.float32)

    about = {"encoder": name, "step": None if model is None else model.step}
    return FrozenEncoder(features, variables, image_size, source, about, encoder, model)


def pixels(images):
    """Return raw pixels averaged down to 16 x 16: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 768]."""
    small = jax.image.resize(images.astype(jnp.float32) / 255.0, (images.shape[0], 16, 16, 3), "linear")
    return small.reshape(images.shape[0], 1, 1, -1)


def histogram(images):
    """Return the joint colour histogram, 4 bins a channel: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 64], summing to 1."""
    bins = (images // 64).astype(jnp.int32) @ jnp.array([16, 4, 1])
    return jax.nn.one_hot(bins, 64).mean((1, 2), dtype=jnp.float32)[:, None, None, :]
