"""Linear probe on CIFAR-10.

    qbheat probe --config configs/cifar10_lin.py --init runs/cifar10 --workdir runs/cifar10/lin

Features are pooled over the image and standardised. SGD trains sixteen heads at once, one per learning rate. The best is chosen
on a tenth of the training images, drawn by the seed, and trained once more on all of them.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "lin"
    config.data = ConfigDict()
    config.data.source = "folder:cifar10"
    config.data.device_cache = True
    config.image_size = 32
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.encoder.stride = 4
    config.batch_size = 512
    config.total_epochs = 30.0
    config.optimizer = "sgd"
    config.learning_rates = tuple(0.0002 * 2.0**k for k in range(16))
    return config
