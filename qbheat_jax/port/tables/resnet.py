"""Parameter names of ResNet in torchvision. timm uses the same, and MoCo's release too, once its prefix is removed."""

from qbheat_jax.models.resnet import ResNet
from qbheat_jax.port.names import Table


def signs(encoder):
    """Return {parameter name: shape} that a file of this encoder must have."""
    shape = (512, 512, 3, 3)
    last = f"layer4.{encoder.blocks[3] - 1}"
    third = f"layer3.{encoder.blocks[2] - 1}.conv1.weight"
    if encoder.bottleneck:
        return {f"{last}.conv2.weight": shape, f"{last}.conv3.weight": (2048, 512, 1, 1), third: (256, 1024, 1, 1)}
    return {f"{last}.conv2.weight": shape, third: (256, 256, 3, 3)}


TABLE = Table(
    module=ResNet,
    rules=(
        (r"encoder/conv1", r"conv1"),
        (r"encoder/bn1", r"bn1"),
        (r"encoder/layer(\d)_(\d+)/(conv|bn)(\d)", r"layer\1.\2.\3\4"),
        (r"encoder/layer(\d)_(\d+)/downsample_(\d)", r"layer\1.\2.downsample.\3"),
        (r"head/classifier", r"fc"),
    ),
    head=r"fc\.",
    signs=signs,
)
