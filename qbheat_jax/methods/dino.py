"""DINO (arXiv 2104.14294): a student predicts from every crop the prototypes that its teacher gives another, larger crop."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.config import BELOW_ONE, POSITIVE, Field, at_least, refuse
from qbheat_jax.data.specs import crops
from qbheat_jax.methods import base
from qbheat_jax.methods.common import ema, encoding, views
from qbheat_jax.methods.common.encoding import l2_normalize
from qbheat_jax.models.layers import Dense, gelu, torch_uniform
from qbheat_jax.ops import images as images_lib

PARTS = ("encoder", "projector")


class Head(nn.Module):
    """DINO's head: three layers, then cosines with prototypes. [B, C] -> float32 [B, prototypes].

    Attributes:
      hidden, bottleneck: Units of the first two layers and of the third, whose output has length 1.
      gain: Learn the length of each prototype instead of fixing it to 1.
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    gain: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.initializers.truncated_normal(0.02)
        x = x.astype(self.dtype)
        for n in (1, 2):
            x = gelu(Dense(self.hidden, dtype=self.dtype, kernel_init=init, name=f"fc{n}")(x))
        x = l2_normalize(Dense(self.bottleneck, dtype=jnp.float32, kernel_init=init, name="fc3")(x))
        last = self.param("last", torch_uniform(self.bottleneck), (self.bottleneck, self.prototypes), jnp.float32)
        last = last * jax.lax.rsqrt(jnp.square(last).sum(0))
        if self.gain:
            last = last * self.param("gain", nn.initializers.ones, (self.prototypes,), jnp.float32)
        return x @ last


def cross_entropy(student, teacher):
    """Return the mean cross-entropy over all pairs of a view and another crop, float32 [B].

    Args:
      student: Logits float32 [B, V, K] of all crops, the views first.
      teacher: Probabilities float32 [B, 2, K] of the views.
    """
    logs = jax.nn.log_softmax(student)
    targets = teacher.shape[1]
    every = (teacher.sum(1) * logs.sum(1)).sum(-1)
    same = (teacher * logs[:, :targets]).sum((1, 2))
    return (same - every) / (targets * (student.shape[1] - 1))


@dataclasses.dataclass(frozen=True)
class DINO(base.Method):
    """Self-distillation without labels.

    The state has `teacher_encoder` and `teacher_projector`, see `ema.followed`; `centre` float32 [K], a running mean of the
    teacher's logits; `steps` int32, the steps done.

    Args:
      encoder: Module of `models.registry`.
      projector: Head.
      momentum: EMA momentum of the teacher at the start; it rises to 1 by a cosine.
      temperatures: Of the student, of the teacher at the start, of the teacher after the warm-up.
      warmup, frozen: Steps until the teacher has its last temperature, and in which the prototypes stay as they are.
      total_steps: Length of the run; None where it is not known, the momentum is then constant.
      centring: Momentum of the centre.
      colours: `Colours` of the first view, the second view and the local crops.
      pixels: How images are normalised.
    """

    encoder: Any
    projector: Head
    momentum: float
    temperatures: tuple
    warmup: int
    frozen: int
    total_steps: int | None
    centring: float
    colours: tuple
    pixels: images_lib.Pixels

    NAME, NOTE = "dino", "DINO"
    TITLE = "DINO"
    STORY = (
        "The encoder sees large and small random crops of each image in random colours. From every crop it predicts which "
        "prototypes its own moving average, the teacher, assigns to another large crop (DINO). No labels are used."
    )
    FIELDS = {
        **views.FIELDS,
        **crops.FIELDS,
        "dino.prototypes": Field(65536, "prototypes, the outputs of the head", POSITIVE),
        "dino.hidden": Field(2048, "hidden units of the head", POSITIVE),
        "dino.bottleneck": Field(256, "numbers that are compared with a prototype", POSITIVE),
        "dino.gain": Field(False, "learn the length of each prototype (better for ViT-S in the paper, less stable)"),
        "dino.momentum": Field(0.996, "EMA momentum of the teacher at the start; it rises to 1 by a cosine", BELOW_ONE),
        "dino.student_temperature": Field(0.1, "temperature of the student", POSITIVE),
        "dino.teacher_temperature": Field(0.04, "temperature of the teacher after its warm-up", POSITIVE),
        "dino.warmup_temperature": Field(0.04, "temperature of the teacher at the start", POSITIVE),
        "dino.warmup_epochs": Field(0.0, "epochs of the linear warm-up of the teacher's temperature", at_least(0)),
        "dino.frozen_epochs": Field(1.0, "epochs at the start in which the prototypes are not trained", at_least(0)),
        "dino.centring": Field(0.9, "momentum of the mean that is taken from the teacher's logits", BELOW_ONE),
    }
    sharded_like_params = ("teacher_encoder", "teacher_projector")

    @classmethod
    def check(cls, values):
        crops.check(values)
        if values["accumulate"] > 1:
            refuse("accumulate", values["accumulate"], "1 with objective='dino', whose teacher follows once a step")

    @classmethod
    def build(cls, config, encoder, schedule):
        views.check_local(config, encoder)
        fields, strengths = config.dino, (0.4, 0.4, 0.2, 0.1)
        head = Head(fields.prototypes, fields.hidden, fields.bottleneck, fields.gain, jnp.dtype(config.dtype))
        warmup, frozen = (
            round(epochs * (schedule.steps_per_epoch or 0)) for epochs in (fields.warmup_epochs, fields.frozen_epochs)
        )
        temperatures = fields.student_temperature, fields.warmup_temperature, fields.teacher_temperature
        colours = tuple(views.colours(config, strengths, *probs) for probs in ((1.0, 0.0), (0.1, 0.2), (0.5, 0.0)))
        return cls(
            encoder,
            head,
            fields.momentum,
            temperatures,
            warmup,
            frozen,
            schedule.total_steps,
            fields.centring,
            colours,
            images_lib.PIXELS[config.pixels],
        )

    @classmethod
    def batch_spec(cls, config):
        return crops.CropsSpec.of(config, views=views.VIEWS)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "projector"}, "batch_stats": state}; the teacher starts as a copy."""
        keys = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        encoder = self.encoder.init(keys[0], images)
        projector = self.projector.init(keys[1], encoding.pooled(*self.encoder.apply(encoder, images)))
        variables = self.init_copies(encoding.collections({"encoder": encoder, "projector": projector}))
        own = {"centre": jnp.zeros(self.projector.prototypes), "steps": jnp.zeros((), jnp.int32)}
        return {**variables, "batch_stats": {**variables["batch_stats"], **own}}

    def init_copies(self, variables):
        """As `Method.init_copies`: the teacher's parts are copies of the given ones."""
        return ema.with_copies(variables, PARTS, "teacher_")

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean `cross_entropy` of the images that count, (state, metrics)).

        batch: image, image2 and local crops image3, ... uint8 [B, H, W, 3], mask bool [B]. In evaluation there is one crop,
        see `views.augmented`. metrics: `teacher_entropy` of its probabilities, log(prototypes) where they are uniform and 0
        where they are certain; those of `encoding.spread_of` of the first view's features.
        """
        keys = jax.random.split(jax.random.key(0) if rng is None else rng)
        groups = views.augmented(batch, self.colours, self.pixels, keys[0])
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        steps = state["steps"].astype(jnp.float32)
        if train:
            state = ema.followed(params, state, PARTS, "teacher_", self.momentum_at(steps))
        given = jax.lax.stop_gradient(self._teacher(state, groups[0]))
        _, first, last = self.temperatures
        temperature = first + (last - first) * jnp.clip(steps / max(1, self.warmup), float(not self.warmup), 1.0)
        teacher = jax.nn.softmax((given - state["centre"]) / temperature)
        features, state = views.encode(self.encoder, params, state, groups, keys[1], train)
        held = {**params, "projector": self._held(params["projector"], steps)}
        logits, state = views.project(self.projector, held, state, features, train)
        losses = cross_entropy(logits / self.temperatures[0], teacher)
        entropy = -(teacher * jnp.log(jnp.maximum(teacher, 1e-30))).sum(-1).mean(1)
        if train:
            mean = (given.mean(1) * weight[:, None]).sum(0)
            mean = jnp.where(batch["mask"].any(), mean, state["centre"])
            centre = ema.ema_update(state["centre"], mean, self.centring)
            state = {**state, "centre": centre, "steps": state["steps"] + 1}
        metrics = {"teacher_entropy": (entropy * weight).sum(), **encoding.spread_of(features[:, 0], batch, train)}
        return (losses * weight).sum(), (state, metrics)

    def momentum_at(self, steps):
        """Return the teacher's momentum at a step."""
        if self.total_steps is None:
            return self.momentum
        return 1.0 - (1.0 - self.momentum) * (jnp.cos(jnp.pi * steps / self.total_steps) + 1.0) / 2.0

    def _teacher(self, state, images):
        """Return the teacher's logits float32 [B, 2, K] of normalised views [B, 2, S, S, 3]."""
        features = encoding.pooled(*self.encoder.apply(state["teacher_encoder"], views.join(images)))
        return views.apart(self.projector.apply(state["teacher_projector"], features), images.shape[1])

    def _held(self, head, steps):
        """Return the head's parameters, the prototypes without a gradient in the first steps."""
        last = {
            name: jnp.where(steps < self.frozen, jax.lax.stop_gradient(head[name]), head[name])
            for name in ("last", "gain")
            if name in head
        }
        return {**head, **last}
