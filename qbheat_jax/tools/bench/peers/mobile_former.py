"""Mobile-Former in PyTorch (arXiv 2108.05895), with the parameter names of its release and a linear classifier.

Maps are [B, C, H, W], tokens are [B, T, D]. `last` and its norm belong to QB-Heat, whose encoders end in one more
convolution.
"""

import torch
import torch.nn.functional as F
from torch import nn


def _hard_sigmoid(x):
    return F.relu6(x + 3.0) / 6.0


def _cells(x):
    """Reshape [B, C, H, W] to [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def _attend(query, key, value, heads):
    """Return softmax attention: query [B, N, C], key and value [B, M, C] -> [B, N, C], heads contiguous in C."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _conv(channels, out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Shuffle(nn.Module):
    """Channel shuffle: reshape channels to (groups, C / groups) and transpose. Identity for one group."""

    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2) if self.groups > 1 else x


class DyReLU(nn.Module):
    def __init__(self, token_dim, channels):
        super().__init__()
        layers = nn.Linear(token_dim, token_dim // 4), nn.ReLU(), nn.Linear(token_dim // 4, 2 * channels)
        self.hyper = nn.Sequential(*layers)

    def forward(self, x, token):
        a1, a2 = _hard_sigmoid(self.hyper(token))[:, :, None, None].chunk(2, 1)
        return torch.maximum(x * (2.0 * (a1 - 0.5) + 1.0), x * (2.0 * (a2 - 0.5)))


class LocalGlobal(nn.Module):
    def __init__(self, channels, token_dim):
        super().__init__()
        self.alpha = nn.Sequential(nn.Linear(token_dim, channels))
        self.q, self.proj = nn.Linear(token_dim, channels), nn.Linear(channels, token_dim)
        self.layer_norm = nn.LayerNorm(token_dim)

    def forward(self, x, tokens):
        cells = _cells(x)
        y = _attend(self.q(tokens), cells, cells, 2) * (2.0 * _hard_sigmoid(self.alpha(tokens)))
        return self.layer_norm(tokens + self.proj(y))


class GlobalBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.channel_mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.layer_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens):
        tokens = self.layer_norm(tokens + self.channel_mlp(_attend(self.q(tokens), tokens, tokens, 4)))
        return self.ffn_norm(tokens + self.ffn(tokens))


class GlobalLocal(nn.Module):
    def __init__(self, channels, token_dim):
        super().__init__()
        self.k, self.proj = nn.Linear(token_dim, channels), nn.Linear(token_dim, channels)

    def forward(self, x, tokens):
        y = _attend(_cells(x), self.k(tokens), self.proj(tokens), 2)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class ConvAlone(nn.Module):
    """A depthwise and a 1x1 convolution, which leave the tokens unchanged."""

    def __init__(self, channels, e1, out, stride, groups):
        super().__init__()
        hidden, self.joined = round(channels * e1), stride == 1 and channels == out
        self.conv = nn.Sequential(
            *_conv(channels, hidden, 3, stride, channels),
            nn.ReLU6(),
            Shuffle(channels if groups > 1 else 1),
            *_conv(hidden, out, groups=groups),
        )

    def forward(self, x, tokens):
        return (x + self.conv(x) if self.joined else self.conv(x)), tokens


class Bridged(nn.Module):
    """Base class of the two kinds of blocks with tokens."""

    def __init__(self, channels, out, stride, token_dim):
        super().__init__()
        self.joined = stride == 1 and channels == out
        self.local_global = LocalGlobal(channels, token_dim)
        self.global_block = GlobalBlock(token_dim)
        self.global_local = GlobalLocal(out, token_dim)

    def bridge(self, x, tokens):
        return self.global_block(self.local_global(x, tokens))


class DnaBlock(Bridged):
    def __init__(self, channels, e1, out, stride, groups, token_dim):
        super().__init__(channels, out, stride, token_dim)
        hidden = round(channels * e1)
        self.conv1, self.hyper1 = _conv(channels, hidden, groups=groups), DyReLU(token_dim, hidden)
        self.conv2, self.hyper2 = _conv(hidden, hidden, 3, stride, hidden), DyReLU(token_dim, hidden)
        self.conv3, self.shuffle = _conv(hidden, out, groups=groups), Shuffle(groups)

    def forward(self, x, tokens):
        tokens = self.bridge(x, tokens)
        token = tokens[:, 0]
        y = self.hyper1(self.shuffle(self.conv1(x)), token)
        y = self.shuffle(self.conv3(self.hyper2(self.conv2(y), token)))
        return self.global_local(x + y if self.joined else y, tokens), tokens


class DnaBlock3(Bridged):
    def __init__(self, channels, e1, out, stride, e2, groups, token_dim):
        super().__init__(channels, out, stride, token_dim)
        first, second = round(channels * e1), round(out * e2)
        self.conv1, self.hyper1 = _conv(channels, first, 3, stride, channels), DyReLU(token_dim, first)
        self.conv2 = _conv(first, out, groups=groups)
        self.conv3, self.hyper3 = _conv(out, second, 3, 1, out), DyReLU(token_dim, second)
        self.conv4 = _conv(second, out, groups=groups)
        self.shuffle1, self.shuffle3 = (Shuffle(n if groups > 1 else 1) for n in (channels, out))

    def forward(self, x, tokens):
        tokens = self.bridge(x, tokens)
        token = tokens[:, 0]
        u = self.conv2(self.hyper1(self.shuffle1(self.conv1(x)), token))
        y = u + self.conv4(self.hyper3(self.shuffle3(self.conv3(u)), token))
        y = self.global_local(y, tokens)
        return (x + y if self.joined else y), tokens


class LinearClassifier(nn.Module):
    """A linear classifier on the mean over the cells, in place of the release's last layer."""

    def __init__(self, channels, classes):
        super().__init__()
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(channels, classes))

    def forward(self, x):
        return self.classifier(x.mean((2, 3)))


class MobileFormer(nn.Module):
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w].

    Args:
      variant: A `qbheat_jax.models.mobile_former.Variant`.
      classes: Number of classes.
    """

    def __init__(self, variant, classes=1000):
        super().__init__()
        v, channels = variant, variant.stem
        self.tokens = nn.Embedding(v.tokens, v.token_dim)
        self.stem = nn.Sequential(*_conv(3, v.stem, 3, 2), nn.ReLU6())
        blocks = []
        for kind, e1, out, stride, e2 in v.blocks:
            if e1 == 1 or e2 == 0:
                blocks.append(ConvAlone(channels, e1, out, stride, v.groups))
            elif kind == 1:
                blocks.append(DnaBlock(channels, e1, out, stride, v.groups, v.token_dim))
            else:
                blocks.append(DnaBlock3(channels, e1, out, stride, e2, v.groups, v.token_dim))
            channels = out
        self.features = nn.ModuleList(blocks)
        self.local_global = LocalGlobal(channels, v.token_dim)
        self.last = nn.Sequential(*_conv(channels, v.width), nn.ReLU()) if v.width else None
        self.classifier = LinearClassifier(v.width or channels, classes)

    def blocks(self, x):
        """Yield (map [B, C, H, W], tokens [B, T, D]) after every block."""
        x, tokens = self.stem(x), self.tokens.weight.expand(len(x), -1, -1)
        for block in self.features:
            x, tokens = block(x, tokens)
            yield x, tokens

    def maps(self, x):
        # Skip the last bridge to the tokens, whose output is not used.
        *_, (x, _) = self.blocks(x)
        return self.last(x) if self.last else x

    def forward(self, x):
        return self.classifier(self.maps(x))
