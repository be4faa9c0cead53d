"""`tran-1` probe of any run: one transformer block on the frozen feature map, then a linear classifier.

    qbheat probe --config configs/tran1.py --init runs/mine --workdir runs/mine/tran1

Training images are encoded once, without augmentation. Their feature maps are kept in memory, or in files if larger than
`cache_gib`. For w720 on ImageNet-1k that would be 0.9 TB (16 x 16 cells of 720 numbers each). `--config.augment True` keeps no
features and encodes anew in every epoch.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "tran-1"
    config.batch_size = 256
    config.total_epochs = 100.0
    config.optimizer = "adamw"
    config.learning_rates = (2.5e-4, 5e-4, 1e-3)
    config.weight_decays = (0.1,)
    config.warmup_epochs = 5.0
    config.label_smoothing = 0.1
    config.head = ConfigDict()
    config.head.width = 256
    config.head.heads = 8
    return config
