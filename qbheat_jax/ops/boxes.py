"""Box geometry: conversions, area, IoU, generalised IoU and non-maximum suppression.

A box is (left, top, right, bottom) in pixels, with x to the right and y down from the top left corner. The centred form is
(centre x, centre y, width, height). All functions are pure and take float arrays [..., 4].
"""

import jax
import jax.numpy as jnp


def centred(corners):
    """Convert corners to the centred form; float [..., 4] -> float [..., 4].

    >>> centred(jnp.array([0.0, 2.0, 4.0, 4.0])).tolist()
    [2.0, 3.0, 4.0, 2.0]
    """
    low, high = corners[..., :2], corners[..., 2:]
    return jnp.concatenate([(low + high) / 2, high - low], -1)


def corners(centred):
    """Convert the centred form to corners; float [..., 4] -> float [..., 4]."""
    middle, half = centred[..., :2], centred[..., 2:] / 2
    return jnp.concatenate([middle - half, middle + half], -1)


def area(boxes):
    """Return the area of corners [..., 4] as [...]; 0 where the width or height is not positive."""
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return size[..., 0] * size[..., 1]


def iou(a, b):
    """Return the intersection over union of corners [..., 4] that broadcast, as [...]; 0 where the union is empty."""
    intersection, union = _overlap(a, b)
    return intersection / jnp.maximum(union, _SMALL)


def giou(a, b):
    """Return the generalised IoU (arXiv 1902.09630) of boxes.

    It is the IoU minus the fraction of the smallest enclosing box that the union leaves empty.

    Args:
      a, b: float [..., 4], corners that broadcast.

    Returns:
      float [...], from -1 (far apart) to 1 (the same box).
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
    """Return which boxes greedy non-maximum suppression keeps.

    Going down the scores, each kept box removes every later box whose IoU with it exceeds `threshold`.

    Args:
      boxes: float [k, 4], corners.
      scores: float [k], in descending order; only the length is used.
      threshold: float IoU.

    Returns:
      bool [k], True where the box is kept.
    """
    overlap = iou(boxes[:, None], boxes[None]) > threshold
    order = jnp.arange(len(scores))

    def turn(n, kept):
        return kept & ~(kept[n] & overlap[n] & (order > n))

    return jax.lax.fori_loop(0, len(scores), turn, jnp.ones(len(scores), bool))


def top_detections(boxes, scores, count, candidates, threshold):
    """Return the best detections of one image, after non-maximum suppression within each class.

    Args:
      boxes: float [p, 4], corners.
      scores: float [p, classes], from 0 to 1.
      count: number of detections returned.
      candidates: number of (box, class) pairs considered, those with the highest scores.
      threshold: IoU above which the lower-scored box of a class is removed.

    Returns:
      (boxes [count, 4], scores [count] in descending order, classes int32 [count]). Empty slots have score 0.
    """
    classes = scores.shape[-1]
    top, place = jax.lax.top_k(scores.reshape(-1), min(candidates, scores.size))
    chosen, which = boxes[place // classes], place % classes
    # Shift each class by its own offset, so that boxes of different classes never overlap.
    apart = chosen + which[:, None] * (2 * jnp.abs(boxes).max() + 1)
    top = jnp.where(suppress(apart, top, threshold), top, 0.0)
    top = jnp.pad(top, (0, max(0, count - len(top))))
    top, order = jax.lax.top_k(top, count)
    order = jnp.minimum(order, len(chosen) - 1)
    return chosen[order], top, which[order].astype(jnp.int32)
