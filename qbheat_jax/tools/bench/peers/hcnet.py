"""HcNet in PyTorch (arXiv 2408.05901), generations C and A, with the parameter names of their releases."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    def __init__(self, channels, depthwise):
        super().__init__()
        hidden = 4 * channels
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.depthwise = depthwise
        setattr(self, depthwise, nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False))

    def forward(self, x):
        return self.fc2(getattr(self, self.depthwise)(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Base class of the two generations, which differ in `laplacian` and in names."""

    GATE, DEPTHWISE = "", ""

    def __init__(self, channels):
        super().__init__()
        setattr(self, self.GATE, nn.Conv2d(channels, channels, 1, bias=False))
        self.norm2, self.mlp = nn.GroupNorm(1, channels), MLP(channels, self.DEPTHWISE)

    def forward(self, x):
        gate = torch.sigmoid(getattr(self, self.GATE)(x.mean((2, 3), keepdim=True)))
        x = x + gate * self.laplacian(x)
        return x + self.mlp(self.norm2(x))


class BlockC(Block):
    GATE, DEPTHWISE = "DeltaT_DeltaD", "Filters"

    def __init__(self, channels):
        super().__init__(channels)
        self.Anisotropic_conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        middle = torch.zeros(1, 1, 5, 5)
        middle[..., 2, 2] = 1.0
        self.register_buffer("middle", middle, persistent=False)

    def laplacian(self, x):
        weight = self.Anisotropic_conv.weight
        weight = weight - self.middle * weight.sum((2, 3), keepdim=True)
        return F.conv2d(x, weight, padding=2, groups=x.shape[1])


class BlockA(Block):
    GATE, DEPTHWISE = "fc_0", "dwconv"

    def laplacian(self, x):
        """The mean of the cells within one step that exist counts x too: n + 1 of them for n neighbours."""
        cells = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, 1, 1) * 9.0
        mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return (mean - x) * (cells / (cells - 1.0).clamp(min=1.0))


class Downsampling(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.reduction = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(1, out)

    def forward(self, x):
        return self.norm(self.reduction(x))


class Stage(nn.Module):
    def __init__(self, block, channels, depth, out, stride):
        super().__init__()
        self.blocks = nn.Sequential(*(block(channels) for _ in range(depth)))
        self.downsample = Downsampling(channels, out, stride) if out else None

    def forward(self, x):
        x = self.blocks(x)
        return self.downsample(x) if self.downsample else x


class Stem(nn.Module):
    def __init__(self, channels, strides):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, strides[0], 1)
        self.norm1 = nn.GroupNorm(1, channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, strides[1], 1)
        self.norm2 = nn.GroupNorm(1, channels)

    def forward(self, x):
        return self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class HcNet(nn.Module):
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w], after its norm.

    Args:
      encoder: A `qbheat_jax.models.hcnet.HcNet`.
      classes: Number of classes.
    """

    def __init__(self, encoder, classes=1000):
        super().__init__()
        block, dims = {"a": BlockA, "c": BlockC}[encoder.generation], encoder.dims
        self.patch_embed = Stem(dims[0], {4: (2, 2), 2: (2, 1), 1: (1, 1)}[encoder.stem_stride])
        strides = (*[2] * (len(dims) - 2), encoder.last_stride, 0)
        rows = zip(dims, encoder.depths, (*dims[1:], 0), strides)
        self.layers = nn.Sequential(*(Stage(block, *row) for row in rows))
        self.norm, self.head = nn.GroupNorm(1, dims[-1]), nn.Linear(dims[-1], classes)

    def maps(self, x):
        return self.norm(self.layers(self.patch_embed(x)))

    def forward(self, x):
        return self.head(self.maps(x).mean((2, 3)))
