"""Linear probe of any run on the images it was trained on, or on others by --config.data.source.

    qbheat probe --config configs/lin.py --init runs/mine --workdir runs/mine/lin

The recipe of method papers (SGD, momentum 0.9, no weight decay, 90 epochs, cosine), sixteen learning rates at once as one
batch of heads, of which held-out images choose. `--config.optimizer lars` trains the same sixteen by LARS; with a million
images both are quicker with `--config.batch_size 4096`, which the learning rates follow.
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
