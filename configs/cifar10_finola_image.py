"""FINOLA on CIFAR-10: each 32-pixel image is compressed to one vector, which grows into a map and is decoded.

    qbheat pretrain --config configs/cifar10_finola_image.py --workdir runs/cifar10_finola_image \
      --config.data.source folder:PATH

The docstring of configs/cifar10.py makes the folder. `psnr` in the log is that of the reconstructions in dB, `psnr_colour` that
of each image's mean colour. We have not run it to the end, nor measured its cost.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "finola"
    config.data = ConfigDict()
    config.data.source = "folder:cifar10"
    config.data.device_cache = True
    config.data.crop_scale = (0.5, 1.0)
    config.image_size = 32
    config.batch_size = 64
    config.total_epochs = 20
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.encoder.stride = 4
    config.finola = ConfigDict()
    config.finola.width = 256
    config.finola.stride = 4
    config.learning_rate = 8e-3  # for 256 images, so 2e-3 for the batch of 64
    config.warmup_percent = 5.0
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.log_every = 50
    config.checkpoint_every_epochs = 1.0
    config.keep = 2
    return config
