"""LeJEPA (arXiv 2511.08544): every crop predicts the mean of the views, and projections are made an isotropic Gaussian.

SIGReg makes them so. It tests random one-dimensional projections against a standard normal by the statistic of Epps and
Pulley, a weighted distance of characteristic functions. There is no teacher, no stop-gradient and no schedule.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.config import FRACTION, POSITIVE, Field, at_least
from qbheat_jax.data.specs import crops
from qbheat_jax.methods.common import encoding, views
from qbheat_jax.methods.common.joint import JointEmbedding, Projector
from qbheat_jax.ops import images as images_lib

LAST = (
    3.0  # of the interval [0, LAST] in which characteristic functions are compared; they are even functions or odd ones
)


def quadrature(knots):
    """Return (knots float32 [K], weights float32 [K]) of the integral over [-LAST, LAST] of exp(-t^2 / 2) f(t), f even."""
    t = np.linspace(0.0, LAST, knots)
    weights = np.full(knots, 2.0 * LAST / (knots - 1))
    weights[[0, -1]] /= 2
    return t.astype(np.float32), (weights * np.exp(-(t**2) / 2)).astype(np.float32)


def epps_pulley(x, mask, knots):
    """Return the Epps-Pulley statistic of each column against a standard normal, float32 [..., M].

    It is n times the integral of |empirical characteristic function - exp(-t^2 / 2)|^2 exp(-t^2 / 2).

    Args:
      x: float32 [B, ..., M].
      mask: bool [B], the n examples that count.
      knots: Points of the trapezoidal rule.
    """
    count = jnp.maximum(mask.sum(), 1)
    weight = (mask / count).reshape(-1, *(1,) * (x.ndim - 1))

    @jax.checkpoint  # one knot's values at a time, in the gradient too
    def distance(t):
        real, imaginary = (jnp.cos(t * x) * weight).sum(0), (jnp.sin(t * x) * weight).sum(0)
        return jnp.square(real - jnp.exp(-jnp.square(t) / 2)) + jnp.square(imaginary)

    t, weights = quadrature(knots)
    return jnp.tensordot(weights, jax.lax.map(distance, jnp.asarray(t)), 1) * count


@dataclasses.dataclass(frozen=True)
class LeJEPA(JointEmbedding):
    """Prediction of the views' mean with SIGReg, as of `JointEmbedding`.

    Args:
      weight: lambda, the weight of SIGReg; that of the prediction is 1 - lambda.
      slices: Random directions, drawn anew at every step.
      knots: As of `epps_pulley`.
    """

    weight: float = 0.05
    slices: int = 1024
    knots: int = 17

    NAME, NOTE = "lejepa", "LeJEPA: SIGReg"
    TITLE = "LeJEPA"
    STORY = (
        "The encoder sees several random crops of each image in random colours. The projection of each predicts the mean of "
        "the two large ones, while random directions of all projections are made normal (LeJEPA). No labels are used."
    )
    FIELDS = {
        **views.FIELDS,
        **crops.FIELDS,
        "lejepa.weight": Field(0.05, "lambda, weight of SIGReg; that of the prediction is 1 - lambda", FRACTION),
        "lejepa.slices": Field(1024, "random directions that are tested", POSITIVE),
        "lejepa.knots": Field(17, "points of each test's integral", at_least(2)),
        "lejepa.hidden": Field(2048, "units of both hidden layers of the projector", POSITIVE),
        "lejepa.width": Field(64, "dimension of a projection", POSITIVE),
    }

    @classmethod
    def check(cls, values):
        super().check(values)
        crops.check(values)

    @classmethod
    def build(cls, config, encoder, schedule):
        views.check_local(config, encoder)
        fields = config.lejepa
        projector = Projector((fields.hidden, fields.hidden, fields.width), jnp.dtype(config.dtype))
        colours = (views.colours(config, (0.8, 0.8, 0.8, 0.2), 0.5, 0.2),) * 3
        settings = fields.weight, fields.slices, fields.knots
        return cls(encoder, projector, colours, images_lib.PIXELS[config.pixels], *settings)

    @classmethod
    def batch_spec(cls, config):
        return crops.CropsSpec.of(config, views=views.VIEWS)

    def compare(self, z, mask, rng):
        """Return ((1 - lambda) prediction + lambda SIGReg, {"prediction", "sigreg"}).

        prediction: mean squared distance of all crops from the mean of the views. sigreg: mean statistic over crops and
        directions.
        """
        weight = mask / jnp.maximum(mask.sum(), 1)
        centre = z[:, : views.VIEWS].mean(1, keepdims=True)
        prediction = (jnp.square(z - centre).mean((1, 2)) * weight).sum()
        directions = encoding.l2_normalize(jax.random.normal(rng, (self.slices, z.shape[-1]))).T
        sigreg = epps_pulley(z @ directions, mask, self.knots).mean()
        loss = (1 - self.weight) * prediction + self.weight * sigreg
        return loss, {"prediction": prediction, "sigreg": sigreg}
