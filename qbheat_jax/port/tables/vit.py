"""Parameter names of ViT in timm. DeiT and MAE use the same."""

import math

from qbheat_jax.errors import UserError
from qbheat_jax.models.vit import ViT
from qbheat_jax.port.names import Table


def options(shapes):
    """Return {config field: value} of the encoder in a file: class token, kind and grid of the position code.

    Args:
      shapes: {parameter name: shape} of the file.

    Raises:
      UserError: the cells of the position code are no square.
    """
    class_token = "cls_token" in shapes
    positions = shapes.get("pos_embed", (1, 14 * 14 + class_token))
    cells = positions[1] - class_token if len(positions) > 1 else 0
    grid = math.isqrt(max(0, cells))
    if grid == 0 or grid * grid != cells:
        raise UserError(
            f"pos_embed {list(positions)} is the position code of {cells} cells: it takes a square number of them"
        )
    return {"encoder.class_token": class_token, "encoder.position": "learnt", "encoder.grid": grid}


TABLE = Table(
    module=ViT,
    rules=(
        (r"encoder/class_token", r"cls_token"),
        (r"encoder/pos_embed", r"pos_embed"),
        (r"encoder/patch_embed", r"patch_embed.proj"),
        (r"encoder/block(\d+)/norm(\d)", r"blocks.\1.norm\2"),
        (r"encoder/block(\d+)/attn/(qkv|proj)", r"blocks.\1.attn.\2"),
        (r"encoder/block(\d+)/fc(\d)", r"blocks.\1.mlp.fc\2"),
        (r"encoder/norm", r"norm"),
        (r"head/classifier", r"head"),
    ),
    head=r"head\.",
    signs=lambda encoder: {
        f"blocks.{encoder.depth - 1}.attn.qkv.weight": (3 * encoder.width, encoder.width),
        "norm.weight": (encoder.width,),
    },
    options=options,
)
