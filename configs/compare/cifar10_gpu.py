"""QB-Heat, MoCo-v2, SimMIM and untrained on CIFAR-10 for 100 epochs, for one GPU.

    bash launch/evidence_gpu.sh FOLDER

The methods and probes are those of cifar10.py. Batches of 512 keep a GPU busier than 64. The learning rate grows with the
square root of the batch, as Adam's updates ask: 1.4e-3 for 64 images, so 4e-3 for 512, which is 2e-3 for the 256 that the
field counts for. No choice was made by looking at results of this config.
"""

from cifar10 import get_config as base


def get_config():
    config = base()
    config["seeds"] = (0,)
    config["all"] |= {"total_epochs": 100, "batch_size": 512, "learning_rate": 2e-3, "checkpoint_every_epochs": 5.0}
    del config["methods"]["supervised"]
    return config
