"""vHeat in PyTorch (arXiv 2405.16555), in train form and folded, with the parameter names of its release.

Between convolutions maps are [B, H, W, C].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def _first(x):
    """Permute [B, H, W, C] to [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


class Last(nn.Module):
    """Permute [B, C, H, W] to [B, H, W, C]."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Heat(nn.Module):
    """Heat conduction for a known time: [B, side, side, C] times factors [side, side, C] between two cosine transforms."""

    def __init__(self, side):
        super().__init__()
        modes = torch.arange(side, dtype=torch.float64)
        cosines = math.sqrt(2 / side) * torch.cos(math.pi / side * modes[:, None] * (modes + 0.5))
        cosines[0] = math.sqrt(1 / side)
        rates = (math.pi * modes / side) ** 2
        self.register_buffer("cosines", cosines.float(), persistent=False)
        self.register_buffer("rates", (rates[:, None] + rates)[..., None].float(), persistent=False)

    def decay(self, k):
        return torch.exp(-self.rates * k)

    def forward(self, u, factors):
        u = self._rows(self.cosines, torch.matmul(self.cosines, u)) * factors
        return torch.matmul(self.cosines.T, self._rows(self.cosines.T, u))

    @staticmethod
    def _rows(matrix, u):
        return torch.matmul(matrix, u.flatten(2)).view_as(u)


class Heat2D(nn.Module):
    def __init__(self, channels, side, folded):
        super().__init__()
        self.heat = Heat(side)
        if folded:
            self.k_exp = nn.Parameter(torch.ones(side, side, channels))
        else:
            self.to_k = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.linear = nn.Linear(channels, 2 * channels)
        self.out_norm, self.out_linear = nn.LayerNorm(channels), nn.Linear(channels, channels)

    def forward(self, x, table):
        factors = self.k_exp if table is None else self.heat.decay(self.to_k(table))
        u, gate = self.linear(self.dwconv(_first(x)).permute(0, 2, 3, 1)).chunk(2, -1)
        return self.out_linear(self.out_norm(self.heat(u.contiguous(), factors)) * F.silu(gate))


class MLP(nn.Module):
    """Its layers are 1x1 convolutions in the release, which have weights of another shape."""

    def __init__(self, channels, ratio):
        super().__init__()
        hidden = int(channels * ratio)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        x = F.gelu(F.linear(x, self.fc1.weight.flatten(1), self.fc1.bias))
        return F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias)


class Block(nn.Module):
    def __init__(self, channels, side, encoder):
        super().__init__()
        self.post_norm, self.scaled = encoder.post_norm, encoder.layer_scale
        if self.scaled:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((channels,), 1e-5)) for _ in range(2))
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.op, self.mlp = Heat2D(channels, side, encoder.folded), MLP(channels, encoder.mlp_ratio)

    def forward(self, x, table):
        heat = self.norm1(self.op(x, table)) if self.post_norm else self.op(self.norm1(x), table)
        x = x + (self.gamma1 * heat if self.scaled else heat)
        mlp = self.norm2(self.mlp(x)) if self.post_norm else self.mlp(self.norm2(x))
        return x + (self.gamma2 * mlp if self.scaled else mlp)


class Stem(nn.Module):
    def __init__(self, channels, strides):
        super().__init__()
        half = channels // 2
        self.conv1, self.conv2 = nn.Conv2d(3, half, 3, strides[0], 1), nn.Conv2d(half, channels, 3, strides[1], 1)
        self.norm1, self.norm2 = (nn.Sequential(Last(), nn.LayerNorm(width, eps=1e-6)) for width in (half, channels))

    def forward(self, x):
        return self.norm2(self.conv2(_first(F.gelu(self.norm1(self.conv1(x))))))


class VHeat(nn.Module):
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w], after its norm.

    It takes square images of the size that the encoder's parameters are made for.

    Args:
      encoder: A `qbheat_jax.models.vheat.VHeat` of its default stride.
      classes: Number of classes.
    """

    def __init__(self, encoder, classes=1000):
        super().__init__()
        dims, side, layers, tables = encoder.dims, encoder.image_size // encoder.stem_stride, [], []
        self.patch_embed = Stem(dims[0], {4: (2, 2), 2: (2, 1), 1: (1, 1)}[encoder.stem_stride])
        for n, (channels, depth) in enumerate(zip(dims, encoder.depths)):
            blocks = [Block(channels, side >> n, encoder) for _ in range(depth)]
            if n + 1 < len(dims):
                conv = nn.Conv2d(channels, dims[n + 1], 3, 2, 1, bias=False)
                blocks.append(nn.Sequential(conv, nn.LayerNorm(dims[n + 1])))
            layers.append(nn.ModuleList(blocks))
            tables.append(nn.Parameter(0.02 * torch.randn(side >> n, side >> n, channels)))
        self.layers, self.depths = nn.ModuleList(layers), encoder.depths
        self.freq_embed = None if encoder.folded else nn.ParameterList(tables)
        last = dims[-1]
        self.classifier = nn.Sequential(nn.LayerNorm(last), nn.Identity(), nn.Identity(), nn.Linear(last, classes))

    def maps(self, x):
        x = self.patch_embed(x)
        for n, (layers, depth) in enumerate(zip(self.layers, self.depths)):
            for block in layers[:depth]:
                x = block(x, None if self.freq_embed is None else self.freq_embed[n])
            for conv, norm in layers[depth:]:
                x = norm(conv(_first(x)).permute(0, 2, 3, 1))
        return _first(self.classifier[0](x))

    def forward(self, x):
        return self.classifier[3](self.maps(x).mean((2, 3)))
