"""Joint embedding: one encoder and one projector for all crops, and a loss of the projections of a whole batch."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.config import refuse
from qbheat_jax.data.specs.views import ViewsSpec
from qbheat_jax.methods import base
from qbheat_jax.methods.common import encoding, views
from qbheat_jax.models.layers import BatchNorm, Dense
from qbheat_jax.ops import images as images_lib


class Projector(nn.Module):
    """Linear layers with batch norm and ReLU between them: [B, C] -> float32 [B, widths[-1]]."""

    widths: tuple
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = x.astype(self.dtype)
        for n, width in enumerate(self.widths[:-1]):
            x = Dense(width, use_bias=False, dtype=self.dtype, name=f"fc{n + 1}")(x)
            x = jax.nn.relu(BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"bn{n + 1}")(x))
        return Dense(self.widths[-1], use_bias=False, dtype=jnp.float32, name=f"fc{len(self.widths)}")(x)


@dataclasses.dataclass(frozen=True)
class JointEmbedding(base.Method):
    """Base of methods without a teacher whose loss compares all crops of all images. A subclass defines `compare`.

    Losses are over the global batch: under `jax.jit` the projections are gathered over the mesh.

    Args:
      encoder: Module of `models.registry`.
      projector: Projector.
      colours: `Colours` of the first view, the second view and the local crops.
      pixels: How images are normalised.
    """

    encoder: Any
    projector: Projector
    colours: tuple
    pixels: images_lib.Pixels

    @classmethod
    def check(cls, values):
        if values["accumulate"] > 1:
            accepted = f"1 with objective={cls.NAME!r}, whose loss compares the images of a whole batch"
            refuse("accumulate", values["accumulate"], accepted)

    @classmethod
    def batch_spec(cls, config):
        return ViewsSpec.of(config, views=views.VIEWS)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "projector"}, "batch_stats": likewise, of the parts that have any}."""
        keys = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(keys[0], images)
        projector = self.projector.init(keys[1], encoding.pooled(*self.encoder.apply(encoder, images)))
        return encoding.collections({"encoder": encoder, "projector": projector})

    def loss(self, params, state, batch, rng, train=True):
        """Return (loss, (state, metrics)), see `compare`.

        batch: image, image2 and, if any, local crops image3, ... uint8 [B, H, W, 3], mask bool [B]. rng None draws the same
        colours every time. metrics: the method's own, and those of `encoding.spread_of` of the first view's features.
        """
        keys = jax.random.split(jax.random.key(0) if rng is None else rng, 3)
        crops = views.augmented(batch, self.colours, self.pixels, keys[0])
        features, state = views.encode(self.encoder, params, state, crops, keys[1], train)
        z, state = views.project(self.projector, params, state, features, train)
        loss, metrics = self.compare(z, batch["mask"], keys[2])
        return loss, (state, {**metrics, **encoding.spread_of(features[:, 0], batch, train)})

    def compare(self, z, mask, rng):
        """Return (loss, metrics) of projections float32 [B, V, D]; mask bool [B], the images that count."""
        raise NotImplementedError
