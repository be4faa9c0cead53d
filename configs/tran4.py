"""`tran-4` probe of any run: four transformer blocks on the frozen feature map, then a linear classifier.

    qbheat probe --config configs/tran4.py --init runs/mine --workdir runs/mine/tran4

Training images are cropped, mirrored and encoded anew in every epoch, because four blocks overfit to fixed features. So an
epoch costs a pass of the encoder. `--config.augment False` trains on cached features.
"""

from tran1 import get_config as base


def get_config():
    config = base()
    config.protocol = "tran-4"
    config.augment = True
    config.head.drop_path = 0.1
    return config
