"""Boxes as numbers: corners and centres, areas, overlaps. Pure functions on arrays.

A box is (left, top, right, bottom) in pixels, x to the right and y down, from the image's top left corner; "centred" is
(centre x, centre y, width, height). All take float arrays [..., 4].
"""

import jax
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


def suppress(boxes, scores, threshold):
    """Greedy non-maximum suppression -> bool [k]: which of the boxes [k, 4], scores [k] in descending order, are kept.

    From the first to the last, a box that is kept takes out all after it whose IoU with it is above `threshold`.
    """
    overlap = iou(boxes[:, None], boxes[None]) > threshold
    order = jnp.arange(len(scores))

    def turn(n, kept):
        return kept & ~(kept[n] & overlap[n] & (order > n))

    return jax.lax.fori_loop(0, len(scores), turn, jnp.ones(len(scores), bool))


def best(boxes, scores, count, candidates, threshold):
    """What one image's detections are: at most `count` of the best (box, class) pairs, overlapping ones of a class left out.

    boxes [p, 4] corners, scores [p, classes] from 0 to 1. Only the `candidates` best pairs are looked at. -> (boxes
    [count, 4], scores [count] descending, classes int32 [count]); score 0 fills up.
    """
    classes = scores.shape[-1]
    top, place = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
    chosen, which = boxes[place // classes], place % classes
    # Boxes of different classes are moved so far apart that none overlap.
    apart = chosen + which[:, None] * (2 * jnp.abs(boxes).max() + 1)
    top = jnp.where(suppress(apart, top, threshold), top, 0.0)
    top = jnp.pad(top, (0, max(0, count - len(top))))
    top, order = jax.lax.top_k(top, count)
    order = jnp.minimum(order, len(chosen) - 1)
    return chosen[order], top, which[order].astype(jnp.int32)
