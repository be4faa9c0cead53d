"""ConvNeXt (arXiv 2201.03545): depthwise 7x7 convolutions and layer norms in four stages, between patches.

Child modules have the release's numbers: `layers_I_J` is block J of stage I, `down_I` the patches before stage I. There is no
classifier; the last norm, which precedes it, belongs to the encoder.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.kernels import matmul_2d
from qbheat_jax.models.layers import (
    Conv,
    Dense,
    DropPath,
    LayerNorm,
    check_size,
    drop_path_rates,
    gelu,
    remat,
    residual,
)
from qbheat_jax.ops.images import to_patches

_INIT = nn.initializers.normal(0.02)


class Patches(nn.Module):
    """A linear map of patches: x [B, H, W, C] -> [B, H / stride, W / stride, features]. H, W are multiples of `stride`.

    A `stride` of 1 takes the patch that begins at each cell, with zeros after the last row and column.
    Parameters, float32: kernel [size, size, C, features], bias [features].
    """

    features: int
    size: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _INIT, shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        x = self._overlapping(x) if self.stride == 1 else to_patches(x, self.size)
        return matmul_2d(x.astype(self.dtype), kernel.reshape(-1, self.features), None) + bias

    def _overlapping(self, x):
        height, width = x.shape[1:3]
        x = jnp.pad(x, ((0, 0), (0, self.size - 1), (0, self.size - 1), (0, 0)))
        places = [(i, j) for i in range(self.size) for j in range(self.size)]
        return jnp.concatenate([x[:, i : i + height, j : j + width] for i, j in places], -1)


class Block(nn.Module):
    """x + gamma * MLP(norm(depthwise 7x7(x))), the MLP with exact GELU: x [B, H, W, C] -> [B, H, W, C]."""

    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        channels = x.shape[-1]
        conv = functools.partial(Conv, dtype=self.dtype, use_bias=True, kernel_init=_INIT)
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=_INIT)
        y = conv(channels, 7, groups=channels, name="conv")(x)
        y = LayerNorm(dtype=self.dtype, name="norm")(y)
        y = dense(channels, name="fc2")(gelu(dense(4 * channels, name="fc1")(y)))
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,), jnp.float32)
        return residual(x, DropPath(self.drop_path, name="drop_path")(y * gamma.astype(self.dtype), train))


class ConvNeXt(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, width], out), the features without a norm.

    `out` holds `stem`, `stage1` ... `stage4`, each before its downsampling, and `pooled` [B, width], the norm of the mean over
    the cells, which a classifier takes. H and W must be multiples of `stride`.

    Attributes:
      dims: channels of the stages; the last are `width`.
      depths: blocks of the stages.
      last_stride: of the last downsampling, 2 or 1; the weights are the same.
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    dims: tuple = (96, 192, 384, 768)
    depths: tuple = (3, 3, 9, 3)
    last_stride: int = 2
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    has_batch_norm = False

    @property
    def stride(self):
        return 4 * math.prod(self._strides)

    @property
    def width(self):
        return self.dims[-1]

    @property
    def _strides(self):
        """Strides of the downsamplings."""
        return (*[2] * (len(self.dims) - 2), self.last_stride)

    @nn.nowrap
    def layer_of(self, name):
        kind, *place = name.split("/")[0].split("_")
        if kind == "layers":
            stage, block = map(int, place)
            return sum(self.depths[stage:]) - block
        if kind == "down":
            return sum(self.depths[int(place[0]) :])
        return 0 if kind == "norm" else sum(self.depths) + 1

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.stride)
        norm = functools.partial(LayerNorm, dtype=self.dtype)
        x = norm(name="stem_norm")(Patches(self.dims[0], 4, 4, self.dtype, name="stem")(images))
        out = {"stem": x}
        block = remat(Block, self.remat)
        for stage, rates in enumerate(drop_path_rates(self.drop_path, self.depths)):
            if stage:
                x = norm(name=f"down_{stage}_norm")(x)
                x = Patches(self.dims[stage], 2, self._strides[stage - 1], self.dtype, name=f"down_{stage}")(x)
            for j, rate in enumerate(rates):
                x = block(rate, self.dtype, name=f"layers_{stage}_{j}")(x, train)
            out[f"stage{stage + 1}"] = x
        out["pooled"] = norm(name="norm")(x.mean((1, 2), dtype=jnp.float32))
        return x, out
