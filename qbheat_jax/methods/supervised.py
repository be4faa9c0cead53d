"""Supervised classification: an encoder, its classifier, cross-entropy. Also what a ported checkpoint is built as."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qbheat_jax.ops import colour
from qbheat_jax.ops import images as images_lib


@dataclasses.dataclass(frozen=True)
class Supervised:
    """The objective. `encoder`: of `models.registry`, `head`: of `registry.head`, None where there are no classes.

    `label_smoothing`: the share of the target spread over all classes; `jitter`: of the colours, in training. Crops and
    mirror images come with the batch.
    """

    encoder: Any
    head: Any = None
    pixels: images_lib.Pixels = images_lib.Pixels()
    label_smoothing: float = 0.0
    jitter: colour.Jitter = colour.Jitter()

    def init(self, rng, batch):
        """Variables {"params": {"encoder", "head"}, "batch_stats": likewise, without what has none}."""
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

    def loss(self, params, mutable, batch, rng, train=True):
        """Mean cross-entropy over the examples that count -> (float32 loss, (mutable, {"top1"})).

        batch: image uint8 [B, H, W, 3], label int32[B], mask bool[B] (False: the example does not count).
        """
        images = batch["image"]
        if train and self.jitter != colour.Jitter():
            rng, colour_rng = jax.random.split(rng)
            images = self.jitter(images.astype(jnp.float32) / 255.0, colour_rng) * 255.0
        logits, mutable = self._forward(params, mutable, self.pixels.normalise(images), rng, train)
        weight = batch["mask"].astype(jnp.float32) / jnp.maximum(batch["mask"].sum(), 1)
        target = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing)
        loss = (optax.softmax_cross_entropy(logits, target) * weight).sum()
        return loss, (mutable, {"top1": ((logits.argmax(-1) == batch["label"]) * weight).sum()})

    def logits(self, variables, images):
        """Normalised images float32 [B, H, W, 3] -> float32 [B, classes]."""
        return self._forward(variables["params"], variables.get("batch_stats", {}), images, None, False)[0]

    def _forward(self, params, mutable, images, rng, train):
        def variables(part):
            return {"params": params[part], **({"batch_stats": mutable[part]} if part in mutable else {})}

        if not train:
            features, out = self.encoder.apply(variables("encoder"), images)
            return self.head.apply(variables("head"), features, out, False), mutable
        keys = jax.random.split(rng, 4)
        options = [
            dict(mutable=["batch_stats"], rngs=dict(zip(("dropout", "drop_path"), k))) for k in (keys[:2], keys[2:])
        ]
        (features, out), encoder = self.encoder.apply(variables("encoder"), images, True, **options[0])
        logits, head = self.head.apply(variables("head"), features, out, True, **options[1])
        updated = {"encoder": encoder, "head": head}
        return logits, {part: tree["batch_stats"] for part, tree in updated.items() if "batch_stats" in tree}
