"""The `detr` detector: queries attend to the map and predict classes and boxes (DETR, arXiv 2005.12872)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, attend
from qbheat_jax.models.pyramid import GroupNorm, locations
from qbheat_jax.ops import boxes as geometry

# name -> (width, heads, encoder blocks, decoder layers).
SIZES = {"small": (128, 4, 1, 3), "base": (256, 8, 3, 6)}

# Frequencies of the position code: from half to eight waves an image.
_WAVES = 8.0
# Initial sides of anchors over those of the image.
_FIRST = 0.2


class DETR(nn.Module):
    """{stride: map} -> (logits float32 [L, B, Q, classes], boxes float32 [L, B, Q, 4]) of each of L decoder layers.

    Boxes are corners in pixels of the image. The coarsest map alone is used.

    Attributes:
      queries: of each group.
      size: a key of SIZES.
      anchors: whether queries are boxes that each layer refines (DAB-DETR, arXiv 2201.12329) and that attend near
        themselves (`near`), which converges in far fewer steps. Otherwise queries are learnt vectors, as in DETR.
      groups: sets of queries that do not attend to each other (Group DETR, arXiv 2207.13085). Q covers all groups in order.
      alone: whether Q covers the first group alone.
    """

    classes: int
    queries: int = 100
    size: str = "small"
    anchors: bool = True
    groups: int = 1
    alone: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps):
        width, heads, blocks, layers = SIZES[self.size]
        stride = max(maps)
        batch, rows, columns, _ = maps[stride].shape
        points, _ = locations(rows * stride, columns * stride, (stride,))
        pixels = np.array([columns, rows] * 2, np.float32) * stride
        points = jnp.asarray(points / pixels[:2])

        x = Dense(width, dtype=self.dtype, name="embed")(maps[stride].astype(self.dtype))
        x = GroupNorm(dtype=self.dtype, name="embed_norm")(x).reshape(batch, rows * columns, width)
        places = code(points, width).astype(self.dtype)
        x = x + places
        for n in range(blocks):
            # Not named `block`: sharding splits blocks of that name over the mesh axis `model`.
            x = TransformerBlock(heads, dtype=self.dtype, name=f"cells{n}")(x, False)
        memory = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="memory_norm")(x)

        groups = 1 if self.alone else self.groups
        count, asked = self.groups * self.queries, groups * self.queries
        content = self.param("content", nn.initializers.normal(0.02), (count, width), jnp.float32)
        if self.anchors:
            start = self.param("anchors", lambda _, shape: _spread(shape[0]), (count, 4))
        else:
            start = self.param("places", nn.initializers.normal(1.0), (count, width), jnp.float32)
        content, start = (
            jnp.broadcast_to(x[:asked], (batch, asked, x.shape[1])) for x in (content.astype(self.dtype), start)
        )
        to_place = MLP(width, width, 2, self.dtype, name="to_place")
        rare = nn.initializers.constant(-math.log(99.0))
        to_class = nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), bias_init=rare, name="classes")
        to_box = MLP(width, 4, 3, jnp.float32, last=nn.initializers.normal(1e-3), name="boxes")
        norm = LayerNorm(epsilon=1e-6, name="norm")

        logits, found, box = [], [], start
        for n in range(layers):
            place = to_place(code(jax.nn.sigmoid(box), width)) if self.anchors else start
            content = DecoderLayer(heads, groups, self.dtype, name=f"layer{n}")(
                content, place.astype(self.dtype), memory, places, (box, points) if self.anchors else None
            )
            seen = norm(content.astype(jnp.float32))
            logits.append(to_class(seen))
            refined = to_box(seen) + (box if self.anchors else 0.0)
            found.append(geometry.corners(jax.nn.sigmoid(refined)) * pixels)
            if self.anchors:
                box = jax.lax.stop_gradient(refined)  # each layer learns from its own step alone
        return jnp.stack(logits), jnp.stack(found)


class DecoderLayer(nn.Module):
    """A pre-norm decoder layer: self-attention within groups, cross-attention to the cells, an MLP. [B, Q, C] -> [B, Q, C].

    Args:
      content: queries [B, Q, C].
      place: position codes of the queries [B, Q, C].
      memory: cells [B, M, C].
      places: position codes of the cells [M, C].
      around: (boxes [B, Q, 4] before the sigmoid, centres of the cells [M, 2]) to attend near the boxes; or None.
    """

    heads: int
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, content, place, memory, places, around=None):
        width = content.shape[-1]

        def linear(name):
            return Dense(width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)

        def norm(name):
            return LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

        def grouped(x):
            return x.reshape(-1, x.shape[1] // self.groups, width)

        x = norm("self_norm")(content)
        query, key, value = linear("self_query")(x + place), linear("self_key")(x + place), linear("self_value")(x)
        looked = attend(grouped(query), grouped(key), grouped(value), self.heads).reshape(content.shape)
        content = content + linear("self_proj")(looked)
        x = norm("cross_norm")(content)
        key = linear("cross_key")(memory) + linear("cross_key_place")(jnp.broadcast_to(places, memory.shape))
        query = linear("cross_query")(x) + linear("cross_query_place")(place)
        bias = None
        if around:
            zeros = nn.initializers.zeros
            where = nn.Dense(4 * self.heads, kernel_init=zeros, bias_init=_around, name="around")(x.astype(jnp.float32))
            bias = near(*around, where.reshape(*x.shape[:2], self.heads, 4)).astype(self.dtype)
        looked = attend(query, key, linear("cross_value")(memory), self.heads, bias)
        content = content + linear("cross_proj")(looked)
        return content + MLP(4 * width, width, 2, self.dtype, name="mlp")(norm("mlp_norm")(content))


class MLP(nn.Module):
    """`depth` linear layers with GELU between, the hidden ones `hidden` wide. [..., C] -> [..., outputs]."""

    hidden: int
    outputs: int
    depth: int
    dtype: Any = jnp.float32
    last: Any = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x):
        for n in range(self.depth - 1):
            init = nn.initializers.xavier_uniform()
            x = jax.nn.gelu(Dense(self.hidden, dtype=self.dtype, kernel_init=init, name=f"fc{n}")(x))
        return Dense(self.outputs, dtype=self.dtype, kernel_init=self.last, name=f"fc{self.depth - 1}")(x)


def code(numbers, width):
    """Return sines and cosines of numbers in [0, 1], [..., k] -> [..., width]; width is a multiple of 2 k."""
    count = width // (2 * numbers.shape[-1])
    waves = np.geomspace(0.5, _WAVES, count).astype(np.float32)
    angles = 2 * math.pi * numbers[..., None] * waves
    coded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return coded.reshape(*numbers.shape[:-1], width)


def near(box, points, where):
    """Return the attention bias from boxes to cells, the logarithm of a Gaussian (SMCA, arXiv 2101.07448), [B, heads, Q, M].

    Args:
      box: [B, Q, 4] (centre x, y, width, height) before the sigmoid.
      points: [M, 2] over the image's sides.
      where: [B, Q, heads, 4], each head's offset from the box's centre to the right and down, and the logarithms of its
        width and height, all in sides of the box.
    """
    middle, sides = jnp.split(jax.nn.sigmoid(box)[:, :, None], 2, -1)
    offset, spread = jnp.split(where, 2, -1)
    sides = jnp.maximum(sides, 1e-2)  # tiny boxes still attend to something
    away = (points - (middle + offset * sides)[..., None, :]) / (sides * jnp.exp(spread))[..., None, :]
    return jnp.swapaxes(-0.5 * jnp.square(away).sum(-1), 1, 2)


def _around(_, shape, dtype=jnp.float32):
    """Return the initial `where` of `near`: heads on a circle round the centre, each half a box wide."""
    turns = 2 * np.pi * np.arange(shape[0] // 4)[:, None] / (shape[0] // 4)
    offset = 0.5 * np.concatenate([np.cos(turns), np.sin(turns)], -1)
    return jnp.asarray(np.concatenate([offset, np.full_like(offset, np.log(0.5))], -1).reshape(-1), dtype)


def _spread(count):
    """Return anchors spread evenly over the image, (centre x, y, width, height) before the sigmoid, float32 [count, 4].

    The centres are the sequence of the plastic number, which covers a square evenly for any count.
    """
    plastic = 1.32471795724474602596
    middle = (0.5 + np.arange(count)[:, None] / plastic ** np.arange(1, 3)) % 1
    boxes = np.concatenate([np.clip(middle, 0.02, 0.98), np.full((count, 2), _FIRST)], -1)
    return jnp.asarray(np.log(boxes / (1 - boxes)), jnp.float32)
