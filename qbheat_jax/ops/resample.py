"""Crop and resize inside jit: bicubic with antialiasing, in Pillow's own arithmetic, so that host and device agree.

Pillow resizes uint8 images in whole numbers: weights of 22 bits, a pass along the rows, its result rounded to uint8, a pass
along the columns. So does this, as a product with a matrix of weights each. Matrix units have few bits (bfloat16 on a
TPU, TF32 on a GPU), so the weights are cut into three digits of 8 bits, whose products with pixels and whose sums are exact
in all of them: no result depends on how a batch is split over devices, nor on the order in which they add.

Of boxes at least as wide as high, all but one pixel in some thousand are Pillow's, and the others one grey level off. For
higher boxes that shrink, Pillow 13 takes the columns first, which makes the rounding between the passes another: one or
two levels here and there in photographs, more in noise.
"""

import jax
import jax.numpy as jnp

# Pillow's: 32 bits less 8 of the pixel, one sign, one for the weights whose sum overshoots 1.
_BITS = 22
# Half the width of the cubic, in pixels of whichever image is the coarser.
_SUPPORT = 2.0


def crop_resize(images, boxes, size, flip=None):
    """Parts of images scaled to one size, as `data.augment.crop_resize` does it with Pillow.

    images: uint8 [B, H, W, 3]. boxes: float32 [B, 4], (top, left, height, width) in pixels and inside the image; they may
    have fractions. size: pixels a side, static. flip: bool [B], where the result is mirrored left to right.
    Returns uint8 [B, size, size, 3]. No pixel outside its box has any influence. Exact for H, W up to 514, and beyond
    that for boxes up to 128 times `size`.
    """
    return from_planes(crop_resize_planes(to_planes(images), boxes, size, flip))


def crop_resize_planes(planes, boxes, size, flip=None):
    """`crop_resize` of images whose channels come first: uint8 [B, 3, H, W] -> uint8 [B, 3, size, size]."""
    rows, columns = planes.shape[2:]
    boxes = boxes.astype(jnp.float32)
    horizontal = weights(boxes[:, 1], boxes[:, 3], columns, size)
    if flip is not None:
        horizontal = jnp.where(flip[:, None, None], horizontal[:, ::-1], horizontal)
    planes = _contract("bchw,bsw->bchs", planes, horizontal)
    return _contract("bchw,bsh->bcsw", planes, weights(boxes[:, 0], boxes[:, 2], rows, size))


def to_planes(images):
    """[B, H, W, C] -> [B, C, H, W]."""
    return images.transpose(0, 3, 1, 2)


def from_planes(planes):
    """[B, C, H, W] -> [B, H, W, C]."""
    return planes.transpose(0, 2, 3, 1)


def weights(start, length, pixels, size):
    """What each of `size` new pixels takes from each of `pixels` old ones, in units of 2^-22.

    start, length: float32 [B], the part of the axis that is shown. Returns int32 [B, size, pixels].
    """
    start, length = start[:, None, None], length[:, None, None]
    new = jnp.arange(size, dtype=jnp.float32)[:, None]
    old = jnp.arange(pixels, dtype=jnp.float32)
    # From the new pixel's centre to the old one's, times 2 `size`: a whole number where the box has no fractions, so
    # that nothing is lost to rounding before the one division.
    distance = (2 * (old - start) + 1) * size - (2 * new + 1) * length
    x = jnp.abs(distance / (2 * jnp.maximum(length, size)))
    inside = (old >= jnp.floor(start)) & (old < jnp.ceil(start + length)) & (x < _SUPPORT)
    # Keys's cubic with a = -1/2.
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    kernel = jnp.where(inside, jnp.where(x < 1.0, near, far), 0.0)
    kernel = kernel / kernel.sum(-1, keepdims=True) * 2.0**_BITS
    # Halves away from zero, as C's cast does it.
    return (jnp.sign(kernel) * jnp.floor(jnp.abs(kernel) + 0.5)).astype(jnp.int32)


def _contract(axes, planes, table):
    """uint8 planes times int32 weights, rounded to uint8."""
    pixels = planes.astype(jnp.float32)
    total = jnp.int32(1 << (_BITS - 1))  # Half a grey level: the shift below rounds down.
    for place, digit in enumerate(_digits(table)):
        product = jnp.einsum(axes, pixels, digit.astype(jnp.float32), precision=jax.lax.Precision.DEFAULT)
        total = total + (product.astype(jnp.int32) << (8 * place))
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


def _digits(values):
    """int32 -> its three digits to base 256, lowest first, each from -128 to 127."""
    for _ in range(2):
        low = ((values + 128) & 255) - 128
        yield low
        values = (values - low) >> 8
    yield values
