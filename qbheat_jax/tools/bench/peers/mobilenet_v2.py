"""MobileNetV2 in PyTorch, with the parameter names of torchvision."""

from torch import nn


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
    """The network. `forward` returns logits [B, classes], `maps` the last feature map [B, C, h, w]."""

    # (expansion, channels, blocks, stride)
    ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes=1000):
        super().__init__()
        layers, channels = [nn.Sequential(*_conv_bn(3, 32, 3, 2), nn.ReLU6())], 32
        for expansion, out, count, stride in self.ROWS:
            for n in range(count):
                layers.append(Inverted(channels, out, stride if n == 0 else 1, expansion))
                channels = out
        self.features = nn.Sequential(*layers, nn.Sequential(*_conv_bn(320, 1280), nn.ReLU6()))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(1280, classes))  # Identity replaces the dropout

    def maps(self, x):
        return self.features(x)

    def forward(self, x):
        return self.classifier(self.maps(x).mean((2, 3)))
