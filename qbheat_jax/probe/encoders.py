"""Frozen encoders for probes and analyses: of a run, untrained, or trivial features without an encoder."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qbheat_jax import methods, pretrained, rng
from qbheat_jax.data.specs.clips import ClipsSpec
from qbheat_jax.data.specs.image import ImageSpec
from qbheat_jax.data.specs.masks import MasksSpec
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.ops.images import Pixels
from qbheat_jax.pretrained import NO_ENCODER, RANDOM
from qbheat_jax.probe.fields import SEGMENTS

# Pixels a side of the cells of trivial features, for segmentation.
CELL = 16


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """An encoder that is not trained any more, as a function.

    Attributes:
      features: Function of (variables, images uint8 [B, H, W, 3] or clips) to a map float32 [B, h, w, C].
      variables: The encoder's.
      spec: The data spec of what it encodes, as evaluated.
      source: The spec string of its images.
      description: Dict for results: the encoder's name and step, and the frames of its clips.
      encoder: The module, None for trivial features.
      model: The `api.Model` it is of, None where there is none.
    """

    features: Callable
    variables: Any
    spec: ImageSpec
    source: str
    description: dict
    encoder: Any = None
    model: Any = None

    @property
    def image_size(self):
        """Pixels a side of its images."""
        return self.spec.image_size


def open_init(init, config, words=(RANDOM, *NO_ENCODER)):
    """Return the `FrozenEncoder` of --init, a directory or one of the words.

    Args:
      init: As of `pretrained.resolve`.
      config: The probe's or analysis's, which fills in what init leaves open.
      words: Which words are accepted.
    """
    found = pretrained.resolve(init, config, words)
    size, source = found.image_size, found.source
    model = None if found.model is None else found.model.sized(size)
    spec = evaluation_spec(config if model is None else model.config, size, config.seed)
    segments = config.get("protocol") in SEGMENTS
    if segments:
        spec = _masks(init, spec)
    if init in NO_ENCODER:
        each = _by_cell if segments else _by_frame
        features = functools.partial(each, {"pixels": pixels, "histogram": histogram}[init])
        return FrozenEncoder(features, {}, spec, source, {"encoder": init})
    if model is None:
        encoder = methods.build_encoder(config)
        return _encoder(encoder, Pixels(), untrained(encoder, size, config.seed), spec, source, config.encoder.name)
    name, kept = model.config.encoder.name, model.objective.pixels
    return _encoder(model.encoder, kept, model.encoder_variables, spec, source, name, model)


def evaluation_spec(config, image_size, seed=0):
    """Return the data spec of the examples that a config's encoder is evaluated on; images where it names no encoder."""
    if not (config.encoder.name and registry.takes_clips(config.encoder.name)):
        return ImageSpec(image_size, seed)
    return ClipsSpec(image_size, seed, frames=config.get("data", {}).get("frames", ClipsSpec.frames))


def _masks(init, spec):
    """Return the data spec of images with masks of a spec's size. Raise UserError where it cannot be."""
    if isinstance(spec, ClipsSpec):
        raise UserError(f"--init {init} has an encoder of clips, and segmentation takes images")
    if init in NO_ENCODER and spec.image_size % CELL:
        raise UserError(
            f"config field image_size={spec.image_size} is not accepted: --init {init} takes a multiple of {CELL}"
        )
    return MasksSpec(spec.image_size, spec.seed)


def untrained(encoder, image_size, seed):
    """Return the initial variables of an encoder, drawn by the seed."""
    example = jnp.zeros((1, *encoder.example_shape(image_size)))
    return jax.jit(encoder.init)(rng.fold(rng.root(seed), "random"), example)


def _encoder(encoder, pixels, variables, spec, source, name, model=None):
    def features(variables, images):
        return encoder.apply(variables, pixels.normalise(images))[0].astype(jnp.float32)

    about = {"encoder": name, "step": None if model is None else model.step}
    if encoder.takes_clips:
        about["frames"] = spec.frames
    return FrozenEncoder(features, variables, spec, source, about, encoder, model)


def _by_frame(features, _, images):
    """Return trivial features float32 [B, 1, 1, C]; those of all frames of a clip, one after the other."""
    found = features(images.reshape(-1, *images.shape[-3:]))
    return found.reshape(images.shape[0], 1, 1, -1)


def _by_cell(features, _, images):
    """Return trivial features float32 [B, H / CELL, W / CELL, C], those of every cell by itself."""
    count, height, width = len(images), images.shape[1] // CELL, images.shape[2] // CELL
    cells = images.reshape(count, height, CELL, width, CELL, 3).swapaxes(2, 3)
    return features(cells.reshape(-1, CELL, CELL, 3)).reshape(count, height, width, -1)


def pixels(images):
    """Return raw pixels averaged down to 16 x 16: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 768]."""
    small = jax.image.resize(images.astype(jnp.float32) / 255.0, (images.shape[0], 16, 16, 3), "linear")
    return small.reshape(images.shape[0], 1, 1, -1)


def histogram(images):
    """Return the joint colour histogram, 4 bins a channel: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 64], summing to 1."""
    bins = (images // 64).astype(jnp.int32) @ jnp.array([16, 4, 1])
    return jax.nn.one_hot(bins, 64).mean((1, 2), dtype=jnp.float32)[:, None, None, :]
