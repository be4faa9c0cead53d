"""Parameter names of vHeat's release: classifiers, folded ones (`k_exp`), and backbones of its detectors (`outnorm`)."""

from qbheat_jax.errors import UserError
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.port.names import Table


def signs(encoder):
    """Return {parameter name: shape} that a file of this encoder must have."""
    dims, depths = encoder.dims, encoder.depths
    last = len(dims) - 1
    return {
        "patch_embed.conv1.weight": (dims[0] // 2, 3, 3, 3),
        f"layers.{last - 1}.{depths[last - 1]}.0.weight": (dims[last], dims[last - 1], 3, 3),
        f"layers.{last}.{depths[last] - 1}.op.linear.weight": (2 * dims[last], dims[last]),
    }


def options(shapes):
    """Return {config field: value} of the encoder in a file: its form, and the cells that its tables are made for.

    Args:
      shapes: {parameter name: shape} of the file.

    Raises:
      UserError: the table of the first stage is not square.
    """
    folded = "layers.0.0.op.k_exp" in shapes
    name = "layers.0.0.op.k_exp" if folded else "freq_embed.0"
    rows, columns = shapes.get(name, (0, 0))[:2]
    if rows != columns:
        raise UserError(f"{name} is made for {rows} x {columns} cells: only square ones are known")
    return {"encoder.grid": rows, "encoder.folded": folded, "encoder.outnorm": "outnorm0.weight" in shapes}


_BLOCK, _NAMES = r"encoder/layers_(\d+)_(\d+)", r"layers.\1.\2"
TABLE = Table(
    module=VHeat,
    rules=(
        (r"encoder/patch_embed/conv(\d)", r"patch_embed.conv\1"),
        (r"encoder/patch_embed/norm(\d)", r"patch_embed.norm\1.1"),
        (r"encoder/freq_embed_(\d+)", r"freq_embed.\1"),
        (rf"{_BLOCK}/(gamma\d)", rf"{_NAMES}.\3"),
        (rf"{_BLOCK}/(norm\d)", rf"{_NAMES}.\3"),
        (rf"{_BLOCK}/op/to_k", rf"{_NAMES}.op.to_k.0"),
        (rf"{_BLOCK}/op/(k_exp|dwconv|linear|out_norm|out_linear)", rf"{_NAMES}.op.\3"),
        (rf"{_BLOCK}/mlp/(fc\d)", rf"{_NAMES}.mlp.\3"),
        (rf"{_BLOCK}/conv", rf"{_NAMES}.0"),
        (rf"{_BLOCK}/norm", rf"{_NAMES}.1"),
        (r"encoder/outnorm(\d+)", r"outnorm\1"),
        (r"encoder/norm", r"classifier.0"),
        (r"head/classifier", r"classifier.3"),
    ),
    head=r"classifier\.3\.",
    signs=signs,
    options=options,
)
