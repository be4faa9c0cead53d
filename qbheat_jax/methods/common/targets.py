"""What a cell is asked for: its pixels and, where wanted, its mean and deviation and the directions of its edges."""

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
    "loss_on": Field("masked", "cells that count (masked is the paper's, and MAE's and SimMIM's)", ("masked", "all")),
}


def statistics(patches):
    """Mean and standard deviation of each patch over all its values, as MAE's norm_pix: [..., P] -> two [..., 1]."""
    return patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)


def oriented_gradients(images, size):
    """Histograms of oriented gradients (HOG), MaskFeat's target (arXiv 2112.09133): which way the edges of a patch run.

    images float [B, H, W, C] -> [B, H / size, W / size, C * BINS]. The gradient of each pixel and channel votes by its
    length for the two bins next to its direction (of 180 degrees: a dark edge counts as a bright one), and the votes
    of a patch are scaled to unit length, channel by channel. Texture that goes on can be told from afar by its
    histogram, and not by its pixels.
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dy, dx = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1], padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    # The direction in bins, from 0 to BINS, which is the first bin again: 180 degrees on.
    place = jnp.arctan(dy / jnp.where(dx == 0.0, 1e-20, dx)) * (BINS / jnp.pi)
    place, length = jnp.where(place < 0.0, place + BINS, place), jnp.sqrt(dx**2 + dy**2)
    batch, height, width, channels = images.shape

    def within_patches(x):  # rows first: on a CPU that is twice as fast as both axes at once
        rows = x.reshape(batch, height // size, size, -1).sum(2)
        return rows.reshape(batch, height // size, width // size, size, channels).sum(3)

    first, *sums, last = (within_patches(length * jnp.maximum(1.0 - jnp.abs(place - k), 0.0)) for k in range(BINS + 1))
    sums = jnp.stack([first + last, *sums], -1)
    sums = sums / jnp.sqrt((sums**2).sum(-1, keepdims=True) + 1e-6)
    return sums.reshape(*sums.shape[:3], channels * BINS)


def build(config, encoder):
    """Return the `Target` of a config, in cells of the encoder's stride."""
    return Target(encoder.stride, config.norm_pix, config.norm_pix_statistics, config.hog)


def error_text(config, error="mean squared error"):
    """Return a few words on an error and the cells that it is taken over."""
    return f"{error} on hidden cells" if config.loss_on == "masked" else error


def text(config, pictures=""):
    """Return sentences on what is predicted beside plain pixels; "" for nothing.

    pictures: words on what is shown of the predictions where their statistics are predicted too.
    """
    sentences = []
    if config.norm_pix and config.norm_pix_statistics > 0:
        sentences.append(
            f"The targets were each patch's normalised pixels and, beside them, their mean and deviation{pictures}."
        )
    elif config.norm_pix:
        sentences.append("The targets were normalised within each patch.")
    if config.hog > 0:
        sentences.append(
            f"Which way the edges of each patch run (a histogram) was asked for too, with a weight of {config.hog:g}."
        )
    return " ".join(sentences)


@dataclasses.dataclass(frozen=True)
class Target:
    """What each cell of `size` x `size` pixels is to predict, and how wrong a prediction is.

    `norm_pix`: pixels normalised within their patch. `statistics`: with norm_pix, the weight of predicting each patch's
    mean and deviation too, which its normalised pixels leave out; 0: not. `hog`: the weight of predicting its
    histogram of oriented gradients; 0: not.
    """

    size: int
    norm_pix: bool = False
    statistics: float = 0.0
    hog: float = 0.0

    @property
    def widths(self):
        """{"pixels", "statistics", "hog"}: how many numbers a cell predicts of each, 0 where it does not."""
        return {
            "pixels": self.size**2 * 3,
            "statistics": 2 if self.norm_pix and self.statistics else 0,
            "hog": 3 * BINS if self.hog else 0,
        }

    def __call__(self, images):
        """Normalised images float32 [B, H, W, 3] -> [B, H / size, W / size, sum of the widths]."""
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
        """Squared error [B, h, w]: the mean over pixels, over the two statistics, and of a channel's whole histogram."""
        pixels, stats, hog = self._split(jnp.square(predicted - target))
        error = pixels.mean(-1)
        if self.widths["statistics"]:
            error = error + self.statistics * stats.mean(-1)
        return error + self.hog * hog.sum(-1) / 3 if self.hog else error

    def pixels(self, predicted, visible):
        """Predicted cells -> patches of pixels [B, h, w, size * size * 3].

        Normalised ones get the mean and deviation that were predicted for them, or those of the `visible` pixels
        [B, H, W, 3], never the target's own.
        """
        patches, stats, _ = self._split(predicted)
        if not self.norm_pix:
            return patches
        if self.widths["statistics"]:
            return patches * jnp.maximum(stats[..., 1:], 0.0) + stats[..., :1]
        mean, std = (s[:, None, None] for s in statistics(visible.reshape(visible.shape[0], -1)))
        return patches * std + mean

    def _split(self, cells):
        """[..., sum of the widths] -> (pixels, statistics, histograms)."""
        pixels, stats, _ = self.widths.values()
        return jnp.split(cells, [pixels, pixels + stats], -1)
