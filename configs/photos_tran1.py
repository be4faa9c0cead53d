"""`tran-1` probe on `photos`: one transformer block on the frozen feature map, then a linear classifier.

    qbheat probe --config configs/photos_tran1.py --init runs/photos --workdir runs/photos/tran1

Cells are averaged two by two before the block, so that it is fast on a CPU. The learning rate is chosen on the val crops.
Then the head is trained on train and val crops together.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "tran-1"
    config.data = ConfigDict()
    config.data.source = "photos"
    config.image_size = 64
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.batch_size = 128
    config.total_epochs = 15.0
    config.optimizer = "adamw"
    config.learning_rates = (2e-3, 4e-3)
    config.weight_decays = (0.1,)
    config.warmup_epochs = 2.0
    config.label_smoothing = 0.1
    config.head = ConfigDict()
    config.head.width = 96
    config.head.heads = 4
    config.head.pool = 2
    return config
