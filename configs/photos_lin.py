"""Linear probe on `photos`.

    qbheat probe --config configs/photos_lin.py --init runs/photos --workdir runs/photos/lin

Features are pooled over the image and standardised. The linear classifier is fitted by ridge regression, which reaches the
optimum; SGD and Adam do not with so few images. The ridge strength is chosen on the val crops. Then the head is fitted to train
and val crops together.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "lin"
    config.data = ConfigDict()
    config.data.source = "photos"
    config.image_size = 64
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.batch_size = 128
    config.optimizer = "ridge"
    config.weight_decays = tuple(10.0**k for k in range(-6, 2))
    return config
