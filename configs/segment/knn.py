"""Segmentation by the nearest training cells of a frozen encoder. Nothing is trained. The data are those of segment/lin.py.

    qbheat probe --config configs/segment/knn.py --init runs/photos random pixels --workdir runs/photos/segment

Each training cell has the commonest class of its pixels as label. Held-out images choose the number of neighbours and the
temperature. `--config.knn.bank 1000000` keeps more cells, and takes as much longer.
"""

from lin import get_config as base


def get_config():
    config = base()
    config.protocol = "seg-knn"
    config.standardise = False
    config.knn = {"neighbours": (5, 20, 50), "temperatures": (0.02, 0.07, 0.2), "bank": 1 << 14}
    return config
