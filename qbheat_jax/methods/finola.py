"""FINOLA (arXiv 2305.16319): one vector an image grows into a feature map by norm + linear steps, and is decoded to pixels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qbheat_jax.config import POSITIVE, Field, at_least, refuse
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common.encoding import collections, encode, pooled, spread_of
from qbheat_jax.models.finola import FinolaDecoder
from qbheat_jax.ops import images as images_lib


@dataclasses.dataclass(frozen=True)
class Finola(base.Method):
    """Reconstruction of an image from one vector, or from the vectors of several paths.

    Args:
      encoder: Module of `models.registry`; it sees whole images.
      decoder: FinolaDecoder.
      pixels: How images are normalised.
    """

    encoder: Any
    decoder: FinolaDecoder
    pixels: images_lib.Pixels = images_lib.Pixels()

    NAME = "finola"
    TITLE = "FINOLA"
    STORY = (
        "The encoder compresses each image to one vector per path. The vector is placed at the centre of a feature map, which "
        "grows cell by cell: normalise, multiply by a matrix, add. All cells of all images share the matrices. A few "
        "convolutions decode the map to pixels. No labels are used."
    )
    FIELDS = {
        "finola.width": Field(512, "channels of the vector and the map (our choice)", POSITIVE),
        "finola.paths": Field(1, "vectors an image, whose maps are summed; the paper's is a single one", POSITIVE),
        "finola.stride": Field(
            4,
            "pixels a side of a cell of the map, a power of 2 that divides image_size; 1 is the paper's finest",
            POSITIVE,
        ),
        "finola.heads": Field(8, "heads of the attention that pools features to vectors (our choice)", POSITIVE),
        "finola.channels": Field(64, "channels of the decoder's first convolution (our choice)", POSITIVE),
        "finola.init_scale": Field(
            1.0, "standard deviation of A and B at the start, times sqrt(width) (our choice)", at_least(0)
        ),
    }

    reconstructs = "images"

    @classmethod
    def check(cls, values):
        width, heads, stride = (values[f"finola.{name}"] for name in ("width", "heads", "stride"))
        if width % heads or width % 4:
            refuse("finola.width", width, f"a multiple of 4 and of finola.heads={heads}")
        if stride & (stride - 1):
            refuse("finola.stride", stride, "a power of 2")

    @classmethod
    def build(cls, config, encoder, schedule):
        fields, size = config.finola.to_dict(), config.image_size
        if size % fields["stride"]:
            raise UserError(
                f"config field finola.stride={fields['stride']} is not accepted: it must divide image_size={size}"
            )
        decoder = FinolaDecoder((size, size), **fields, dtype=jnp.dtype(config.dtype))
        return cls(encoder, decoder, images_lib.PIXELS[config.pixels])

    def init(self, rng, batch):
        """Return {"params": {"encoder", "decoder"}, "batch_stats": {"encoder"}}."""
        keys = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(keys[0], images)
        features, _ = self.encoder.apply(encoder, images)
        decoder = self.decoder.init(keys[1], features)
        return collections({"encoder": encoder, "decoder": decoder})

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean squared error of normalised pixels, (state, metrics)).

        batch: image uint8 [B, H, W, 3], mask bool [B]. metrics: `psnr` of the reconstructions, in dB, the mean over images;
        the same of two trivial predictors, `psnr_mean` of the mean image of the batch and `psnr_colour` of each image's own
        mean colour; `variance`, the loss of the mean image; those of `encoding.spread_of`.
        """
        images = self.pixels.normalise(batch["image"])
        predicted, vectors, state = self._forward(params, state, images, rng, train)
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)

        def mean(values):
            return (values * weight).sum()

        def error(guess):
            return mean(jnp.square(guess - images).mean((1, 2, 3)))

        average = (images * weight[:, None, None, None]).sum(0)
        metrics = {
            "psnr": mean(self._psnr(predicted, images)),
            "psnr_mean": mean(self._psnr(average, images)),
            "psnr_colour": mean(self._psnr(images.mean((1, 2), keepdims=True), images)),
            "variance": error(average),
            **spread_of(vectors, batch, train),
        }
        return error(predicted), (state, metrics)

    def operator(self, params):
        return params["decoder"]["heat"], self.decoder.heat

    @property
    def cell_size(self):
        return self.decoder.stride

    def reconstruct(self, variables, images):
        """Return images uint8 [B, H, W, 3], each decoded from its own vectors."""
        pixels = self.pixels.normalise(images)
        return self.pixels.unnormalise(self._forward(variables["params"], variables["batch_stats"], pixels)[0])

    def _forward(self, params, state, images, rng=None, train=False):
        """Return (normalised pixels float32 [B, H, W, 3], pooled features float32 [B, C], state)."""
        features, out, state = encode(self.encoder, params, state, images, rng, train)
        return self.decoder.apply({"params": params["decoder"]}, features)[0], pooled(features, out), state

    def _psnr(self, predicted, images):
        """Return the peak signal-to-noise ratio in dB of normalised images, float32 [B]; see `images.psnr`."""
        mean, std = jnp.asarray(self.pixels.mean), jnp.asarray(self.pixels.std)
        return images_lib.psnr(jnp.clip(predicted * std + mean, 0.0, 1.0), images * std + mean)
