"""A model as one file of StableHLO: weights and normalisation inside, any batch size, without this package."""

import jax
import jax.numpy as jnp
from jax import export

PLATFORMS = ("cpu", "cuda", "tpu")


def serialise(model):
    """api.Model -> bytes of `jax.export`: uint8 [batch, H, W, 3] -> logits float32 [batch, classes].

    Without a classifier: the feature map float32 [batch, H / stride, W / stride, C]. H = W = the config's image_size; the
    batch size is symbolic. `jax.export.deserialize(bytearray(data)).call(images)` runs it on any of PLATFORMS.
    """
    objective, side = model.objective, model.config.image_size
    variables = jax.tree.map(jnp.asarray, model.variables)

    def call(images):
        pixels = objective.pixels.normalise(images)
        if getattr(objective, "head", None) is not None:
            return objective.logits(variables, pixels)
        return objective.encoder.apply(model.encoder_variables, pixels)[0].astype(jnp.float32)

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
    return bytes(export.export(jax.jit(call), platforms=PLATFORMS)(images).serialize())
