"""Supervised classification: an encoder, its classifier, cross-entropy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.config import BELOW_ONE, FRACTION, Field, at_least, refuse
from qbheat_jax.methods import base
from qbheat_jax.methods.common.encoding import collections, pooled, spread_of
from qbheat_jax.methods.common.mixing import CUTMIX, MIXUP, Mixing
from qbheat_jax.models import registry
from qbheat_jax.models.ghost_batch_norm import grouped
from qbheat_jax.ops import colour
from qbheat_jax.ops import images as images_lib
from qbheat_jax.ops.rand_augment import MOST, Erasing, RandAugment

RAND_AUGMENT = Field(
    0.0,
    "magnitude of RandAugment, two random operations an image of timm's increasing set; 9 is usual, 0: none",
    (lambda v: 0 <= v <= MOST, f"a number from 0 to {MOST:g}"),
)
ERASING = Field(0.0, "probability that a random box of an image is replaced by noise", FRACTION)


def build_head(config):
    """Return the classifier module of the config's encoder; None if `head.classes` is 0."""
    classes = config.head.classes
    head = registry.head(config.encoder.name, classes, dtype=config.dtype) if classes else None
    return grouped(head, config.get("bn_groups", 1))


def augmentations(settings, encoder, section=""):
    """Return the arguments of `Supervised` that the fields `rand_augment` and `erasing` of a section of a config stand for.

    Raises UserError for an augmentation of images with an encoder of clips, whose event frames have no colours.
    """
    for name in ("colour_jitter", "rand_augment", "erasing"):
        if encoder.takes_clips and settings.get(name):
            refuse(section + name, settings[name], "0 with an encoder of clips")
    return {
        "rand_augment": RandAugment(settings.rand_augment) if settings.rand_augment else None,
        "erasing": Erasing(settings.erasing) if settings.erasing else None,
    }


@dataclasses.dataclass(frozen=True)
class Supervised(base.Method):
    """Classification of augmented images. Crops and mirror images come with the batch.

    Args:
      encoder: Module of `models.registry`.
      head: Module of `registry.head`; None where there are no classes.
      pixels: How images are normalised.
      label_smoothing: Fraction of the target spread over all classes.
      jitter: Colour jitter in training.
      mixing: Mixup and cutmix in training.
      rand_augment: RandAugment in training, after the jitter; None for none.
      erasing: Random erasing in training, of normalised images; None for none.
    """

    encoder: Any
    head: Any = None
    pixels: images_lib.Pixels = images_lib.Pixels()
    label_smoothing: float = 0.0
    jitter: colour.Jitter = colour.Jitter()
    mixing: Mixing = Mixing()
    rand_augment: RandAugment | None = None
    erasing: Erasing | None = None

    NAME = "supervised"
    TITLE = "supervised"
    STORY = "The encoder and a classifier train on images and their labels, as a reference for label-free methods."
    FIELDS = {
        "supervised.label_smoothing": Field(0.0, "share of the target spread over all classes", BELOW_ONE),
        "supervised.colour_jitter": Field(0.0, "random brightness, contrast and saturation, by up to this", FRACTION),
        "supervised.mixup": MIXUP,
        "supervised.cutmix": CUTMIX,
        "supervised.rand_augment": RAND_AUGMENT,
        "supervised.erasing": ERASING,
        "head.classes": Field(0, "supervised: classes of the classifier; 0: those of the data", at_least(0)),
    }
    classifies = True
    takes_clips = True

    @classmethod
    def build(cls, config, encoder, schedule):
        settings, pixels = config.supervised, images_lib.PIXELS[config.pixels]
        jitter = colour.Jitter(*3 * (settings.colour_jitter,))
        mixing = Mixing(settings.mixup, settings.cutmix)
        head = build_head(config)
        augmented = augmentations(settings, encoder, "supervised.")
        return cls(encoder, head, pixels, settings.label_smoothing, jitter, mixing, **augmented)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "head"}, "batch_stats": likewise, of the parts that have any}."""
        encoder_rng, head_rng = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        made = {"encoder": self.encoder.init(encoder_rng, images)}
        if self.head is not None:
            features, out = self.encoder.apply(made["encoder"], images)
            made["head"] = self.head.init(head_rng, features, out, False)
        return collections(made)

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean cross-entropy over the examples that count, (state, {"top1", and those of `encoding.spread_of`})).

        batch: image uint8 [B, H, W, 3], label int32 [B], mask bool [B]. For mixed images `top1` counts the class with the
        larger weight, and both images of a pair must count.
        """
        images, counts = batch["image"], batch["mask"]
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], self.head.classes), self.label_smoothing)
        mixing = self.mixing if train else None
        if mixing:
            mix_rng, which_rng, rng = jax.random.split(rng, 3)
        images, rng = self._augment(images, rng) if train else (self.pixels.normalise(images), rng)
        if mixing:
            images, targets = mixing(images, targets, mix_rng, which_rng)
            counts = counts & counts[::-1]
        logits, vectors, state = self._forward(params, state, images, rng, train)
        weight = counts.astype(jnp.float32) / jnp.maximum(counts.sum(), 1)
        loss = (optax.softmax_cross_entropy(logits, targets) * weight).sum()
        top1 = ((logits.argmax(-1) == targets.argmax(-1)) * weight).sum()
        return loss, (state, {"top1": top1, **spread_of(vectors, batch, train)})

    def _augment(self, images, rng):
        """Return (normalised float32, the key that is left) of images uint8 [B, H, W, 3]."""
        if self.jitter != colour.Jitter():
            rng, colour_rng = jax.random.split(rng)
            images = self.jitter(images.astype(jnp.float32) / 255.0, colour_rng) * 255.0
        if self.rand_augment is not None:
            rng, augment_rng = jax.random.split(rng)
            images = self.rand_augment(jnp.round(images), augment_rng)
        images = self.pixels.normalise(images)
        if self.erasing is not None:
            rng, erase_rng = jax.random.split(rng)
            images = self.erasing(images, erase_rng)
        return images, rng

    def logits(self, variables, images):
        """Return the logits float32 [B, classes] of normalised images float32 [B, H, W, 3]."""
        return self._forward(variables["params"], variables.get("batch_stats", {}), images, None, False)[0]

    def _forward(self, params, state, images, rng, train):
        """Return (logits float32 [B, classes], pooled features float32 [B, C], state)."""

        def variables(part):
            return {"params": params[part], **({"batch_stats": state[part]} if part in state else {})}

        if not train:
            features, out = self.encoder.apply(variables("encoder"), images)
            return self.head.apply(variables("head"), features, out, False), pooled(features, out), state
        keys = jax.random.split(rng, 4)
        options = [
            dict(mutable=["batch_stats"], rngs=dict(zip(("dropout", "drop_path"), k))) for k in (keys[:2], keys[2:])
        ]
        (features, out), encoder = self.encoder.apply(variables("encoder"), images, True, **options[0])
        logits, head = self.head.apply(variables("head"), features, out, True, **options[1])
        updated = {"encoder": encoder, "head": head}
        state = {part: tree["batch_stats"] for part, tree in updated.items() if "batch_stats" in tree}
        return logits, pooled(features, out), state
