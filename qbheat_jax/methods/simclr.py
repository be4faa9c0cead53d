"""SimCLR (arXiv 2002.05709): find the other view of an image among all views of a batch."""

import dataclasses

import jax
import jax.numpy as jnp

from qbheat_jax.config import POSITIVE, Field
from qbheat_jax.methods.common import views
from qbheat_jax.methods.common.encoding import l2_normalize
from qbheat_jax.methods.common.joint import JointEmbedding, Projector
from qbheat_jax.ops import images as images_lib


def nt_xent(z, mask, temperature):
    """Return the cross-entropy of each view's other view among all views of the batch but itself.

    Args:
      z: float32 [B, 2, D].
      mask: bool [B]; views of other images are no negatives.
      temperature: Divisor of the cosines.

    Returns:
      (losses float32 [B, 2], bool [B, 2] whether the other view is the nearest).
    """
    rows = views.join(l2_normalize(z))
    counts, numbers = jnp.repeat(mask, 2), jnp.arange(len(rows))
    logits = rows @ rows.T / temperature
    logits = jnp.where((numbers[:, None] != numbers) & counts, logits, -1e9)
    positive = (rows * views.join(l2_normalize(z)[:, ::-1])).sum(-1) / temperature
    losses = jax.nn.logsumexp(logits, -1) - positive
    return views.apart(losses, 2), views.apart(logits.argmax(-1) == (numbers ^ 1), 2)


@dataclasses.dataclass(frozen=True)
class SimCLR(JointEmbedding):
    """Contrast within the batch, as of `JointEmbedding`. temperature: Divisor of the cosines."""

    temperature: float = 0.1

    NAME, NOTE = "simclr", "SimCLR"
    TITLE = "SimCLR"
    STORY = (
        "The encoder sees two random crops of each image in random colours. It learns to tell which crops are of one image, "
        "against all other crops of the batch (SimCLR). No labels are used."
    )
    FIELDS = {
        **views.FIELDS,
        "simclr.temperature": Field(0.1, "divisor of the cosines", POSITIVE),
        "simclr.hidden": Field(2048, "hidden units of the projector", POSITIVE),
        "simclr.width": Field(128, "dimension of a projection", POSITIVE),
    }

    @classmethod
    def build(cls, config, encoder, schedule):
        fields = config.simclr
        projector = Projector((fields.hidden, fields.width), jnp.dtype(config.dtype))
        colours = (views.colours(config, (0.8, 0.8, 0.8, 0.2)),) * 3
        return cls(encoder, projector, colours, images_lib.PIXELS[config.pixels], fields.temperature)

    def compare(self, z, mask, rng):
        """Return (mean `nt_xent` over the images that count, {"top1": share of views whose other view is the nearest})."""
        losses, nearest = nt_xent(z, mask, self.temperature)
        weight = mask / jnp.maximum(mask.sum(), 1)
        return (losses.mean(1) * weight).sum(), {"top1": (nearest.mean(1) * weight).sum()}
