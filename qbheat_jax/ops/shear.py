"""Shear, translate and rotate images by moving whole rows and columns, with Pillow's bicubic interpolation.

A row that moves by a fraction of a pixel needs four neighbours with weights that are the same along the row. So no operation
looks up single pixels, which takes a TPU longer than a train step. A rotation is three shears (Paeth, "A Fast Algorithm for
General Raster Rotation", 1986).
"""

import math

import jax
import jax.numpy as jnp

_MARGIN = 6  # pixels around an image that interpolation near its border reads, over all passes
_STEPS = 4  # steps per grey level, to which a pass rounds values down


def three_passes(planes, passes, most):
    """Move the rows, then the columns, then the rows of images.

    A pass takes the pixel at (u, v), from the centre, from u + slope v + shift along its axis. A shear or a translation is one
    pass and equals Pillow's up to a rounding. A rotation interpolates three times.

    Args:
      planes: int32 [B, 3, H, W] in 0..255.
      passes: ((slope, shift), ...) of the rows, the columns and the rows again, float32 [B] each.
      most: Static float. A slope of the first pass that the third one undoes in part is at most this.

    Returns:
      (int32 [B, 3, H, W], bool [B, 1, H, W]: whether a pixel comes from inside the image).
    """
    height, width = planes.shape[2:]
    # The first pass moves rows out of sight that the third brings back.
    wide = _MARGIN + math.ceil(most * height / 2)
    channels = (_STEPS * planes[:, n] for n in range(3))
    canvas = jnp.pad(_pack(channels), ((0, 0), (_MARGIN, _MARGIN), (wide, wide)), mode="edge")
    rows, columns = (jnp.arange(n) - (n - 1) / 2 for n in canvas.shape[1:])
    for axis, lines, (slope, shift) in zip((2, 1, 2), (rows, columns, rows), passes):
        canvas = _shift(canvas, slope[:, None] * lines + shift[:, None], axis)
    moved = _unpack(canvas[:, _MARGIN : _MARGIN + height, wide : wide + width])
    return jnp.stack(list(moved), 1) // _STEPS, _inside(height, width, passes)


def _pack(channels):
    """Put the three channels of a pixel, of ten bits each, into one number, which moves at a third of the cost."""
    red, green, blue = channels
    return red | green << 10 | blue << 20


def _unpack(packed):
    """Yield the three channels that `_pack` has put together."""
    return (packed >> bits & 1023 for bits in (0, 10, 20))


def _inside(height, width, passes):
    """Return whether each pixel comes from inside the image, bool [B, 1, H, W]."""
    (first, right), (second, down), (third, back) = ((a[:, None, None] for a in one) for one in passes)
    v, u = (jnp.arange(n) + 0.5 - n / 2 for n in (height, width))
    u = u + third * v[:, None] + back
    v = v[:, None] + second * u + down
    u = u + first * v + right
    return ((u >= -width / 2) & (u < width / 2) & (v >= -height / 2) & (v < height / 2))[:, None]


def _shift(canvas, distance, axis):
    """Move each line of packed images along an axis by a distance of its own. What leaves on one side enters on the other.

    Args:
      canvas: int32 [B, H, W], see `_pack`.
      distance: float32 [B, lines], in pixels: where a pixel is taken from.
      axis: 1 (lines are columns) or 2 (rows).

    Returns:
      int32 [B, H, W], rounded down.
    """
    whole = jnp.floor(distance)
    fraction = jnp.expand_dims(distance - whole, axis)
    forms = dict(tpu=lambda x, n: _roll_by_bits(x, n, axis), default=lambda x, n: _roll(x, n, axis))
    canvas = jax.lax.platform_dependent(canvas, whole.astype(jnp.int32), **forms)
    neighbours = zip(*(_unpack(jnp.roll(canvas, n, axis)) for n in (1, 0, -1, -2)))  # of each channel
    return _pack(_interpolated(fraction, *four) for four in neighbours)


def _interpolated(fraction, *neighbours):
    """Return int32 [B, H, W] at a fraction of the way from the second to the third of four neighbours, int32 [B, H, W]."""
    a, b, c, d = (x.astype(jnp.float32) for x in neighbours)
    # Keys's kernel with a coefficient of -1, added up as Pillow does, so that equal pixels stay equal.
    moved = b + fraction * (c - a + fraction * (2 * (a - b) + c - d + fraction * (b - a + d - c)))
    return jnp.clip(moved, 0, 255 * _STEPS).astype(jnp.int32)


def _roll(canvas, steps, axis):
    """Roll each line of [B, H, W] by int32 [B, lines] steps towards its start."""
    size = canvas.shape[axis]
    place = jnp.arange(size)
    place = place[:, None] if axis == 1 else place
    source = (jnp.expand_dims(steps, axis) + place) % size
    return jnp.take_along_axis(canvas, source, axis, mode="promise_in_bounds")


def _roll_by_bits(canvas, steps, axis):
    """Do as `_roll`, by one choice between two copies for each binary digit of the steps."""
    size = canvas.shape[axis]
    steps = jnp.expand_dims(steps, axis) % size
    for bit in range((size - 1).bit_length()):
        canvas = jnp.where(steps >> bit & 1, jnp.roll(canvas, -(1 << bit), axis), canvas)
    return canvas
