"""Export a model as StableHLO with weights and normalisation inside, which runs without this package."""

import jax
import jax.numpy as jnp
from jax import export

from qbheat_jax import methods
from qbheat_jax.data.specs.clips import ClipsSpec

PLATFORMS = ("cpu", "cuda", "tpu")


def serialise(model):
    """Return the bytes of `jax.export` of an api.Model: images uint8 [batch, S, S, 3] -> logits float32 [batch, classes].

    An encoder of clips takes uint8 [batch, 2, T, S, S, 3], T as in training.

    Without a classifier it returns the feature map float32 [batch, S / stride, S / stride, C]. S is the config's image_size;
    the batch size is symbolic. `jax.export.deserialize(bytearray(data)).call(images)` runs it on any of PLATFORMS.
    """
    side = model.config.image_size
    variables = jax.tree.map(jnp.asarray, model.variables)

    def call(images):
        return methods.forward(model.objective, variables, images)

    (batch,) = export.symbolic_shape("batch")
    frames = model.config.get("data", {}).get("frames", ClipsSpec.frames)
    images = jax.ShapeDtypeStruct((batch, *model.encoder.example_shape(side, frames)), jnp.uint8)
    return bytes(export.export(jax.jit(call), platforms=PLATFORMS)(images).serialize())
