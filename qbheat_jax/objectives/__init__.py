"""What is learnt from: one file a method, built from a config by `build`."""

import jax.numpy as jnp

from qbheat_jax import heat, quarters
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.objectives.qbheat import STATISTICS, QBHeat


def build(config):
    """The objective that a pre-training config asks for. Raises UserError where the grid cannot be split so."""
    encoder = registry.encoder(
        config.encoder.name, stride=config.encoder.stride, drop_path=config.encoder.drop_path, dtype=config.dtype
    )
    placements = quarters.PLACEMENT_SETS[config.quarter.placements]
    _check_grid(config, encoder, placements)
    decoder = HeatDecoder(
        stride=encoder.stride,
        heat=heat.Heat(**config.heat.to_dict()),
        placements=placements,
        width=config.decoder.width,
        depth=config.decoder.depth,
        heads=config.decoder.heads,
        statistics=STATISTICS if config.norm_pix and config.norm_pix_statistics > 0 else 0,
        dtype=jnp.dtype(config.dtype),
    )
    return QBHeat(encoder, decoder, config.norm_pix, config.loss_on, config.norm_pix_statistics)


def _check_grid(config, encoder, placements):
    if config.image_size % encoder.stride:
        raise UserError(
            f"config field image_size={config.image_size} is not accepted: {config.encoder.name} takes a multiple of "
            f"its stride, {encoder.stride}"
        )
    cells = config.image_size // encoder.stride
    try:
        quarters.check_grid(cells, cells, placements)
    except UserError as error:
        raise UserError(f"config field image_size={config.image_size} with stride {encoder.stride}: {error}") from error
