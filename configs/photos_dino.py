"""DINO on `photos`: two views of 64 pixels and four crops of 32, with the quickstart's encoder, images and steps.

    qbheat pretrain --config configs/photos_dino.py --workdir runs/photos_dino

Momentum and head are those of a short run of a small encoder. Blur is scaled to 64 pixels, and colours are jittered half as
much as in the paper. At the quickstart's learning rate the head collapses within 100 steps: `teacher_entropy` goes to 6.24,
which is log(512).
"""

from photos import get_config as base


def get_config():
    config = base()
    config.objective = "dino"
    config.data.local_crops = 4
    config.data.local_size = 32
    config.data.local_scale = (0.1, 0.5)
    config.dino = {"prototypes": 512, "hidden": 512, "bottleneck": 64, "momentum": 0.99}
    config.views = {"jitter": 0.5, "blur_sigma": (0.1, 0.6)}
    config.learning_rate = 1e-3  # for 256 images, so 2.5e-4 for the batch of 64
    config.warmup_percent = 10.0
    return config
