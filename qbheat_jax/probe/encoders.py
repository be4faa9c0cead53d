"""What a probe looks at: the encoder of a run, the same encoder untrained, or features that nothing was learnt for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qbheat_jax import api, methods, rng
from qbheat_jax.errors import UserError
from qbheat_jax.ops.images import Pixels

NO_ENCODER = ("pixels", "histogram")


@dataclasses.dataclass(frozen=True)
class FrozenEncoder:
    """`features(variables, images uint8 [B, H, W, 3]) -> float32 [B, h, w, C]`, of images of `image_size` pixels a side.

    encoder: the module; model: the `api.Model` that it is of. Both None where there is none.
    """

    features: Callable
    variables: Any
    image_size: int
    source: str
    description: dict
    encoder: Any = None
    model: Any = None


def open_init(init, config):
    """--init DIR | random | pixels | histogram -> Frozen. The probe config fills in what the init leaves open."""
    if init in NO_ENCODER or init == "random":
        if not config.data.source or not config.image_size:
            raise UserError(
                f"--init {init} brings no images: config fields data.source={config.data.source!r} and "
                f"image_size={config.image_size} must both be set"
            )
        if init in NO_ENCODER:
            features = {"pixels": pixels, "histogram": histogram}[init]
            return FrozenEncoder(
                lambda _, images: features(images), {}, config.image_size, config.data.source, {"encoder": init}
            )
        if not config.encoder.name:
            raise UserError("--init random: config field encoder.name is empty; it takes a name of models.registry")
        encoder = methods.build_encoder(config)
        _check_size(encoder, config.image_size, config.encoder.name)
        variables = untrained(encoder, config.image_size, config.seed)
        return _encoder(encoder, Pixels(), variables, config.image_size, config.data.source, config.encoder.name)
    trained = api.read_config(init)
    size = config.image_size or trained.image_size
    source = config.data.source or trained.get("data", {}).get("source")
    if not source:
        raise UserError(f"--init {init} brings no images: config field data.source={config.data.source!r} must be set")
    _check_size(methods.build_encoder(trained), size, trained.encoder.name)
    model = api.load(init).sized(size)
    name, kept = trained.encoder.name, model.objective.pixels
    return _encoder(model.encoder, kept, model.encoder_variables, size, source, name, model)


def untrained(encoder, image_size, seed):
    """The variables that an encoder begins with, drawn by the seed."""
    return jax.jit(encoder.init)(rng.fold(rng.root(seed), "random"), jnp.zeros((1, image_size, image_size, 3)))


def _encoder(encoder, pixels, variables, image_size, source, name, model=None):
    def features(variables, images):
        return encoder.apply(variables, pixels.normalise(images))[0].astype(jnp.float32)

    about = {"encoder": name, "step": None if model is None else model.step}
    return FrozenEncoder(features, variables, image_size, source, about, encoder, model)


def _check_size(encoder, image_size, name):
    if image_size % encoder.stride:
        raise UserError(
            f"config field image_size={image_size} is not accepted: {name} takes a multiple of {encoder.stride}"
        )


def pixels(images):
    """Raw pixels averaged down to 16 x 16: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 768]."""
    small = jax.image.resize(images.astype(jnp.float32) / 255.0, (images.shape[0], 16, 16, 3), "linear")
    return small.reshape(images.shape[0], 1, 1, -1)


def histogram(images):
    """Joint colour histogram, 4 bins a channel: uint8 [B, H, W, 3] -> float32 [B, 1, 1, 64], shares that sum to 1."""
    bins = (images // 64).astype(jnp.int32) @ jnp.array([16, 4, 1])
    return jax.nn.one_hot(bins, 64).mean((1, 2), dtype=jnp.float32)[:, None, None, :]
