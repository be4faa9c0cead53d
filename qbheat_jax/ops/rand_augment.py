"""RandAugment and random erasing on the device: pure functions of images and a key.

RandAugment (arXiv 1909.13719) is that of timm's policy `rand-m9-mstd0.5-inc1`, which DeiT, Swin and vHeat train with:
OPERATIONS whose strength grows with the level, each applied with probability one half at a level drawn around the magnitude.
Results are Pillow's up to a rounding, and near them for rotations. All images go through the same program, whatever they drew,
in three stages:

1. Eight operations map each value of a channel to another one: a table of 256 values.
2. Colour and sharpness move a pixel away from its grey value or its blurred one.
3. Five operations move pixels (`ops.shear`).

An operation of one stage leaves the others at the identity, which is exact.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from qbheat_jax.ops import resample, shear

OPERATIONS = (
    "auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "brightness", "contrast",
    "colour", "sharpness", "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
NONE = len(OPERATIONS)  # the number of no operation
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}

MOST = 10.0  # the highest level
_FILL = (124, 116, 104)  # what comes in from outside of an image: ImageNet's mean


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Apply `layers` operations one after the other, drawn per image and with replacement.

    Args:
      magnitude: Mean of the levels, 0 to 10. Levels are clipped to that range too.
      deviation: Standard deviation of the levels.
      prob: Probability of applying an operation once it is drawn.
      layers: Number of operations drawn.
    """

    magnitude: float
    deviation: float = 0.5
    prob: float = 0.5
    layers: int = 2

    def __call__(self, images, rng):
        """Augment images of whole numbers in 0..255, [B, H, W, 3] of any dtype; return uint8 of the same shape."""

        def layer(planes, key):
            return apply(planes, *self.draw(key, len(planes))), None

        planes = resample.to_planes(images).astype(jnp.uint8)
        planes, _ = jax.lax.scan(layer, planes, jax.random.split(rng, self.layers))
        return resample.from_planes(planes)

    def draw(self, rng, count):
        """Return (operation int32 [count], level float32 [count], sign float32 [count] of -1 or 1) of one layer."""
        which_rng, level_rng, sign_rng, coin_rng = jax.random.split(rng, 4)
        which = jax.random.randint(which_rng, (count,), 0, len(OPERATIONS))
        which = jnp.where(jax.random.uniform(coin_rng, (count,)) < self.prob, which, NONE)
        level = self.magnitude + self.deviation * jax.random.normal(level_rng, (count,))
        return which, jnp.clip(level, 0.0, MOST), jax.random.rademacher(sign_rng, (count,), jnp.float32)


def apply(planes, which, level, sign):
    """Apply operation `which` to each image.

    Args:
      planes: uint8 [B, 3, H, W].
      which: int [B], index in OPERATIONS, or NONE.
      level: float32 [B] in 0..10.
      sign: float32 [B], the direction of operations that have two.

    Returns:
      uint8 [B, 3, H, W].
    """
    factor = jnp.maximum(0.1, 1.0 + level * sign / 10 * 0.9)  # of Pillow's enhancers; 1 changes nothing
    values = planes.astype(jnp.int32)
    values = _look_up(values, _tables(values, which, level, factor))
    values = _blend(values, which, factor)
    return _move(values, which, level * sign).astype(jnp.uint8)


def _is(which, name):
    """Return whether each image's operation has this name, bool [B, 1, 1, 1]."""
    return _each(which == _NUMBER[name])


def _each(numbers):
    """Reshape [B] to [B, 1, 1, 1]."""
    return numbers[:, None, None, None]


# --- Tables ----------------------------------------------------------------------------------------------------------


def _tables(planes, which, level, factor):
    """Return the new value of each value: int32 [B, 3, 256]."""
    counts = _histogram(planes)
    old = jnp.arange(256)
    level, factor = level[:, None, None], factor[:, None, None]
    bits = jnp.maximum(1, 4 - jnp.floor(level / 10 * 4).astype(jnp.int32))  # none, at level 10, is refused by Pillow
    threshold = 256 - jnp.floor(level / 10 * 256).astype(jnp.int32)
    added = jnp.floor(level / 10 * 110).astype(jnp.int32)
    middle = _mean_grey(planes)[:, None, None]
    made = (
        _auto_contrast(counts),
        _equalize(counts),
        255 - old,
        old & (256 - (1 << (8 - bits))),
        jnp.where(old < threshold, old, 255 - old),
        jnp.where(old < 128, jnp.minimum(old + added, 255), old),
        _cast(old * factor),
        _cast(middle + factor * (old - middle)),
    )
    table = jnp.broadcast_to(old, counts.shape)
    for number, new in enumerate(made):
        table = jnp.where(which[:, None, None] == number, new, table)
    return table


def _cast(values):
    """Return float values as Pillow stores them in a byte: clipped to 0..255 and rounded down; int32."""
    return jnp.clip(values, 0.0, 255.0).astype(jnp.int32)


def _auto_contrast(counts):
    """Return the table that spreads the values of a channel over 0..255. counts: int32 [B, 3, 256]."""
    old = jnp.arange(256)
    low = jnp.where(counts > 0, old, 255).min(-1, keepdims=True)
    high = jnp.where(counts > 0, old, 0).max(-1, keepdims=True)
    return jnp.where(high > low, jnp.clip(255 * (old - low) // jnp.maximum(high - low, 1), 0, 255), old)


def _equalize(counts):
    """Return the table by which a channel's values become equally frequent. counts: int32 [B, 3, 256]."""
    old = jnp.arange(256)
    highest = jnp.where(counts > 0, old, 0).max(-1, keepdims=True)
    step = (counts.sum(-1, keepdims=True) - jnp.take_along_axis(counts, highest, -1)) // 255
    below = jnp.cumsum(counts, -1) - counts
    return jnp.where(step > 0, jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255), old)


def _mean_grey(planes):
    """Return the rounded mean brightness of each image, int32 [B]."""
    grey = _grey(planes)
    pixels = grey.size // len(grey)
    return (2 * grey.sum((1, 2, 3)) + pixels) // (2 * pixels)


def _grey(planes):
    """Return Pillow's brightness of every pixel; int32 [B, 3, H, W] -> int32 [B, 1, H, W]."""
    red, green, blue = jnp.split(planes, 3, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _histogram(planes):
    """Count each value of each channel; int32 [B, 3, H, W] -> int32 [B, 3, 256]."""
    pixels = planes.reshape(*planes.shape[:2], -1)
    return jax.lax.platform_dependent(pixels, tpu=_count_by_products, default=_count)


def _look_up(planes, tables):
    """Return tables int32 [B, 3, 256] of whole numbers 0..255 at the values of planes int32 [B, 3, H, W]."""
    pixels = planes.reshape(*planes.shape[:2], -1)
    found = jax.lax.platform_dependent(pixels, tables, tpu=_find_by_products, default=_find)
    return found.reshape(planes.shape)


def _count(pixels):
    zeros = jnp.zeros(256, jnp.int32)
    return jax.vmap(jax.vmap(lambda values: zeros.at[values].add(1, mode="promise_in_bounds")))(pixels)


def _find(pixels, tables):
    return jnp.take_along_axis(tables, pixels, -1, mode="promise_in_bounds")


# A TPU gathers and scatters a number at a time, and takes long. Products of one-hot digits are exact too: bfloat16 holds whole
# numbers to 256, and sums are float32, exact to 2^24 pixels.


def _digits(pixels):
    """Return (high, low): one-hot base-16 digits of int32 [B, 3, n] in 0..255, bfloat16 [B, 3, n, 16] each."""
    return ((digit[..., None] == jnp.arange(16)).astype(jnp.bfloat16) for digit in (pixels >> 4, pixels & 15))


def _count_by_products(pixels):
    counts = jnp.einsum("bcph,bcpl->bchl", *_digits(pixels), preferred_element_type=jnp.float32)
    return counts.reshape(*pixels.shape[:2], 256).astype(jnp.int32)


def _find_by_products(pixels, tables):
    high, low = _digits(pixels)
    tables = tables.reshape(*tables.shape[:2], 16, 16).astype(jnp.bfloat16)
    rows = jnp.einsum("bcpl,bchl->bcph", low, tables, preferred_element_type=jnp.bfloat16)
    return (rows * high).sum(-1).astype(jnp.int32)


# --- Colour and sharpness --------------------------------------------------------------------------------------------


def _blend(values, which, factor):
    """Scale the distance of values int32 [B, 3, H, W] from grey (colour) or from a blurred image (sharpness)."""
    colour, sharpness = _is(which, "colour"), _is(which, "sharpness")
    base = jnp.where(colour, _grey(values), _smooth(values))
    factor = jnp.where(colour | sharpness, _each(factor), 1.0)
    return _cast(base + factor * (values - base))


def _smooth(values):
    """Return Pillow's filter SMOOTH: the mean of 3 x 3 pixels, the middle one weighing five times; the border as it was."""
    height, width = values.shape[2:]
    padded = jnp.pad(values, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = sum(padded[:, :, n : n + height] for n in range(3))
    total = sum(rows[..., n : n + width] for n in range(3)) + 4 * values
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inside, (2 * total + 13) // 26, values)


# --- Moves -----------------------------------------------------------------------------------------------------------


def _move(values, which, level):
    """Rotate by up to 30 degrees, shear by up to 0.3, translate by up to 0.45 of the side.

    values int32 [B, 3, H, W], level float32 [B] with its sign -> int32 [B, 3, H, W]. What comes from outside is grey.
    """
    height, width = values.shape[2:]

    def of(name, value):
        return jnp.where(which == _NUMBER[name], value, 0.0)

    level = level / 10
    angle = of("rotate", level * math.radians(30.0))
    slope_x, slope_y = (of(f"shear_{axis}", level * 0.3) for axis in "xy")
    # Pillow shears about the upper left corner. The passes are about the centre.
    shift_x = slope_x * height / 2 + of("translate_x", level * 0.45 * width)
    shift_y = slope_y * width / 2 + of("translate_y", level * 0.45 * height)
    half = -jnp.tan(angle / 2)
    passes = (half + slope_x, shift_x), (jnp.sin(angle) + slope_y, shift_y), (half, jnp.zeros_like(half))
    moved, inside = shear.three_passes(values, passes, math.tan(math.radians(15.0)))
    return jnp.where(inside, moved, jnp.asarray(_FILL)[:, None, None])


# --- Random erasing --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Erasing:
    """Replace a box of an image by noise (Random Erasing, arXiv 1708.04896), as timm's mode `pixel`.

    Args:
      prob: Probability that an image has a box.
      area: Range of the box's share of the image, uniform.
      aspect: Range of height / width, uniform in the logarithm.
    """

    prob: float
    area: tuple = (0.02, 1 / 3)
    aspect: tuple = (0.3, 1 / 0.3)

    def __call__(self, images, rng):
        """Erase normalised float32 [B, H, W, 3]: the noise is standard normal, so of the images' mean and deviation."""
        count, height, width, _ = images.shape
        noise_rng, box_rng, place_rng, coin_rng = jax.random.split(rng, 4)
        # Of ten boxes the first that is smaller than the image, as the reference draws them.
        area, aspect = jnp.moveaxis(jax.random.uniform(box_rng, (count, 10, 2)), -1, 0)
        area = height * width * (self.area[0] + (self.area[1] - self.area[0]) * area)
        low, high = map(math.log, self.aspect)
        aspect = jnp.exp(low + (high - low) * aspect)
        sides = jnp.round(jnp.sqrt(jnp.stack([area * aspect, area / aspect], -1)))
        fits = (sides < jnp.asarray([height, width])).all(-1)
        first = fits.argmax(-1)
        sides = jnp.take_along_axis(sides, first[:, None, None], 1)[:, 0]
        starts = jnp.floor(jax.random.uniform(place_rng, (count, 2)) * (jnp.asarray([height, width]) - sides + 1))
        erased = (jax.random.uniform(coin_rng, (count,)) < self.prob) & fits.any(-1)

        def within(axis, pixels):
            place = jnp.arange(pixels)
            start, side = starts[:, axis, None], sides[:, axis, None]
            return (place >= start) & (place < start + side)

        box = within(0, height)[:, :, None] & within(1, width)[:, None, :] & erased[:, None, None]
        return jnp.where(box[..., None], jax.random.normal(noise_rng, images.shape), images)
