"""Mixup and cutmix: train on pairs of images of one batch, and on the weighted targets of both."""

import dataclasses

import jax
import jax.numpy as jnp

from qbheat_jax.config import Field, at_least

MIXUP = Field(0.0, "alpha of mixup, images averaged in pairs; 0: none", at_least(0))
CUTMIX = Field(0.0, "alpha of cutmix, a box of one image put into another; 0: none", at_least(0))


def mixup(images, targets, key, alpha):
    """Return weighted means of images and targets in pairs (Zhang et al., arXiv 1710.09412).

    images [B, ..., H, W, C], targets [B, classes] -> the same shapes. One weight a batch, from Beta(alpha, alpha); image i is
    paired with image B - 1 - i.
    """
    weight = jax.random.beta(key, alpha, alpha)

    def mix(x):
        return weight * x + (1.0 - weight) * x[::-1]

    return mix(images), mix(targets)


def cutmix(images, targets, key, alpha):
    """Return images with a box pasted from their partner (Yun et al., arXiv 1905.04899); shapes and pairs as in `mixup`.

    One box a batch, with the image's aspect, a fraction 1 - w of its area with w from Beta(alpha, alpha), and any centre.
    All frames of a clip have the same box. Targets are weighted by the area of the box within the image.
    """
    height, width = images.shape[-3:-1]
    weight_key, *centres = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(weight_key, alpha, alpha))

    def inside(n, key):
        return jnp.abs(jnp.arange(n) + 0.5 - n * jax.random.uniform(key)) < side * n / 2

    box = inside(height, centres[0])[:, None] & inside(width, centres[1])
    weight = 1.0 - box.mean()
    images = jnp.where(box[..., None], images[::-1], images)
    return images, weight * targets + (1.0 - weight) * targets[::-1]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Mix every batch by one of the two: by the one whose alpha is above 0, or by a coin where both are.

    That is timm's mode `batch` with probability 1 and a switch probability of one half. It is false where both are 0.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __bool__(self):
        return bool(self.mixup or self.cutmix)

    def __call__(self, images, targets, key, which):
        """Return mixed images [B, ..., H, W, C] and targets [B, classes]. which: key of the coin."""
        if not self.cutmix:
            return mixup(images, targets, key, self.mixup)
        if not self.mixup:
            return cutmix(images, targets, key, self.cutmix)
        return jax.lax.cond(
            jax.random.bernoulli(which),
            lambda: mixup(images, targets, key, self.mixup),
            lambda: cutmix(images, targets, key, self.cutmix),
        )
