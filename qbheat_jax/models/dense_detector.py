"""The `dense` detector: a class and a box at every cell of a feature pyramid (FCOS, arXiv 1904.01355)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.layers import Conv
from qbheat_jax.models.pyramid import GroupNorm, Pyramid, locations

# Initial box sides in strides, and the logarithm of the largest factor on them.
_FIRST, _LARGEST = 4.0, 4.0


class DenseDetector(nn.Module):
    """{stride: map} -> (logits float32 [B, p, classes], boxes float32 [B, p, 4], corners in pixels), p cells of all levels.

    Two towers of `depth` 3 x 3 convolutions, for classes and for boxes, shared by all levels.
    """

    classes: int
    strides: tuple = (8, 16, 32)
    width: int = 128
    depth: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps):
        levels = Pyramid(self.strides, self.width, self.dtype, name="pyramid")(maps)
        rare = nn.initializers.constant(-math.log(99.0))  # initial probability 0.01 of each class
        small = nn.initializers.normal(0.01)
        outputs = (("classes", self.classes, rare), ("boxes", 4, nn.initializers.zeros))
        found = []
        for name, count, bias in outputs:
            convs = [Conv(self.width, 3, dtype=self.dtype, name=f"{name}{n}") for n in range(self.depth)]
            norms = [GroupNorm(dtype=self.dtype, name=f"{name}{n}_norm") for n in range(self.depth)]
            last = nn.Conv(count, (3, 3), kernel_init=small, bias_init=bias, dtype=jnp.float32, name=name)
            rows = []
            for x in levels:
                for conv, norm in zip(convs, norms):
                    x = jax.nn.relu(norm(conv(x)))
                rows.append(last(x.astype(jnp.float32)).reshape(x.shape[0], -1, count))
            found.append(jnp.concatenate(rows, 1))
        logits, raw = found
        height, width = (side * self.strides[0] for side in levels[0].shape[1:3])
        points, strides = locations(height, width, self.strides)
        middle = points + raw[..., :2] * strides[:, None]
        half = 0.5 * _FIRST * strides[:, None] * jnp.exp(jnp.clip(raw[..., 2:], -_LARGEST, _LARGEST))
        return logits, jnp.concatenate([middle - half, middle + half], -1)
