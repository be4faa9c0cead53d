"""`tran-1` probe on CIFAR-10: one transformer block on the frozen feature map, then a linear classifier.

    qbheat probe --config configs/cifar10_tran1.py --init runs/cifar10 --workdir runs/cifar10/tran1

Cells are averaged two by two before the block, so that it is fast on a CPU. The learning rate was chosen for an untrained
encoder, on a tenth of the training images. `--config.total_epochs 10 --config.learning_rates "(1e-3, 2e-3)"` chooses it anew.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "tran-1"
    config.data = ConfigDict()
    config.data.source = "folder:cifar10"
    config.data.device_cache = True
    config.image_size = 32
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.encoder.stride = 4
    config.batch_size = 256
    config.total_epochs = 5.0
    config.optimizer = "adamw"
    config.learning_rates = (2e-3,)
    config.weight_decays = (0.1,)
    config.warmup_epochs = 0.5
    config.label_smoothing = 0.1
    config.head = ConfigDict()
    config.head.width = 96
    config.head.heads = 4
    config.head.pool = 2
    return config
