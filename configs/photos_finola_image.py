"""FINOLA on `photos`: each 64-pixel image is compressed to one vector, which grows into a map and is decoded.

    qbheat pretrain --config configs/photos_finola_image.py --workdir runs/photos_finola_image

`psnr` in the log is that of the reconstructions in dB, `psnr_colour` that of each image's mean colour. Several vectors an
image, whose maps are summed: `--config.finola.paths 4`.

Expected: 22.2 dB on val after 1,000 steps (one seed), against 21.1 dB for each image's mean colour and 13.6 dB for the mean
image. A step takes 14 GFLOP; that of configs/photos.py takes 11.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "finola"
    config.data = ConfigDict()
    config.data.source = "photos"
    config.data.crop_scale = (0.5, 1.0)
    config.image_size = 64
    config.batch_size = 32
    config.total_steps = 1000
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"
    config.finola = ConfigDict()
    config.finola.width = 256
    config.finola.stride = 8
    config.learning_rate = 1.6e-2  # for 256 images, so 2e-3 for the batch of 32
    config.warmup_percent = 5.0
    config.weight_decay = 0.0
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every = 250
    config.checkpoint_every = 500
    config.keep = 2
    return config
