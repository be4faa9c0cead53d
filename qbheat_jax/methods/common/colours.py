"""Colour augmentation of methods that compare views: jitter, grey, blur, solarisation, on the device."""

import dataclasses

import jax
import jax.numpy as jnp

from qbheat_jax.ops import colour


@dataclasses.dataclass(frozen=True)
class Colours:
    """MoCo-v2's augmentation after crop and flip, in its order: colour jitter, grey, blur; then BYOL's solarisation.

    Args:
      jitter, jitter_prob: Colour jitter and its probability.
      grey_prob, blur_prob, solarise_prob: Probabilities of grey, blur and solarisation.
      sigma: Range of the blur's standard deviation in pixels (0.1 to 2 for 224 x 224 images in the paper).
    """

    jitter: colour.Jitter = colour.Jitter(0.4, 0.4, 0.4, 0.1)
    jitter_prob: float = 0.8
    grey_prob: float = 0.2
    blur_prob: float = 0.5
    sigma: tuple = (0.1, 2.0)
    solarise_prob: float = 0.0

    def __call__(self, images, rng):
        """Augment float32 [B, H, W, 3] on the 0..1 scale; every image has draws of its own."""
        keys = jax.random.split(rng, 3)
        if self.jitter_prob:
            images = colour.random_apply(self.jitter, images, keys[0], self.jitter_prob)
        images = colour.random_apply(_to_grey, images, keys[1], self.grey_prob)
        if self.blur_prob:
            images = colour.random_apply(self._blur, images, keys[2], self.blur_prob)
        if self.solarise_prob:
            images = colour.random_apply(_solarised, images, jax.random.fold_in(rng, 3), self.solarise_prob)
        return images

    def _blur(self, images, rng):
        low, high = self.sigma
        return colour.blur(images, jax.random.uniform(rng, images.shape[:1], minval=low, maxval=high), high)


def _to_grey(images, rng):
    return jnp.broadcast_to(colour.grey(images), images.shape)


def _solarised(images, rng):
    return jnp.where(images < 128 / 255, images, 1.0 - images)
