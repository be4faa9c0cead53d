"""Parameter names of ConvNeXt: timm's, the release's, torchvision's, and those of Hugging Face's model."""

from qbheat_jax.models.convnext import ConvNeXt
from qbheat_jax.port.names import Table


def _rules(ends, block, modules, down):
    """Return the rules of a release.

    Args:
      ends: names of stem, stem_norm, norm and the classifier.
      block: name of block \\2 of stage \\1.
      modules: names of conv, norm, fc1, fc2 and gamma below it.
      down: names of the norm and the convolution before stage \\1.
    """
    ours = ("encoder/stem", "encoder/stem_norm", "encoder/norm", "head/classifier")
    names = ("conv", "norm", "fc1", "fc2", "gamma")
    return (
        *zip(ours, ends),
        *((rf"encoder/layers_(\d+)_(\d+)/{name}", f"{block}.{there}") for name, there in zip(names, modules)),
        (r"encoder/down_(\d+)_norm", down[0]),
        (r"encoder/down_(\d+)", down[1]),
    )


def _torchvision():
    """Return the rules of torchvision, which numbers stages and what lies before them in one row."""
    modules = {"conv": "block.0", "norm": "block.2", "fc1": "block.3", "fc2": "block.5", "gamma": "layer_scale"}
    rows = [
        (rf"encoder/layers_{stage}_(\d+)/{name}", rf"features.{2 * stage + 1}.\1.{there}")
        for stage in range(4)
        for name, there in modules.items()
    ]
    for stage in range(1, 4):
        rows += [(f"encoder/down_{stage}{name}", f"features.{2 * stage}.{n}") for n, name in enumerate(("_norm", ""))]
    ends = {"encoder/stem": "features.0.0", "encoder/stem_norm": "features.0.1", "encoder/norm": "classifier.0"}
    return (*rows, *ends.items(), ("head/classifier", "classifier.2"))


def signs(encoder):
    """Return {parameter name: shape} that a file of this encoder must have."""
    third, last = (f"stages.{stage}.blocks.{encoder.depths[stage] - 1}.conv_dw.weight" for stage in (2, 3))
    return {last: (encoder.dims[3], 1, 7, 7), third: (encoder.dims[2], 1, 7, 7)}


def dialect_signs(encoder):
    """Return the signs of files in the other names."""
    last, shape = encoder.depths[3] - 1, (encoder.dims[3], 1, 7, 7)
    third, third_shape = encoder.depths[2] - 1, (encoder.dims[2], 1, 7, 7)
    places = (
        (f"stages.3.{last}.dwconv", f"stages.2.{third}.dwconv"),
        (f"features.7.{last}.block.0", f"features.5.{third}.block.0"),
        (f"encoder.stages.3.layers.{last}.dwconv", f"encoder.stages.2.layers.{third}.dwconv"),
    )
    return tuple({f"{a}.weight": shape, f"{b}.weight": third_shape} for a, b in places)


_RELEASE = ("dwconv", "norm", "pwconv1", "pwconv2", "gamma")
_HF = ("dwconv", "layernorm", "pwconv1", "pwconv2", "layer_scale_parameter")
TABLE = Table(
    module=ConvNeXt,
    rules=_rules(
        ("stem.0", "stem.1", "head.norm", "head.fc"),
        r"stages.\1.blocks.\2",
        ("conv_dw", "norm", "mlp.fc1", "mlp.fc2", "gamma"),
        (r"stages.\1.downsample.0", r"stages.\1.downsample.1"),
    ),
    dialects={
        "release": _rules(
            ("downsample_layers.0.0", "downsample_layers.0.1", "norm", "head"),
            r"stages.\1.\2",
            _RELEASE,
            (r"downsample_layers.\1.0", r"downsample_layers.\1.1"),
        ),
        "torchvision": _torchvision(),
        "hf convnext": _rules(
            ("embeddings.patch_embeddings", "embeddings.layernorm", "layernorm", "classifier"),
            r"encoder.stages.\1.layers.\2",
            _HF,
            (r"encoder.stages.\1.downsampling_layer.0", r"encoder.stages.\1.downsampling_layer.1"),
        ),
    },
    head=r"head\.(fc|weight|bias)|classifier\.(2|weight|bias)",
    signs=signs,
    dialect_signs=dialect_signs,
)
