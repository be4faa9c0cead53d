"""QB-Heat on a folder of your own images, on a laptop: a small Mobile-Former, 96-pixel images, minutes on a CPU.

    qbheat pretrain --config configs/folder_small.py --workdir runs/mine --config.data.source folder:PATH

It takes about five minutes on two CPU cores, whatever the number of images (64 or more). More steps give better features.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "folder:."
    config.data.crop_scale = (0.5, 1.0)  # at this size smaller crops have little to extrapolate from
    config.image_size = 96
    config.batch_size = 64
    config.total_steps = 1000
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.decoder = ConfigDict()
    config.decoder.width = 96
    config.decoder.depth = 1
    config.decoder.heads = 4
    config.norm_pix = True
    config.norm_pix_statistics = 1.0
    config.hog = 4.0
    config.learning_rate = 5.6e-3
    config.warmup_percent = 5.0
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every = 250
    config.checkpoint_every = 250
    config.keep = 2
    return config
