"""MMHCO-HAR on `shapes`, generated clips of a moving shape and its event frames: a small encoder from random weights.

    qbheat pretrain --config configs/shapes_mmhco.py --workdir runs/shapes
    qbheat classify --init runs/shapes --data shapes --split test

The class is the direction of motion, which single RGB frames do not show.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.objective = "supervised"
    config.data = ConfigDict()
    config.data.source = "shapes"
    config.data.frames = 4
    config.data.clip_scales = (1.0,)
    config.data.flip = False  # a mirrored motion has another direction
    config.image_size = 48
    config.batch_size = 32
    config.total_steps = 900
    config.encoder = ConfigDict()
    config.encoder.name = "mmhco_nano"
    config.encoder.routing = "soft"  # it trains sooner than drawn candidates
    config.learning_rate = 4.8e-2  # for 256 clips, so 6e-3 for the batch of 32
    config.warmup = 10
    config.clip_norm = 1.0
    config.log_every = 20
    config.eval_every = 300
    config.checkpoint_every = 900
    return config
