"""Shear, translate and rotate images by moving whole rows and columns, with Pillow's bicubic interpolation.

A row that moves by a fraction of a pixel needs four neighbours with weights that are the same along the row. So no operation
looks up single pixels, which takes a TPU longer than a train step. A rotation is three shears (Paeth, "A Fast Algorithm for
General Raster Rotation", 1986).
"""

import math

import jax
import jax.numpy as jnp

_MARGIN = 6  # pixels around an image that interpolation near its border reads, over all passes


def three_passes(planes, passes, most):
    """Move the rows, then the columns, then the rows of images.

    A pass takes the pixel at (u, v), from the centre, from u + slope v + shift along its axis. A shear or a translation is one
    pass and is exactly Pillow's. Of a rotation, pixels are interpolated three times.

    Args:
      planes: float32 [B, C, H, W].
      passes: ((slope, shift), ...) of the rows, the columns and the rows again, float32 [B] each.
      most: Static float. A slope of the first pass that the third one undoes in part is at most this.

    Returns:
      (float32 [B, C, H, W], bool [B, 1, H, W]: whether a pixel comes from inside the image).
    """
    height, width = planes.shape[2:]
    # The first pass moves rows out of sight that the third brings back.
    wide = _MARGIN + math.ceil(most * height / 2)
    canvas = jnp.pad(planes, ((0, 0), (0, 0), (_MARGIN, _MARGIN), (wide, wide)), mode="edge")
    rows, columns = (jnp.arange(n) - (n - 1) / 2 for n in canvas.shape[2:])
    along = {3: rows, 2: columns}
    for axis, (slope, shift) in zip((3, 2, 3), passes):
        canvas = _shift(canvas, slope[:, None] * along[axis] + shift[:, None], axis)
    moved = canvas[:, :, _MARGIN : _MARGIN + height, wide : wide + width]
    return moved, _inside(height, width, passes)


def _inside(height, width, passes):
    """Return whether each pixel comes from inside the image, bool [B, 1, H, W]."""
    (first, right), (second, down), (third, back) = ((a[:, None, None] for a in one) for one in passes)
    v, u = (jnp.arange(n) + 0.5 - n / 2 for n in (height, width))
    u = u + third * v[:, None] + back
    v = v[:, None] + second * u + down
    u = u + first * v + right
    return ((u >= -width / 2) & (u < width / 2) & (v >= -height / 2) & (v < height / 2))[:, None]


def _shift(planes, distance, axis):
    """Move each line of the planes along an axis by a distance of its own.

    Args:
      planes: float32 [B, C, H, W].
      distance: float32 [B, lines], in pixels: where a pixel is taken from.
      axis: 2 (lines are columns) or 3 (rows).

    Returns:
      float32 [B, C, H, W]. What leaves on one side comes in on the other.
    """
    whole = jnp.floor(distance)
    d = jnp.expand_dims(distance - whole, (1, axis))
    x = jax.lax.platform_dependent(
        planes,
        whole.astype(jnp.int32),
        tpu=lambda x, n: _roll_by_bits(x, n, axis),
        default=lambda x, n: _roll(x, n, axis),
    )
    before, after, next_after = (jnp.roll(x, n, axis) for n in (1, -1, -2))
    # Keys's kernel with a = -1, added up as Pillow does, so that equal pixels stay equal.
    second = after - before
    third = 2 * (before - x) + after - next_after
    fourth = -before + x - after + next_after
    return x + d * (second + d * (third + d * fourth))


def _roll(planes, steps, axis):
    """Roll each line by int32 [B, lines] steps towards its start."""
    size = planes.shape[axis]
    place = jnp.arange(size)
    place = place[:, None] if axis == 2 else place
    source = (jnp.expand_dims(steps, (1, axis)) + place) % size
    return jnp.take_along_axis(planes, source, axis, mode="promise_in_bounds")


def _roll_by_bits(planes, steps, axis):
    """Do as `_roll`, by one choice between two copies for each binary digit of the steps."""
    size = planes.shape[axis]
    steps = jnp.expand_dims(steps, (1, axis)) % size
    for bit in range((size - 1).bit_length()):
        planes = jnp.where(steps >> bit & 1, jnp.roll(planes, -(1 << bit), axis), planes)
    return planes
