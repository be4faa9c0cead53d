"""FINOLA with a masked quarter on `photos`: configs/photos.py with norm + linear steps from cell to cell.

    qbheat pretrain --config configs/photos_finola_quarter.py --workdir runs/photos_finola_quarter

Each masked cell is its neighbour z plus A norm(z), from the border of the visible quarter outwards. `--config.heat.propagator
offset` takes one such step over half an image instead. Both propagators suit any other config, with `--config.heat.norm layer`.
"""

from photos import get_config as base


def get_config():
    config = base()
    config.heat = {"propagator": "autoregressive", "norm": "layer"}
    return config
