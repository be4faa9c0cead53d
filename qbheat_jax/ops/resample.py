"""Crop and resize inside jit: antialiased bicubic in Pillow's integer arithmetic, so that host and device agree.

Pillow resizes uint8 images in integers: with 22-bit weights, it resizes the rows, rounds to uint8, and resizes the
columns. Here each pass is a product with a matrix of weights. Matrix units have few bits (bfloat16 on TPUs, TF32 on GPUs),
so the weights are split into three 8-bit digits. Their products with pixels and the sums are then exact. Results do not
depend on how a batch is split over devices, nor on the order of summation.

For boxes at least as wide as high, about one pixel in a thousand differs from Pillow's, by one grey level. For taller boxes
that shrink, Pillow 13 resizes the columns first, which changes the intermediate rounding. Photographs then differ by one or
two levels in a few pixels, and noise in more.
"""

import jax
import jax.numpy as jnp

# Pillow's: 32 bits minus 8 for the pixel, one for the sign, one for sums of weights above 1.
_BITS = 22
# Half the width of the cubic kernel, in pixels of the coarser image.
_SUPPORT = 2.0


def crop_resize(images, boxes, size, flip=None):
    """Crop and resize images to one size, as `data.augment.crop_resize` does with Pillow.

    No pixel outside a box affects its result. The arithmetic is exact for H, W up to 514, and beyond that for boxes up to
    128 times `size`.

    Args:
      images: uint8 [B, H, W, 3].
      boxes: float32 [B, 4], (top, left, height, width) in pixels, within the image; fractions are allowed.
      size: static int, pixels a side.
      flip: bool [B], True to mirror the result left to right; None mirrors none.

    Returns:
      uint8 [B, size, size, 3].
    """
    return from_planes(crop_resize_planes(to_planes(images), boxes, size, flip))


def crop_resize_planes(planes, boxes, size, flip=None):
    """Crop and resize channels-first images as `crop_resize` does; uint8 [B, 3, H, W] -> uint8 [B, 3, size, size]."""
    rows, columns = planes.shape[2:]
    boxes = boxes.astype(jnp.float32)
    horizontal = weights(boxes[:, 1], boxes[:, 3], columns, size)
    if flip is not None:
        horizontal = jnp.where(flip[:, None, None], horizontal[:, ::-1], horizontal)
    planes = _contract("bchw,bsw->bchs", planes, horizontal)
    return _contract("bchw,bsh->bcsw", planes, weights(boxes[:, 0], boxes[:, 2], rows, size))


def to_planes(images):
    """Move the channels first; [B, H, W, C] -> [B, C, H, W]."""
    return images.transpose(0, 3, 1, 2)


def from_planes(planes):
    """Move the channels last; [B, C, H, W] -> [B, H, W, C]."""
    return planes.transpose(0, 2, 3, 1)


def weights(start, length, pixels, size):
    """Return the weight of each old pixel in each new one, in units of 2^-22.

    Args:
      start, length: float32 [B], the part of the axis to resize, in pixels.
      pixels, size: static int, old and new length of the axis.

    Returns:
      int32 [B, size, pixels].
    """
    start, length = start[:, None, None], length[:, None, None]
    new = jnp.arange(size, dtype=jnp.float32)[:, None]
    old = jnp.arange(pixels, dtype=jnp.float32)
    # Distance between the new and the old pixel's centres, times 2 * size. It is a whole number for boxes without
    # fractions, so nothing is rounded before the one division.
    distance = (2 * (old - start) + 1) * size - (2 * new + 1) * length
    x = jnp.abs(distance / (2 * jnp.maximum(length, size)))
    inside = (old >= jnp.floor(start)) & (old < jnp.ceil(start + length)) & (x < _SUPPORT)
    # Keys's cubic kernel with a = -1/2.
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    kernel = jnp.where(inside, jnp.where(x < 1.0, near, far), 0.0)
    kernel = kernel / kernel.sum(-1, keepdims=True) * 2.0**_BITS
    # Round halves away from zero, as Pillow's C cast does.
    return (jnp.sign(kernel) * jnp.floor(jnp.abs(kernel) + 0.5)).astype(jnp.int32)


def _contract(axes, planes, table):
    """Multiply uint8 planes by int32 weights and round to uint8."""
    pixels = planes.astype(jnp.float32)
    total = jnp.int32(1 << (_BITS - 1))  # half a grey level, because the shift below rounds down
    for place, digit in enumerate(_digits(table)):
        product = jnp.einsum(axes, pixels, digit.astype(jnp.float32), precision=jax.lax.Precision.DEFAULT)
        total = total + (product.astype(jnp.int32) << (8 * place))
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


def _digits(values):
    """Yield the three base-256 digits of int32 values, lowest first, each in -128..127."""
    for _ in range(2):
        low = ((values + 128) & 255) - 128
        yield low
        values = (values - low) >> 8
    yield values
