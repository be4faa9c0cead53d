"""Parameter names of EfficientNet-Lite0 in efficientnet_lite_pytorch."""

from qbheat_jax.models.mobilenet import VARIANTS, MobileNet
from qbheat_jax.port.names import Table

TABLE = Table(
    module=MobileNet,
    fields={"variant": VARIANTS["efficientnet_lite0"]},
    rules=(
        (r"encoder/stem/conv", r"_conv_stem"),
        (r"encoder/stem/bn", r"_bn0"),
        (r"encoder/block(\d+)/expand/conv", r"_blocks.\1._expand_conv"),
        (r"encoder/block(\d+)/expand/bn", r"_blocks.\1._bn0"),
        (r"encoder/block(\d+)/depthwise/conv", r"_blocks.\1._depthwise_conv"),
        (r"encoder/block(\d+)/depthwise/bn", r"_blocks.\1._bn1"),
        (r"encoder/block(\d+)/project/conv", r"_blocks.\1._project_conv"),
        (r"encoder/block(\d+)/project/bn", r"_blocks.\1._bn2"),
        (r"encoder/last/conv", r"_conv_head"),
        (r"encoder/last/bn", r"_bn1"),
        (r"head/classifier", r"_fc"),
    ),
    head=r"_fc\.",
    signs=lambda encoder: {"_conv_stem.weight": (32, 3, 3, 3), "_conv_head.weight": (1280, 320, 1, 1)},
)
