"""ResNet (arXiv 1512.03385): basic blocks, or bottlenecks with their stride in the 3x3 (v1.5, as torchvision).

Parameters have torchvision's names, each dot before a digit as an underscore (`layer1.0.downsample.0` is
`layer1_0/downsample_0`), so one rule ports the weights. There is no classifier.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qbheat_jax.models.encoder import Encoder
from qbheat_jax.models.kernels import max_pool
from qbheat_jax.models.layers import BatchNorm, Conv, DropPath, check_size, remat


class ResNetBlock(nn.Module):
    """relu(shortcut(x) + branch(x)): x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), out].

    Basic: 3x3 (stride), 3x3; out = channels. Bottleneck: 1x1, 3x3 (stride), 1x1; out = 4 * channels. The shortcut is the
    identity, or a 1x1 convolution (stride) and a batch norm where the shapes differ.
    """

    channels: int
    stride: int = 1
    bottleneck: bool = True
    zero_init: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        out = self.channels * 4 if self.bottleneck else self.channels
        rows = ((self.channels, 3, self.stride), (out, 3, 1))
        if self.bottleneck:
            rows = ((self.channels, 1, 1), (self.channels, 3, self.stride), (out, 1, 1))
        y = x
        for n, (features, kernel, stride) in enumerate(rows, 1):
            last = n == len(rows)
            y = Conv(features, kernel, stride, dtype=self.dtype, name=f"conv{n}")(y)
            y = self._norm(f"bn{n}", train, zero=last and self.zero_init)(y)
            y = y if last else jax.nn.relu(y)
        if self.stride > 1 or x.shape[-1] != out:
            x = Conv(out, 1, self.stride, dtype=self.dtype, name="downsample_0")(x)
            x = self._norm("downsample_1", train)(x)
        return jax.nn.relu(x + DropPath(self.drop_path)(y, train))

    def _norm(self, name, train, zero=False):
        init = nn.initializers.zeros if zero else nn.initializers.ones
        return BatchNorm(use_running_average=not train, dtype=self.dtype, scale_init=init, name=name)


class ResNet(Encoder):
    """The encoder: images [B, H, W, 3] -> (features [B, H / stride, W / stride, width], out).

    `out` holds `stem` and `stage1` ... `stage4`. H and W must be multiples of `stride`. ResNet-18 has blocks (2, 2, 2, 2)
    without bottleneck, ResNet-50 blocks (3, 4, 6, 3).

    Attributes:
      stem_stride: 4 is ImageNet's stem (7x7 stride 2, 3x3 max-pool stride 2). 2 and 1, for small images, are one 3x3 of
        that stride without pool (1: SimCLR's for CIFAR, arXiv 2002.05709 B.9).
      last_stride: of stage 4. At 1 its dilation stays 1: the same weights and cost of a cell, a smaller receptive field.
      zero_init: whether the last batch norm of a block starts with gain 0 (arXiv 1706.02677, section 5.1).
      drop_path: rate of the last block; the rates grow linearly from 0 at the first.
      remat: policy of the blocks, see layers.remat.
    """

    blocks: tuple = (3, 4, 6, 3)
    bottleneck: bool = True
    stem_stride: int = 4
    last_stride: int = 2
    zero_init: bool = True
    drop_path: float = 0.0
    dtype: Any = jnp.float32
    remat: str = "none"

    @property
    def stride(self):
        return self.stem_stride * 4 * self.last_stride

    @property
    def width(self):
        return 2048 if self.bottleneck else 512

    @nn.nowrap
    def layer_of(self, name):
        top = name.split("/")[0]
        if not top.startswith("layer"):
            return sum(self.blocks) + 1
        stage, block = map(int, top.removeprefix("layer").split("_"))
        return sum(self.blocks[stage - 1 :]) - block

    @nn.compact
    def __call__(self, images, train=False):
        check_size(images, self.stride)
        x = self._stem(images, train)
        out = {"stem": x}
        residual, block, last_block = remat(ResNetBlock, self.remat), 0, max(1, sum(self.blocks) - 1)
        for stage, count in enumerate(self.blocks, 1):
            stage_stride = (1, 2, 2, self.last_stride)[stage - 1]
            for n in range(count):
                x = residual(
                    channels=64 * 2 ** (stage - 1),
                    stride=stage_stride if n == 0 else 1,
                    bottleneck=self.bottleneck,
                    zero_init=self.zero_init,
                    drop_path=self.drop_path * block / last_block,
                    dtype=self.dtype,
                    name=f"layer{stage}_{n}",
                )(x, train)
                block += 1
            out[f"stage{stage}"] = x
        return x, out

    def _stem(self, images, train):
        if self.stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride is {self.stem_stride}; a ResNet stem has stride 1, 2 or 4")
        kernel, stride = (7, 2) if self.stem_stride == 4 else (3, self.stem_stride)
        x = Conv(64, kernel, stride, dtype=self.dtype, name="conv1")(images)
        x = jax.nn.relu(BatchNorm(use_running_average=not train, dtype=self.dtype, name="bn1")(x))
        if self.stem_stride == 4:
            x = max_pool(x)
        return x
