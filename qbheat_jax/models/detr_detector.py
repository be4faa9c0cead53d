"""The `detr` detector: queries that look at the map and say what is there and where (DETR, arXiv 2005.12872)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.models.layers import Dense, LayerNorm, TransformerBlock, attend
from qbheat_jax.models.pyramid import GroupNorm, locations
from qbheat_jax.ops import boxes as geometry

# name -> (width, heads, blocks over the cells, layers of the decoder).
SIZES = {"small": (128, 4, 1, 3), "base": (256, 8, 3, 6)}

# Positions are coded by waves of half to eight an image.
_WAVES = 8.0
# Anchors' sides at first, as shares of the image.
_FIRST = 0.2


class DETR(nn.Module):
    """{stride: map} -> (logits float32 [L, B, queries, classes], boxes float32 [L, B, queries, 4]), each decoder layer's.

    Boxes are corners in pixels of the image; only the coarsest map is looked at. anchors: queries are boxes that the layers
    refine one after the other, each with what it has learnt to look for (DAB-DETR, arXiv 2201.12329), and look round their
    boxes (`near`), which converges in far fewer steps; without, plain learnt queries, as in DETR. groups: sets of that
    many queries that do not see each other, so that each box is learnt from by one of every set (Group DETR, arXiv
    2207.13085); queries are then those of all sets, one set after the other, or with `alone` of the first.
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
            # Not `block`: those are split over the mesh's axis `model`, which takes heads that it divides.
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
                box = jax.lax.stop_gradient(refined)  # each layer answers for its own step
        return jnp.stack(logits), jnp.stack(found)


class DecoderLayer(nn.Module):
    """Queries look at those of their group, then at the cells, then at themselves: content [B, Q, C] -> [B, Q, C], pre-norm.

    place [B, Q, C]: where the queries are; memory [B, M, C] of the cells, places [M, C] where those are. around: (boxes
    [B, Q, 4] before the sigmoid, centres of the cells [M, 2]), where queries look round their boxes.
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
    """Sines and cosines of numbers from 0 to 1, [..., k] -> [..., width]; width is a multiple of 2 k."""
    count = width // (2 * numbers.shape[-1])
    waves = np.geomspace(0.5, _WAVES, count).astype(np.float32)
    angles = 2 * math.pi * numbers[..., None] * waves
    coded = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    return coded.reshape(*numbers.shape[:-1], width)


def near(box, points, where):
    """What attention from a box to a cell gains: the logarithm of a Gaussian (SMCA, arXiv 2101.07448), [B, heads, Q, M].

    box [B, Q, 4] (centre x, y, width, height) before the sigmoid; points [M, 2] as shares of the image; where
    [B, Q, heads, 4]: how far from the box's centre each head looks, right and down, and the logarithms of how wide and how
    high, all in sides of the box.
    """
    middle, sides = jnp.split(jax.nn.sigmoid(box)[:, :, None], 2, -1)
    offset, spread = jnp.split(where, 2, -1)
    sides = jnp.maximum(sides, 1e-2)  # a box that has all but vanished still sees something
    away = (points - (middle + offset * sides)[..., None, :]) / (sides * jnp.exp(spread))[..., None, :]
    return jnp.swapaxes(-0.5 * jnp.square(away).sum(-1), 1, 2)


def _around(_, shape, dtype=jnp.float32):
    """`where` at first: the heads look at places on a circle round the centre, each as far as half the box is wide."""
    turns = 2 * np.pi * np.arange(shape[0] // 4)[:, None] / (shape[0] // 4)
    offset = 0.5 * np.concatenate([np.cos(turns), np.sin(turns)], -1)
    return jnp.asarray(np.concatenate([offset, np.full_like(offset, np.log(0.5))], -1).reshape(-1), dtype)


def _spread(count):
    """Anchors evenly over the image, as (centre x, centre y, width, height) before the sigmoid: float32 [count, 4].

    Their centres are the sequence of the plastic number, which covers a square evenly for any count.
    """
    plastic = 1.32471795724474602596
    middle = (0.5 + np.arange(count)[:, None] / plastic ** np.arange(1, 3)) % 1
    boxes = np.concatenate([np.clip(middle, 0.02, 0.98), np.full((count, 2), _FIRST)], -1)
    return jnp.asarray(np.log(boxes / (1 - boxes)), jnp.float32)
