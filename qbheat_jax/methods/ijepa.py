"""I-JEPA (arXiv 2301.08243): a ViT sees a part of an image, and a predictor predicts a teacher's features of other parts."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from qbheat_jax.config import BELOW_ONE, FRACTION_RANGE, POSITIVE, RANGE, Field, refuse
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.methods.common import decoding, ema, encoding
from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, remat, sincos_2d
from qbheat_jax.ops import images as images_lib


class Predictor(nn.Module):
    """Transformer from the context's features to those of each block of cells, which are predicted one block at a time.

    context [B, n, C], keep int32 [B, n] its cells, blocks int32 [B, M, k] cells; grid (h, w) -> float32 [B, M, k, outputs].
    A learnt token stands for every cell of a block, and all cells get a position code.
    """

    outputs: int
    width: int = 384
    depth: int = 6
    heads: int = 12
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, context, keep, blocks, grid, train=False):
        (batch, count, _), (_, many, cells) = context.shape, blocks.shape
        position = jnp.asarray(sincos_2d(*grid, self.width).reshape(-1, self.width), self.dtype)
        embed = Dense(self.width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name="embed")
        token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        seen = jnp.broadcast_to((embed(context) + position[keep])[:, None], (batch, many, count, self.width))
        x = jnp.concatenate([seen, token.astype(self.dtype) + position[blocks]], 2)
        x = x.reshape(batch * many, count + cells, self.width)
        block = remat(TransformerBlock, self.remat)
        for n in range(self.depth):
            x = block(self.heads, dtype=self.dtype, name=f"block{n}")(x, train)
        x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, count:])
        x = Dense(self.outputs, dtype=jnp.float32, kernel_init=nn.initializers.xavier_uniform(), name="features")(x)
        return x.reshape(batch, many, cells, self.outputs)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Multi-block masks of a square grid, of fixed sizes.

    The paper draws the blocks' size for each batch, and cuts all lists of cells to the shortest of the batch. Here both sizes
    are those of the run, since shapes are static (our choice): target blocks are of all shapes (h, w) that have the same
    number of cells, and the context has the number of cells that is expected. An image with more drops some at random, one
    with fewer repeats some.

    Args:
      side: Cells a side of the grid.
      count: Target blocks of an image, M.
      shapes: ((h, w), ...) of target blocks, of the same h * w; each block draws one of them.
      scale: Range of the context block's share of the grid; the block is square.
    """

    side: int
    count: int
    shapes: tuple
    scale: tuple

    @property
    def cells(self):
        """Cells of a target block, k."""
        return math.prod(self.shapes[0])

    @property
    def kept(self):
        """Cells of the context, n."""
        cells = self.side**2
        return max(1, round(cells * sum(self.scale) / 2 * (1 - self.cells / cells) ** self.count))

    def draw(self, rng, batch):
        """Return (keep int32 [B, n], blocks int32 [B, M, k]), numbers of cells by row. rng None draws the same every time."""
        keys = jax.random.split(jax.random.key(0) if rng is None else rng, 3)
        side, shapes = self.side, jnp.asarray(self.shapes)
        which, *place = jax.random.uniform(keys[0], (3, batch, self.count))
        which = (which * len(self.shapes)).astype(jnp.int32)
        size = shapes[which]  # [B, M, 2]
        corner = self._corner(jnp.stack(place, -1), size)
        within = [np.stack(np.divmod(np.arange(self.cells), w), -1) for _, w in self.shapes]
        cells = corner[:, :, None] + jnp.asarray(np.stack(within))[which]  # [B, M, k, 2]

        scale, *place = jax.random.uniform(keys[1], (3, batch))
        low, high = self.scale
        around = jnp.round(side * jnp.sqrt(low + (high - low) * scale)).astype(jnp.int32)[:, None]
        free = self._covered(self._corner(jnp.stack(place, -1), around), around)
        free = free & ~self._covered(corner, size).any(1)
        order = jnp.argsort(jax.random.uniform(keys[2], (batch, side * side)) + ~free, -1).astype(jnp.int32)
        places = jnp.arange(self.kept) % jnp.maximum(free.sum(-1, keepdims=True), 1)
        return jnp.take_along_axis(order, places, -1), cells[..., 0] * side + cells[..., 1]

    def _corner(self, place, size):
        """Return the top left cell int32 [..., 2] of blocks of a size [..., 2]; place: uniform [..., 2]."""
        return jnp.floor(place * (self.side - size + 1)).astype(jnp.int32)

    def _covered(self, corner, size):
        """Return the cells that blocks cover, bool [..., side * side]."""
        row, column = np.divmod(np.arange(self.side**2), self.side)
        past = corner + size
        rows = (row >= corner[..., :1]) & (row < past[..., :1])
        return rows & (column >= corner[..., 1:]) & (column < past[..., 1:])


def target_shapes(side, scale, ratio):
    """Return the shapes ((h, w), ...) of target blocks on a grid of `side` cells a side, all of one number of cells.

    Of the numbers within `scale` (shares of the grid) it is that with most shapes whose h / w lies within `ratio`, then that
    nearest to the middle of the range; where none is within, the nearest of all.

    >>> target_shapes(14, (0.15, 0.2), (0.75, 1.5))
    ((5, 6), (6, 5))
    """
    numbers, middle = range(1, side + 1), side**2 * sum(scale) / 2
    found = {}
    for h, w in ((h, w) for h in numbers for w in numbers if ratio[0] <= h / w <= ratio[1]):
        found.setdefault(h * w, []).append((h, w))
    within = {n: s for n, s in found.items() if scale[0] <= n / side**2 <= scale[1]}
    if within:
        return tuple(min(within.items(), key=lambda one: (-len(one[1]), abs(one[0] - middle)))[1])
    return tuple(min(found.items(), key=lambda one: abs(one[0] - middle))[1])


@dataclasses.dataclass(frozen=True)
class IJEPA(base.Method):
    """Prediction of features.

    The state has `teacher_encoder`, an EMA of the encoder, and `steps` int32, the steps done.

    Args:
      encoder: ViT, the only encoder that can leave cells out.
      predictor: Predictor.
      blocks: Blocks.
      momentum: EMA momentum of the teacher at the start; it rises to 1 linearly.
      total_steps: Length of the run; None where it is not known, the momentum is then constant.
      pixels: How images are normalised.
    """

    encoder: Any
    predictor: Predictor
    blocks: Blocks
    momentum: float
    total_steps: int | None
    pixels: images_lib.Pixels

    NAME, NOTE = "ijepa", "I-JEPA: a vit alone"
    TITLE = "I-JEPA"
    STORY = (
        "The encoder sees some cells of each image. A small transformer predicts the features that the encoder's moving "
        "average, which sees all cells, has in several blocks of the others (I-JEPA). No labels are used."
    )
    FIELDS = {
        **decoding.FIELDS,
        "ijepa.targets": Field(4, "blocks of each image that are predicted", POSITIVE),
        "ijepa.target_scale": Field((0.15, 0.2), "range of a block's share of the cells", FRACTION_RANGE),
        "ijepa.target_ratio": Field((0.75, 1.5), "range of a block's height over its width", RANGE),
        "ijepa.context_scale": Field((0.85, 1.0), "range of the share of cells seen, before blocks go", FRACTION_RANGE),
        "ijepa.momentum": Field(0.996, "EMA momentum of the teacher at the start; it rises to 1 linearly", BELOW_ONE),
    }
    sharded_like_params = ("teacher_encoder",)

    @classmethod
    def check(cls, values):
        decoding.check(values)
        if values["accumulate"] > 1:
            refuse("accumulate", values["accumulate"], "1 with objective='ijepa', whose teacher follows once a step")

    @classmethod
    def build(cls, config, encoder, schedule):
        if not encoder.takes_keep:
            raise UserError(
                f"config field encoder.name={config.encoder.name!r} is not accepted with objective='ijepa', which leaves "
                "cells out: it takes a ViT"
            )
        fields, side = config.ijepa, config.image_size // encoder.stride
        ratio = tuple(fields.target_ratio)
        if not ratio[0] <= 1 <= ratio[1]:
            refuse("ijepa.target_ratio", ratio, "a range that contains 1")
        shapes = target_shapes(side, tuple(fields.target_scale), ratio)
        if math.prod(shapes[0]) >= side**2:
            raise UserError(
                f"config field ijepa.target_scale={tuple(fields.target_scale)} is not accepted: a block must leave some of the "
                f"{side} x {side} cells of an image of image_size={config.image_size}"
            )
        blocks = Blocks(side, fields.targets, shapes, tuple(fields.context_scale))
        predictor = Predictor(encoder.width, **decoding.options(config))
        pixels = images_lib.PIXELS[config.pixels]
        return cls(encoder, predictor, blocks, fields.momentum, schedule.total_steps, pixels)

    def init(self, rng, batch):
        """Return {"params": {"encoder", "predictor"}, "batch_stats": state}; the teacher starts as a copy."""
        keys = jax.random.split(rng)
        images = self.pixels.normalise(batch["image"][:1])
        keep, blocks = self.blocks.draw(None, 1)
        (features, _), encoder = self.encoder.init_with_output(keys[0], images, keep=keep)
        predictor = self.predictor.init(keys[1], features, keep, blocks, self._grid)
        variables = self.init_copies(encoding.collections({"encoder": encoder, "predictor": predictor}))
        return {**variables, "batch_stats": {**variables["batch_stats"], "steps": jnp.zeros((), jnp.int32)}}

    def init_copies(self, variables):
        """As `Method.init_copies`: the teacher is a copy of the given encoder."""
        return ema.with_copies(variables, ("encoder",), "teacher_")

    def loss(self, params, state, batch, rng, train=True):
        """Return (mean smooth L1 distance of predicted features, (state, metrics)).

        batch: image uint8 [B, H, W, 3], mask bool [B]. Masks are drawn by `rng`; None draws the same every time. The teacher's
        features are normalised over their channels. metrics: those of `encoding.spread_of` of the context's features.
        """
        mask_rng, encoder_rng = (None, None) if rng is None else jax.random.split(rng)
        images = self.pixels.normalise(batch["image"])
        keep, blocks = self.blocks.draw(mask_rng, len(images))
        if train:
            momentum = self.momentum
            if self.total_steps is not None:
                momentum = momentum + (1.0 - momentum) * state["steps"] / self.total_steps
            state = ema.followed(params, state, ("encoder",), "teacher_", momentum)
        wanted = jax.lax.stop_gradient(self._wanted(state, images, blocks))
        features, out, state = encoding.encode(self.encoder, params, state, images, encoder_rng, train, keep=keep)
        predicted = self.predictor.apply({"params": params["predictor"]}, features, keep, blocks, self._grid)
        weight = batch["mask"] / jnp.maximum(batch["mask"].sum(), 1)
        losses = optax.huber_loss(predicted, wanted).mean((1, 2, 3))
        if train:
            state = {**state, "steps": state["steps"] + 1}
        return (losses * weight).sum(), (state, encoding.spread_of(encoding.pooled(features, out), batch, train))

    @property
    def _grid(self):
        return self.blocks.side, self.blocks.side

    def _wanted(self, state, images, blocks):
        """Return the teacher's normalised features float32 [B, M, k, C] of normalised images in blocks int32 [B, M, k]."""
        features, _ = self.encoder.apply(state["teacher_encoder"], images)
        features = features.reshape(len(images), -1, features.shape[-1])
        flat = blocks.reshape(len(images), -1, 1)
        wanted = jnp.take_along_axis(features, flat, 1).astype(jnp.float32).reshape(*blocks.shape, -1)
        return jax.nn.standardize(wanted, epsilon=1e-6)
