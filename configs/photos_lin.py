"""Linear probe on `photos`.

    qbheat probe --config configs/photos_lin.py --init runs/photos --workdir runs/photos/lin

Features pooled over the image, standardised. AdamW, since in these few steps SGD stays far from the optimum along the
directions of little variance. Learning rate and weight decay are chosen on the val crops, then the head is trained on train
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
    config.total_epochs = 100.0
    config.optimizer = "adamw"
    config.learning_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    config.weight_decays = (0.0, 0.1, 0.3, 1.0)
    return config
