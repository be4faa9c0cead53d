"""Registry of encoders and their released classifiers by name."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from qbheat_jax.errors import UserError, unknown
from qbheat_jax.models import mobile_former, mobilenet
from qbheat_jax.models.convnext import ConvNeXt
from qbheat_jax.models.hcnet import HcNet
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.models.mmhco import MMHCO, ClipHead
from qbheat_jax.models.mobile_former import MobileFormer, MobileFormerHead
from qbheat_jax.models.mobilenet import MobileNet
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.models.vit import ViT

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to build one encoder.

    Attributes:
      module: subclass of `encoder.Encoder`.
      fields: {field: value} that the name fixes.
      strides: {stride: the fields that make it}, the default first.
      options: further fields that a caller may set.
      pixels: the key of `images.PIXELS` that the released weights expect.
      head: the classifier, made by (classes, dropout).
    """

    module: Any
    fields: dict
    strides: dict
    options: tuple = ()
    pixels: str = "imagenet"
    head: Any = PooledHead


# The classifier of encoders whose release draws it with this deviation.
_HEAD = functools.partial(PooledHead, std=0.02)


def _mobile_former(variant):
    own = MobileFormer(variant).stride
    return Entry(MobileFormer, {"variant": variant}, {own: {}, own // 2: {"last_stride": 1}})


def _resnet(**fields):
    return Entry(ResNet, fields, {32: {}, 16: {"last_stride": 1}, 8: {"stem_stride": 1}}, ("zero_init",))


def _mobilenet(name, **fields):
    return Entry(MobileNet, {"variant": mobilenet.VARIANTS[name]}, {32: {}, 16: {"last_stride": 1}}, **fields)


_VIT = (
    *("class_token", "position", "grid", "interpolation", "registers", "mlp", "layer_scale", "rope_theta"),
    *("norm_eps", "pre_norm", "fc_norm"),
)


def _vit(patches=(16, 8, 14), **fields):
    return Entry(ViT, fields, {patch: {"patch": patch} for patch in patches}, _VIT)


def _convnext(**fields):
    return Entry(ConvNeXt, fields, {32: {}, 16: {"last_stride": 1}}, head=_HEAD)


def _hcnet(strides=None, **fields):
    strides = strides or {32: {}, 16: {"last_stride": 1}, 8: {"stem_stride": 1}}
    return Entry(HcNet, {"generation": "c", **fields}, strides, head=_HEAD)


_VHEAT = ("grid", "embedding", "folded", "outnorm")


def _vheat(**fields):
    return Entry(VHeat, fields, {32: {}, 16: {"last_stride": 1}, 8: {"stem_stride": 1}}, _VHEAT, head=_HEAD)


def _mmhco(strides, **fields):
    return Entry(MMHCO, fields, strides, ("grid", "embedding", "fve_mode", "fve_pool", "routing"), head=ClipHead)


ENCODERS = {
    **{f"mobile_former_{name}": _mobile_former(variant) for name, variant in mobile_former.VARIANTS.items()},
    "convnext_t": _convnext(depths=(3, 3, 9, 3)),
    "convnext_s": _convnext(depths=(3, 3, 27, 3)),
    "convnext_b": _convnext(dims=(128, 256, 512, 1024), depths=(3, 3, 27, 3)),
    "mmhco_s": _mmhco({32: {}, 16: {"last_stride": 1}}, depths=(2, 2, 18, 2), post_norm=True, layer_scale=True),
    # Ours, not the paper's: for small generated clips on a CPU.
    "mmhco_nano": _mmhco({8: {}, 4: {"last_stride": 1}}, dims=(32, 64), depths=(1, 1)),
    "mobilenet_v2": _mobilenet("mobilenet_v2"),
    "efficientnet_lite0": _mobilenet("efficientnet_lite0", pixels="lite"),
    "hcnet_t": _hcnet(depths=(3, 8, 18, 3)),
    "hcnet_t_551405": _hcnet(depths=(5, 5, 14, 5)),
    "hcnet_a_t": _hcnet(depths=(5, 5, 14, 5), generation="a"),
    # Ours, not the paper's: about as many parameters as `mobile_former_tiny`, for small images.
    "hcnet_nano": _hcnet(
        {8: {"stem_stride": 2, "last_stride": 1}, 4: {"stem_stride": 1, "last_stride": 1}},
        dims=(16, 32, 64, 128),
        depths=(1, 1, 2, 1),
    ),
    "resnet18": _resnet(blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet50": _resnet(blocks=(3, 4, 6, 3)),
    "vheat_t": _vheat(depths=(2, 2, 6, 2)),
    "vheat_s": _vheat(depths=(2, 2, 18, 2), post_norm=True, layer_scale=True),
    "vheat_b": _vheat(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), post_norm=True, layer_scale=True),
    # The paper's table has this width; it was not released, so norms and layer scale are assumed to be those of vheat_b.
    "vheat_b96": _vheat(depths=(4, 4, 20, 4), post_norm=True, layer_scale=True),
    # Ours, not the paper's: stride 8, for 64-pixel images on a CPU.
    "vheat_nano": Entry(
        VHeat, {"dims": (48, 96), "depths": (2, 2)}, {8: {}, 4: {"last_stride": 1}}, _VHEAT, head=_HEAD
    ),
    # Ours, not the paper's: about as many parameters as `mobile_former_tiny`, for small images.
    "vit_nano": Entry(ViT, {"width": 96, "heads": 3, "depth": 4}, {8: {"patch": 8}, 4: {"patch": 4}}, _VIT),
    "vit_ti": _vit(width=192, heads=3),
    "vit_s": _vit(width=384, heads=6),
    "vit_b": _vit(width=768, heads=12),
    "vit_l": _vit(width=1024, heads=16, depth=24),
    "vit_h": _vit((14, 16), width=1280, heads=16, depth=32),
    "vit_g": _vit((14, 16), width=1536, heads=24, depth=40, mlp="swiglu"),  # DINOv2's
    # DINOv3's, with a gated MLP.
    "vit_s_plus": _vit(width=384, heads=6, mlp="swiglu", mlp_ratio=6.0),
    "vit_h_plus": _vit(width=1280, heads=20, depth=32, mlp="swiglu", mlp_ratio=6.0),
}


def names():
    """Return the sorted names of all encoders."""
    return sorted(ENCODERS)


def encoder(name, stride=0, drop_path=0.0, dtype="float32", remat="none", **options):
    """Return the linen module of an encoder.

    Args:
      name: one of `names()`.
      stride: pixels a cell, 0 for the default. ResNets offer 32, 16 (stage 4 does not stride) and 8 (a 3x3 stem without stride
        or pool, for small images). ConvNeXts and MobileNets offer 32 and 16, Mobile-Formers their own and half of it (the last
        strided stage does not stride). HcNets and vHeats offer 32, 16 and 8 in the same ways (`hcnet_nano` and `vheat_nano` 8
        and 4). ViTs offer patches of 16, 8 and 14, `vit_h` and `vit_g` of 14 and 16, `vit_nano` of 8 and 4.
      drop_path: rate of stochastic depth, in [0, 1).
      dtype: to compute in: "float32", "bfloat16" or the jnp type.
      remat: see layers.remat.
      **options: `zero_init` of ResNets; attributes of `ViT`, such as `class_token`, `position`, `grid`; `grid`, `embedding`,
        `folded`, `outnorm` of vHeats; `grid`, `embedding`, `fve_mode`, `fve_pool`, `routing` of MMHCOs.

    Raises:
      UserError: the name, the stride or an option is unknown.

    >>> vit = encoder("vit_ti", stride=8)
    >>> vit.stride, vit.width
    (8, 192)
    """
    entry = _entry(name)
    stride = stride or next(iter(entry.strides))
    if stride not in entry.strides:
        raise UserError(f"encoder {name} has no stride {stride}; it offers {_either(entry.strides)}")
    _check_rate("drop_path", drop_path)
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        accepted = ("stride", "drop_path", "dtype", "remat", *entry.options)
        raise UserError(f"encoder {name} has no option {unknown[0]}; it takes {', '.join(accepted)}")
    fields = {**entry.fields, **entry.strides[stride], **options, **({} if remat == "none" else {"remat": remat})}
    return entry.module(**fields, drop_path=drop_path, dtype=_dtype(dtype))


def head(name, classes, dropout=0.0, dtype="float32"):
    """Return the released classifier of encoder `name`: a linen module (features, out, train) -> logits float32 [B, classes].

    It is Mobile-Former's own where the release has one, otherwise that of the `Entry`. `dropout` in [0, 1) precedes the last
    layer.

    Raises:
      UserError: an argument is not accepted.

    >>> head("resnet50", 1000)
    PooledHead(
        # attributes
        classes = 1000
        dropout = 0.0
        std = 0.01
    )
    """
    fields = _entry(name).fields
    if not isinstance(classes, int) or classes < 1:
        raise UserError(f"classes is {classes}; a head needs a whole number of them, at least 1")
    _check_rate("dropout", dropout)
    dtype = _dtype(dtype)
    if getattr(fields.get("variant"), "features", 0):
        variant = fields["variant"]
        return MobileFormerHead(classes, variant.features, variant.groups, dropout, dtype)
    return _entry(name).head(classes, dropout)


def released_pixels(name):
    """Return the key of `images.PIXELS` that the released weights of encoder `name` expect."""
    return _entry(name).pixels


def takes_clips(name):
    """Return whether encoder `name` takes clips instead of images."""
    return _entry(name).module.takes_clips


def _entry(name):
    if name not in ENCODERS:
        raise unknown(f"encoder {name!r}", name, names())
    return ENCODERS[name]


def _check_rate(name, rate):
    if not 0 <= rate < 1:
        raise UserError(f"{name} is {rate}; it must be at least 0 and less than 1")


def _either(values):
    return " or ".join(str(value) for value in sorted(values))


def _dtype(dtype):
    """Return the jnp scalar type of a name or type of `DTYPES`, so that equal encoders hash alike."""
    try:
        return DTYPES[jnp.dtype(dtype).name]
    except (TypeError, KeyError):
        raise UserError(f"dtype is {dtype}; an encoder computes in {_either(DTYPES)}") from None
