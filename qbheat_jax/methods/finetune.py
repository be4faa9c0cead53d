"""Fine-tuning: supervised classification of mixed images (mixup, cutmix)."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.config import BELOW_ONE, Field, at_least
from qbheat_jax.methods import base
from qbheat_jax.methods.supervised import Supervised
from qbheat_jax.models import registry
from qbheat_jax.models.ghost_batch_norm import grouped
from qbheat_jax.ops import images as images_lib


def mixup(images, targets, key, alpha):
    """Return weighted means of images and targets in pairs (Zhang et al., arXiv 1710.09412).

    images [B, H, W, C], targets [B, classes] -> the same shapes. One weight a batch, from Beta(alpha, alpha); image i is
    paired with image B - 1 - i.
    """
    weight = jax.random.beta(key, alpha, alpha)

    def mix(x):
        return weight * x + (1.0 - weight) * x[::-1]

    return mix(images), mix(targets)


def cutmix(images, targets, key, alpha):
    """Return images with a box pasted from their partner (Yun et al., arXiv 1905.04899); shapes and pairs as in `mixup`.

    All frames of a clip have the same box.
    One box a batch, with the image's aspect, a fraction 1 - w of its area with w from Beta(alpha, alpha), and any centre.
    Targets are weighted by the area of the box within the image.
    """
    height, width = images.shape[-3:-1]
    weight_key, *centres = jax.random.split(key, 3)
    side = jnp.sqrt(1.0 - jax.random.beta(weight_key, alpha, alpha))

    def inside(n, key):
        return jnp.abs(jnp.arange(n) + 0.5 - n * jax.random.uniform(key)) < side * n / 2

    box = inside(height, centres[0])[:, None] & inside(width, centres[1])
    weight = 1.0 - box.mean()
    images = jnp.where(box[..., None], images[::-1], images)
    return images, weight * targets + (1.0 - weight) * targets[::-1]


@dataclasses.dataclass(frozen=True)
class Finetune(Supervised):
    """`Supervised` with mixup and cutmix of these alphas (0: off); with both, every step takes one of them."""

    mixup: float = 0.0
    cutmix: float = 0.0

    NAME = "finetune"
    TASK = base.FINETUNE
    TITLE = "fine-tuned classifier"
    STORY = "encoder and linear classifier trained end to end"
    FIELDS = {
        "head.classes": Field(0, "set from the data", at_least(0)),
        "head.dropout": Field(0.0, "dropout before the last layer", BELOW_ONE),
        "mixup": Field(0.0, "alpha of mixup, images averaged in pairs; 0: none", at_least(0)),
        "cutmix": Field(0.0, "alpha of cutmix, a box of one image put into another; 0: none", at_least(0)),
        "label_smoothing": Field(0.1, "share of the target spread over all classes", BELOW_ONE),
    }

    @classmethod
    def build(cls, config, encoder, schedule):
        head = registry.head(config.encoder.name, config.head.classes, config.head.dropout, config.dtype)
        mixing = {name: config[name] for name in ("label_smoothing", "mixup", "cutmix")}
        return cls(encoder, grouped(head, config.bn_groups), images_lib.PIXELS[config.pixels], **mixing)

    def loss(self, params, state, batch, rng, train=True):
        """As `Supervised.loss`. For mixed images `top1` counts the class with the larger weight."""
        if not train or not (self.mixup or self.cutmix):
            return super().loss(params, state, batch, rng, train)
        mix_rng, which_rng, rng = jax.random.split(rng, 3)
        classes = self.head.classes
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], classes), self.label_smoothing)
        images = self.pixels.normalise(batch["image"])
        images, targets = self._mix(images, targets, mix_rng, which_rng)
        logits, state = self._forward(params, state, images, rng, True)
        counts = (batch["mask"] & batch["mask"][::-1]).astype(jnp.float32)  # both images of a pair must count
        weight = counts / jnp.maximum(counts.sum(), 1.0)
        loss = (optax.softmax_cross_entropy(logits, targets) * weight).sum()
        return loss, (state, {"top1": ((logits.argmax(-1) == targets.argmax(-1)) * weight).sum()})

    def _mix(self, images, targets, key, which):
        if not self.cutmix:
            return mixup(images, targets, key, self.mixup)
        if not self.mixup:
            return cutmix(images, targets, key, self.cutmix)
        return jax.lax.cond(
            jax.random.bernoulli(which),
            lambda: mixup(images, targets, key, self.mixup),
            lambda: cutmix(images, targets, key, self.cutmix),
        )
