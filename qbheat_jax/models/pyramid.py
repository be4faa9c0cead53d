"""Maps of several strides out of what an encoder returns, for detectors that look for small and large things apart."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.models.layers import Conv


def maps(features, out, height, stages):
    """{stride: map [B, h, w, C]}: the encoder's features and, with `stages`, the last of its intermediate maps of each
    finer stride. `height`: of the images."""
    found = {}
    for x in out.values() if stages else ():
        if x.ndim == 4 and height % x.shape[1] == 0:
            found[height // x.shape[1]] = x
    coarsest = height // features.shape[1]
    return {**{s: x for s, x in found.items() if s < coarsest}, coarsest: features}


def locations(height, width, strides):
    """The centres of all cells of all levels, finest first -> (float32 [p, 2] as (x, y) in pixels, float32 [p] strides)."""
    points, sizes = [], []
    for stride in strides:
        y, x = np.mgrid[: height // stride, : width // stride].reshape(2, -1)
        points.append((np.stack([x, y], -1) + 0.5) * stride)
        sizes.append(np.full(len(x), stride))
    return np.concatenate(points).astype(np.float32), np.concatenate(sizes).astype(np.float32)


class GroupNorm(nn.GroupNorm):
    """Over groups of channels of each image by itself: no statistics to keep, the same for any batch and mesh."""

    num_groups: int = 8
    epsilon: float = 1e-5


class Pyramid(nn.Module):
    """{stride: map} -> one map [B, H / s, W / s, width] for each of `strides`, ascending powers of two times each other.

    From the coarsest map downwards: doubled, and added to what the encoder has at that stride, where it has something
    (feature pyramid, arXiv 1612.03144; of the last map alone, ViTDet's simple one, arXiv 2203.16527). Strides beyond the
    coarsest map's are made from it by convolutions that halve.
    """

    strides: tuple
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps):
        def own(stride):
            x = Conv(self.width, dtype=self.dtype, name=f"lateral{stride}")(maps[stride])
            return GroupNorm(dtype=self.dtype, name=f"lateral{stride}_norm")(x)  # whatever the scale of the features

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
