"""Encoders by name: the only door to them."""

import dataclasses
import difflib
from typing import Any

import jax.numpy as jnp

from qbheat_jax.errors import UserError
from qbheat_jax.models.mobile_former import VARIANTS, MobileFormer
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vit import ViT

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to build one encoder.

    `fields`: those of `module` that the name fixes. `strides`: for each stride offered, its own first, the fields that
    make it. `options`: further fields that a caller may set.
    """

    module: Any
    fields: dict
    strides: dict
    options: tuple = ()


def _mobile_former(variant):
    return Entry(MobileFormer, {"variant": variant}, {MobileFormer(variant).stride: {}})


def _resnet(**fields):
    return Entry(ResNet, fields, {32: {}, 16: {"last_stride": 1}, 8: {"stem_stride": 1}}, ("zero_init",))


def _vit(**fields):
    return Entry(ViT, fields, {16: {"patch": 16}, 8: {"patch": 8}}, ("class_token", "position", "grid"))


ENCODERS = {
    **{f"mobile_former_{name}": _mobile_former(variant) for name, variant in VARIANTS.items()},
    "resnet18": _resnet(blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet50": _resnet(blocks=(3, 4, 6, 3)),
    "vit_ti": _vit(width=192, heads=3),
    "vit_s": _vit(width=384, heads=6),
    "vit_b": _vit(width=768, heads=12),
}


def names():
    """The names of all encoders, sorted."""
    return sorted(ENCODERS)


def encoder(name, stride=0, drop_path=0.0, dtype="float32", **options):
    """The linen module behind `name`; parameters are made by its `init`.

    `stride`: pixels a cell, 0 for the encoder's own (resnet: 32, or 16 by not striding the last stage, or 8 by a 3x3
    stem without stride or pool, for small images; vit: the patch, 16 or 8). `drop_path`: stochastic depth, in [0, 1).
    `dtype`: the type computed in, "float32" or "bfloat16" or the jnp type. `options`: resnet `zero_init`; vit
    `class_token`, `position`, `grid`. UserError for anything else.

    >>> vit = encoder("vit_ti", stride=8)
    >>> vit.stride, vit.width
    (8, 192)
    """
    if name not in ENCODERS:
        near = difflib.get_close_matches(str(name), names(), 1, 0.0)[0]
        raise UserError(f"encoder {name!r} is unknown, the nearest is {near}; the encoders are {', '.join(names())}")
    entry = ENCODERS[name]
    stride = stride or next(iter(entry.strides))
    if stride not in entry.strides:
        raise UserError(f"encoder {name} has no stride {stride}; it offers {_either(entry.strides)}")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path is {drop_path}; it must be at least 0 and less than 1")
    unknown = sorted(set(options) - set(entry.options))
    if unknown:
        accepted = ("stride", "drop_path", "dtype", *entry.options)
        raise UserError(f"encoder {name} has no option {unknown[0]}; it takes {', '.join(accepted)}")
    fields = {**entry.fields, **entry.strides[stride], **options}
    return entry.module(**fields, drop_path=drop_path, dtype=_dtype(dtype))


def _either(values):
    return " or ".join(str(value) for value in sorted(values))


def _dtype(dtype):
    """A name or type of `DTYPES` -> the jnp scalar type, so that equal encoders hash alike."""
    try:
        return DTYPES[jnp.dtype(dtype).name]
    except (TypeError, KeyError):
        raise UserError(f"dtype is {dtype}; an encoder computes in {_either(DTYPES)}") from None
