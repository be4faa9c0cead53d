"""Weighted k-nearest-neighbour probe on `photos`.

    qbheat probe --config configs/photos_knn.py --init runs/photos --workdir runs/photos/knn

It takes seconds on two CPU cores. Neighbours and temperature are chosen on the val crops; then train and val crops vote
together.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "knn"
    config.data = ConfigDict()
    config.data.source = "photos"
    config.image_size = 64
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.batch_size = 128
    config.knn = ConfigDict()
    config.knn.neighbours = (1, 3, 5, 10, 20, 50, 100)
    config.knn.temperatures = (0.02, 0.07, 0.2)
    return config
