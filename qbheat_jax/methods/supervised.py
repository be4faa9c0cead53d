"""Supervised classification: an encoder, its classifier, cross-entropy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.config import BELOW_ONE, FRACTION, Field, at_least, refuse
from qbheat_jax.methods import base
from qbheat_jax.models import registry
from qbheat_jax.models.ghost_batch_norm import grouped
from qbheat_jax.ops import colour
from qbheat_jax.ops import images as images_lib


def build_head(config):
    """Return the classifier module of the config's encoder; None if `head.classes` is 0."""
    classes = config.head.classes
    head = registry.head(config.encoder.name, classes, dtype=config.dtype) if classes else None
    return grouped(head, config.get("bn_groups", 1))


@dataclasses.dataclass(frozen=True)
class Supervised(base.Method):
    """Classification of augmented images. Crops and mirror images come with the batch.

    Args:
      encoder: Module of `models.registry`.
      head: Module of `registry.head`; None where there are no classes.
      pixels: How images are normalised.
      label_smoothing: Fraction of the target spread over all classes.
      jitter: Colour jitter in training.
    """

    encoder: Any
    head: Any = None
    pixels: images_lib.Pixels = images_lib.Pixels()
    label_smoothing: float = 0.0
    jitter: colour.Jitter = colour.Jitter()

    NAME = "supervised"
    TITLE = "supervised"
    STORY = "The encoder and a classifier train on images and their labels, as a reference for label-free methods."
    FIELDS = {
        "supervised.label_smoothing": Field(0.0, "share of the target spread over all classes", BELOW_ONE),
        "supervised.colour_jitter": Field(0.0, "random brightness, contrast and saturation, by up to this", FRACTION),
        "head.classes": Field(0, "supervised: classes of the classifier; 0: those of the data", at_least(0)),
    }
    classifies = True
    takes_clips = True

    @classmethod
    def build(cls, config, encoder, schedule):
        strength = config.supervised.colour_jitter
        if strength and encoder.takes_clips:
            refuse(
                "supervised.colour_jitter", strength, "0 with an encoder of clips, whose event frames have no colours"
            )
        jitter = colour.Jitter(strength, strength, strength)
        pixels = images_lib.PIXELS[config.pixels]
        return cls(encoder, build_head(config), pixels, config.supervised.label_smoothing, jitter)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "head"}, "batch_stats": likewise, of the parts that have any}."""
        encoder_rng, head_rng = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        made = {"encoder": self.encoder.init(encoder_rng, images)}
        if self.head is not None:
            features, out = self.encoder.apply(made["encoder"], images)
            made["head"] = self.head.init(head_rng, features, out, False)
        return {
            collection: {part: tree[collection] for part, tree in made.items() if collection in tree}
            for collection in ("params", "batch_stats")
        }

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean cross-entropy over the examples that count, (state, {"top1"})).

        batch: image uint8 [B, H, W, 3], label int32 [B], mask bool [B].
        """
        images = batch["image"]
        if train and self.jitter != colour.Jitter():
            rng, colour_rng = jax.random.split(rng)
            images = self.jitter(images.astype(jnp.float32) / 255.0, colour_rng) * 255.0
        logits, state = self._forward(params, state, self.pixels.normalise(images), rng, train)
        weight = batch["mask"].astype(jnp.float32) / jnp.maximum(batch["mask"].sum(), 1)
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing)
        loss = (optax.softmax_cross_entropy(logits, target) * weight).sum()
        return loss, (state, {"top1": ((logits.argmax(-1) == batch["label"]) * weight).sum()})

    def logits(self, variables, images):
        """Return the logits float32 [B, classes] of normalised images float32 [B, H, W, 3]."""
        return self._forward(variables["params"], variables.get("batch_stats", {}), images, None, False)[0]

    def _forward(self, params, state, images, rng, train):
        def variables(part):
            return {"params": params[part], **({"batch_stats": state[part]} if part in state else {})}

        if not train:
            features, out = self.encoder.apply(variables("encoder"), images)
            return self.head.apply(variables("head"), features, out, False), state
        keys = jax.random.split(rng, 4)
        options = [
            dict(mutable=["batch_stats"], rngs=dict(zip(("dropout", "drop_path"), k))) for k in (keys[:2], keys[2:])
        ]
        (features, out), encoder = self.encoder.apply(variables("encoder"), images, True, **options[0])
        logits, head = self.head.apply(variables("head"), features, out, True, **options[1])
        updated = {"encoder": encoder, "head": head}
        return logits, {part: tree["batch_stats"] for part, tree in updated.items() if "batch_stats" in tree}
