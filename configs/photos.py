"""QB-Heat on `photos`, the quickstart: a small Mobile-Former, 64-pixel crops of twenty real photographs.

qbheat pretrain --config configs/photos.py --workdir runs/photos
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "photos"
    config.image_size = 64
    config.batch_size = 128
    config.total_steps = 400
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.decoder = ConfigDict()
    config.decoder.width = 96
    config.decoder.depth = 1
    config.decoder.heads = 4
    config.learning_rate = 4e-3  # for 256 images, so 2e-3 for the batch of 128
    config.warmup_percent = 5.0
    config.clip_norm = 1.0
    config.log_every = 20
    config.eval_every = 100
    config.checkpoint_every = 100
    return config
