"""Base class of the detectors: an encoder, frozen or not, and a detector on its maps; focal losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.config import POSITIVE, Field
from qbheat_jax.data.specs import boxes
from qbheat_jax.methods import base
from qbheat_jax.methods.common.encoding import collections
from qbheat_jax.methods.common.encoding import variables as variables_of
from qbheat_jax.models import pyramid
from qbheat_jax.ops import images as images_lib

FIELDS = {
    **boxes.FIELDS,
    "detector.stages": Field(
        False, "give the detector the encoder's maps of finer strides too, not the last one alone"
    ),
    "detector.count": Field(100, "detections an image, at most", POSITIVE),
}


@dataclasses.dataclass(frozen=True)
class Detection(base.Method):
    """A detector on an encoder. A subclass has `outputs_loss` and `decode`.

    Args:
      encoder: Linen module. Its batch norm and drop path are those of evaluation, since batches of detection are small.
      detector: Linen module of {stride: map}.
      pixels: How images are normalised.
      tune: Train the encoder too.
      stages: Give the detector the encoder's intermediate maps too.
      count: Detections an image.
    """

    encoder: Any
    detector: Any
    pixels: images_lib.Pixels = images_lib.Pixels()
    tune: bool = False
    stages: bool = False
    count: int = 100

    TASK = base.DETECT
    METRIC = "average_precision"

    @classmethod
    def batch_spec(cls, config):
        return boxes.BoxesSpec.of(config)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "detector"}, "batch_stats": {"encoder"}}."""
        encoder_rng, detector_rng = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(encoder_rng, images)
        features, out = self.encoder.apply(encoder, images)
        detector = self.detector.init(detector_rng, self._maps(features, out, images))
        return collections({"encoder": encoder, "detector": detector})

    def loss(self, params, state, batch, rng, train=True):
        """Return (loss, (state, metrics)), the same in training and evaluation.

        batch: image uint8 [B, H, W, 3], boxes float32 [B, N, 4], classes int32 [B, N] (-1: none), mask bool [B].
        """
        del rng, train
        if not self.tune:
            params = {**params, "encoder": jax.lax.stop_gradient(params["encoder"])}
        outputs = self._outputs(params, state, self.pixels.normalise(batch["image"]))
        classes = jnp.where(batch["mask"][:, None], batch["classes"], -1)
        loss, metrics = self.outputs_loss(outputs, batch["boxes"], classes, batch["mask"], batch["image"].shape[1:3])
        return loss, (state, metrics)

    def detections(self, variables, images):
        """Return the detections of normalised images float32 [B, H, W, 3].

        Returns:
          (boxes [B, count, 4], corners in pixels; scores [B, count], descending, 0 where there are fewer; classes int32
          [B, count]).
        """
        outputs = self._outputs(variables["params"], variables.get("batch_stats", {}), images)
        return self.decode(outputs, images.shape[1:3])

    def _outputs(self, params, state, images):
        features, out = self.encoder.apply(variables_of(params, state), images)
        return self.detector.apply({"params": params["detector"]}, self._maps(features, out, images))

    def _maps(self, features, out, images):
        return pyramid.maps(features, out, images.shape[1], self.stages)


def focal(logits, targets, alpha=0.25, gamma=2.0):
    """Return the focal loss (arXiv 1708.02002) of each logit; targets 0 or 1 of the same shape."""
    probability = jax.nn.sigmoid(logits)
    miss = jnp.where(targets > 0, 1.0 - probability, probability)
    weight = jnp.where(targets > 0, alpha, 1.0 - alpha)
    return weight * miss**gamma * optax.sigmoid_binary_cross_entropy(logits, targets)


def quality_focal(logits, targets, beta=2.0):
    """Return the quality focal loss (arXiv 2006.04388) of each logit; targets 0..1 of the same shape, the box's IoU."""
    return jnp.abs(jax.nn.sigmoid(logits) - targets) ** beta * optax.sigmoid_binary_cross_entropy(logits, targets)
