"""ViT by the names of timm, which are DeiT's and MAE's."""

import math

from qbheat_jax.errors import UserError
from qbheat_jax.models.vit import ViT
from qbheat_jax.port.names import Table


def options(shapes):
    """The encoder's fields that a file decides: whether it has a class token, and the grid of its position code.

    UserError for a position code that is not that of a square.
    """
    class_token = "cls_token" in shapes
    positions = shapes.get("pos_embed", (1, 14 * 14 + class_token))
    cells = positions[1] - class_token if len(positions) > 1 else 0
    grid = math.isqrt(max(0, cells))
    if grid == 0 or grid * grid != cells:
        raise UserError(f"pos_embed {list(positions)} is the position code of {cells} cells, which are no square grid")
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
