"""`tran-4` probe of any run: four transformer blocks on the frozen feature map, then a linear classifier.

    qbheat probe --config configs/tran4.py --init runs/mine --workdir runs/mine/tran4

Training images are cropped and mirrored anew in every epoch, and encoded as they come, since four blocks learn features that
are always the same by heart: an epoch costs a pass of the encoder. `--config.augment False` trains from cached features.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "tran-4"
    config.augment = True
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
    config.head.drop_path = 0.1
    return config
