"""HcNet (arXiv 2408.05901): an explicit step of the heat equation in each block, gated by the image, then a convolutional MLP.

There are two generations of the release, which differ in the stencil. "c", the later, learns it for every channel and holds
the border at temperature zero. "a" averages the neighbours and insulates the border.

Child modules have the release's numbers: `layers_I_J` is block J of stage I, `down_I` the downsampling after it. There is no
classifier; the last norm, which precedes it, belongs to the encoder.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.models.conv_stem import ConvStem, Downsampling
from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.kernels import depthwise_conv
from qbheat_jax.models.layers import Conv, DropPath, check_size, drop_path_rates, gelu, remat, residual


def anisotropic_laplacian(x, kernel):
    """Return the weighted sum of each cell's differences from its neighbours: sum_j w_j (x(p + j) - x(p)).

    Cells outside the map are at 0. The centre's weight cancels.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, 1, C], k odd.

    Returns:
      [B, H, W, C], the type of x.
    """
    middle = np.zeros((*kernel.shape[:2], 1, 1), np.float32)
    middle[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1.0
    return depthwise_conv(x, kernel - middle * kernel.sum((0, 1)))


def isotropic_laplacian(x):
    """Return the mean of those of a cell's 8 neighbours that exist, minus the cell. It is 0 on a map of one cell.

    x [B, H, W, C] -> [B, H, W, C].
    """
    height, width = x.shape[1:3]
    if height == width == 1:
        return jnp.zeros_like(x)
    rows, columns = (1 + (np.arange(n) > 0) + (np.arange(n) < n - 1) for n in (height, width))
    count = np.outer(rows, columns)[..., None] - 1
    around = np.ones((3, 3, 1, x.shape[-1]))
    around[1, 1] = 0.0
    return depthwise_conv(x, jnp.asarray(around, x.dtype)) / jnp.asarray(count, x.dtype) - x


class GroupNorm(nn.Module):
    """Group norm of one group: x [B, H, W, C] normalised over H, W and C of each example -> the same, of `dtype`.

    Statistics are float32. The gradient keeps x alone, where flax.linen.GroupNorm's keeps x - mean too.
    Parameters: scale, bias [C], float32.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        shape, x = (x.shape[-1],), x.astype(jnp.float32)
        mean, square = (y.mean((1, 2, 3), keepdims=True) for y in (x, x * x))
        gain = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + self.epsilon)
        gain = gain * self.param("scale", nn.initializers.ones, shape, jnp.float32)
        shift = self.param("bias", nn.initializers.zeros, shape, jnp.float32) - mean * gain
        return (x * gain + shift).astype(self.dtype)


class Stencil(nn.Module):
    """`anisotropic_laplacian` by a learnt kernel: x [B, H, W, C] -> [B, H, W, C]. Parameter: kernel [size, size, 1, C]."""

    size: int = 5

    @nn.compact
    def __call__(self, x):
        shape = (self.size, self.size, 1, x.shape[-1])
        return anisotropic_laplacian(x, self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32))


class Block(nn.Module):
    """A step of the heat equation, x + gate * laplacian(x), then x + MLP(norm(x)). x [B, H, W, C] -> [B, H, W, C].

    The gate, in (0, 1) for every example and channel, is the sigmoid of a linear map of x's mean over the cells. The MLP is
    linear (C -> 4 C), exact GELU, depthwise 3x3, linear. Generation "a" drops both branches, "c" the MLP alone.
    """

    generation: str = "c"
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        channels = x.shape[-1]
        conv = functools.partial(Conv, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02))
        mean = x.mean((1, 2), keepdims=True, dtype=jnp.float32)
        gate = jax.nn.sigmoid(conv(channels, name="gate")(mean))
        if self.generation == "c":
            x = x + gate * Stencil(name="stencil")(x)
        else:
            x = x + DropPath(self.drop_path, name="drop_path1")(gate * isotropic_laplacian(x), train)
        y = GroupNorm(dtype=self.dtype, name="norm")(x)
        y = gelu(conv(4 * channels, use_bias=True, name="fc1")(y))
        y = conv(4 * channels, 3, groups=4 * channels, name="filter")(y)
        y = conv(channels, use_bias=True, name="fc2")(y)
        return residual(x, DropPath(self.drop_path, name="drop_path2")(y, train))


class HcNet(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, width], out), the features after a last norm.

    `out` holds `stem` and `stage1` ... `stage4`, each before its downsampling and without a norm. H and W must be multiples
    of `stride`.

    The gate and the norms see all cells. In pre-training by QB-Heat these are the cells of the crop, afterwards of the image.

    Attributes:
      dims: channels of the stages; the last are `width`.
      depths: blocks of the stages.
      generation: "c" or "a", see the module.
      stem_stride: 4, or 2 or 1 for small images: the stem's last convolutions do not stride.
      last_stride: of the last downsampling, 2 or 1; the weights are the same.
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    dims: tuple = (64, 128, 320, 512)
    depths: tuple = (3, 8, 18, 3)
    generation: str = "c"
    stem_stride: int = 4
    last_stride: int = 2
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"
    has_batch_norm = False

    @property
    def stride(self):
        return math.prod((self.stem_stride, *self._strides))

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
            return sum(self.depths[int(place[0]) + 1 :])
        return 0 if kind == "norm" else sum(self.depths) + 1

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.stride)
        if self.generation not in ("a", "c"):
            raise ValueError(f"generation is {self.generation!r}; an HcNet's is 'a' or 'c'")
        x = ConvStem(self.dims[0], GroupNorm, self.stem_stride, self.dtype, name="stem")(images)
        out = {"stem": x}
        block = remat(Block, self.remat)
        for stage, rates in enumerate(drop_path_rates(self.drop_path, self.depths)):
            if stage:
                stride, name = self._strides[stage - 1], f"down_{stage - 1}"
                x = Downsampling(self.dims[stage], GroupNorm, stride, self.dtype, name=name)(x)
            for j, rate in enumerate(rates):
                x = block(self.generation, rate, self.dtype, name=f"layers_{stage}_{j}")(x, train)
            out[f"stage{stage + 1}"] = x
        return GroupNorm(dtype=self.dtype, name="norm")(x), out
