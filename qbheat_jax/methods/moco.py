"""MoCo-v2 (arXiv 1911.05722, 2003.04297): find the other view of an image among a queue of views of other images."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.config import BELOW_ONE, FRACTION, POSITIVE, RANGE, Field, refuse
from qbheat_jax.data.specs.views import ViewsSpec
from qbheat_jax.methods import base
from qbheat_jax.methods.common import ema, encoding
from qbheat_jax.methods.common.colours import Colours
from qbheat_jax.methods.common.encoding import encode, l2_normalize, pooled
from qbheat_jax.models.layers import BatchNorm
from qbheat_jax.ops import images as images_lib

PARTS = ("encoder", "projector")


class Projector(nn.Module):
    """MoCo-v2's head: two layers, the first as wide as its input. [B, C] -> float32 [B, width] of unit length.

    Args:
      width: Numbers in a key.
      standardise: Put a batch norm without gain and bias first (the paper has none).
    """

    width: int
    standardise: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        if self.standardise:
            x = BatchNorm(use_running_average=not train, use_scale=False, use_bias=False, name="norm")(x)
        x = jax.nn.relu(nn.Dense(x.shape[-1], name="fc1")(x))
        return l2_normalize(nn.Dense(self.width, name="fc2")(x))


def info_nce(query, key, queue, temperature):
    """Return InfoNCE of every example: cross-entropy of the positive among itself and the queue.

    Args:
      query, key: float32 [B, D] of unit length.
      queue: float32 [K, D] of unit length.
      temperature: Divisor of the similarities.

    Returns:
      (losses float32 [B], bool [B] whether the positive is nearer than every negative).
    """
    positive = (query * key).sum(-1, keepdims=True) / temperature
    negative = query @ queue.T / temperature
    losses = jax.nn.logsumexp(jnp.concatenate([positive, negative], -1), -1) - positive[:, 0]
    return losses, positive[:, 0] > negative.max(-1)


def enqueue(queue, pointer, key, mask):
    """Return (queue with its oldest keys replaced by the batch's, the next batch's pointer).

    Args:
      queue: [K, D], K a multiple of the batch.
      pointer: int32, the oldest key.
      key: [B, D].
      mask: bool [B]; False keeps the old key, since an image that could not be read is no negative.
    """
    batch = key.shape[0]
    old = jax.lax.dynamic_slice_in_dim(queue, pointer, batch)
    new = jnp.where(mask[:, None], key, old)
    return jax.lax.dynamic_update_slice_in_dim(queue, new, pointer, 0), (pointer + batch) % queue.shape[0]


@dataclasses.dataclass(frozen=True)
class MoCo(base.Method):
    """Momentum contrast of two random crops: `image` gives the query, `image2` the key.

    The state has `key_encoder` {"params", "batch_stats"} and `key_projector`, the momentum encoder; `queue` float32 [K, width];
    `pointer` int32, where the next keys go; `steps` int32, the steps done.

    Batch norm must not leak the answer. Query and key come from one batch, the negatives from earlier ones: keys normalised by
    their own batch's statistics can be matched without looking at the image. MoCo shuffles keys over GPUs, whose statistics
    differ. Here batch norm is over the global batch, so shuffling would change nothing. Instead the key encoder normalises by
    averages (EMAN, arXiv 2101.08482): its statistics follow the encoder's running statistics by the momentum update, as its
    parameters follow the parameters. A key then depends on its own image and the past alone, on any number of devices.

    Running statistics begin at (0, 1). To forget that, the momentum of step n is at most (1 + n) / (10 + n), for parameters
    and statistics alike (our choice).

    The age of the queue can leak the answer too. A small encoder's features are nearly equal at first; keys then drift more
    between steps than they differ between images, and the positive is the newest. `Projector.standardise` prevents it.

    Args:
      encoder: Module of `models.registry`.
      projector: Head of queries and keys.
      queue: Keys kept, a multiple of the batch.
      momentum: EMA momentum of the key encoder.
      temperature: Divisor of the similarities.
      colours: Augmentation on the device.
      pixels: How images are normalised.
    """

    encoder: Any
    projector: Projector = Projector(128)
    queue: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    colours: Colours = Colours()
    pixels: images_lib.Pixels = images_lib.Pixels()

    NAME = "moco"
    NOTE = "MoCo-v2"
    TITLE = "MoCo-v2"
    STORY = (
        "The encoder sees two random crops of each image in random colours. It learns to tell that both are of one image, "
        "against a queue of earlier crops (MoCo-v2). A moving average of the encoder gives the keys. No labels are used."
    )
    FIELDS = {
        "moco.queue": Field(65536, "keys kept to compare with, a multiple of batch_size", POSITIVE),
        "moco.momentum": Field(0.999, "EMA momentum of the key encoder; use about 0.99 for short runs", BELOW_ONE),
        "moco.temperature": Field(0.2, "divisor of the similarities", POSITIVE),
        "moco.width": Field(128, "dimension of a key", POSITIVE),
        "moco.standardise": Field(
            False, "batch norm of the features before the projector, for small encoders (our choice)"
        ),
        "moco.blur_share": Field(0.5, "fraction of images that are blurred", FRACTION),
        "moco.blur_sigma": Field((0.1, 2.0), "range of the blur in pixels (the paper's, of 224 x 224 images)", RANGE),
    }
    sharded_like_params = ("key_encoder", "key_projector")

    @classmethod
    def check(cls, values):
        if values["accumulate"] > 1:
            refuse("accumulate", values["accumulate"], "1 with objective='moco', whose key encoder follows once a step")
        queue, batch = values["moco.queue"], values["batch_size"]
        if queue % batch:
            refuse("moco.queue", queue, f"a multiple of batch_size={batch}")

    @classmethod
    def build(cls, config, encoder, schedule):
        fields = config.moco
        colours = Colours(blur_prob=fields.blur_share, sigma=fields.blur_sigma)
        projector = Projector(fields.width, fields.standardise)
        pixels = images_lib.PIXELS[config.pixels]
        return cls(encoder, projector, fields.queue, fields.momentum, fields.temperature, colours, pixels)

    @classmethod
    def batch_spec(cls, config):
        return ViewsSpec.of(config, views=2)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "projector"}, "batch_stats": state}; the key encoder starts as a copy."""
        keys = jax.random.split(rng, 3)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(keys[0], images)
        projector = self.projector.init(keys[1], pooled(*self.encoder.apply(encoder, images)))
        variables = self.init_copies(encoding.collections({"encoder": encoder, "projector": projector}))
        queue = l2_normalize(jax.random.normal(keys[2], (self.queue, self.projector.width)))
        counters = {"pointer": jnp.zeros((), jnp.int32), "steps": jnp.zeros((), jnp.int32)}
        return {**variables, "batch_stats": {**variables["batch_stats"], "queue": queue, **counters}}

    def init_copies(self, variables):
        """As `Method.init_copies`: the key encoder's parts are copies of the given ones."""
        return ema.with_copies(variables, PARTS, "key_")

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean InfoNCE of the examples that count, (state, {"top1", and those of `encoding.spread_of`})).

        batch: image, image2 uint8 [B, H, W, 3], mask bool [B]. Without `image2`, as in evaluation, both views are of the same
        crop and differ in colour alone. rng None draws the same colours every time. Only training enqueues keys. `top1` is the
        fraction of positives that are nearer than every negative.
        """
        keys = jax.random.split(jax.random.key(0) if rng is None else rng, 3)
        # Views have an axis of their own: joined along the batch, devices would exchange images.
        crops = jnp.stack([batch["image"], batch["image2" if "image2" in batch else "image"]])
        first, second = jax.vmap(self._view)(crops, keys[:2])
        if train:
            momentum = jnp.minimum(self.momentum, ema.early(state["steps"].astype(jnp.float32)))
            state = ema.followed(params, state, PARTS, "key_", momentum)
        key = jax.lax.stop_gradient(self._key(state, second))
        features, out, state = encode(self.encoder, params, state, first, keys[2], train)
        vectors = pooled(features, out)
        query, state = encoding.project(self.projector, params, state, vectors, train)
        losses, nearest = info_nce(query, key, state["queue"], self.temperature)
        weight = batch["mask"].astype(jnp.float32) / jnp.maximum(batch["mask"].sum(), 1)
        if train:
            queue, pointer = enqueue(state["queue"], state["pointer"], key, batch["mask"])
            state = {**state, "queue": queue, "pointer": pointer, "steps": state["steps"] + 1}
        figures = {"top1": (nearest * weight).sum(), **encoding.spread_of(vectors, batch, train)}
        return (losses * weight).sum(), (state, figures)

    def _view(self, images, rng):
        """Augment and normalise uint8 [B, H, W, 3]."""
        coloured = self.colours(images.astype(jnp.float32) / 255.0, rng)
        return self.pixels.normalise(coloured * 255.0)

    def _key(self, state, images):
        return self.projector.apply(state["key_projector"], pooled(*self.encoder.apply(state["key_encoder"], images)))
