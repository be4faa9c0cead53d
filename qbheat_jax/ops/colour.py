"""Random colours and blur on the device: pure functions of images, strengths and a key.

Images are float32 [B, H, W, 3] on the 0..1 scale and stay there; every other argument is one number an image, [B], so
that each has its own. What an operation does is what torchvision and Pillow do, without their rounding to 8 bits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's and torchvision's


def grey(images):
    """The brightness of every pixel, [B, H, W, 1]."""
    return (images * jnp.asarray(LUMA)).sum(-1, keepdims=True)


def brightness(images, factor):
    """Every value times `factor`: 0 is black."""
    return _blend(images, 0.0, factor)


def contrast(images, factor):
    """Distances from the image's mean brightness times `factor`: 0 is one grey."""
    return _blend(images, grey(images).mean((1, 2), keepdims=True), factor)


def saturation(images, factor):
    """Distances from each pixel's brightness times `factor`: 0 is a grey image."""
    return _blend(images, grey(images), factor)


def hue(images, shift):
    """Every hue turned by `shift` of the colour circle; saturation and value (of HSV) stay."""
    value = images.max(-1, keepdims=True)
    spread = value - images.min(-1, keepdims=True)
    red, green, blue = jnp.split(images, 3, -1)
    # The hue in sixths of the circle: from which of the three the largest is, and where between its neighbours.
    sixths = jnp.where(
        value == red, green - blue, jnp.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    sixths = sixths / jnp.where(spread > 0, spread, 1.0) + 6 * _each(shift)
    # Back, by one formula a channel: how far the hue is from where the channel is full.
    k = (sixths + jnp.asarray((5.0, 3.0, 1.0))) % 6
    return value - spread * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def blur(images, sigma, largest):
    """Gaussian blur with a standard deviation of `sigma` pixels, at most `largest`; the border pixels go on outside.

    The kernel is cut at three times `largest`, and its weights are scaled to sum to 1.
    """
    reach = math.ceil(3 * largest)
    offsets = jnp.arange(-reach, reach + 1)
    weights = jax.nn.softmax(-0.5 * jnp.square(offsets / jnp.maximum(sigma, 1e-3)[:, None]), -1)
    for axis in (1, 2):
        size = images.shape[axis]
        padded = jnp.pad(images, [(reach, reach) if a == axis else (0, 0) for a in range(4)], mode="edge")
        images = sum(
            jax.lax.slice_in_dim(padded, n, n + size, axis=axis) * _each(weights[:, n]) for n in range(len(offsets))
        )
    return images


@dataclasses.dataclass(frozen=True)
class Jitter:
    """torchvision's ColorJitter: the four operations in a random order, each by a random amount, one draw an image.

    The factors of the first three are uniform in [max(0, 1 - x), 1 + x], the shift of the hue in [-hue, hue].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images, rng):
        """-> images, changed."""
        count, (order_rng, amount_rng) = images.shape[0], jax.random.split(rng)
        order = jnp.argsort(jax.random.uniform(order_rng, (count, 4)), -1)
        draws = jax.random.uniform(amount_rng, (count, 4))
        strengths = (self.brightness, self.contrast, self.saturation)
        low = jnp.asarray([*(max(0.0, 1 - s) for s in strengths), -self.hue])
        high = jnp.asarray([*(1 + s for s in strengths), self.hue])
        amounts = low + (high - low) * draws
        return jax.lax.fori_loop(0, 4, lambda turn, x: self._apply(x, order[:, turn], amounts), images)

    def _apply(self, images, which, amounts):
        """The operation `which` int[B] of every image. Three of them are one blend with different things."""
        pixel = grey(images)
        mean = pixel.mean((1, 2), keepdims=True)
        base = jnp.where(_each(which) == 0, 0.0, jnp.where(_each(which) == 1, mean, pixel))
        factor = jnp.take_along_axis(amounts, which[:, None], 1)[:, 0]
        blended = _blend(images, base, factor)
        turned = hue(images, amounts[:, 3]) if self.hue else images
        return jnp.where(_each(which) == 3, turned, blended)


def sometimes(change, images, rng, probability):
    """`change(images, rng)` for each image with that probability, by its own draw; the others as they were."""
    coin, rng = jax.random.split(rng)
    chosen = jax.random.uniform(coin, images.shape[:1]) < probability
    return jnp.where(_each(chosen), change(images, rng), images)


def _blend(images, base, factor):
    return jnp.clip(base + (images - base) * _each(factor), 0.0, 1.0)


def _each(numbers):
    """[B] -> [B, 1, 1, 1]."""
    return numbers[:, None, None, None]
