"""QB-Heat (arXiv 2211.13228): encode a quarter, extrapolate its features by the heat equation, decode the other pixels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.config import Field, at_least, refuse
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common import decoding, targets
from qbheat_jax.methods.common.encoding import collections, encode, pooled, spread_of
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.ops import heat, poisson, quarters
from qbheat_jax.ops import images as images_lib


def crop_visible(images, quarter):
    """Return the visible quarter of every image: images [B, ..., H, W, C], quarter int32 [B] -> [B, ..., H/2, W/2, C].

    All frames of a clip have the same quarter. Every image selects one of the few static slices. A dynamic slice an image would
    be a loop over images on a TPU.
    """
    for axis in (0, 1):
        place = images.ndim - 3 + axis
        length = images.shape[place]
        starts, which = np.unique(quarters.starts(length, axis), return_inverse=True)
        slices = [jax.lax.slice_in_dim(images, s, s + length // 2, axis=place) for s in starts]
        own = jnp.asarray(which)[quarter].reshape(-1, *[1] * (images.ndim - 1))
        images = slices[0]
        for n, other in enumerate(slices[1:], 1):
            images = jnp.where(own == n, other, images)
    return images


def _check_grid(config, encoder, placements):
    cells = config.image_size // encoder.stride
    try:
        quarters.check_grid(cells, cells, placements)
    except UserError as error:
        raise UserError(f"config field image_size={config.image_size} with stride {encoder.stride}: {error}") from error


def _interpolated(patches, size):
    """Return pixels [B, H, W, C] of patches [B, h, w, size * size * C], mean colours interpolated between the cells."""
    batch, height, width, numbers = patches.shape
    channels = numbers // size**2
    cells = patches.reshape(batch, height, width, size * size, channels)
    means = cells.mean(3)
    within = images_lib.from_patches((cells - means[..., None, :]).reshape(patches.shape), size)
    return within + jax.image.resize(means, (batch, height * size, width * size, channels), "linear")


@dataclasses.dataclass(frozen=True)
class QBHeat(base.Method):
    """Quarter-block prediction by the heat equation.

    Args:
      encoder: Module of `models.registry`; it sees the visible quarter alone.
      decoder: HeatDecoder, which extrapolates the features and predicts every cell.
      target: What each cell predicts.
      loss_on: Cells that count, "masked" or "all".
      pixels: How images are normalised.
    """

    encoder: Any
    decoder: HeatDecoder
    target: Target
    loss_on: str = "masked"
    pixels: images_lib.Pixels = images_lib.Pixels()

    NAME = "qbheat"
    TITLE = "QB-Heat"
    takes_clips = True
    STORY = (
        "The encoder sees one quarter of each image. Linear maps, which are the same at every position, "
        "extrapolate its features into the hidden quarters. A small decoder predicts the pixels. No labels are used."
    )
    FIELDS = {
        **decoding.FIELDS,
        "heat.propagator": Field(
            "offset",
            "the map over a distance (offset is the paper's); autoregressive: cell by cell, FINOLA with heat.norm=layer; "
            "cosine: heat conduction in the block, mirrored",
            heat.PROPAGATORS,
        ),
        "heat.directions": Field(
            "untied",
            "untied: one matrix a direction; tied: a step back is the inverse of a step ahead",
            heat.DIRECTIONS,
        ),
        "heat.norm": Field("none", "layer norm before each product (none is QB-Heat, layer is FINOLA)", heat.NORMS),
        "heat.init_scale": Field(0.0, "standard deviation of A and B at the start, times sqrt(width)", at_least(0)),
        "quarter.placements": Field(
            "corners_center",
            "placements of the visible quarter, drawn uniformly (our choice)",
            tuple(quarters.PLACEMENT_SETS),
        ),
        **targets.FIELDS,
    }

    reconstructs = "quarters"

    @classmethod
    def check(cls, values):
        decoding.check(values)
        if values["heat.propagator"] == "autoregressive" and values["heat.directions"] == "tied":
            refuse("heat.directions", "tied", "untied with heat.propagator='autoregressive', whose step has no inverse")
        for name, default in heat.Heat(values["heat.propagator"]).fixed.items():
            if values[f"heat.{name}"] != default:
                words = f"{default!r} with heat.propagator={values['heat.propagator']!r}, which has no A and B"
                refuse(f"heat.{name}", values[f"heat.{name}"], words)

    @classmethod
    def build(cls, config, encoder, schedule):
        placements = quarters.PLACEMENT_SETS[config.quarter.placements]
        _check_grid(config, encoder, placements)
        target = targets.build(config, encoder)
        decoder = HeatDecoder(
            outputs=sum(target.widths.values()),
            heat=heat.Heat(**config.heat.to_dict()),
            placements=placements,
            **decoding.options(config),
        )
        return cls(encoder, decoder, target, config.loss_on, images_lib.PIXELS[config.pixels])

    @classmethod
    def batch_spec(cls, config):
        return base.crop_spec(config, placements=quarters.PLACEMENT_SETS[config.quarter.placements])

    def init(self, rng, batch):
        """Return {"params": {"encoder", "decoder"}, "batch_stats": {"encoder"}}."""
        visible = crop_visible(self.pixels.normalise(batch["image"][:1]), batch["quarter"][:1])
        encoder_rng, decoder_rng = jax.random.split(rng)
        encoder = self.encoder.init(encoder_rng, visible)
        features, _ = self.encoder.apply(encoder, visible)
        decoder = self.decoder.init(decoder_rng, features, batch["quarter"][:1])
        return collections({"encoder": encoder, "decoder": decoder})

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean `Target.error` over the cells that count, (state, {"variance", and those of `encoding.spread_of`})).

        batch: image uint8 [B, H, W, 3] or clips, quarter int32 [B], mask bool [B]. `variance` is the loss of the trivial
        predictor, which predicts the mean target of the batch.
        """
        images = self.pixels.normalise(batch["image"])
        predicted, out, state = self._forward(params, state, images, batch["quarter"], rng, train)
        target = self.target(self.encoder.picture(images))
        cells = jnp.ones(target.shape[:3], bool)
        if self.loss_on == "masked":
            cells = jnp.asarray(quarters.masked(*target.shape[1:3]))[batch["quarter"]]
        weight = (cells & batch["mask"][:, None, None]).astype(jnp.float32)
        weight = weight / jnp.maximum(weight.sum(), 1.0)
        loss = (self.target.error(predicted, target) * weight).sum()
        mean = (target * weight[..., None]).sum((0, 1, 2))
        variance = (self.target.error(mean, target) * weight).sum()
        return loss, (state, {"variance": variance, **spread_of(out["pooled"], batch, train)})

    def operator(self, params):
        return (params["decoder"]["heat"], self.decoder.heat) if self.decoder.heat.names else None

    def reconstruct(self, variables, images, quarter, blend=True):
        """Return images uint8 [B, H, W, 3] with the masked quarters predicted and the visible one kept.

        Of clips it returns the encoder's `picture`, uint8 [B, H, W, 6].
        Normalised patches carry no slope between cells, so their mean colours are interpolated between the cells' centres.

        Args:
          variables: {"params", "batch_stats"}.
          images: uint8 [B, H, W, 3] or clips.
          quarter: int32 [B], the visible quarter.
          blend: Shift predictions to meet the visible pixels (`poisson.blend`); otherwise they are the decoder's.
        """
        size, pixels = self.encoder.stride, self.pixels.normalise(images)
        predicted, _, _ = self._forward(variables["params"], variables["batch_stats"], pixels, quarter)
        pixels, images = self.encoder.picture(pixels), self.encoder.picture(images)
        patches = self.target.pixels(predicted, crop_visible(pixels, quarter))
        hidden = jnp.asarray(quarters.masked(*patches.shape[1:3]))[quarter][..., None]
        if self.target.norm_pix:
            patches = jnp.where(hidden, patches, images_lib.to_patches(pixels, size))
            predicted = _interpolated(patches, size)
        else:
            predicted = images_lib.from_patches(patches, size)
        hidden = jnp.repeat(jnp.repeat(hidden, size, 1), size, 2)
        # A condition in the program, so that both choices share one compilation.
        predicted = jax.lax.cond(
            blend, poisson.blend, lambda predicted, *_: predicted, predicted, pixels, ~hidden[..., 0]
        )
        coloured = self.pixels.unnormalise(predicted.reshape(*predicted.shape[:3], -1, 3)).reshape(predicted.shape)
        return jnp.where(hidden, coloured, images)

    def continued(self, variables, images, quarter):
        """Return the extrapolated feature grid float32 [B, h, w, C] of images uint8 [B, H, W, 3]."""
        pixels = self.pixels.normalise(images)
        return self._forward(variables["params"], variables["batch_stats"], pixels, quarter)[1]["grid"]

    def _forward(self, params, state, images, quarter, rng=None, train=False):
        """Return (predicted cells [B, h, w, ...], out, state).

        out: `grid` [B, h, w, C], the extrapolated features; `pooled` float32 [B, C], those of the visible quarter.
        """
        features, out, state = encode(self.encoder, params, state, crop_visible(images, quarter), rng, train)
        predicted, decoded = self.decoder.apply({"params": params["decoder"]}, features, quarter)
        return predicted, {"grid": decoded["grid"], "pooled": pooled(features, out)}, state
