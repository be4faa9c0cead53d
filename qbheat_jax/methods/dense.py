"""Dense detection (FCOS, arXiv 1904.01355): every cell near the centre of a box predicts its class and the box."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.config import COUNTS, POSITIVE, Field, at_least, refuse
from qbheat_jax.methods.common import detection
from qbheat_jax.methods.common.detection import Detection, quality_focal
from qbheat_jax.models.dense_detector import DenseDetector
from qbheat_jax.models.pyramid import GroupNorm, locations
from qbheat_jax.ops import boxes as geometry
from qbheat_jax.ops import images

# A box belongs to the finest level whose stride times REACH covers its longer side; the largest boxes to the coarsest level.
REACH = 8.0
# Centre sampling: cells up to this many strides from the centre of a box are positive.
RADIUS = 1.5
_BOX_WEIGHT = 2.0


@dataclasses.dataclass(frozen=True)
class Dense(Detection):
    """`Detection` by a `DenseDetector`. Class scores are trained on the box's IoU, so there is no centre-ness.

    Args:
      candidates: Pairs of box and class that non-maximum suppression looks at.
      overlap: IoU from which it suppresses a box.
    """

    candidates: int = 300
    overlap: float = 0.6

    NAME = "dense"
    NOTE = "at every cell, as FCOS"
    TITLE = "dense detector"
    STORY = "dense detector on the encoder's maps"
    FIELDS = {
        **detection.FIELDS,
        "dense.strides": Field(
            (8, 16, 32), "strides of the detector's levels in pixels, each twice the one before", COUNTS
        ),
        "dense.width": Field(128, "channels of the detector, a multiple of 8", POSITIVE),
        "dense.depth": Field(2, "convolutions in each of its two towers", at_least(0)),
    }

    @classmethod
    def check(cls, values):
        strides = _whole(values["dense.strides"])
        if any(b != 2 * a for a, b in zip(strides, strides[1:])) or strides[0] & (strides[0] - 1):
            refuse("dense.strides", strides, "powers of two, each twice the one before")
        if values["image_size"] % strides[-1]:
            refuse("image_size", values["image_size"], f"a multiple of the largest of dense.strides={strides}")
        if values["dense.width"] % GroupNorm.num_groups:
            refuse("dense.width", values["dense.width"], f"a multiple of {GroupNorm.num_groups}")

    @classmethod
    def build(cls, config, encoder, schedule):
        fields, dtype = config.dense, jnp.dtype(config.dtype)
        detector = DenseDetector(config.detector.classes, _whole(fields.strides), fields.width, fields.depth, dtype)
        pixels = images.PIXELS[config.pixels]
        return cls(encoder, detector, pixels, config.tune, config.detector.stages, config.detector.count)

    def outputs_loss(self, outputs, boxes, classes, mask, size):
        """Return (loss, {"class", "box", "cells"}): losses summed over cells, divided by the positive cells of the batch."""
        logits, found = outputs
        points, strides = locations(*size, self.detector.strides)
        index = jax.vmap(lambda b, c: assign(points, strides, b, c, self.detector.strides))(boxes, classes)
        own = index >= 0
        index = jnp.maximum(index, 0)
        wanted = jnp.take_along_axis(boxes, index[..., None], 1)
        label = jnp.take_along_axis(classes, index, 1)
        cells = jnp.maximum(own.sum(), 1)
        quality = jax.lax.stop_gradient(geometry.iou(found, wanted))
        targets = jax.nn.one_hot(label, logits.shape[-1]) * jnp.where(own, quality, 0.0)[..., None]
        class_loss = (quality_focal(logits, targets).sum(-1) * mask[:, None]).sum() / cells
        box_loss = jnp.where(own, 1.0 - geometry.giou(found, wanted), 0.0).sum() / cells
        metrics = {"class": class_loss, "box": box_loss, "cells": own.sum() / jnp.maximum(mask.sum(), 1)}
        return class_loss + _BOX_WEIGHT * box_loss, metrics

    def decode(self, outputs, size):
        """As `Detection.detections`."""
        logits, found = outputs
        found = jnp.clip(found, 0, np.array([size[1], size[0]] * 2, np.float32))

        def one(boxes, scores):
            return geometry.top_detections(boxes, scores, self.count, self.candidates, self.overlap)

        return jax.vmap(one)(found, jax.nn.sigmoid(logits))


def _whole(strides):
    """Return the strides as ints; a config's lists are of floats."""
    return tuple(int(stride) for stride in strides)


def assign(points, strides, boxes, classes, levels):
    """Return the box that each cell predicts -> int32 [p], -1 for none.

    A cell of the box's level is positive where it lies in the box, at most RADIUS strides from the centre in x and in y. The
    cell of the centre is always positive, so that no box is too small. A cell of several boxes takes the smallest.

    Args:
      points, strides: [p, 2], [p] of the cells.
      boxes, classes: [n, 4], [n]; class -1 is none.
      levels: Strides of the pyramid.
    """
    middle, size = jnp.split(geometry.centred(boxes), 2, -1)
    limits = jnp.asarray(levels[:-1], jnp.float32) * REACH
    level = jnp.asarray(levels, jnp.float32)[jnp.searchsorted(limits, size.max(-1))]
    away = jnp.abs(points[:, None] - middle).max(-1)
    edges = jnp.concatenate([points[:, None] - boxes[:, :2], boxes[:, 2:] - points[:, None]], -1)
    near = (away < RADIUS * strides[:, None]) & (edges.min(-1) > 0)
    holds = away <= strides[:, None] / 2
    counts = (near | holds) & (strides[:, None] == level) & (classes >= 0)
    area = jnp.where(counts, geometry.area(boxes), jnp.inf)
    return jnp.where(counts.any(-1), area.argmin(-1), -1)
