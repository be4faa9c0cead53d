"""Linear probe of a run on `photos`.

qbheat probe --config configs/photos_lin.py --init runs/photos --workdir runs/photos/lin
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
    config.total_epochs = 90
    config.optimizer = "sgd"
    config.learning_rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    config.weight_decays = (0.0, 1e-4, 1e-3, 1e-2)
    return config
