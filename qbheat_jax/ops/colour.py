"""Random colour operations and blur on the device: pure functions of images, strengths and a key.

Images are float32 [B, H, W, 3] in 0..1, and results stay in that range. Every other argument is [B], one value per image.
The operations match those of torchvision and Pillow, without rounding to 8 bits.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow and torchvision


def grey(images):
    """Return the brightness of every pixel, float32 [B, H, W, 1]."""
    return (images * jnp.asarray(LUMA)).sum(-1, keepdims=True)


def brightness(images, factor):
    """Multiply every value by `factor`; 0 gives black."""
    return _blend(images, 0.0, factor)


def contrast(images, factor):
    """Scale each pixel's distance from the image's mean brightness by `factor`; 0 gives a uniform grey."""
    return _blend(images, grey(images).mean((1, 2), keepdims=True), factor)


def saturation(images, factor):
    """Scale each channel's distance from the pixel's brightness by `factor`; 0 gives a grey image."""
    return _blend(images, grey(images), factor)


def hue(images, shift):
    """Rotate every hue by `shift`, a fraction of the colour circle; HSV saturation and value stay."""
    value = images.max(-1, keepdims=True)
    spread = value - images.min(-1, keepdims=True)
    red, green, blue = jnp.split(images, 3, -1)
    # Hue in sixths of the circle: the largest channel selects the base, the other two the position around it.
    sixths = jnp.where(
        value == red, green - blue, jnp.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    )
    sixths = sixths / jnp.where(spread > 0, spread, 1.0) + 6 * _each(shift)
    # Convert back: each channel depends on the distance of the hue from where that channel is full.
    k = (sixths + jnp.asarray((5.0, 3.0, 1.0))) % 6
    return value - spread * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def blur(images, sigma, largest):
    """Apply a Gaussian blur, with the border pixels repeated outside the image.

    The kernel is cut at three times `largest`, and its weights are normalised to sum to 1.

    Args:
      images: float32 [B, H, W, C].
      sigma: float [B], standard deviation in pixels, at most `largest`.
      largest: static float, pixels.

    Returns:
      float32 [B, H, W, C].
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
    """Apply the four operations in a random order and by random amounts, drawn per image, as torchvision's ColorJitter.

    The first three factors are uniform in [max(0, 1 - x), 1 + x], the hue shift in [-hue, hue].
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, images, rng):
        """Return the jittered images, float32 [B, H, W, 3]."""
        count, (order_rng, amount_rng) = images.shape[0], jax.random.split(rng)
        order = jnp.argsort(jax.random.uniform(order_rng, (count, 4)), -1)
        draws = jax.random.uniform(amount_rng, (count, 4))
        strengths = (self.brightness, self.contrast, self.saturation)
        low = jnp.asarray([*(max(0.0, 1 - s) for s in strengths), -self.hue])
        high = jnp.asarray([*(1 + s for s in strengths), self.hue])
        amounts = low + (high - low) * draws
        return jax.lax.fori_loop(0, 4, lambda turn, x: self._apply(x, order[:, turn], amounts), images)

    def _apply(self, images, which, amounts):
        """Apply operation `which` (int [B]) to each image. Three of the four are one blend with different bases."""
        pixel = grey(images)
        mean = pixel.mean((1, 2), keepdims=True)
        base = jnp.where(_each(which) == 0, 0.0, jnp.where(_each(which) == 1, mean, pixel))
        factor = jnp.take_along_axis(amounts, which[:, None], 1)[:, 0]
        blended = _blend(images, base, factor)
        turned = hue(images, amounts[:, 3]) if self.hue else images
        return jnp.where(_each(which) == 3, turned, blended)


def random_apply(change, images, rng, probability):
    """Apply `change(images, rng)` to each image with the given probability, drawn per image."""
    coin, rng = jax.random.split(rng)
    chosen = jax.random.uniform(coin, images.shape[:1]) < probability
    return jnp.where(_each(chosen), change(images, rng), images)


def _blend(images, base, factor):
    return jnp.clip(base + (images - base) * _each(factor), 0.0, 1.0)


def _each(numbers):
    """Reshape [B] to [B, 1, 1, 1]."""
    return numbers[:, None, None, None]
