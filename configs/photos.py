"""QB-Heat on `photos`, the quickstart: a small Mobile-Former, 64-pixel crops of twenty real photographs.

    qbheat pretrain --config configs/photos.py --workdir runs/photos

It takes about three minutes and 3 GiB on two CPU cores. Expected results are in docs/results/quickstart.md.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "photos"
    config.data.crop_scale = (0.5, 1.0)  # the crops are at native resolution already, and are probed there
    config.image_size = 64
    config.batch_size = 64
    config.total_steps = 1000
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.decoder = ConfigDict()
    config.decoder.width = 96
    config.decoder.depth = 1
    config.decoder.heads = 4
    # Texture cannot be told from afar pixel by pixel. What can be told, and makes the features better, is asked for too:
    # the mean and deviation of each patch, and which way its edges run.
    config.norm_pix = True
    config.norm_pix_statistics = 1.0
    config.hog = 4.0
    config.learning_rate = 5.6e-3  # for 256 images, so 1.4e-3 for the batch of 64
    config.warmup_percent = 5.0
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every = 250
    config.monitors = ConfigDict()
    config.monitors.images = 192  # with six views, a few per cent of the run's time
    config.monitors.views = 6
    config.checkpoint_every = 500
    config.keep = 2
    return config
