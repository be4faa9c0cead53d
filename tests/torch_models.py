"""The architectures that are ported, in PyTorch, by the names of torchvision, timm and efficientnet_lite_pytorch.

Written for the tests: plain definitions to compare with, given random weights and random running averages.
"""

import torch
import torch.nn.functional as F
from torch import nn


def randomise(model, seed):
    """Random weights of a size that keeps activations near 1, batch norms with random gains, biases and averages."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, mean, std):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                normal(module.weight, 0, (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    normal(module.bias, 0, 0.1)
            elif isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                uniform(module.weight, 0.5, 1.2)
                normal(module.bias, 0, 0.2)
                if isinstance(module, nn.BatchNorm2d):
                    normal(module.running_mean, 0, 0.3)
                    uniform(module.running_var, 0.5, 1.5)
        for name in ("cls_token", "pos_embed"):
            if hasattr(model, name):
                normal(getattr(model, name), 0, 0.5)
    return model.eval()


class Basic(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels, width, stride)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels, 4 * width, stride)

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


def _shortcut(channels, out, stride):
    if stride == 1 and channels == out:
        return None
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """torchvision's names. forward -> logits; `maps` -> the last feature map [B, C, h, w]."""

    def __init__(self, block, counts, classes=1000):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels, expansion = 64, 4 if block is Bottleneck else 1
        for stage, count in enumerate(counts):
            width, blocks = 64 * 2**stage, []
            for n in range(count):
                blocks.append(block(channels, width, 2 if stage and n == 0 else 1))
                channels = width * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)

    def maps(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.fc(self.maps(x).mean((2, 3)))


def resnet18(classes=1000):
    return ResNet(Basic, (2, 2, 2, 2), classes)


def resnet50(classes=1000):
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class ViT(nn.Module):
    """timm's names. A smaller image than the table's takes the table's top left."""

    def __init__(self, width, heads, depth=12, patch=16, grid=14, classes=1000):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.patch_embed = PatchEmbed(width, patch)
        self.blocks = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def tokens(self, x):
        x = self.patch_embed.proj(x)
        rows, columns = x.shape[2:]
        table = self.pos_embed[:, 1:].reshape(1, self.grid, self.grid, -1)[:, :rows, :columns]
        x = x.flatten(2).transpose(1, 2) + table.flatten(1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat([token, x], 1)))

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])


def _conv_bn(channels, out, kernel=1, stride=1, groups=1):
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out)


class Inverted(nn.Module):
    def __init__(self, channels, out, stride, expansion):
        super().__init__()
        hidden, self.joined = channels * expansion, stride == 1 and channels == out
        layers = [] if expansion == 1 else [nn.Sequential(*_conv_bn(channels, hidden), nn.ReLU6())]
        layers.append(nn.Sequential(*_conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6()))
        self.conv = nn.Sequential(*layers, *_conv_bn(hidden, out))

    def forward(self, x):
        return x + self.conv(x) if self.joined else self.conv(x)


class MobileNetV2(nn.Module):
    """torchvision's names."""

    ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes=1000):
        super().__init__()
        layers, channels = [nn.Sequential(*_conv_bn(3, 32, 3, 2), nn.ReLU6())], 32
        for expansion, out, count, stride in self.ROWS:
            for n in range(count):
                layers.append(Inverted(channels, out, stride if n == 0 else 1, expansion))
                channels = out
        self.features = nn.Sequential(*layers, nn.Sequential(*_conv_bn(320, 1280), nn.ReLU6()))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def maps(self, x):
        return self.features(x)

    def forward(self, x):
        return self.classifier(self.maps(x).mean((2, 3)))


def _same(x, conv):
    """A convolution padded as TensorFlow's "same": the odd zero after, on each axis by its own size."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // conv.stride[0]) - 1) * conv.stride[0] + conv.kernel_size[0] - size, 0)
        pads += [total // 2, total - total // 2]
    return conv(F.pad(x, pads))


class MBConv(nn.Module):
    def __init__(self, channels, out, stride, kernel, expansion):
        super().__init__()
        hidden, self.joined, self.widens = channels * expansion, stride == 1 and channels == out, expansion > 1
        if self.widens:
            self._expand_conv = nn.Conv2d(channels, hidden, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv = nn.Conv2d(hidden, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(_same(y, self._depthwise_conv)))))
        return x + y if self.joined else y


class EfficientNetLite0(nn.Module):
    """efficientnet_lite_pytorch's names."""

    ROWS = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip

    def __init__(self, classes=1000):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, channels = [], 32
        for expansion, out, count, stride, kernel in self.ROWS:
            for n in range(count):
                blocks.append(MBConv(channels, out, stride if n == 0 else 1, kernel, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, classes)

    def maps(self, x):
        x = F.relu6(self._bn0(_same(x, self._conv_stem)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, x):
        return self._fc(self.maps(x).mean((2, 3)))
