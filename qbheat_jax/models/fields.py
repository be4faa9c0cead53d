"""Config fields of the encoder and of its pixels' normalisation."""

from qbheat_jax.config import BELOW_ONE, POSITIVE, Field, at_least
from qbheat_jax.models import layers, mmhco, vit
from qbheat_jax.ops import images

ENCODER = {
    "encoder.name": Field("mobile_former_w720", "the encoder, a name of models.registry"),
    "encoder.stride": Field(0, "pixels a cell, where the encoder leaves a choice; 0: its own", at_least(0)),
    "encoder.drop_path": Field(0.0, "stochastic depth rate", BELOW_ONE),
    "encoder.class_token": Field(False, "vit: a class token before the patches"),
    "encoder.position": Field("sincos", "vit: its position code, fixed, a learnt table, or rotary", vit.POSITIONS),
    "encoder.grid": Field(
        0,
        "vit: cells a side of the learnt table; vheat: of the first stage's frequency embeddings, 0: the image's",
        at_least(0),
    ),
    "encoder.interpolation": Field(
        "antialias", "vit: how a learnt table is fitted to another image size, see vit.resample", vit.INTERPOLATIONS
    ),
    "encoder.registers": Field(0, "vit: register tokens beside the class token", at_least(0)),
    "encoder.mlp": Field("gelu", "vit: MLP of the blocks; vit_g and vit_*_plus have swiglu in any case", layers.MLPS),
    "encoder.layer_scale": Field(0.0, "vit: initial gain of each channel of a branch; 0: no gains", at_least(0)),
    "encoder.rope_theta": Field(100.0, "vit: base of the rotary code's periods", POSITIVE),
    "encoder.norm_eps": Field(1e-6, "vit: epsilon of the layer norms", POSITIVE),
    "encoder.pre_norm": Field(False, "vit: a layer norm before the blocks and no bias of patches, as in CLIP"),
    "encoder.fc_norm": Field(False, "vit: the last norm is that of the mean over the cells, as in fine-tuned MAE"),
    "encoder.embedding": Field(
        "bicubic", "vheat: how frequency embeddings are fitted to maps of another size", ("bicubic", "padded")
    ),
    "encoder.folded": Field(False, "vheat: decay factors instead of embeddings, for inference on images of one size"),
    "encoder.outnorm": Field(False, "vheat: a layer norm for each stage's map, as in the release's detectors"),
    "encoder.fve_mode": Field(
        "feature",
        "mmhco: what multiplies the frequency embeddings: mean features (feature), noise as in the released program, or "
        "nothing (static)",
        mmhco.FVE_MODES,
    ),
    "encoder.fve_pool": Field(
        "sample", "mmhco, feature: mean features of each clip (sample), or of the batch as released", mmhco.FVE_POOLS
    ),
    "encoder.routing": Field(
        "gumbel",
        "mmhco: router; gumbel draws in training and takes the likeliest in evaluation, sampled draws in both as released",
        mmhco.ROUTINGS,
    ),
    "dtype": Field(
        "float32", "computation type; parameters, losses and norm statistics are float32", ("float32", "bfloat16")
    ),
}
# {name: default} of the fields that only some encoders have.
OPTIONS = {
    key.removeprefix("encoder."): field.default
    for key, field in ENCODER.items()
    if key.startswith("encoder.") and key not in ("encoder.name", "encoder.stride", "encoder.drop_path")
}
PIXELS = {
    "pixels": Field("imagenet", "normalisation of pixels for the encoder, see images.PIXELS", tuple(images.PIXELS))
}
