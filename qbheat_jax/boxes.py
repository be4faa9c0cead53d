"""Boxes as numbers: corners and centres, areas, overlaps. Pure functions on numpy and jax arrays alike.

A box is (left, top, right, bottom) in pixels, x to the right and y down, from the image's top left corner; "centred" is
(centre x, centre y, width, height). All take float arrays [..., 4].
"""

import jax.numpy as jnp


def centred(corners):
    """Corners -> centred, same shape.

    >>> centred(jnp.array([0.0, 2.0, 4.0, 4.0])).tolist()
    [2.0, 3.0, 4.0, 2.0]
    """
    low, high = corners[..., :2], corners[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], -1)


def corners(centred):
    """Centred -> corners, same shape."""
    middle, half = centred[..., :2], centred[..., 2:] / 2
    return jnp.concatenate([middle - half, middle + half], -1)


def area(boxes):
    """Corners [..., 4] -> [...]; 0 where a box has no width or no height."""
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return size[..., 0] * size[..., 1]


def iou(a, b):
    """Intersection over union of corners [..., 4] that broadcast -> [...]; 0 where both have no area."""
    intersection, union = _overlap(a, b)
    return intersection / jnp.maximum(union, _SMALL)


def giou(a, b):
    """Generalised IoU (arXiv 1902.09630): IoU less the share of the smallest box around both that neither fills.

    Corners [..., 4] that broadcast -> [...], from -1 (far apart) to 1 (the same box).
    """
    intersection, union = _overlap(a, b)
    low, high = jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
    around = area(jnp.concatenate([low, high], -1))
    return intersection / jnp.maximum(union, _SMALL) - (around - union) / jnp.maximum(around, _SMALL)


_SMALL = 1e-9


def _overlap(a, b):
    low, high = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = area(jnp.concatenate([low, high], -1))
    return intersection, area(a) + area(b) - intersection
