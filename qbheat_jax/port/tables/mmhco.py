"""Parameter names of MMHCO-HAR in mmengine's checkpoints of the released program, and of its backbone alone (`backbone`)."""

from qbheat_jax.errors import UserError
from qbheat_jax.models.mmhco import MMHCO
from qbheat_jax.port.names import IGNORED, Table

_MODULES = (
    (r"encoder/freq_embed_rgb", r"freq_embed"),
    (r"encoder/freq_embed_event", r"freq_embed2"),
    (r"encoder/freq_conv(\d)_(rgb|event)/conv", r"freq_conv\1_\2.0"),
    (r"encoder/freq_conv(\d)_(rgb|event)/bn", r"freq_conv\1_\2.1"),
    (r"encoder/patch_embed/conv(\d)", r"patch_embed.conv\1"),
    (r"encoder/patch_embed/norm(\d)", r"patch_embed.norm\1.1"),
    (r"encoder/layers_(\d+)_(\d+)/conv", r"layers.\1.\2.0"),
    (r"encoder/layers_(\d+)_(\d+)/norm", r"layers.\1.\2.1"),
    (r"encoder/layers_(\d+)_(\d+)/(gamma\d)", r"layers.\1.\2.\3"),
    (r"encoder/layers_(\d+)_(\d+)/(norm\d)", r"layers.\1.\2.\3"),
    (r"encoder/layers_(\d+)_(\d+)/mlp/(fc\d)", r"layers.\1.\2.mlp.\3"),
    (r"encoder/layers_(\d+)_(\d+)/op/(dwconv|linear|out_norm|out_linear)", r"layers.\1.\2.op.\3"),
    (r"encoder/layers_(\d+)_(\d+)/op/to_k", r"layers.\1.\2.op.to_k.0"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/router/fc0", r"layers.\1.\2.op.policy.net.0"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/router/bn0", r"layers.\1.\2.op.policy.net.2"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/router/fc1", r"layers.\1.\2.op.policy.net.3"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/router/bn1", r"layers.\1.\2.op.policy.net.5"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/router/fc2", r"layers.\1.\2.op.policy.net.6"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/gate", r"layers.\1.\2.op.dynamicconv.conv.0"),
    (r"encoder/layers_(\d+)_(\d+)/op/fusion/gate_bn", r"layers.\1.\2.op.dynamicconv.conv.1"),
    (r"encoder/norm", r"classifier.0"),
)


def signs(encoder):
    """Return {parameter name: shape} that a recogniser's file of this encoder must have."""
    dims, last = encoder.dims, len(encoder.dims) - 1
    return {
        "backbone.patch_embed.conv1.weight": (dims[0] // 2, 3, 3, 3),
        f"backbone.freq_conv{last}_event.0.weight": (dims[last], dims[last - 1], 3, 3),
        f"backbone.layers.{last}.{encoder.depths[last] - 1}.op.policy.net.0.weight": (256, dims[last]),
    }


def options(shapes):
    """Return {config field: value} of the encoder in a file: as in the program that wrote it, whose chain is noise.

    Args:
      shapes: {parameter name: shape} of the file.

    Raises:
      UserError: the table of the first stage is not square.
    """
    rows, columns = next((shapes[name] for name in ("backbone.freq_embed", "freq_embed") if name in shapes), (0, 0, 0))[
        :2
    ]
    if rows != columns:
        raise UserError(f"freq_embed is made for {rows} x {columns} cells: only square ones are known")
    return {"encoder.grid": rows, "encoder.fve_mode": "noise"}


TABLE = Table(
    module=MMHCO,
    rules=(
        *((pattern, f"backbone.{name}") for pattern, name in _MODULES),
        (r"head/classifier", r"cls_head.fc_cls"),
    ),
    dialects={"backbone": (*_MODULES, (r"head/classifier", r"fc_cls"))},
    head=r"cls_head\.",
    signs=signs,
    options=options,
    # What its forward pass leaves in the state dict.
    ignored=rf"{IGNORED}|(backbone\.)?freq_embed_(rgb|event)",
)
