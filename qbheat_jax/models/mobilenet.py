"""Networks of inverted residuals: MobileNetV2 (arXiv 1801.04381) and EfficientNet-Lite0 (the light B0 of arXiv 1905.11946).

Both follow their releases: torchvision's MobileNetV2, and TensorFlow's EfficientNet-Lite0 with TensorFlow's padding and batch
norm. Blocks have the releases' numbers. There is no classifier.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.layers import BatchNorm, ConvBN, DropPath, check_size, remat


@dataclasses.dataclass(frozen=True)
class Variant:
    """One network.

    Attributes:
      rows: (expansion, channels, blocks, stride of the first block, kernel) of each stage, as in the papers' tables.
      first: number of the first block.
      padding, momentum, epsilon: of every convolution and batch norm (layers.ConvBN).
    """

    rows: tuple
    first: int = 0
    padding: str = "symmetric"
    momentum: float = BatchNorm.momentum
    epsilon: float = BatchNorm.epsilon


VARIANTS = {
    "mobilenet_v2": Variant((
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    ), first=1),
    "efficientnet_lite0": Variant((
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ), padding="same", momentum=0.99, epsilon=1e-3),
}  # fmt: skip


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (depthwise), project (1x1, no activation); add the input where the shapes agree.

    x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), channels]. `conv` makes the ConvBNs. Children: expand (not at
    expansion 1), depthwise, project.
    """

    conv: Any
    expansion: int
    channels: int
    stride: int = 1
    kernel: int = 3
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = jax.nn.relu6(self.conv(hidden, name="expand")(y, train))
        y = self.conv(hidden, self.kernel, self.stride, groups=hidden, name="depthwise")(y, train)
        y = self.conv(self.channels, name="project")(jax.nn.relu6(y), train)
        if self.stride == 1 and x.shape[-1] == self.channels:
            y = x + DropPath(self.drop_path)(y, train)
        return y


class MobileNet(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, 1280], out).

    `out` holds `stem` and `blockN` of every block. H and W must be multiples of `stride`.

    Attributes:
      last_stride: of the last stage that strides, 2 or 1; the weights are the same.
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    variant: Variant
    last_stride: int = 2
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"

    @property
    def stride(self):
        return math.prod((2, *(stride for _, _, stride, _ in self._blocks())))

    @property
    def width(self):
        return 1280

    @nn.nowrap
    def layer_of(self, name):
        top, count = name.split("/")[0], len(list(self._blocks()))
        if top.startswith("block"):
            return count - (int(top.removeprefix("block")) - self.variant.first)
        return 0 if top == "last" else count + 1

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.stride)
        v = self.variant
        conv = functools.partial(ConvBN, dtype=self.dtype, padding=v.padding, momentum=v.momentum, epsilon=v.epsilon)
        x = jax.nn.relu6(conv(32, 3, 2, name="stem")(images, train))
        out = {"stem": x}
        blocks, residual = list(self._blocks()), remat(InvertedResidual, self.remat)
        for n, fields in enumerate(blocks):
            name, rate = f"block{v.first + n}", self.drop_path * n / (len(blocks) - 1)
            x = out[name] = residual(conv, *fields, drop_path=rate, name=name)(x, train)
        return jax.nn.relu6(conv(self.width, name="last")(x, train)), out

    def _blocks(self):
        """Yield (expansion, channels, stride, kernel) of each block."""
        last = max(n for n, row in enumerate(self.variant.rows) if row[3] > 1)
        for n, (expansion, channels, count, stride, kernel) in enumerate(self.variant.rows):
            first = self.last_stride if n == last else stride
            for block_stride in (first, *[1] * (count - 1)):
                yield expansion, channels, block_stride, kernel
