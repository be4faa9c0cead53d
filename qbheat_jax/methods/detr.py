"""Detection by queries (DETR, arXiv 2005.12872): each box is matched with one query; the other queries predict nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qbheat_jax.config import POSITIVE, Field, refuse
from qbheat_jax.methods.common import detection
from qbheat_jax.methods.common.detection import Detection, focal
from qbheat_jax.models.detr_detector import DETR
from qbheat_jax.ops import boxes as geometry
from qbheat_jax.ops import images

# Weights of class, L1 and GIoU in the matching cost and in the loss, of Deformable DETR (arXiv 2010.04159).
CLASS, L1, GIOU = 2.0, 5.0, 2.0
# Above any cost; stands for one that is not finite.
_TOO_MUCH = 1e6


@dataclasses.dataclass(frozen=True)
class Detr(Detection):
    """`Detection` by a `DETR`. Every layer of its decoder and every group of queries has a matching and a loss of its own."""

    NAME = "detr"
    NOTE = "queries, as DETR"
    TITLE = "DETR detector"
    STORY = "DETR detector on the encoder's maps"
    FIELDS = {
        **detection.FIELDS,
        "detr.size": Field("small", "width 128 and 3 layers, or width 256 and 6", ("small", "base")),
        "detr.queries": Field(100, "number of queries, data.max_boxes or more", POSITIVE),
        "detr.anchors": Field(
            True, "queries are boxes that the layers refine; converges far sooner than learnt queries"
        ),
        "detr.groups": Field(
            4, "groups of queries trained side by side; only the first is used for prediction", POSITIVE
        ),
    }

    @classmethod
    def check(cls, values):
        queries, boxes = values["detr.queries"], values["data.max_boxes"]
        if queries < boxes:
            refuse("detr.queries", queries, f"data.max_boxes={boxes} or more, one for each box")

    @classmethod
    def build(cls, config, encoder, schedule):
        detector = DETR(config.detector.classes, **config.detr, dtype=jnp.dtype(config.dtype))
        pixels = images.PIXELS[config.pixels]
        return cls(encoder, detector, pixels, config.tune, count=config.detector.count)

    def detections(self, variables, images):
        """As `Detection.detections`, by the first group of queries."""
        first = dataclasses.replace(self, detector=self.detector.clone(alone=True))
        return Detection.detections(first, variables, images)

    def outputs_loss(self, outputs, boxes, classes, mask, size):
        """Return (loss, {"class", "box", "giou"} of the last layer).

        The loss is summed over layers and averaged over groups; each is divided by the boxes of the batch.
        """
        pixels = np.array([size[1], size[0]] * 2, np.float32)
        boxes = boxes / pixels

        def layer(logits, found):
            found = found / pixels
            match = jax.vmap(matched)(
                jax.lax.stop_gradient(jax.vmap(costs)(logits, found, boxes, classes)), classes >= 0
            )
            return criterion(logits, found, boxes, classes, match, mask)

        parts = jax.vmap(jax.vmap(layer, 1))(*map(self._grouped, outputs))  # [layers, groups] each
        parts = {name: values.mean(1) for name, values in parts.items()}
        loss = sum(weight * parts[name].sum() for name, weight in (("class", CLASS), ("box", L1), ("giou", GIOU)))
        return loss, {name: values[-1] for name, values in parts.items()}

    def _grouped(self, x):
        """Reshape [layers, B, groups * queries, ...] to [layers, B, groups, queries, ...]."""
        return x.reshape(*x.shape[:2], self.detector.groups, -1, *x.shape[3:])

    def decode(self, outputs, size):
        """As `Detection.detections`, of the last layer; no suppression, since each box has one query."""
        logits, found = (x[-1] for x in outputs)
        found = jnp.clip(found, 0, np.array([size[1], size[0]] * 2, np.float32))
        classes = logits.shape[-1]
        scores = jax.nn.sigmoid(logits).reshape(len(logits), -1)
        top, place = jax.lax.top_k(scores, min(self.count, scores.shape[1]))
        missing = ((0, 0), (0, self.count - top.shape[1]))
        top, place = jnp.pad(top, missing), jnp.pad(place, missing)
        chosen = jnp.take_along_axis(found, (place // classes)[..., None], 1)
        return chosen, top, (place % classes).astype(jnp.int32)


def costs(logits, found, boxes, classes):
    """Return the cost [queries, n] of matching each query with each box of one image.

    logits [queries, classes]; found [queries, 4], boxes [n, 4]: corners as fractions of the image; classes [n], -1: none.
    """
    label = jnp.maximum(classes, 0)
    seen = (focal(logits, jnp.ones_like(logits)) - focal(logits, jnp.zeros_like(logits)))[:, label]
    apart = jnp.abs(geometry.centred(found)[:, None] - geometry.centred(boxes)[None]).sum(-1)
    return CLASS * seen + L1 * apart - GIOU * geometry.giou(found[:, None], boxes[None])


def matched(cost, real):
    """Return the query of each box in the cheapest assignment -> int32 [n], -1 where `real` [n] is False.

    cost [queries, n], at least as many queries as boxes.
    """
    # Padding boxes cost the same with any query, so they do not change the assignment of the others.
    cost = jnp.where(real, jnp.nan_to_num(cost, nan=_TOO_MUCH, posinf=_TOO_MUCH, neginf=-_TOO_MUCH), 0.0)
    queries, places = optax.assignment.hungarian_algorithm(cost)
    found = jnp.zeros(cost.shape[1], jnp.int32).at[places].set(queries.astype(jnp.int32))
    return jnp.where(real, found, -1)


def criterion(logits, found, boxes, classes, match, mask):
    """Return {"class", "box", "giou"}: focal, L1 and GIoU losses of a batch, divided by its boxes.

    logits [B, queries, classes], found [B, queries, 4], boxes [B, n, 4], classes [B, n], match [B, n] (see `matched`),
    mask bool [B].
    """
    real = match >= 0
    number = jnp.maximum(real.sum(), 1)
    own = jnp.take_along_axis(found, jnp.maximum(match, 0)[..., None], 1)
    apart = jnp.abs(geometry.centred(own) - geometry.centred(boxes)).sum(-1)
    place = jnp.where(real, match, logits.shape[1])  # outside, so that nothing is set
    targets = jax.vmap(lambda p, c: jnp.zeros(logits.shape[1:]).at[p, c].set(1.0, mode="drop"))(place, classes)
    return {
        "class": (focal(logits, targets).sum((1, 2)) * mask).sum() / number,
        "box": jnp.where(real, apart, 0.0).sum() / number,
        "giou": jnp.where(real, 1.0 - geometry.giou(own, boxes), 0.0).sum() / number,
    }
