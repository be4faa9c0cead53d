"""Fine-tuning on `photos`: encoder and classifier end to end.

    qbheat finetune --config configs/photos_finetune.py --init runs/photos --workdir runs/photos/finetune

Regularisation is mild: crops keep at least half of the area, and there is mixup but no cutmix. Layer-wise decay is weak,
because the encoder has few layers.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict()
    config.data.source = "photos"
    config.data.crop_scale = (0.5, 1.0)
    config.image_size = 64
    config.encoder = ConfigDict()
    config.encoder.name = "mobile_former_tiny"  # of --init random
    config.encoder.drop_path = 0.05
    config.batch_size = 64
    config.total_epochs = 15.0
    config.learning_rate = 4e-3  # for 256 images, so 1e-3 for the batch of 64
    config.warmup_epochs = 1.0
    config.layer_decay = 0.8
    config.mixup = 0.2
    config.ema = 0.99
    config.clip_norm = 1.0
    config.log_every = 25
    config.eval_every_epochs = 5.0
    config.checkpoint_every_epochs = 5.0
    config.keep = 1
    return config
