"""What is learnt from: one file a method, built from a config by `build`."""

import jax.numpy as jnp

from qbheat_jax import heat, images, quarters
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.objectives.finetune import Finetune
from qbheat_jax.objectives.qbheat import QBHeat
from qbheat_jax.objectives.supervised import Supervised
from qbheat_jax.objectives.targets import Target


def build_encoder(config):
    """The encoder of any config that has `encoder` fields. Raises UserError where they do not go together."""
    fields = config.encoder
    options = {name: fields[name] for name in ("class_token", "position", "grid") if fields[name] != _PLAIN[name]}
    return registry.encoder(
        fields.name, stride=fields.stride, drop_path=fields.drop_path, dtype=config.dtype, **options
    )


def build(config):
    """The objective of a run's or a ported checkpoint's config. Raises UserError where the grid cannot be split so."""
    encoder = build_encoder(config)
    pixels = images.PIXELS[config.pixels]
    if config.objective == "classifier":
        _check_size(config, encoder)
        head = (
            registry.head(config.encoder.name, config.head.classes, dtype=config.dtype) if config.head.classes else None
        )
        return Supervised(encoder, head, pixels)
    if config.objective == "finetune":
        _check_size(config, encoder)
        head = registry.head(config.encoder.name, config.head.classes, config.head.dropout, config.dtype)
        return Finetune(encoder, head, pixels, config.label_smoothing, config.mixup, config.cutmix)
    placements = quarters.PLACEMENT_SETS[config.quarter.placements]
    _check_grid(config, encoder, placements)
    target = Target(encoder.stride, config.norm_pix, config.norm_pix_statistics, config.hog)
    decoder = HeatDecoder(
        outputs=sum(target.widths.values()),
        heat=heat.Heat(**config.heat.to_dict()),
        placements=placements,
        width=config.decoder.width,
        depth=config.decoder.depth,
        heads=config.decoder.heads,
        dtype=jnp.dtype(config.dtype),
    )
    return QBHeat(encoder, decoder, target, config.loss_on, pixels)


# Only a vit has these, so the others are not given them.
_PLAIN = {"class_token": False, "position": "sincos", "grid": 0}


def _check_size(config, encoder):
    if config.image_size % encoder.stride:
        raise UserError(
            f"config field image_size={config.image_size} is not accepted: {config.encoder.name} takes a multiple of "
            f"its stride, {encoder.stride}"
        )


def _check_grid(config, encoder, placements):
    _check_size(config, encoder)
    cells = config.image_size // encoder.stride
    try:
        quarters.check_grid(cells, cells, placements)
    except UserError as error:
        raise UserError(f"config field image_size={config.image_size} with stride {encoder.stride}: {error}") from error
