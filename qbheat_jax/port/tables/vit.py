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


def advice(shapes):
    """Why a file of ViT's names does not fit, of what is often met."""
    patch = shapes.get("patch_embed.proj.weight", (0, 0, 16, 16))
    if patch[2:] not in ((16, 16), (8, 8)):
        return f"its patches have {' x '.join(map(str, patch[2:]))} pixels, and these encoders take 16 or 8 a side"
    if "fc_norm.weight" in shapes:
        return (
            "it pools the patches before its last norm (fc_norm), as MAE's fine-tuned models, which is not built here"
        )
    if "dist_token" in shapes:
        return "it has a distillation token (DeiT's distilled models), which is not built here"
    if "blocks.0.ls1.gamma" in shapes:
        return "it scales its layers (ls1.gamma: CaiT's LayerScale, DINOv2), which is not built here"
    return ""


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
    advice=advice,
)
