"""EfficientNet-Lite0 in PyTorch, with the parameter names of efficientnet_lite_pytorch."""

import torch.nn.functional as F
from torch import nn


def _same(x, conv):
    """Apply a convolution with TensorFlow's "same" padding, which puts the odd zero at the end of each axis."""
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
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w]."""

    # (expansion, channels, blocks, stride, kernel)
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
