"""Stem and downsampling by 3x3 convolutions, each followed by a norm, as vHeat and HcNet have them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from qbheat_jax.models.layers import Conv, gelu


class ConvStem(nn.Module):
    """Two 3x3 convolutions with norms, an exact GELU between: images [B, H, W, 3] -> [B, H / stride, W / stride, C].

    Attributes:
      channels: C; the first convolution has half of them.
      norm: makes a norm of (dtype, name).
      stride: 4, 2 or 1.
    """

    channels: int
    norm: Callable
    stride: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        strides = {4: (2, 2), 2: (2, 1), 1: (1, 1)}.get(self.stride)
        if strides is None:
            raise ValueError(f"stem_stride is {self.stride}; this stem has stride 1, 2 or 4")
        for n, (channels, stride) in enumerate(zip((self.channels // 2, self.channels), strides), 1):
            x = x if n == 1 else gelu(x)
            x = Conv(channels, 3, stride, dtype=self.dtype, use_bias=True, torch_init=True, name=f"conv{n}")(x)
            x = self.norm(dtype=self.dtype, name=f"norm{n}")(x)
        return x


class Downsampling(nn.Module):
    """3x3 convolution and norm: [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), channels]. `norm` as of `ConvStem`."""

    channels: int
    norm: Callable
    stride: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = Conv(self.channels, 3, self.stride, dtype=self.dtype, torch_init=True, name="conv")(x)
        return self.norm(dtype=self.dtype, name="norm")(x)
