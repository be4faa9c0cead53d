"""Feature pyramids: maps of several strides from an encoder's outputs, for detectors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.models.layers import Conv


def maps(features, out, height, stages):
    """Return {stride: map [B, h, w, C]} of an encoder's outputs for images of `height` pixels.

    It holds the features and, with `stages`, the last intermediate map of each finer stride.
    """
    found = {}
    for x in out.values() if stages else ():
        if x.ndim == 4 and height % x.shape[1] == 0:
            found[height // x.shape[1]] = x
    coarsest = height // features.shape[1]
    return {**{s: x for s, x in found.items() if s < coarsest}, coarsest: features}


def locations(height, width, strides):
    """Return (centres float32 [p, 2] as (x, y) in pixels, strides float32 [p]) of the cells of all levels, finest first."""
    points, sizes = [], []
    for stride in strides:
        y, x = np.mgrid[: height // stride, : width // stride].reshape(2, -1)
        points.append((np.stack([x, y], -1) + 0.5) * stride)
        sizes.append(np.full(len(x), stride))
    return np.concatenate(points).astype(np.float32), np.concatenate(sizes).astype(np.float32)


class GroupNorm(nn.GroupNorm):
    """Group norm: no running statistics, the same result for any batch and mesh."""

    num_groups: int = 8
    epsilon: float = 1e-5


class Pyramid(nn.Module):
    """{stride: map} -> a list of maps [B, H / s, W / s, width], one for each of `strides`, each twice the one before.

    From the coarsest map downwards each map is doubled and added to the encoder's map of that stride, if any (feature pyramid,
    arXiv 1612.03144; with one map ViTDet's simple pyramid, arXiv 2203.16527). Strided convolutions make coarser maps.
    """

    strides: tuple
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps):
        def own(stride):
            x = Conv(self.width, dtype=self.dtype, name=f"lateral{stride}")(maps[stride])
            return GroupNorm(dtype=self.dtype, name=f"lateral{stride}_norm")(x)  # removes the scale of the features

        coarsest = max(maps)
        found = {coarsest: own(coarsest)}
        for stride in _halves(coarsest, self.strides[0]):
            x = jnp.repeat(jnp.repeat(found[2 * stride], 2, 1), 2, 2)
            found[stride] = x + own(stride) if stride in maps else x
        for stride in _doubles(coarsest, self.strides[-1]):
            x = Conv(self.width, 3, 2, dtype=self.dtype, name=f"coarser{stride}")(jax.nn.relu(found[stride // 2]))
            found[stride] = GroupNorm(dtype=self.dtype, name=f"coarser{stride}_norm")(x)
        smooth = {s: Conv(self.width, 3, dtype=self.dtype, name=f"smooth{s}")(found[s]) for s in self.strides}
        return [GroupNorm(dtype=self.dtype, name=f"smooth{s}_norm")(smooth[s]) for s in self.strides]


def _halves(start, until):
    while start > until:
        start //= 2
        yield start


def _doubles(start, until):
    while start < until:
        start *= 2
        yield start
