"""Linear probe of any run on the images it was trained on, or on those of --config.data.source.

    qbheat probe --config configs/lin.py --init runs/mine --workdir runs/mine/lin

The recipe of method papers: SGD, momentum 0.9, no weight decay, 90 epochs, cosine. Sixteen heads train at once, one per
learning rate, and held-out images choose the best. `--config.optimizer lars` uses LARS instead of SGD. With a million images
both are faster with `--config.batch_size 4096`; the learning rates are scaled by it.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.protocol = "lin"
    config.batch_size = 256
    config.total_epochs = 90.0
    config.optimizer = "sgd"
    config.learning_rates = tuple(0.001 * 2.0**k for k in range(16))
    return config
