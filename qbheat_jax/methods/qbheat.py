"""QB-Heat (arXiv 2211.13228): see a quarter, extrapolate its features by the heat equation, predict the other pixels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.methods.common.targets import Target
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.ops import images as images_lib
from qbheat_jax.ops import poisson, quarters


def crop_visible(images, quarter):
    """The visible quarter of every image. images [B, H, W, C], quarter int32[B] -> [B, H/2, W/2, C].

    Of the few slices that placements ask for, each image selects its own: a slice that begins elsewhere for every image
    would be a loop over them on a TPU.
    """
    for axis in (0, 1):
        length = images.shape[axis + 1]
        starts, which = np.unique(quarters.starts(length, axis), return_inverse=True)
        slices = [jax.lax.slice_in_dim(images, s, s + length // 2, axis=axis + 1) for s in starts]
        own = jnp.asarray(which)[quarter][:, None, None, None]
        images = slices[0]
        for n, other in enumerate(slices[1:], 1):
            images = jnp.where(own == n, other, images)
    return images


def _interpolated(patches, size):
    """Patches [B, h, w, size * size * 3] -> pixels [B, H, W, 3] whose mean colours run on linearly between the cells."""
    batch, height, width, _ = patches.shape
    cells = patches.reshape(batch, height, width, size * size, 3)
    means = cells.mean(3)
    within = images_lib.from_patches((cells - means[..., None, :]).reshape(patches.shape), size)
    return within + jax.image.resize(means, (batch, height * size, width * size, 3), "linear")


@dataclasses.dataclass(frozen=True)
class QBHeat:
    """The objective: what is learnt and what is minimised.

    `encoder` is any module of `models.registry`; it sees the visible crop alone. `target`: what each cell is to predict,
    as many numbers as the decoder has outputs. `loss_on`: "masked" cells or "all".
    """

    encoder: Any
    decoder: HeatDecoder
    target: Target
    loss_on: str = "masked"
    pixels: images_lib.Pixels = images_lib.Pixels()

    def init(self, rng, batch):
        """Variables {"params": {"encoder", "decoder"}, "batch_stats": {"encoder"}} for batches of this shape."""
        visible = crop_visible(self.pixels.normalise(batch["image"][:1]), batch["quarter"][:1])
        encoder_rng, decoder_rng = jax.random.split(rng)
        encoder = self.encoder.init(encoder_rng, visible)
        features, _ = self.encoder.apply(encoder, visible)
        decoder = self.decoder.init(decoder_rng, features, batch["quarter"][:1])
        params = {"encoder": encoder["params"], "decoder": decoder["params"]}
        stats = {"encoder": encoder["batch_stats"]} if "batch_stats" in encoder else {}
        return {"params": params, "batch_stats": stats}

    def loss(self, params, mutable, batch, rng, train=True):
        """Mean squared error (`Target.error`) over the cells asked for -> (float32 loss, (mutable, metrics)).

        batch: image uint8 [B, H, W, 3], quarter int32[B], mask bool[B] (False: the example does not count).
        metrics: `variance`, the same error if the mean target patch of the batch were predicted (the trivial predictor's).
        """
        images = self.pixels.normalise(batch["image"])
        predicted, _, mutable = self._forward(params, mutable, images, batch["quarter"], rng, train)
        target = self.target(images)
        cells = jnp.ones(target.shape[:3], bool)
        if self.loss_on == "masked":
            cells = jnp.asarray(quarters.masked(*target.shape[1:3]))[batch["quarter"]]
        weight = (cells & batch["mask"][:, None, None]).astype(jnp.float32)
        weight = weight / jnp.maximum(weight.sum(), 1.0)
        loss = (self.target.error(predicted, target) * weight).sum()
        mean = (target * weight[..., None]).sum((0, 1, 2))
        variance = (self.target.error(mean, target) * weight).sum()
        return loss, (mutable, {"variance": variance})

    def reconstruct(self, variables, images, quarter, blend=True):
        """Predicted images with the visible pixels put back. images uint8 [B, H, W, 3] -> uint8 [B, H, W, 3].

        Where patches were normalised, what is predicted of them has no slope from cell to cell: their mean colours are then
        interpolated between the centres of the cells, from those of the visible cells on. `blend`: what is predicted is
        raised or lowered to meet the visible pixels (`harmonic.blend`); without it, it is as the decoder left it.
        """
        size, pixels = self.encoder.stride, self.pixels.normalise(images)
        predicted, _, _ = self._forward(variables["params"], variables["batch_stats"], pixels, quarter)
        patches = self.target.pixels(predicted, crop_visible(pixels, quarter))
        hidden = jnp.asarray(quarters.masked(*patches.shape[1:3]))[quarter][..., None]
        if self.target.norm_pix:
            patches = jnp.where(hidden, patches, images_lib.to_patches(pixels, size))
            predicted = _interpolated(patches, size)
        else:
            predicted = images_lib.from_patches(patches, size)
        hidden = jnp.repeat(jnp.repeat(hidden, size, 1), size, 2)
        # Of the two only one is computed, in a program that has both.
        predicted = jax.lax.cond(
            blend, poisson.blend, lambda predicted, *_: predicted, predicted, pixels, ~hidden[..., 0]
        )
        return jnp.where(hidden, self.pixels.unnormalise(predicted), images)

    def continued(self, variables, images, quarter):
        """The visible features extrapolated over the grid. images uint8 [B, H, W, 3] -> float32 [B, h, w, C]."""
        pixels = self.pixels.normalise(images)
        return self._forward(variables["params"], variables["batch_stats"], pixels, quarter)[1]

    def _forward(self, params, mutable, images, quarter, rng=None, train=False):
        """-> (what was predicted for each cell [B, h, w, ...], the extrapolated grid [B, h, w, C], updated mutable)."""
        visible = crop_visible(images, quarter)
        variables = {"params": params["encoder"]}
        if "encoder" in mutable:
            variables["batch_stats"] = mutable["encoder"]
        if train:
            rngs = dict(zip(("dropout", "drop_path"), jax.random.split(rng)))
            (features, _), updated = self.encoder.apply(variables, visible, True, mutable=["batch_stats"], rngs=rngs)
            mutable = {"encoder": updated["batch_stats"]} if "encoder" in mutable else mutable
        else:
            features, _ = self.encoder.apply(variables, visible)
        predicted, out = self.decoder.apply({"params": params["decoder"]}, features, quarter)
        return predicted, out["grid"], mutable
