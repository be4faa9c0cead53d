"""VICReg (arXiv 2105.04906): equal projections of two views, whose dimensions vary over the batch and are uncorrelated."""

import dataclasses

import jax
import jax.numpy as jnp

from qbheat_jax.config import POSITIVE, Field, at_least
from qbheat_jax.methods.common import views
from qbheat_jax.methods.common.joint import JointEmbedding, Projector
from qbheat_jax.ops import images as images_lib


def terms(z, mask):
    """Return (invariance, hinge, covariance) of projections, float32 scalars, as the authors' code scales them.

    invariance: mean squared difference of the two views. hinge: mean over views and dimensions of max(0, 1 - standard
    deviation). covariance: sum of the squared covariances of different dimensions over D, both views together.

    Args:
      z: float32 [B, 2, D].
      mask: bool [B], the images that count.
    """
    count, width = mask.sum(), z.shape[-1]
    weight = (mask / jnp.maximum(count, 1))[:, None, None]
    unbiased = count / jnp.maximum(count - 1, 1)
    invariance = (jnp.square(z[:, 0] - z[:, 1]).mean(-1) * weight[:, 0, 0]).sum()
    centred = (z - (z * weight).sum(0)) * jnp.sqrt(weight)
    std = jnp.sqrt(jnp.square(centred).sum(0) * unbiased + 1e-4)
    products = jnp.einsum("bvi,bvj->vij", centred, centred) * unbiased
    others = jnp.square(products).sum() - jnp.square(jnp.diagonal(products, axis1=1, axis2=2)).sum()
    return invariance, jax.nn.relu(1.0 - std).mean(), others / width


@dataclasses.dataclass(frozen=True)
class VICReg(JointEmbedding):
    """Variance, invariance and covariance, as of `JointEmbedding`. Weights are those of the three `terms`."""

    invariance: float = 25.0
    hinge: float = 25.0
    covariance: float = 1.0

    NAME, NOTE = "vicreg", "VICReg"
    TITLE = "VICReg"
    STORY = (
        "The encoder sees two random crops of each image in random colours. Projections of both are made equal, while each of "
        "their dimensions varies over the batch and no two are correlated (VICReg). No labels are used."
    )
    FIELDS = {
        **views.FIELDS,
        "vicreg.invariance": Field(25.0, "weight of the difference of the views", at_least(0)),
        "vicreg.variance": Field(25.0, "weight of standard deviations below 1", at_least(0)),
        "vicreg.covariance": Field(1.0, "weight of covariances of different dimensions", at_least(0)),
        "vicreg.width": Field(8192, "dimension of a projection, and of both hidden layers", POSITIVE),
    }

    @classmethod
    def build(cls, config, encoder, schedule):
        fields, strengths = config.vicreg, (0.4, 0.4, 0.2, 0.1)
        projector = Projector((fields.width,) * 3, jnp.dtype(config.dtype))
        first, second = (views.colours(config, strengths, *probs) for probs in ((1.0, 0.0), (0.1, 0.2)))
        weights = fields.invariance, fields.variance, fields.covariance
        return cls(encoder, projector, (first, second, second), images_lib.PIXELS[config.pixels], *weights)

    def compare(self, z, mask, rng):
        """Return (weighted sum of `terms`, {"invariance", "hinge", "covariance"})."""
        metrics = dict(zip(("invariance", "hinge", "covariance"), terms(z, mask)))
        return sum(getattr(self, name) * value for name, value in metrics.items()), metrics
