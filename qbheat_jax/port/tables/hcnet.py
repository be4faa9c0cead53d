"""Parameter names of HcNet's later generation, `generation="c"`. `hcnet_a.py` has the first's."""

from qbheat_jax.errors import UserError
from qbheat_jax.models.hcnet import HcNet
from qbheat_jax.port.names import Table


def rules(gate, depthwise):
    """Return the rules of a generation, given its names of the gate and of the MLP's depthwise convolution."""
    block = r"encoder/layers_(\d)_(\d+)"
    there = r"layers.\1.blocks.\2"
    return (
        (r"encoder/stem/(conv|norm)(\d)", r"patch_embed.\1\2"),
        (rf"{block}/stencil", rf"{there}.Anisotropic_conv"),
        (rf"{block}/gate", rf"{there}.{gate}"),
        (rf"{block}/norm", rf"{there}.norm2"),
        (rf"{block}/fc(\d)", rf"{there}.mlp.fc\3"),
        (rf"{block}/filter", rf"{there}.mlp.{depthwise}"),
        (r"encoder/down_(\d)/conv", r"layers.\1.downsample.reduction"),
        (r"encoder/down_(\d)/norm", r"layers.\1.downsample.norm"),
        (r"encoder/norm", r"norm"),
        (r"head/classifier", r"head"),
    )


def last_blocks(encoder):
    """Yield (name, channels) of the last block of each of the last two stages, by which sizes are told apart."""
    for stage in (2, 3):
        yield f"layers.{stage}.blocks.{encoder.depths[stage] - 1}", encoder.dims[stage]


def options(shapes):
    """Return {}, as a file chooses no option. Raise UserError for a file of generation B, whose stencil is 3 x 3.

    Args:
      shapes: {parameter name: shape} of the file.
    """
    for name, shape in shapes.items():
        if name.endswith("Anisotropic_conv.weight") and tuple(shape[2:]) == (3, 3):
            raise UserError(
                f"{name} {list(shape)} is of HcNet's generation B, which is not supported; A, which lacks this weight, and "
                "C, where it is 5 x 5, are accepted"
            )
    return {}


TABLE = Table(
    module=HcNet,
    fields={"generation": "c"},
    rules=rules("DeltaT_DeltaD", "Filters"),
    head=r"head\.",
    signs=lambda encoder: {f"{n}.Anisotropic_conv.weight": (c, 1, 5, 5) for n, c in last_blocks(encoder)},
    options=options,
)
