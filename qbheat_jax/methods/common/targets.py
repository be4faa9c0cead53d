"""Prediction targets of a cell: its pixels, their mean and deviation, the histogram of its edges; config fields."""

import dataclasses

import jax.numpy as jnp

from qbheat_jax.config import Field, at_least
from qbheat_jax.ops import images as images_lib

BINS = 9
FIELDS = {
    "norm_pix": Field(False, "predict pixels normalised within each patch (our choice)"),
    "norm_pix_statistics": Field(
        1.0,
        "with norm_pix, weight of predicting each patch's mean and deviation too; 0: not (our choice)",
        at_least(0),
    ),
    "hog": Field(
        0.0,
        "weight of predicting each patch's histogram of oriented gradients too, MaskFeat's target; 0: not (our choice)",
        at_least(0),
    ),
    "loss_on": Field("masked", "cells in the loss (masked in the paper, MAE and SimMIM)", ("masked", "all")),
}


def statistics(patches):
    """Return (mean, standard deviation) of each patch, as in MAE's norm_pix: [..., P] -> two arrays [..., 1]."""
    return patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)


def oriented_gradients(images, size):
    """Return histograms of oriented gradients (HOG), MaskFeat's target (arXiv 2112.09133).

    Each pixel and channel votes by the length of its gradient for the two bins next to the gradient's direction, modulo 180
    degrees. The votes of a patch are scaled to unit length, channel by channel. A histogram describes texture that can be
    predicted from afar where its pixels cannot.

    Args:
      images: float [B, H, W, C].
      size: Pixels a side of a patch.

    Returns:
      [B, H / size, W / size, C * BINS].
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dy, dx = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1], padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    # Direction in bins, from 0 to BINS; BINS is 180 degrees on, the first bin again.
    place = jnp.arctan(dy / jnp.where(dx == 0.0, 1e-20, dx)) * (BINS / jnp.pi)
    place, length = jnp.where(place < 0.0, place + BINS, place), jnp.sqrt(dx**2 + dy**2)
    batch, height, width, channels = images.shape

    def within_patches(x):  # rows first: twice as fast on a CPU as both axes at once
        rows = x.reshape(batch, height // size, size, -1).sum(2)
        return rows.reshape(batch, height // size, width // size, size, channels).sum(3)

    first, *sums, last = (within_patches(length * jnp.maximum(1.0 - jnp.abs(place - k), 0.0)) for k in range(BINS + 1))
    sums = jnp.stack([first + last, *sums], -1)
    sums = sums / jnp.sqrt((sums**2).sum(-1, keepdims=True) + 1e-6)
    return sums.reshape(*sums.shape[:3], channels * BINS)


def build(config, encoder):
    """Return the `Target` of a config, in cells of the encoder's stride."""
    return Target(encoder.stride, config.norm_pix, config.norm_pix_statistics, config.hog, encoder.picture_channels)


@dataclasses.dataclass(frozen=True)
class Target:
    """Target of each cell, and the error of a prediction.

    Args:
      size: Pixels a side of a cell.
      norm_pix: Normalise pixels within their patch.
      statistics: With norm_pix, weight of predicting each patch's mean and deviation; 0: do not.
      hog: Weight of predicting each patch's `oriented_gradients`; 0: do not.
      channels: Of the images.
    """

    size: int
    norm_pix: bool = False
    statistics: float = 0.0
    hog: float = 0.0
    channels: int = 3

    @property
    def widths(self):
        """Return {"pixels", "statistics", "hog"}: numbers that a cell predicts of each."""
        return {
            "pixels": self.size**2 * self.channels,
            "statistics": 2 if self.norm_pix and self.statistics else 0,
            "hog": self.channels * BINS if self.hog else 0,
        }

    def __call__(self, images):
        """Return the targets [B, H / size, W / size, sum of the widths] of normalised images float32 [B, H, W, C]."""
        pixels = images_lib.to_patches(images, self.size)
        parts = [pixels]
        if self.norm_pix:
            mean, std = statistics(pixels)
            parts = [(pixels - mean) / std]
            if self.widths["statistics"]:
                parts += [mean, std]
        if self.hog:
            parts.append(oriented_gradients(images, self.size))
        return jnp.concatenate(parts, -1)

    def error(self, predicted, target):
        """Return the squared error [B, h, w]: means over pixels and statistics, sums over histograms."""
        pixels, stats, hog = self._split(jnp.square(predicted - target))
        error = pixels.mean(-1)
        if self.widths["statistics"]:
            error = error + self.statistics * stats.mean(-1)
        return error + self.hog * hog.sum(-1) / self.channels if self.hog else error

    def pixels(self, predicted, visible):
        """Return patches of pixels [B, h, w, size * size * C] from predicted cells.

        Normalised patches get the predicted mean and deviation, else those of the `visible` pixels [B, H, W, C]; never those
        of the target.
        """
        patches, stats, _ = self._split(predicted)
        if not self.norm_pix:
            return patches
        if self.widths["statistics"]:
            return patches * jnp.maximum(stats[..., 1:], 0.0) + stats[..., :1]
        mean, std = (s[:, None, None] for s in statistics(visible.reshape(visible.shape[0], -1)))
        return patches * std + mean

    def _split(self, cells):
        """Split [..., sum of the widths] into (pixels, statistics, histograms)."""
        pixels, stats, _ = self.widths.values()
        return jnp.split(cells, [pixels, pixels + stats], -1)
