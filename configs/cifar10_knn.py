"""Weighted k-nearest-neighbour probe on CIFAR-10.

    qbheat probe --config configs/cifar10_knn.py --init runs/cifar10 --workdir runs/cifar10/knn

Neighbours and temperature are chosen on a tenth of the training images, drawn by the seed; then all training images vote.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "knn"
    config.data = ConfigDict()
    config.data.source = "folder:cifar10"
    config.data.device_cache = True
    config.image_size = 32
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.encoder.stride = 4
    config.batch_size = 512
    config.knn = ConfigDict()
    config.knn.neighbours = (5, 10, 20, 50, 100, 200)
    config.knn.temperatures = (0.02, 0.07, 0.2)
    return config
